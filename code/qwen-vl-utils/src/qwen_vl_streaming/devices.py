"""Shows the GPUs of this machine and how many of them PyTorch can use. If there are GPUs that PyTorch cannot use,
prints the reason and the fix, and exits with status 1.

    python -m qwen_vl_streaming.devices

All programs check the GPUs with `look` and select a device with `choose_device`. If the machine has GPUs that PyTorch
cannot use, the programs stop with the reason, unless the user requested the CPU. If there is no GPU, they use the CPU
and tell the user. Independent of models.
"""

import ctypes
import os
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .common.errors import InputError, OneLineParser, first_line, run
from .common.nvidia import Driver, ask_driver

LEAST_DRIVER = {11: 450, 12: 525, 13: 580}
"""The oldest NVIDIA driver for Linux that supports each major version of CUDA (NVIDIA, "CUDA Compatibility", minor
version compatibility)."""
OLDEST_CUDA = 12
"""The oldest major version of CUDA with builds of a PyTorch version that this project supports."""
ANOTHER_BUILD = "requirements.txt says how"
CUDA = "libcuda.so.1"
GPU_FILES = ("nvidia*", "nvhost*", "nvmap", "kfd", "dxg")
"""Files in /dev without at least one of which no process can use a GPU: NVIDIA's, of Tegra, of AMD and of WSL."""
DEVICE_HELP = "cpu, cuda or cuda:N (default: a GPU if available)"
"""Help text of the flag --device."""
GIVE_TO_CONTAINER = "start the container with its GPUs (docker --gpus all, apptainer --nv)"


@dataclass(frozen=True)
class Torch:
    """What PyTorch reports."""

    build: str
    """The PyTorch version, such as 2.14.1+cu130."""
    cuda: str | None = None
    """The CUDA version of the build."""
    hip: str | None = None
    """The ROCm version of the build."""
    count: int = 0
    """Number of GPUs, if CUDA or ROCm could be initialized."""
    bfloat16: bool = False
    """The current GPU supports bfloat16 without emulation."""
    alien: tuple[str, ...] = ()
    """The GPUs that the build has no kernels for, each with its index, name and architecture."""
    fault: str = ""
    """The error message if CUDA could not be initialized."""


@dataclass(frozen=True)
class Devices:
    """The result of checking the GPUs of this machine."""

    usable: int = 0
    """Number of GPUs that PyTorch can use: cuda:0 and so on."""
    bfloat16: bool = False
    """The current GPU supports bfloat16 without emulation."""
    why_not: str = ""
    """If there are GPUs that cannot be used: the GPUs, the reason and the fix, without a full stop."""
    none: str = "no GPU found"
    """If there is no GPU: a message that says so, with details where known."""


def look(environment: Mapping[str, str]) -> Devices:
    """Checks the GPUs of this machine. Initializes CUDA, so child processes that use CUDA must not be forked
    afterwards."""
    driver = ask_driver()
    if not driver.gpus and "torch" not in sys.modules and not may_have_gpus():
        return judge(driver, Torch(""), environment)  # importing PyTorch takes seconds
    return judge(driver, ask_torch(), environment)


def may_have_gpus(root: Path = Path("/")) -> bool:
    """Returns whether there is any file of a GPU. If not, PyTorch cannot use one."""
    return any(next((root / "dev").glob(pattern), None) for pattern in GPU_FILES)


def choose_device(asked: str, devices: Devices, cpu: str = "--device cpu") -> tuple[str, str]:
    """Returns the device to use, and a message for the user if that is the CPU without a request, else an empty string.

    `asked` is cpu, cuda, cuda:N, or empty for a GPU if there is one and the CPU otherwise. Raises InputError if `asked`
    is not valid, if it does not exist, or if the machine has GPUs that PyTorch cannot use and the CPU is not requested.
    `cpu` is the option that selects the CPU, for these messages; it is empty if there is none.
    """
    kind, _, index = asked.partition(":")
    if asked not in ("", "cpu") and not (kind == "cuda" and (asked == kind or index.isdecimal())):
        raise InputError(f"device {asked} is neither cpu nor cuda nor cuda:N")
    if asked == "cpu":
        return "cpu", ""
    if not devices.usable and devices.why_not:
        raise InputError(devices.why_not + (f"; or give {cpu} to use the CPU" if cpu else ""))
    if asked and int(index or 0) >= devices.usable:
        found = f"PyTorch can use {count_gpus(devices.usable)} here" if devices.usable else devices.none
        raise InputError(f"device {asked}: {found}; give another, or {cpu}")
    if asked or devices.usable:
        return asked or "cuda", ""
    return "cpu", f"{devices.none}: using the CPU"


