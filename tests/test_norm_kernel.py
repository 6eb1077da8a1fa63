"""A product and its RMS norm, by the kernel that adds up parts, in Triton's interpreter, and as the plain form."""

import time
from types import SimpleNamespace

import pytest
import torch
from qwen_vl_streaming.engine import hopper, quantized_linear
from qwen_vl_streaming.engine.quantized_linear import GROUP, Tiles, interleave
from qwen_vl_streaming.engine.rms_norm import product_and_norm, rms_norm
from qwen_vl_streaming.model.quantization import quantize, scaled_linear
from test_dependent_launch import assembly

SEED = time.time_ns() % 100_000


def parts_of(x, weight, scale, tiles: Tiles):
    """Parts as a kernel writes them, (S, M, N). Outputs that have fewer parts hold NaN in the others."""
    outputs, inputs = weight.shape
    count, share = tiles.parts(outputs, inputs)
    plain = x.float()[:, interleave(torch.arange(inputs)[None])[0].argsort()]
    parts = torch.full((count, len(x), outputs), torch.nan)
    for tile in range(-(-outputs // tiles.outputs)):
        rows = slice(tile * tiles.outputs, (tile + 1) * tiles.outputs)
        first, last = tile * inputs // GROUP, (tile + 1) * inputs // GROUP
        for s, program in enumerate(range(first // share, (last - 1) // share + 1)):
            groups = slice(
                (max(program * share, first) - first) * GROUP, (min(program * share + share, last) - first) * GROUP
            )
            parts[s, :, rows] = plain[:, groups] @ (weight[rows, groups].float() * scale[rows, None]).T
    return parts


@pytest.fixture
def kernel(monkeypatch):
    pytest.importorskip("triton")
    from qwen_vl_streaming.engine import norm_kernel
    from triton.language import standard
    from triton.runtime.interpreter import InterpretedFunction

    monkeypatch.setattr(norm_kernel, "_plus", standard._sum_combine)
    monkeypatch.setattr(norm_kernel, "_sum_and_norm", InterpretedFunction(norm_kernel._sum_and_norm.fn))
    return norm_kernel


@pytest.mark.parametrize("programs", [0, 1, 5, 8, 15])
def test_parts_are_added_before_the_norm(programs, kernel):
    print("seed", SEED)
    torch.manual_seed(SEED)
    tiles, rows, outputs, inputs = Tiles(128, 16, 0, programs, 8, 2, 2), 3, 384, 640
    weight, scale = quantize(torch.randn(outputs, inputs), "int8")
    x, added, norm = torch.randn(rows, inputs), torch.randn(rows, outputs), torch.randn(outputs)
    parts = parts_of(interleave(x), weight, scale, tiles)
    hidden, normed = kernel.sum_and_norm(parts, added, norm, tiles, inputs, 1e-6)
    expected = scaled_linear(x, weight, scale) + added
    torch.testing.assert_close(hidden, expected, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(normed, interleave(rms_norm(expected, norm, 1e-6)), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("kernels", [True, False])
def test_a_product_and_its_norm_equal_the_plain_form(kernels, kernel, monkeypatch):
    """With a stand-in for the kernel of the product, and on other devices without any."""
    print("seed", SEED)
    torch.manual_seed(SEED)
    stand_in = SimpleNamespace(partial_products=parts_of)
    monkeypatch.setattr(quantized_linear, "_has_kernels", lambda x: kernels)
    monkeypatch.setattr(hopper, "_hopper_processors", lambda device: 5)
    monkeypatch.setattr(quantized_linear, "kernel_of", lambda tiles: stand_in)
    weight, scale = quantize(torch.randn(256, 640), "int8")
    following = quantize(torch.randn(384, 256), "int8")
    for rows in (3, 16, 91):
        x, added, norm = torch.randn(1, rows, 640), torch.randn(1, rows, 256), torch.randn(256)
        hidden, normed, interleaved = product_and_norm(x, weight, scale, added, norm, 1e-6)
        assert interleaved == kernels
        expected = scaled_linear(x, weight, scale) + added
        torch.testing.assert_close(hidden, expected, atol=1e-3, rtol=1e-4)
        found = quantized_linear.product(normed, *following, None, interleaved)
        expected = scaled_linear(rms_norm(expected, norm, 1e-6), *following)
        torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-3)


def test_the_kernel_waits_first():
    norm_kernel = pytest.importorskip("qwen_vl_streaming.engine.norm_kernel")
    types = ["*fp32", *["*bf16"] * 4, "i32"]
    shape = {"N": 3584, "POWER": 4096, "S": 6, "OUTPUTS": 128, "GROUPS": 28, "SHARE": 6, "EPS": 1e-6}
    found = assembly(norm_kernel._sum_and_norm, types, shape | {"DEPENDENT": True}, norm_kernel.WARPS)
    assert found[:2] == ["griddepcontrol.wait", "griddepcontrol.launch_dependents"]
    assert len(found) > 10 and not any("griddepcontrol" in access for access in found[2:])
