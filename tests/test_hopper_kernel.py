"""The kernel for products with 8-bit weights on Hopper: its tiles, and the machine code that the compiler makes."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from qwen_vl_streaming.engine import hopper, quantized_linear
from qwen_vl_streaming.engine.hopper import hopper_processors
from qwen_vl_streaming.engine.quantized_linear import (
    GROUP,
    HOPPER_ROWS,
    WARPGROUP_OUTPUTS,
    Tiles,
    choose_tiles,
    interleave,
)
from qwen_vl_streaming.engine.quantized_tiles import TILES
from qwen_vl_streaming.model.quantization import quantize, scaled_linear

MEMORY, REGISTERS = 232_448, 65_536
"""What a Hopper processor has: bytes of shared memory for one program, and registers."""


@pytest.mark.parametrize("processors", [114, 132])
@pytest.mark.parametrize("shape", TILES, ids=str)
def test_tiles_share_the_work_among_all_processors(shape, processors):
    outputs, inputs = shape
    for rows in range(3, sum(HOPPER_ROWS[-1]) + 1):
        tiles = choose_tiles(rows, *shape, processors)
        assert tiles is not None and rows <= tiles.rows + tiles.more_rows <= 2 * max(rows, 16)
        assert tiles.outputs == WARPGROUP_OUTPUTS * tiles.warpgroups and 2 <= tiles.stages <= 8
        units = -(-outputs // tiles.outputs) * (inputs // GROUP)
        _, share = tiles.parts(*shape)
        assert processors * (share - 1) < units <= processors * share
    assert choose_tiles(sum(HOPPER_ROWS[-1]) + 1, *shape, processors) is None
    assert choose_tiles(96, 37_888, 3584, 132).warpgroups == 3 and choose_tiles(96, 3584, 3584, 132).warpgroups == 2


def test_only_hopper_has_the_kernel(monkeypatch, caplog):
    """Where Triton lacks what it needs, that is reported, and products are computed as on other GPUs."""
    pytest.importorskip("triton")
    known = hopper._hopper_processors
    monkeypatch.setattr(hopper, "_hopper_processors", known.__wrapped__)
    assert hopper_processors(torch.device("cpu")) == 0
    for major, processors in ((8, 108), (9, 114), (10, 148)):
        gpu = SimpleNamespace(major=major, multi_processor_count=processors)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, gpu=gpu: gpu)
        assert hopper_processors(torch.device("cuda")) == (processors if major == 9 else 0)
    assert not caplog.messages
    gpu.major = 9
    monkeypatch.setitem(sys.modules, "triton.experimental.gluon.nvidia.hopper", None)  # not in this Triton
    monkeypatch.delitem(sys.modules, "qwen_vl_streaming.engine.hopper_kernel", raising=False)
    assert hopper_processors(torch.device("cuda")) == 0
    assert len(caplog.messages) == 1 and "gluon" in caplog.messages[0] and "requirements.txt" in caplog.messages[0]


def test_the_compiler_follows_the_choice_of_tiles(monkeypatch):
    """Without a graph break, and once for all rows with the same tiles. With stand-ins for the GPU and the kernel."""
    taken, graphs = [], []

    def partial_products(x, weight, scale, tiles):
        taken.append(tiles)
        inputs = interleave(torch.arange(x.shape[1])[None])[0].argsort()
        parts = x.new_zeros(tiles.parts(*weight.shape)[0], len(x), len(weight), dtype=torch.float32)
        parts[0] = scaled_linear(x[:, inputs].float(), weight, scale)
        return parts

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(quantized_linear, "_has_kernels", lambda x: True)
    monkeypatch.setattr(hopper, "_hopper_processors", lambda device: 132)
    monkeypatch.setattr(quantized_linear, "kernel_of", lambda tiles: SimpleNamespace(partial_products=partial_products))
    torch._dynamo.reset()
    product = torch.compile(quantized_linear.product, fullgraph=True, backend=backend, dynamic=True)
    weight, scale = quantize(torch.randn(1280, 640), "int8")
    for rows in (5, 9, 70, 80, 96, 91, 16):
        x = torch.randn(1, rows, 640, dtype=torch.bfloat16)
        torch.testing.assert_close(product(x, weight, scale), scaled_linear(x, weight, scale), atol=0.1, rtol=0.02)
        assert taken[-1] == choose_tiles(rows, 1280, 640, 132) and taken[-1].parts(1280, 640)[0] > 1
    assert len(graphs) == 2  # up to 16 rows, and 65 to 96


def compiled(tiles: Tiles, kind: torch.dtype, dependent: bool):
    """The kernel, compiled for Hopper."""
    import triton
    from qwen_vl_streaming.engine import hopper_kernel
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    def blocks(rows, inputs, name, kind):
        return f"tensordesc<{name}{[rows, inputs]},{hopper_kernel._layout(rows, inputs, kind)!r}>"

    names = hopper_kernel._product.arg_names
    rows = blocks(tiles.rows, GROUP, "bf16", gl.bfloat16)
    types = {
        "weight": blocks(WARPGROUP_OUTPUTS, GROUP // 4, "i32", gl.int32),
        "rows": rows,
        "more_rows": blocks(tiles.more_rows, GROUP, "bf16", gl.bfloat16) if tiles.more_rows else rows,
        **{"scale": "*fp32", "output": "*fp32", "M": "i32", "N": "i32", "K": "i32", "SHARE": "i32"},
    }
    width = {
        "FP8": kind == torch.float8_e4m3fn,
        **{"ROWS": tiles.rows, "MORE_ROWS": tiles.more_rows, "GROUP": GROUP, "HEIGHT": WARPGROUP_OUTPUTS},
        **{"WARPGROUPS": tiles.warpgroups, "STAGES": tiles.stages, "DEPENDENT": dependent},
        "REGISTERS": hopper_kernel.THREAD_REGISTERS[tiles.warpgroups],
    }
    constants = {(names.index(name),): value for name, value in width.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in ("scale", "output", "N", "K")}
    source = GluonASTSource(hopper_kernel._product, types | dict.fromkeys(width, "constexpr"), constants, aligned)
    return triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": 4, "launch_pdl": dependent})


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("width", HOPPER_ROWS, ids=str)
@pytest.mark.parametrize("outputs", [3584, 37_888])
def test_weights_are_converted_while_tensor_cores_multiply(outputs, width, kind, tmp_path):
    """The assembler waits for each multiplication, and only says so, if registers are used in ways that it does not
    follow. What one program takes fits a processor."""
    triton = pytest.importorskip("triton")
    from qwen_vl_streaming.engine import hopper_kernel

    tiles = choose_tiles(sum(width), outputs, 3584, 132)
    found = compiled(tiles, kind, True)
    assert found.metadata.shared <= tiles.shared_memory((9, 0)) <= MEMORY
    assert found.metadata.num_warps == tiles.warps + 4
    (tmp_path / "kernel.ptx").write_text(found.asm["ptx"])
    said = subprocess.run(
        [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name", "sm_90a", "kernel.ptx", "-o", "kernel.cubin"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    ).stderr  # fmt: skip
    assert "serialized" not in said, said
    assert re.search(r"Used \d+ registers", said), said
    # Of the widest tiles, some addresses do not fit in registers where outputs are written, after the loop.
    assert int(re.search(r"(\d+) bytes spill stores", said)[1]) <= (64 if width == HOPPER_ROWS[-1] else 0), said
    # Registers that warpgroups take when they begin to multiply, and what remains for others.
    registers = {(way, int(count)) for way, count in re.findall(r"setmaxnreg\.(\w+)\S+\s+(\d+)", found.asm["ptx"])}
    loader = hopper_kernel.LOADER_REGISTERS.value
    others = hopper_kernel.THREAD_REGISTERS[tiles.warpgroups]
    all_threads = int(re.search(r"\.maxnreg (\d+)", found.asm["ptx"])[1]) * (tiles.warpgroups + 1)
    first = all_threads - others * (tiles.warpgroups - 1) - loader
    assert {("inc", others), ("dec", first), ("dec", loader)} <= registers
    assert others <= first and 128 * all_threads <= REGISTERS
    # Each part but the last of a group is multiplied while the next is converted.
    waits = [int(count) for count in re.findall(r"wgmma\.wait_group\S*\s+(\d+)", found.asm["ptx"])]
    assert [count for count in waits if count] == 3 * tiles.warpgroups * [2 if tiles.more_rows else 1]


@pytest.mark.parametrize("dependent", [True, False])
def test_only_weights_are_loaded_while_the_previous_kernel_runs(dependent):
    pytest.importorskip("triton")
    ptx = compiled(choose_tiles(92, 3584, 3584, 132), torch.int8, dependent).asm["ptx"]
    found = re.findall(r"griddepcontrol\.\w+|cp\.async\.bulk\.tensor", ptx)
    assert found.count("cp.async.bulk.tensor") == 12  # weights of two warpgroups, and rows twice in two halves each
    if dependent:
        assert found[:4] == [*["cp.async.bulk.tensor"] * 2, "griddepcontrol.wait", "griddepcontrol.launch_dependents"]
    else:
        assert not any("griddepcontrol" in each for each in found)
