"""Weights in 8 bits: their values, that streamed equals full with them, and what refuses them."""

import math
import random
import time
from types import SimpleNamespace

import pytest
import torch
from identity import keep_arguments
from qwen_vl_streaming import Captioner
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.engine.decoder_layer import FusedProjections
from qwen_vl_streaming.engine.quantized_linear import (
    GROUP,
    TILES,
    Tiles,
    choose_tiles,
    interleave,
    partial_products,
    sum_parts,
)
from qwen_vl_streaming.live import cli
from qwen_vl_streaming.live.setup import read_checkpoint
from qwen_vl_streaming.model.loading import load_model
from qwen_vl_streaming.model.quantization import (
    LARGEST,
    WEIGHTS,
    QuantizedLinear,
    check_precision,
    quantize,
    quantize_model,
    scaled_linear,
    weights_of,
)
from qwen_vl_streaming.model.released import SIZES
from qwen_vl_streaming.replay import replay
from qwen_vl_streaming.replay.cli import main as replay_command
from qwen_vl_streaming.sessions.record import describe_precision, identity, read_record
from qwen_vl_streaming.timeline.variants import VARIANTS
from sessions import random_case
from test_batch import batched, random_jobs, reference_captions
from test_replay import recorded
from tiny import tiny_model

SEED = time.time_ns() % 100_000


def quantized_model(kind: str, seed: int = 0):
    model = tiny_model(seed)
    quantize_model(model, kind)
    return model


@pytest.mark.parametrize("kind", WEIGHTS)
def test_values_are_the_nearest(kind):
    weight = torch.randn(40, 64) * torch.logspace(-6, 2, 40)[:, None]
    weight[3] = 0
    values, scale = quantize(weight.bfloat16(), kind)
    assert values.dtype == WEIGHTS[kind] and values.float().abs().max() == LARGEST[values.dtype]
    error = (values.float() * scale[:, None] - weight.bfloat16().float()).abs()
    step = torch.ones(()) if kind == "int8" else (values.float().abs() / 8).clamp(min=2**-9)  # of e4m3: 3 bits
    assert (error <= 0.501 * step * scale[:, None]).all() and not error[3].any()
    for again in (quantize(weight, kind), quantize(weight.bfloat16().float(), kind)):  # whatever the dtype in memory
        assert torch.equal(again[0].float(), values.float()) and torch.equal(again[1], scale)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_only_the_linear_layers_of_the_language_model_change(kind):
    plain, model = tiny_model(), quantized_model(kind)
    changed = {name for name, _ in plain.named_parameters()} & {
        name for name, weight in model.named_parameters() if weight.dtype == WEIGHTS[kind]
    }
    layers = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    assert changed == {f"model.language_model.layers.{i}.{layer}.weight" for i in range(2) for layer in layers}
    kept = dict(model.named_parameters())
    assert all(torch.equal(weight, kept[name]) for name, weight in plain.named_parameters() if name not in changed)
    assert weights_of(plain) is None and weights_of(model) == kind and model.dtype == torch.float32
    assert identity(plain)["fingerprint"] != identity(model)["fingerprint"]
    assert describe_precision(identity(model)) == f"float32 with {kind} weights"
    assert identity(quantized_model(kind)) == identity(model)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("variant", ("group", "interleave"))
def test_streamed_equals_full_in_8_bits(kind, variant, tmp_path):
    """Batches and sessions write what the reference writes with the stock layers."""
    print("seed", SEED)
    draw, variant, model = random.Random(f"{SEED} {kind} {variant}"), VARIANTS[variant], quantized_model(kind, SEED)
    jobs = random_jobs(draw, variant, 4)
    assert batched(model, variant, jobs, batch_size=3) == reference_captions(model, variant, jobs)
    case = random_case(draw, variant, may_be_late=True)
    record = recorded(model, case, "fused" if variant.parallel else "serial", tmp_path / "r.json")
    assert record.model["weights"] == kind and not replay(record, model, list(case.pixels))
    with pytest.raises(InputError, match=f"float32 with {kind} weights, but the model is in float32:"):
        replay(record, tiny_model(SEED), list(case.pixels))