def judge(driver: Driver, torch: Torch, environment: Mapping[str, str]) -> Devices:
    """Combines the reports of the driver and of PyTorch into the usable devices, or the reason and the fix."""
    if torch.count and not torch.alien:
        return Devices(torch.count, torch.bfloat16)
    if torch.count:
        hide = "HIP_VISIBLE_DEVICES" if torch.hip else "CUDA_VISIBLE_DEVICES"
        also = "" if len(torch.alien) == torch.count else f", or list only the others in {hide}"
        return Devices(
            why_not=f"PyTorch {torch.build} has no kernels for {', '.join(torch.alien)}: install a build that has "
            f"({ANOTHER_BUILD}){also}"
        )
    if driver.gpus:
        return Devices(why_not=_why_not(driver, torch, environment))
    if torch.hip and torch.fault:
        return Devices(none=f"no GPU found that PyTorch {torch.build}, built for ROCm {torch.hip}, can use")
    promised = environment.get("SLURM_GPUS_ON_NODE", "")
    if promised.isdecimal() and int(promised):
        return Devices(
            why_not=f"SLURM gave this job {count_gpus(int(promised))}, and none is visible here: "
            f"{GIVE_TO_CONTAINER}, or ask SLURM for none"
        )
    if driver.elsewhere:
        those = f"the machine has {count_gpus(driver.elsewhere)}, and this job or container was not given any"
        return Devices(none=f"no GPU is visible ({those})")
    return Devices()


def _why_not(driver: Driver, torch: Torch, environment: Mapping[str, str]) -> str:
    version = f", driver {driver.version}" if driver.version else ""
    names = " and ".join(dict.fromkeys(driver.gpus))
    there = f"{count_gpus(len(driver.gpus))} here ({names}{version}) cannot be used"
    if torch.hip:
        return f"{there}: PyTorch {torch.build} is built for ROCm: install the build that requirements.txt names"
    if torch.cuda is None:
        return f"{there}: PyTorch {torch.build} is built without CUDA: install the build that requirements.txt names"
    number = int(major[0]) if (major := re.match(r"\d+", driver.version)) else 0
    least = LEAST_DRIVER.get(int(torch.cuda.split(".")[0]))
    if "driver on your system is too old" in torch.fault or (number and least and number < least):
        needs = f"which needs driver {least} or newer" if least else "which needs a newer driver"
        do = f"update the driver to {least} or newer" if least else "update the driver"
        fits = [major for major, oldest in LEAST_DRIVER.items() if oldest <= number and major >= OLDEST_CUDA]
        if fits:
            do += f", or install a build of PyTorch for CUDA {max(fits)} ({ANOTHER_BUILD})"
        return f"{there}: PyTorch {torch.build} is built for CUDA {torch.cuda}, {needs}: {do}"
    if (visible := environment.get("CUDA_VISIBLE_DEVICES")) is not None and "No CUDA GPUs" in torch.fault:
        return f"{there}: CUDA_VISIBLE_DEVICES={visible!r} hides them: unset it, or list GPUs, such as 0,1"
    if not _loads(CUDA):
        return f"{there}: the driver's library {CUDA} is missing: {GIVE_TO_CONTAINER}, or reinstall the driver"
    if driver.fault:
        return f"{there}: the driver does not answer ({driver.fault}): restart the machine, or install the driver again"
    if driver.mig:
        return f"{there}: MIG is enabled, but there is no MIG device: create one with `nvidia-smi mig`, or disable MIG"
    return (
        f"{there}: CUDA does not start ({torch.fault}): check that `nvidia-smi` works and, on machines with NVSwitch, "
        "that nvidia-fabricmanager runs, or restart the machine"
    )


def count_gpus(number: int) -> str:
    return f"{number or 'no'} GPU{'s' * (number != 1)}"


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def ask_torch() -> Torch:
    """Queries PyTorch. `device_count` alone is not sufficient: it uses NVML, which also counts GPUs on which CUDA
    cannot be initialized."""
    import torch

    about = {"build": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns about GPUs without kernels, which `alien` reports
            torch.cuda.init()
            count = torch.cuda.device_count()
            bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    except (RuntimeError, AssertionError) as error:
        first = first_line(error)
        return Torch(**about, fault=(re.search(r"Error \d+: .*", first) or [first])[0])
    alien = []
    for index in range(count if torch.version.cuda else 0):
        capability = torch.cuda.get_device_capability(index)
        if not has_kernels(torch.cuda.get_arch_list(), capability):
            alien.append(f"GPU {index} ({torch.cuda.get_device_name(index)}, sm_{capability[0]}{capability[1]})")
    return Torch(**about, count=count, bfloat16=bfloat16, alien=tuple(alien))


def has_kernels(architectures: list[str], capability: tuple[int, int]) -> bool:
    """Returns whether code built for `architectures`, such as sm_80 and compute_90, runs on a GPU of `capability`.

    sm_XY runs on GPUs with the same X and at least that Y. compute_XY runs on all GPUs of that capability or newer.
    With the suffix `a`, both run only on GPUs of exactly that capability.
    """
    for architecture in architectures:
        if not (parts := re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", architecture)):
            continue
        kind, version, exact = parts[1], (int(parts[2]), int(parts[3])), parts[4] == "a"
        if capability == version or (
            not exact and version <= capability and (kind == "compute" or version[0] == capability[0])
        ):
            return True
    return False


def main() -> None:
    OneLineParser(prog="python -m qwen_vl_streaming.devices", description=(__doc__ or "").split("\n\n")[0]).parse_args()
    driver, torch = ask_driver(), ask_torch()
    devices = judge(driver, torch, os.environ)
    print(f"driver: {driver.version or 'none'}; {', '.join(driver.gpus) or 'no GPU'}")
    print(f"PyTorch {torch.build}, CUDA {torch.cuda}, ROCm {torch.hip}")
    print(f"PyTorch can use {count_gpus(devices.usable)}" if devices.usable else devices.why_not or devices.none)
    sys.exit(1 if devices.why_not else 0)


if __name__ == "__main__":
    run(main)
