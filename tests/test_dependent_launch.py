"""Kernels that are launched before the kernel before them has completed wait for it: in the code of each of them, which
is compiled for Hopper without a GPU."""

import re
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from qwen_vl_streaming.engine import dependent_launch
from qwen_vl_streaming.engine.quantized_linear import GROUP
from torch._inductor import config
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _triton

HOPPER = SimpleNamespace(
    name="", major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=65536, total_memory=2**37,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32, L2_cache_size=2**25,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, gcnArchName="",
)  # fmt: skip
ACCESS = re.compile(r"gdc_wait|gdc_launch_dependents|tl\.(?:load|store|atomic_\w+)|\bld\.|\bst\.")


@pytest.fixture
def hopper(monkeypatch):
    """A GPU that can be compiled for."""
    pytest.importorskip("triton")
    from torch._dynamo.device_interface import CudaInterface

    for name, answer in {
        "get_device_capability": (9, 0), "get_device_properties": HOPPER, "_get_device_properties": HOPPER,
        "current_device": 0, "device_count": 1, "_lazy_init": None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer, raising=False)
    for owner, name, answer in (
        (CudaInterface, "is_available", True), (CudaInterface, "get_device_properties", HOPPER),
        (CudaInterface, "current_device", 0), (CudaInterface.Worker, "get_device_properties", HOPPER),
        (CudaInterface.Worker, "current_device", 0),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, staticmethod(lambda *_, answer=answer: answer))
    for name, answer in {"has_triton": True, "triton_hash_with_backend": ""}.items():
        own = getattr(_triton, name)
        for module in [*sys.modules.values()]:  # those that have imported it too
            if vars(module).get(name) is own:
                monkeypatch.setattr(module, name, lambda *_, answer=answer: answer)
    dependent_launch.is_supported.cache_clear()
    yield torch.device("cuda")
    dependent_launch.is_supported.cache_clear()


def kernels(function, options, *shapes, early=True) -> dict[str, str]:
    """The bodies of the kernels that the compiler makes of `function` of tensors of these shapes and dtypes, which
    are launched `early`, or not."""
    with FakeTensorMode() as mode, config.patch(options), V.set_fake_mode(mode):
        given = [torch.empty(shape, dtype=dtype, device="cuda") for shape, dtype in shapes]
        traced = make_fx(function, decomposition_table=select_decomp_table())(*given)
        graph = GraphLowering(traced, shape_env=mode.shape_env, example_inputs=given)
        with V.set_graph_handler(graph), V.set_debug_handler(MagicMock()):
            graph.run(*given)
            code = graph.codegen()[0]
    parts = getattr(code, "value", code).split("async_compile.triton(")[1:]
    assert parts and all(("'launch_pdl': True" in part) == early for part in parts)
    bodies = [re.search(r"def (\w+)\([^)]*\):\n(.*?)'''", part, re.S) for part in parts]
    return {found[1]: found[2] for found in bodies if found}


def scaled(x, weight):
    """Loops, of which one stores beside a sum, and numbers that depend on nothing."""
    hidden = x + weight
    normed = hidden * torch.rsqrt(hidden.float().pow(2).mean(-1, keepdim=True))
    return hidden, normed.relu().sum(0), torch.arange(1 << 20, device=x.device) * 3