@pytest.mark.parametrize("kind", WEIGHTS)
def test_fused_weights_take_no_memory_of_their_own(kind):
    layer = quantized_model(kind).model.language_model.layers[0]
    fused = FusedProjections.from_layer(layer)
    attention, mlp = layer.self_attn, layer.mlp
    assert fused.qkv.data_ptr() == attention.q_proj.weight.data_ptr() and fused.qkv.dtype == WEIGHTS[kind]
    assert fused.gate_up_scale.data_ptr() == mlp.gate_proj.scale.data_ptr() and len(fused.gate_up_scale) == 2 * 48
    assert isinstance(mlp.up_proj, QuantizedLinear) and fused.down_scale is mlp.down_proj.scale


def test_a_session_is_watched_and_replayed(made, tmp_path, monkeypatch, capsys):
    """`live --weights` and Captioner write the same; `replay` takes the weights from the record."""
    path = tmp_path / "r.json"

    def command(main, *words) -> str:
        monkeypatch.setattr("sys.argv", ["x", *map(str, words), "--device", "cpu"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        return capsys.readouterr().out

    flags = ("--model", made[0], "--source", "synthetic", "--max-clips", "3", "--max-new-tokens", "9", "--speed", "20")
    said = command(cli.main, *flags, "--weights", "int8", "--record", path)
    assert "float32 with int8 weights on cpu" in said and read_record(path).model["weights"] == "int8"
    assert "9 tokens" in (said := command(replay_command, path, "--model", made[0])) and "all the same" in said
    captioner = Captioner(made[0], device="cpu", weights="int8")
    list(captioner.watch("synthetic", max_clips=3, max_new_tokens=9, speed=20))
    assert [token.token for token in captioner.session.written] == read_record(path).tokens


def test_result_files_are_not_mixed(tmp_path):
    out = tmp_path / "group_infer.json"
    keep_arguments(out, {"dtype": "bfloat16"}, begun=False)  # of an earlier version
    keep_arguments(out, {"dtype": "bfloat16", "weights": None}, begun=True)
    with pytest.raises(InputError, match="was started with weights None, not 'int8': give another --output-dir"):
        keep_arguments(out, {"dtype": "bfloat16", "weights": "int8"}, begun=True)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -3.4e38])
def test_values_that_are_not_finite_in_bfloat16_are_refused(kind, value):
    """A NaN would make its whole channel 0."""
    model = tiny_model()
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.up_proj.weight[2, 3] = value
    with pytest.raises(InputError, match=r"the weight of layer 1\.mlp\.up_proj has NaN or infinite values: copy"):
        quantize_model(model, kind)
    with pytest.raises(InputError, match="a weight has NaN"):
        quantize(torch.tensor([[1.0, value]]), kind)
    assert not quantize(torch.zeros(1, 2), kind)[0].float().any()


