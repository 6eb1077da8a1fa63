"""The kernel for attention of clips on Hopper: the machine code that the compiler makes. tests/test_gpu_attention.py
compares what it computes; Triton's interpreter does not run Gluon."""

import itertools
import re
import subprocess

import pytest
from qwen_vl_streaming.engine.kv_cache import BLOCK_SIZE, TEXT_OFFSET
from test_hopper_kernel import MEMORY

pytest.importorskip("triton")
import triton
from qwen_vl_streaming.engine import hopper_attention
from qwen_vl_streaming.engine.hopper_kernel import _layout
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource


def compiled(windowed: bool):
    def rows(count):
        return f"tensordesc<bf16{[count, 128]},{_layout(count, 128, gl.bfloat16)!r}>"

    names = hopper_attention._attend_chunks.arg_names
    kinds = [rows(hopper_attention.HEIGHT), rows(BLOCK_SIZE), "*i32", "*i32", *["*i64"] * 6, "*bf16", "*fp32", "fp32"]
    types = dict(zip(names, [*kinds, *["i32"] * 4], strict=False))
    shape = {
        **{"Q": 95, "GROUPS": 7, "HEADS": 4, "SPLITS": 3, "OFFSET": TEXT_OFFSET, "HEIGHT": hopper_attention.HEIGHT},
        **{"BLOCK": BLOCK_SIZE, "D": 128, "PLACES": hopper_attention.PLACES, "WINDOWED": windowed, "DEPENDENT": True},
    }
    constants = {(names.index(name),): value for name, value in shape.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in ("blocks", "output", "lse", "TOKENS")}
    source = GluonASTSource(
        hopper_attention._attend_chunks, types | dict.fromkeys(shape, "constexpr"), constants, aligned
    )
    return triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": 4, "launch_pdl": True})


@pytest.mark.parametrize("windowed", [False, True], ids=["all", "window"])
def test_exponentials_are_computed_while_values_are_multiplied(windowed, tmp_path):
    """The assembler may move them behind the wait, and may wait for each multiplication. Nothing is read before the
    kernel before has completed."""
    found = compiled(windowed)
    assert found.metadata.shared <= MEMORY
    access = re.findall(r"griddepcontrol\.\w+|(?:ld|st|cp\.async)\S*\.global\S*", found.asm["ptx"])
    assert access[:2] == ["griddepcontrol.wait", "griddepcontrol.launch_dependents"]
    assert len(access) > 20 and not any("griddepcontrol" in other for other in access[2:])
    (tmp_path / "kernel.ptx").write_text(found.asm["ptx"])
    said = subprocess.run(
        [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name", "sm_90a", "kernel.ptx", "-o", "kernel.cubin"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    ).stderr  # fmt: skip
    assert "serialized" not in said and int(re.search(r"(\d+) bytes spill stores", said)[1]) <= 64, said
    code = subprocess.run(
        [triton.knobs.nvidia.nvdisasm.path, "-c", "kernel.cubin"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    # In the loop of each warpgroup, 64 x 128 scores and as many outputs are multiplied. Between the waits for these are
    # the exponentials, in one branch with the mask, in the other without.
    steps = re.findall(r"\b(HGMMA|MUFU\.EX2|WARPGROUP\.DEPBAR)\b", code)
    between = " ".join(steps).split("WARPGROUP.DEPBAR")
    counts = [(part.count("HGMMA"), part.count("EX2")) for part in between]
    loops = [after for before, after in itertools.pairwise(counts) if before[0] == 16]
    assert len(loops) == 2 and all(products == 0 and exponentials >= 2 * 64 for products, exponentials in loops), counts
