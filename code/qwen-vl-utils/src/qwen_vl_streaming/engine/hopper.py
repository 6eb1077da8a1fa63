"""Which devices run the kernels for NVIDIA Hopper. These are in Gluon, a part of Triton, which is only installed where
PyTorch supports a GPU."""

import functools
import importlib
import logging
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)

HOPPER = 9
"""Major compute capability."""


@functools.cache
def _hopper_processors(device: torch.device) -> int:
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    if (gpu := torch.cuda.get_device_properties(device)).major != HOPPER:
        return 0
    try:
        importlib.import_module(".hopper_kernel", __package__)
    except ImportError as error:  # Gluon is experimental: another Triton may lack what the kernels need
        logger.warning(
            "clips and 8-bit weights are slower here: %s; requirements.txt has versions that were tested", error
        )
        return 0
    return gpu.multi_processor_count


# The compiler would not trace a device's properties.
hopper_processors: Callable[[torch.device], int] = torch.compiler.assume_constant_result(
    lambda device: _hopper_processors(device)
)
"""The number of processors of a device if it runs the kernels for Hopper, else 0: on other GPUs, and where Triton lacks
what they need."""