def test_refusals(made, monkeypatch):
    check_precision(None, "cpu", torch.float16)
    with pytest.raises(InputError, match="--weights int4: choose int8 or fp8"):
        check_precision("int4", "cpu", torch.float32)
    with pytest.raises(InputError, match="does not work in float16"):
        check_precision("int8", "cpu", torch.float16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA RTX A6000")
    check_precision("int8", "cuda", torch.bfloat16)
    with pytest.raises(InputError, match=r"fp8 needs a GPU .* 8\.9 or more, and NVIDIA RTX A6000 has 8\.6: use int8"):
        check_precision("fp8", "cuda", torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    check_precision("int8", "cuda:0", torch.float32)
    with pytest.raises(InputError, match="Tesla T4 does not support bfloat16: use --dtype float32, or another GPU"):
        check_precision(None, "cuda:0", torch.bfloat16)
    with pytest.raises(InputError, match="use dtype float32"):
        read_checkpoint(made[0], None, "cuda", None, False, "force=True", None, "weights")
    with pytest.raises(InputError, match="choose int8 or fp8"):
        load_model(made[0], "sdpa", torch.float32, "int3")


def test_tiles_cover_every_product():
    """All released sizes, few rows to many: sides are powers of two, and every program has inputs."""
    for text in SIZES.values():
        hidden, inner = text["hidden_size"], text["intermediate_size"]
        assert hidden % GROUP == inner % GROUP == 0
    for shape, measured in TILES.items():
        rows = [most for most, _ in measured]
        assert rows == sorted(rows)
        for most in rows:
            if (tiles := choose_tiles(most, *shape)) is not None:
                assert {tiles.rows, tiles.outputs, tiles.more_rows} <= {0, 16, 32, 64, 128, 256} and tiles.rows
                assert all(number >= 1 for number in tiles.parts(*shape))
        assert choose_tiles(10**6, *shape) is None
    x = torch.arange(2 * GROUP)[None]
    assert interleave(x)[0, :3].tolist() == [0, 4, 8] and sorted(interleave(x)[0].tolist()) == x[0].tolist()


GPUS = {(8, 0): 166_912, (8, 6): 101_376, (8, 9): 101_376, (9, 0): 232_448, (10, 0): 232_448, (12, 0): 101_376}
"""Bytes of shared memory that a program may take, by compute capability."""
COMPILED = {  # shared memory with Triton 3.6 and 3.8, by compute capability and tiles
    ((9, 0), (128, 256, 0, 8, 3)): (229_376, 253_952),
    ((9, 0), (128, 256, 0, 8, 2)): (147_456, 172_032),
    ((9, 0), (64, 64, 0, 4, 5)): (114_688, 126_976),
    ((9, 0), (128, 32, 0, 4, 4)): (81_920, 106_496),
    ((9, 0), (64, 64, 32, 4, 3)): (90_112, 102_400),
    ((8, 9), (128, 256, 0, 8, 3)): (163_840, 188_416),
    ((8, 9), (128, 256, 0, 8, 2)): (131_072, 131_072),
    ((8, 9), (64, 64, 0, 4, 5)): (98_304, 110_592),
    ((8, 9), (128, 32, 0, 4, 4)): (73_728, 98_304),
    ((8, 0), (128, 128, 0, 8, 2)): (49_152, 73_728),
    ((12, 0), (128, 64, 32, 8, 4)): (None, 155_648),
}


def test_tiles_fit_every_gpu():
    """With fewer stages or rows where they must, and the same parts."""
    for shape, measured in TILES.items():
        for tiles in (Tiles(*tiles) for _, tiles in measured if tiles):
            for capability, memory in GPUS.items():
                found = tiles.fit(capability, memory)
                assert found.shared_memory(capability) <= memory and found.parts(*shape) == tiles.parts(*shape)
                assert found.stages >= 2 and found.rows in (16, 32, 64, 128, 256)
                assert (found == tiles) == (tiles.shared_memory(capability) <= memory)
    widest = Tiles(128, 256, 0, 0, 8, 3)
    assert [widest.fit(gpu, memory) for gpu, memory in GPUS.items() if gpu in ((8, 0), (8, 9), (9, 0))] == [
        Tiles(128, 256, 0, 0, 8, 2), Tiles(128, 128, 0, 0, 8, 2), Tiles(128, 256, 0, 0, 8, 2)
    ]  # fmt: skip
    assert Tiles(64, 64, 32, 5, 4, 3).fit((8, 6), 45_000) == Tiles(64, 64, 0, 5, 4, 2)


def test_the_shared_memory_of_tiles():
    for (capability, (outputs, rows, more, *rest)), (earlier, latest) in COMPILED.items():
        bound = Tiles(outputs, rows, more, 0, *rest).shared_memory(capability)
        assert (earlier or 0) <= latest <= bound and bound in (latest, latest + 64 * outputs * bool(more))


@pytest.mark.parametrize("capability,tiles", [((9, 0), (128, 256, 0, 0, 8, 3)), ((8, 9), (64, 64, 0, 0, 4, 5))])
def test_the_compiler_takes_no_more_shared_memory(capability, tiles):
    """The installed one: a newer Triton may take more, and tiles then fail where the model is loaded."""
    triton = pytest.importorskip("triton")
    from qwen_vl_streaming.engine.quantized_kernel import _product
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tiles, width = Tiles(*tiles), {"FP8": False, "INTERPRETED": False, "INPUTS": GROUP, "DEPENDENT": capability[0] >= 9}
    width |= {"OUTPUTS": tiles.outputs, "ROWS": tiles.rows, "MORE_ROWS": tiles.more_rows}
    types = dict(zip(_product.arg_names, ("*bf16", "*i32", "*fp32", "*fp32", *["i32"] * 4), strict=False))
    aligned = {(argument,): [["tt.divisibility", 16]] for argument in (0, 1, 2, 3, 5, 6)}
    source = ASTSource(_product, types | dict.fromkeys(width, "constexpr"), width, aligned)
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    compiled = triton.compile(source, target, {"num_warps": tiles.warps, "num_stages": tiles.stages})
    assert 0.8 * tiles.shared_memory(capability) < compiled.metadata.shared <= tiles.shared_memory(capability)


def test_the_engine_takes_tiles_that_fit_the_gpu(monkeypatch):
    """The operation that the compiler does not look into, with a stand-in for the kernel and the GPU."""
    pytest.importorskip("triton")
    from qwen_vl_streaming.engine import quantized_kernel

    gpu, taken = SimpleNamespace(major=8, minor=6, shared_memory_per_block_optin=GPUS[8, 6]), []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(quantized_kernel, "partial_products", lambda x, w, s, tiles: taken.append(tiles) or x.clone())
    weight, scale = quantize(torch.randn(128, 128), "int8")
    partial_products(torch.randn(200, 128), weight, scale, [128, 256, 0, 112, 8, 3])
    assert taken == [Tiles(128, 128, 0, 112, 8, 2)]


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_kernel_equals_the_plain_form(kind, monkeypatch):
    """In Triton's interpreter, which computes in float32 here, because it multiplies no bfloat16. Programs that have
    whole tiles, and parts of one to three."""
    pytest.importorskip("triton")
    from qwen_vl_streaming.engine import quantized_kernel
    from triton.runtime.interpreter import InterpretedFunction

    monkeypatch.setattr(quantized_kernel, "_product", InterpretedFunction(quantized_kernel._product.fn))
    for rows, outputs, inputs, tiles, parts in (
        (5, 96, 384, Tiles(64, 16, 0, 0, 4, 2), 1),
        (20, 64, 512, Tiles(64, 16, 16, 2, 4, 2), 2),
        (45, 200, 640, Tiles(64, 32, 16, 7, 4, 2), 3),
    ):
        x, (weight, scale) = torch.randn(rows, inputs), quantize(torch.randn(outputs, inputs), kind)
        found = quantized_kernel.partial_products(interleave(x), weight, scale, tiles, interpreted=True)
        assert found.shape == (parts, rows, outputs) and tiles.parts(outputs, inputs)[0] == parts
        total = sum_parts(found, tiles, outputs, inputs)
        torch.testing.assert_close(total, scaled_linear(x, weight, scale), atol=1e-3, rtol=1e-4)


@pytest.fixture
def few_rows_kernel(monkeypatch):
    """In Triton's interpreter, in float32."""
    pytest.importorskip("triton")
    from qwen_vl_streaming.engine import few_rows_kernel
    from triton.runtime.interpreter import InterpretedFunction

    print("seed", SEED)
    torch.manual_seed(SEED)
    for name in ("_few_rows", "_sums", "_read", "_value", "_add", "_plus"):
        monkeypatch.setattr(few_rows_kernel, name, InterpretedFunction(getattr(few_rows_kernel, name).fn))
    return few_rows_kernel


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_kernel_for_few_rows_equals_the_plain_form(kind, few_rows_kernel):
    """With all chunks of inputs read at once and not, chunks that are left over, narrow chunks, and outputs that do not
    fill the last program."""
    for rows, outputs, inputs in ((1, 4, 512), (2, 3, 8 * 512), (1, 7, 9 * 512), (2, 20, 1408), (3, 5, 640)):
        x, (weight, scale) = torch.randn(rows, inputs), quantize(torch.randn(outputs, inputs), kind)
        expected, added = scaled_linear(x, weight, scale), 30 * torch.randn(rows, outputs)
        found = few_rows_kernel.few_rows_product(interleave(x), weight, scale)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
        found = few_rows_kernel.few_rows_product(interleave(x), weight, scale, added)
        torch.testing.assert_close(found, added + expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_few_rows_are_gated_for_the_next_product(kind, few_rows_kernel):
    """Programs with one gate, and with several; two products in a row, whose order of inputs fits."""
    for rows, channels, inputs in ((1, 128, 512), (2, 128, 128), (1, 128, 9 * 512)):
        x, (weight, scale) = torch.randn(rows, inputs), quantize(torch.randn(2 * channels, inputs) / inputs**0.5, kind)
        down, down_scale = quantize(torch.randn(3, channels), kind)
        gate, up = scaled_linear(x, weight, scale).chunk(2, -1)
        gated = few_rows_kernel.few_rows_product(interleave(x), weight, scale, gated=True)
        activated = torch.nn.functional.silu(gate) * up
        torch.testing.assert_close(gated, interleave(activated), atol=1e-4, rtol=1e-4)
        found = few_rows_kernel.few_rows_product(gated, down, down_scale)
        torch.testing.assert_close(found, scaled_linear(activated, down, down_scale), atol=1e-3, rtol=1e-4)


def run_ptx(code: str, **registers: int) -> dict[str, int]:
    """Runs the few instructions of a conversion, and returns all registers."""

    def number(name: str) -> int:
        return int(name, 0) if name[0].isdigit() else registers[name]

    def bf16(bits: int) -> torch.Tensor:
        return torch.tensor([bits & 0xFFFF, bits >> 16]).to(torch.uint16).view(torch.bfloat16).double()

    for statement in code.strip("{ }").split(";"):
        what, _, rest = statement.strip().partition(" ")
        names = [name.strip("{ }") for name in rest.split(",")]
        if what in ("", ".reg"):
            continue
        target, *values = names[0], *([] if what == "mov.b64" else map(number, names[1:]))
        if what == "prmt.b32":
            octets = [values[i // 4] >> 8 * (i % 4) & 0xFF for i in range(8)]
            result = sum(octets[values[2] >> 4 * i & 7] << 8 * i for i in range(4))
        elif what == "lop3.b32":
            assert values[3] == 0xEA
            result = values[0] & values[1] | values[2]
        elif what == "fma.rn.bf16x2":
            found = (bf16(values[0]) * bf16(values[1]) + bf16(values[2])).to(torch.bfloat16).view(torch.uint16).tolist()
            result = found[0] | found[1] << 16
        elif what == "mov.b64":
            result = number(names[1]) | number(names[2]) << 32
        else:
            result = {"mov.b32": lambda a: a, "shr.b32": int.__rshift__, "and.b32": int.__and__}[what](*values)
        registers[target] = result
    return registers


@pytest.mark.parametrize("kind", WEIGHTS)
def test_conversions_are_exact(kind):
    """The instructions of a GPU that convert 8-bit numbers, for all of them that weights have."""
    pytest.importorskip("triton")
    from qwen_vl_streaming.engine.quantized_kernel import pairs_by_byte, word_to_four

    octets = torch.arange(256).to(torch.uint8)
    octets = octets[octets.view(WEIGHTS[kind]).float().abs() <= LARGEST[WEIGHTS[kind]]]
    every = torch.cat([octets, octets.flip(0)])[:504].view(WEIGHTS[kind])
    for numbers in every.split(8):
        words = numbers.view(torch.int32).tolist()
        bits = numbers.to(torch.bfloat16).view(torch.uint16).tolist()
        found = run_ptx(pairs_by_byte(every.dtype), **{"$4": words[0] & 0xFFFFFFFF, "$5": words[1] & 0xFFFFFFFF})
        assert [found[f"${j}"] for j in range(4)] == [bits[j] | bits[4 + j] << 16 for j in range(4)]
        four = run_ptx(word_to_four(every.dtype), **{"$1": words[0] & 0xFFFFFFFF})["$0"]
        assert four == sum(bits[j] << 16 * j for j in range(4))
