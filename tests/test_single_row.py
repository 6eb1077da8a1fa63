"""The kernels for one row, in Triton's interpreter in float32, compute what `run_layer` does."""

import time

import pytest
import torch
from qwen_vl_streaming.engine.decoder_layer import FusedProjections, run_layer
from qwen_vl_streaming.engine.kv_cache import BLOCK_SIZE, PagedKVCache
from qwen_vl_streaming.engine.model_runner import make_single_row
from qwen_vl_streaming.engine.paged_attention import PagedAttention
from qwen_vl_streaming.model.quantization import quantize
from tiny import tiny_model

pytest.importorskip("triton")
from qwen_vl_streaming.engine import few_rows_kernel, single_row
from triton.language import standard
from triton.runtime.interpreter import InterpretedFunction

SEED = time.time_ns() % 100_000
SIZES = {
    "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
}  # fmt: skip


def weights_of(layer, kind: str | None) -> tuple[FusedProjections, FusedProjections]:
    """The weights of a layer as the kernels read them, and the same numbers in float32."""
    given = FusedProjections.from_layer(layer)
    plain = FusedProjections.from_layer(layer)
    for name in ("qkv", "output", "gate_up", "down"):
        weight = getattr(given, name)
        if kind is None:
            setattr(given, name, weight.bfloat16())
            setattr(plain, name, weight.bfloat16().float())
        else:
            values, scale = quantize(weight, kind)
            setattr(given, name, values)
            setattr(given, f"{name}_scale", scale)
            setattr(plain, name, values.float() * scale[:, None])
    return given, plain


def test_only_sizes_that_the_kernels_take():
    layers = {}
    for name, sizes in {
        "taken": {},
        "narrow": {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1},
        "odd channels": {"intermediate_size": 192},
        "another activation": {"hidden_act": "gelu"},
    }.items():
        language = tiny_model(**SIZES | sizes).model.language_model
        layers[name] = [FusedProjections.from_layer(layer) for layer in language.layers]
    found = {name: make_single_row(given, torch.bfloat16, {}) is not None for name, given in layers.items()}
    assert found == {name: name == "taken" for name in layers}
    assert make_single_row(layers["taken"], torch.float16, {}) is None


@pytest.fixture
def interpreted(monkeypatch):
    for module in (few_rows_kernel, single_row):
        for name in (
            "_few_rows",
            "_rotated",
            "_sums",
            "_read",
            "_value",
            "_add",
            "_plus",
            "_larger",
            "_attend",
            "_combine",
        ):
            if hasattr(module, name):
                kernel = getattr(module, name)
                function = kernel.fn if hasattr(kernel, "fn") else kernel
                monkeypatch.setattr(module, name, InterpretedFunction(function))
        # The interpreter reduces by functions that it does not know in Python, number by number.
        for name, known in (("_plus", standard._sum_combine), ("_larger", standard._elementwise_max)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, known)
    monkeypatch.setattr(few_rows_kernel, "choose", lambda *_: (16, 2, 1))  # fewer programs, which are slow
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.parametrize(
    "kind,splits,window", [(None, 1, False), (None, 3, True), ("int8", 5, False), ("fp8", 1, True)]
)
@torch.no_grad()
def test_one_row_through_all_layers_equals_the_plain_layers(kind, splits, window, interpreted):
    """The hidden state, and the keys and values in the cache."""
    print("seed", SEED)
    language = tiny_model(SEED, **SIZES).model.language_model
    for name, parameter in language.named_parameters():
        if "layernorm" in name:
            parameter.normal_(1, 0.3)
    pairs = [weights_of(layer, kind) for layer in language.layers]
    cache = PagedKVCache(language.config, 1, 4, 4, torch.float32, torch.device("cpu"))
    cache.allocate(0, 200, 100)
    cache.store.normal_()
    place = torch.tensor([[2 * BLOCK_SIZE + 7]])  # row 7 of the second block
    cache.kept_tokens[:, 0] = torch.tensor([9, 3])
    attention = PagedAttention(
        cache,
        torch.tensor([0]),
        place,
        torch.tensor([[150]]),
        torch.tensor([[30]]),
        2,
        use_flex=True,
        window_start=torch.tensor([[[70]], [[11]]]) if window else None,
        splits=splits,
    )
    hidden = torch.randn(1, 1, 128)
    rotary = language.rotary_emb(hidden, torch.randint(0, 5000, (3, 1, 1)))
    before, expected = cache.store.clone(), hidden
    for (_, weights), layer_cache in zip(pairs, cache.layers, strict=True):
        expected = run_layer(weights, expected, attention, rotary, layer_cache)
    written = cache.store.clone()
    cache.store.copy_(before)
    found = single_row.SingleRow([weights for weights, _ in pairs], {}).run(hidden, rotary, attention, cache.layers)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(cache.store, written, atol=1e-3, rtol=1e-3)
    assert (written != before).any(-1).sum() == 2 * 2 * 2  # keys and values, layers, heads