BF16, LONG = torch.bfloat16, torch.long
FUNCTIONS = {
    "scaled": (scaled, ((7, 3584), BF16), ((7, 3584), BF16)),
    "listed": (lambda at, blocks: at.new_zeros(3, 80).scatter(-1, at, blocks), ((3, 50), LONG), ((3, 50), LONG)),
    "chosen": (lambda logits, ids: ids.scatter(0, logits.argmax(-1), 1), ((1, 152064), BF16), ((1000,), LONG)),
    "multiplied": (lambda x, weight: (x @ weight).relu().sum(), ((5, 512), BF16), ((512, 4000), BF16)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_kernels_of_the_compiler_wait_first(name, hopper):
    """Also those that read nothing, which the compiler alone lets run without waiting."""
    found = kernels(FUNCTIONS[name][0], dependent_launch.compile_options(hopper), *FUNCTIONS[name][1:])
    assert found
    for kernel, body in found.items():
        accesses = ACCESS.findall(body)
        assert accesses[:2] == ["gdc_wait", "gdc_launch_dependents"] and len(accesses) > 2, (kernel, body)
        assert "gdc_wait" not in accesses[1:] and "gdc_launch_dependents" not in accesses[2:]
        assert not re.search(r"^ +(if|for|while)\b.*\n(.*\n)*.*gdc_wait", body, re.M), "not in each program"


def test_kernels_without_dependent_launch_do_not_wait(hopper):
    dependent_launch.compile_options(hopper)
    found = kernels(scaled, {}, *FUNCTIONS["scaled"][1:], early=False)
    assert found and not any("gdc_" in body for body in found.values())


def assembly(kernel, types, constants, warps) -> list[str]:
    """What a kernel reads and writes in global memory, and its waits, in the order of its PTX for Hopper."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = dict(zip(kernel.arg_names, types, strict=False))
    constants = constants | {name: None for name, kind in types.items() if kind is None}
    types = {name: kind for name, kind in types.items() if kind is not None}
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in types}
    source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants, aligned)
    options = {"num_warps": warps, "num_stages": 4} | {"launch_pdl": constants["DEPENDENT"]}
    compiled = triton.compile(source, GPUTarget("cuda", 90, 32), options)
    assert compiled.metadata.launch_pdl == constants["DEPENDENT"]
    access = r"griddepcontrol\.\w+|(?:ld|st|red|atom|cp\.async)\S*\.global\S*"
    return re.findall(access, compiled.asm["ptx"])


@pytest.mark.parametrize("kind", ["plain", "added", "normed", "gated", "rotated"])
@pytest.mark.parametrize(
    "weights,rows,inputs,dependent",
    [
        *(("int8", 1, 3584, early) for early in (True, False)),
        *(("int8", 2, 3584, True), ("int8", 1, 18944, True)),
        *(("bfloat16", 1, inputs, True) for inputs in (3584, 18944)),
    ],
)
def test_few_rows_read_only_weights_before_they_wait(weights, rows, inputs, dependent, kind):
    pytest.importorskip("triton")
    from qwen_vl_streaming.engine import few_rows_kernel, single_row

    outputs, count, warps = few_rows_kernel.choose(inputs // 512, weights == "int8", kind == "normed")
    constants = {"K": inputs, "M": rows, "OUTPUTS": outputs * warps, "WORDS": 128, "COUNT": min(count, inputs // 512)}
    constants |= {"KIND": weights, "PARTS": 224, "POWER": 256, "EPS": 1e-6, "DEPENDENT": dependent}
    words = ["*i64", None] if weights == "bfloat16" else ["*i32", "*fp32"]
    normed = ["*bf16", "*bf16", "*fp32"] if kind == "normed" else [None] * 3
    if kind == "rotated":
        kernel, types = single_row._rotated, ["*bf16", "*bf16", "*bf16", "*i64", "*bf16", "*bf16", "i64", "i64"]
        constants |= {"HALF": 64, "HEADS": 28, "KEY_HEADS": 4}
    else:
        added = "*bf16" if kind in ("added", "normed") else None
        kernel, types = few_rows_kernel._few_rows, [added, normed[0], "*bf16", *normed[1:]]
        constants |= {"ADDED": added is not None, "GATED": kind == "gated", "NORM": kind == "normed"}
    found = assembly(kernel, ["*bf16", *words, "*fp32", *types, "i32"], constants, warps)
    waits = [i for i, access in enumerate(found) if "griddepcontrol" in access]
    assert [found[i] for i in waits] == ["griddepcontrol.wait", "griddepcontrol.launch_dependents"] * dependent
    # Inputs are not read one by one.
    assert sum("b16" in access for access in found) < 25
    if dependent:
        before, after = found[: waits[0]], found[waits[1] + 1 :]
        # Weights and scales are read once, and evicted first. Inputs are not.
        assert len(before) >= outputs * count / 2 and all("evict_first" in access for access in before)
        assert not any("st" in access.partition(".")[0] for access in before)
        assert any("evict_first" not in access and access.startswith("ld") for access in after)


@pytest.mark.parametrize("tiles", [(64, 16, 0), (128, 64, 32)])
def test_products_with_8_bit_weights_wait_first(tiles):
    pytest.importorskip("triton")
    from qwen_vl_streaming.engine.quantized_kernel import _product

    constants = dict(zip(("OUTPUTS", "ROWS", "MORE_ROWS"), tiles, strict=True)) | {"FP8": False, "INPUTS": GROUP}
    types = "*bf16", "*i32", "*fp32", "*fp32", *["i32"] * 4
    found = assembly(_product, types, constants | {"INTERPRETED": False, "DEPENDENT": True}, 4)
    assert found[:2] == ["griddepcontrol.wait", "griddepcontrol.launch_dependents"]
    assert len(found) > 4 and not any("griddepcontrol" in access for access in found[2:])


def test_only_hopper_launches_early(hopper, monkeypatch):
    assert dependent_launch.launch_options(hopper) == {"launch_pdl": True}
    for number, (device, capability, built) in enumerate((
        ("cpu", (9, 0), "13.0"), ("cuda", (8, 9), "13.0"), ("cuda", (12, 0), "13.0"), ("cuda", (9, 0), "12.6"),
        ("cuda", (9, 0), None),
    )):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, answer=capability: answer)
        monkeypatch.setattr(torch.version, "cuda", built)
        other = torch.device(device if device == "cpu" else f"cuda:{number}")  # answers are kept
        assert dependent_launch.launch_options(other) == dependent_launch.compile_options(other) == {}
