"""Programmatic dependent launch, on NVIDIA Hopper: a kernel starts while the one before it still runs. This
saves about a microsecond per kernel, of which a step has hundreds.

A dependent kernel starts once each program of the kernel before it has called `gdc_launch_dependents` or has ended.
Its own `gdc_wait` returns once that kernel has completed and its writes are visible. A kernel may complete while
earlier ones still run, unless it has waited for them itself. Therefore each program of each dependent kernel calls
`gdc_wait` before it reads or writes anything that a step writes, and `gdc_launch_dependents` after that. Before it
waits, it may only read weights. All other kernels start after all before them.
"""

import functools
import importlib.util
from typing import Any

import torch

from ..common.compiling import CompileOptions
from .hopper import HOPPER

CUDA = 13
"""The major version of CUDA that was tested, on Hopper. Later GPUs have dependent launch too, and earlier
versions of CUDA may come with a driver that cannot capture it."""


@functools.cache
def is_supported(device: torch.device) -> bool:
    """Whether kernels on `device` may be dependent."""
    built = int((torch.version.cuda or "0").partition(".")[0])
    if device.type != "cuda" or built < CUDA or importlib.util.find_spec("triton") is None:
        return False
    from triton.language.extra import cuda

    return torch.cuda.get_device_capability(device)[0] == HOPPER and hasattr(cuda, "gdc_wait")


def launch_options(device: torch.device) -> dict[str, bool]:
    """Options of a launch of a Triton kernel that waits: `launch_pdl`, or none where that is not supported."""
    return {"launch_pdl": True} if is_supported(device) else {}


def compile_options(device: torch.device) -> CompileOptions:
    """Options of torch.compile with which the compiler's own kernels are dependent, except templates, such as those of
    FlexAttention. Functions compiled with these options should be captured: launching them takes the host longer."""
    if not is_supported(device):
        return {}
    from torch._inductor.codegen.triton import TritonKernel

    if not hasattr(TritonKernel, "_filter_pdl"):  # where the compiler removes waits that it does not need
        return {}
    TritonKernel._filter_pdl = _wait_first
    # Combined kernels keep the waits where the compiler put them. Without the harness, which is not used, no code is
    # loaded from the compiler's cache that an earlier process compiled with its own waits.
    return {"triton.enable_pdl": True, "combo_kernels": False, "benchmark_harness": False}


def _wait_first(self: Any, code: Any) -> None:
    """Makes a kernel of the compiler wait before anything else. The compiler's own waits, in torch 2.11 to 2.14, are
    missing in kernels that read nothing, and it does not notice memory that two buffers share."""
    own = self.GDC_WAIT, self.GDC_LAUNCH
    lines = [line for line in code._lines if not (isinstance(line, str) and line.strip() in own)]
    code._lines = [*own, *lines] if self._enable_pdl_codegen() else lines
