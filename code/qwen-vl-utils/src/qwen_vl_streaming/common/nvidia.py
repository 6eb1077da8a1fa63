"""What the NVIDIA driver reports about the GPUs of this machine, through its NVML library. Independent of PyTorch."""

import ctypes
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

NVML = "libnvidia-ml.so.1"
NVML_SUCCESS, NVML_NO_PERMISSION = 0, 4
NAME_BYTES = 96
"""NVML_DEVICE_NAME_V2_BUFFER_SIZE in nvml.h. Also large enough for a driver version."""


@dataclass(frozen=True)
class Driver:
    """What the NVIDIA driver reports."""

    gpus: tuple[str, ...] = ()
    """Names of the GPUs that are visible to this process."""
    version: str = ""
    """For example 535.129.03."""
    elsewhere: int = 0
    """Number of GPUs of the machine that this process cannot access, for example in a container or job without GPUs."""
    fault: str = ""
    """Why the NVML library of the driver failed."""
    mig: bool = False
    """All visible GPUs have MIG enabled, and none has a MIG device."""


def ask_driver(root: Path = Path("/")) -> Driver:
    """Queries the NVIDIA driver through its NVML library. If NVML fails, reads the files below `root` that the kernel
    module creates."""
    nodes = sum(path.name[len("nvidia") :].isdecimal() for path in (root / "dev").glob("nvidia*"))
    module = root / "proc/driver/nvidia"
    listed = [_field(path, r"Model:\s*(.+)") for path in sorted(module.glob("gpus/*/information"))]
    try:
        names, version, mig = _ask_nvml()
    except (OSError, AttributeError) as error:
        version = _field(module / "version", r"Kernel Module.*?\s(\d[\d.]+)\s")
        if not nodes:  # /proc lists the GPUs of the host, even in a container without GPUs
            return Driver(version=version, elsewhere=len(listed), fault=str(error))
        return Driver(tuple(listed[:nodes]) or ("NVIDIA",) * nodes, version, fault=str(error))
    return Driver(names, version, elsewhere=0 if names else max(nodes, len(listed)), mig=mig)


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """The NVIDIA GPUs that a child process can be given, each a value of CUDA_VISIBLE_DEVICES: those that the variable
    lists, else all."""
    if (listed := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        names = [name.strip() for name in listed.split(",") if name.strip()]
        return list(itertools.takewhile(lambda name: not name.startswith("-"), names))  # CUDA stops at -1
    return [str(index) for index in range(len(ask_driver().gpus))]


def _field(path: Path, pattern: str) -> str:
    """Returns the first group of `pattern` in a file, or an empty string if there is no match or no readable file."""
    try:
        found = re.search(pattern, path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return ""
    return found[1].strip() if found else ""


def _ask_nvml() -> tuple[tuple[str, ...], str, bool]:
    """Returns the names of the GPUs, the driver version, and whether all GPUs have MIG enabled but no MIG device.

    Raises OSError if NVML is missing or fails, and AttributeError if it lacks a function.
    """
    nvml = ctypes.CDLL(NVML)
    nvml.nvmlErrorString.restype = ctypes.c_char_p

    def call(name: str, *arguments) -> int:
        status = getattr(nvml, name)(*arguments)
        if status not in (NVML_SUCCESS, NVML_NO_PERMISSION):
            raise OSError(nvml.nvmlErrorString(status).decode())
        return status

    call("nvmlInit_v2")
    try:
        text, count, names, mig = ctypes.create_string_buffer(NAME_BYTES), ctypes.c_uint(), [], []
        call("nvmlSystemGetDriverVersion", text, ctypes.c_uint(NAME_BYTES))
        version = text.value.decode()
        call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        for index in range(count.value):
            device = ctypes.c_void_p()
            if call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(device)) == NVML_SUCCESS:
                call("nvmlDeviceGetName", device, text, ctypes.c_uint(NAME_BYTES))
                names.append(text.value.decode(errors="replace"))
                mig.append(_without_mig_device(nvml, device))
    finally:
        nvml.nvmlShutdown()
    return tuple(names), version, bool(mig) and all(mig)


def _without_mig_device(nvml, device: ctypes.c_void_p) -> bool:
    """Returns whether MIG is enabled but has no MIG device. On GPUs without MIG, the query fails: returns False."""
    on, pending, most, part = (ctypes.c_uint() for _ in range(4))
    if nvml.nvmlDeviceGetMigMode(device, ctypes.byref(on), ctypes.byref(pending)) != NVML_SUCCESS or not on.value:
        return False
    nvml.nvmlDeviceGetMaxMigDeviceCount(device, ctypes.byref(most))
    part = ctypes.c_void_p()
    handle = nvml.nvmlDeviceGetMigDeviceHandleByIndex
    return all(handle(device, ctypes.c_uint(i), ctypes.byref(part)) != NVML_SUCCESS for i in range(most.value))
