"""Which GPUs there are and PyTorch can use: one line that is the same in all programs, for any answer of the driver and
PyTorch. Both are replaced by stand-ins."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import eval as evaluation
import pytest
import verify
from evaluating import finish, start
from metrics.scorecard import prepare_scoring
from processes import count_processes
from qwen_vl_streaming import devices
from qwen_vl_streaming.common.errors import InputError, run
from qwen_vl_streaming.common.nvidia import NVML_NO_PERMISSION
from qwen_vl_streaming.devices import (
    Devices,
    Driver,
    Torch,
    ask_driver,
    choose_device,
    has_kernels,
    judge,
    may_have_gpus,
)
from qwen_vl_streaming.live import cli
from qwen_vl_streaming.replay.cli import main as replay_command
from qwenvl import device as training_device
from qwenvl.param_groups import empty_model
from ranks import Rank
from settings import Settings
from tiny import tiny_config, tiny_model
from training import flags, refused
from transformers import Qwen2_5_VLConfig
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

H100 = "NVIDIA H100 80GB HBM3"
EIGHT = Driver((H100,) * 8, "535.129.03")
TOO_OLD = "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver"
CUDA_13 = Torch("2.14.1+cu130", "13.0", fault=TOO_OLD)
HIDDEN = Torch("2.14.1+cu130", "13.0", fault="No CUDA GPUs are available")
NEW = Driver((H100,), "580.65.06")
HERE = "1 GPU here (NVIDIA H100 80GB HBM3, driver 580.65.06) cannot be used: "


@pytest.mark.parametrize(
    "driver, torch, environment, line",
    [
        (
            EIGHT, CUDA_13, {},
            "8 GPUs here (NVIDIA H100 80GB HBM3, driver 535.129.03) cannot be used: PyTorch 2.14.1+cu130 is built for "
            "CUDA 13.0, which needs driver 580 or newer: update the driver to 580 or newer, or install a build of "
            "PyTorch for CUDA 12 (requirements.txt says how)",
        ),
        (
            Driver(("Tesla V100", "NVIDIA T4"), "470.82.01"), CUDA_13, {},
            "2 GPUs here (Tesla V100 and NVIDIA T4, driver 470.82.01) cannot be used: PyTorch 2.14.1+cu130 is built "
            "for CUDA 13.0, which needs driver 580 or newer: update the driver to 580 or newer",
        ),
        (  # NVML is absent: the driver's own files tell its version
            Driver((H100,), "525.60.13", fault="libnvidia-ml.so.1: no such file"), HIDDEN, {},
            "1 GPU here (NVIDIA H100 80GB HBM3, driver 525.60.13) cannot be used: PyTorch 2.14.1+cu130 is built for "
            "CUDA 13.0, which needs driver 580 or newer: update the driver to 580 or newer, or install a build of "
            "PyTorch for CUDA 12 (requirements.txt says how)",
        ),
        (
            NEW, Torch("3.1+cu140", "14.0", fault=TOO_OLD), {},
            HERE + "PyTorch 3.1+cu140 is built for CUDA 14.0, which needs a newer driver: update the driver, or "
            "install a build of PyTorch for CUDA 13 (requirements.txt says how)",
        ),
        (
            NEW, Torch("2.14.1+cpu"), {},
            HERE + "PyTorch 2.14.1+cpu is built without CUDA: install the build that requirements.txt names",
        ),
        (
            NEW, Torch("2.14.1+rocm7.1", hip="7.1"), {},
            HERE + "PyTorch 2.14.1+rocm7.1 is built for ROCm: install the build that requirements.txt names",
        ),
        (
            NEW, HIDDEN, {"CUDA_VISIBLE_DEVICES": ""},
            HERE + "CUDA_VISIBLE_DEVICES='' hides them: unset it, or list GPUs, such as 0,1",
        ),
        (
            NEW, HIDDEN, {"CUDA_VISIBLE_DEVICES": "NoDevFiles"},
            HERE + "CUDA_VISIBLE_DEVICES='NoDevFiles' hides them: unset it, or list GPUs, such as 0,1",
        ),
        (
            Driver((H100,), "580.65.06", mig=True), HIDDEN, {},
            HERE + "MIG is enabled, but there is no MIG device: create one with `nvidia-smi mig`, or disable MIG",
        ),
        (
            Driver((H100,), "580.65.06", fault="Driver/library version mismatch"), HIDDEN, {},
            HERE + "the driver does not answer (Driver/library version mismatch): restart the machine, or install the "
            "driver again",
        ),
        (
            NEW, Torch("2.14.1+cu130", "13.0", fault="Error 802: system not yet initialized"), {},
            HERE + "CUDA does not start (Error 802: system not yet initialized): check that `nvidia-smi` works and, on "
            "machines with NVSwitch, that nvidia-fabricmanager runs, or restart the machine",
        ),
        (
            NEW, Torch("2.14.1+cu130", "13.0", count=1, alien=("GPU 0 (Tesla V100, sm_70)",)), {},
            "PyTorch 2.14.1+cu130 has no kernels for GPU 0 (Tesla V100, sm_70): install a build that has "
            "(requirements.txt says how)",
        ),
        (
            NEW, Torch("2.14.1+cu130", "13.0", count=2, alien=("GPU 1 (Quadro P400, sm_61)",)), {},
            "PyTorch 2.14.1+cu130 has no kernels for GPU 1 (Quadro P400, sm_61): install a build that has "
            "(requirements.txt says how), or list only the others in CUDA_VISIBLE_DEVICES",
        ),
        (
            Driver(), HIDDEN, {"SLURM_GPUS_ON_NODE": "8"},
            "SLURM gave this job 8 GPUs, and none is visible here: start the container with its GPUs (docker --gpus "
            "all, apptainer --nv), or ask SLURM for none",
        ),
    ],
)  # fmt: skip
def test_why_gpus_cannot_be_used(driver, torch, environment, line, monkeypatch):
    monkeypatch.setattr(devices, "_loads", lambda library: True)
    found = judge(driver, torch, environment)
    assert (found.usable, found.why_not) == (0, line)
    with pytest.raises(InputError) as refused:
        choose_device("", found, "--use_cpu True")
    assert str(refused.value) == f"{line}; or give --use_cpu True to use the CPU"
    with pytest.raises(InputError, match=r"cannot be used|no kernels|none is visible"):
        choose_device("cuda:0", found)
    assert choose_device("cpu", found) == ("cpu", "")


def test_a_container_with_gpus_and_without_driver_libraries(monkeypatch):
    monkeypatch.setattr(devices, "_loads", lambda library: False)
    driver = Driver((H100,), "580.65.06", fault="libnvidia-ml.so.1: cannot open shared object file")
    said = judge(driver, HIDDEN, {}).why_not
    assert said.startswith(HERE + "the driver's library libcuda.so.1 is missing: start the container with its GPUs")


@pytest.mark.parametrize("driver, torch, none", [
    (Driver(), HIDDEN, "no GPU found"),
    (Driver(fault="Driver Not Loaded"), HIDDEN, "no GPU found"),
    (Driver(), Torch("2.14.1+cpu"), "no GPU found"),
    (Driver(elsewhere=8), HIDDEN,
     "no GPU is visible (the machine has 8 GPUs, and this job or container was not given any)"),
    (Driver(), Torch("2.14.1+rocm7.1", hip="7.1", fault="No HIP GPUs are available"),
     "no GPU found that PyTorch 2.14.1+rocm7.1, built for ROCm 7.1, can use"),
])  # fmt: skip
def test_without_a_gpu_the_cpu_is_used_and_reported(driver, torch, none):
    found = judge(driver, torch, {"SLURM_GPUS_ON_NODE": "0", "CUDA_VISIBLE_DEVICES": ""})
    assert (found.usable, found.why_not) == (0, "")
    assert choose_device("", found) == ("cpu", f"{none}: using the CPU")
    with pytest.raises(InputError, match="device cuda: no GPU "):
        choose_device("cuda", found)


def test_gpus_that_can_be_used():
    found = judge(NEW, Torch("2.14.1+cu130", "13.0", count=2, bfloat16=True), {"SLURM_GPUS_ON_NODE": "8"})
    assert found == Devices(2, bfloat16=True)
    assert [choose_device(asked, found) for asked in ("", "cuda", "cuda:1", "cpu")] == [
        ("cuda", ""), ("cuda", ""), ("cuda:1", ""), ("cpu", "")]  # fmt: skip
    with pytest.raises(InputError, match="device cuda:2: PyTorch can use 2 GPUs here; give another, or --device cpu"):
        choose_device("cuda:2", found)
    for name in ("foo", "mps", "cuda:x", "cuda:", "cpu:0", "cuda:-1"):
        with pytest.raises(InputError, match="is neither cpu nor cuda nor cuda:N"):
            choose_device(name, found)


@pytest.mark.parametrize("architectures, capability, runs", [
    (["sm_75", "sm_80", "sm_90"], (7, 0), False),
    (["sm_75", "sm_80", "sm_90"], (7, 5), True),
    (["sm_75", "sm_80", "sm_90"], (8, 9), True),
    (["sm_75", "sm_80", "sm_90"], (12, 0), False),
    (["sm_75", "compute_90"], (12, 0), True),
    (["sm_90a"], (9, 0), True),
    (["compute_90a"], (10, 0), False),
    (["sm_100", "sm_120"], (10, 3), True),
    (["gfx942"], (9, 4), False),
])  # fmt: skip
def test_which_kernels_run_where(architectures, capability, runs):
    assert has_kernels(architectures, capability) is runs


class Nvml:
    """A stand-in for NVIDIA's library, with three GPUs. This process may not use the second."""

    def __init__(self, fault: int = 0, mig: bool = False):
        self.fault, self.mig, self.begun = fault, mig, 0
        self.nvmlErrorString = lambda status: b"Driver/library version mismatch"

    def nvmlInit_v2(self) -> int:
        self.begun += not self.fault
        return self.fault

    def nvmlShutdown(self) -> int:
        self.begun -= 1
        return 0

    def nvmlSystemGetDriverVersion(self, text, length) -> int:
        text.value = b"535.129.03"
        return 0

    def nvmlDeviceGetCount_v2(self, count) -> int:
        count._obj.value = 3
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, device) -> int:
        device._obj.value = index.value + 1
        return NVML_NO_PERMISSION if index.value == 1 else 0

    def nvmlDeviceGetName(self, device, text, length) -> int:
        text.value = f"GPU number {device.value}".encode()
        return 0

    def nvmlDeviceGetMigMode(self, device, on, pending) -> int:
        on._obj.value = self.mig
        return 0

    def nvmlDeviceGetMaxMigDeviceCount(self, device, most) -> int:
        most._obj.value = 7
        return 0

    def nvmlDeviceGetMigDeviceHandleByIndex(self, device, index, part) -> int:
        return 6  # not found


def machine(root: Path, nodes: int, listed: int) -> Path:
    """The files of a driver: device nodes, and the data of its kernel module."""
    (root / "dev").mkdir(parents=True)
    for name in ["nvidiactl", "nvidia-uvm", *(f"nvidia{index}" for index in range(nodes))]:
        (root / "dev" / name).touch()
    for index in range(listed):
        folder = root / f"proc/driver/nvidia/gpus/0000:0{index}:00.0"
        folder.mkdir(parents=True)
        (folder / "information").write_text("Model: \t\t NVIDIA A100-SXM4-80GB\nIRQ:   \t\t 16\n")
    if listed:
        (root / "proc/driver/nvidia/version").write_text(
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19\nGCC version: 12\n"
        )
    return root


def test_the_driver_library_is_read(tmp_path, monkeypatch):
    for mig in (False, True):
        nvml = Nvml(mig=mig)
        monkeypatch.setattr(ctypes, "CDLL", lambda name, nvml=nvml: nvml)
        found = ask_driver(tmp_path)
        assert found == Driver(("GPU number 1", "GPU number 3"), "535.129.03", mig=mig) and nvml.begun == 0
    monkeypatch.setattr(Nvml, "nvmlDeviceGetHandleByIndex_v2", lambda *_: NVML_NO_PERMISSION)
    assert ask_driver(machine(tmp_path, 8, 8)) == Driver((), "535.129.03", elsewhere=8)


@pytest.mark.parametrize("nodes, listed, gpus, elsewhere, version", [
    (0, 0, (), 0, ""),
    (2, 2, ("NVIDIA A100-SXM4-80GB",) * 2, 0, "535.129.03"),
    (2, 0, ("NVIDIA",) * 2, 0, ""),
    (0, 8, (), 8, "535.129.03"),  # a container sees what the kernel lists, and was given none of it
])  # fmt: skip
def test_the_driver_files_are_read(tmp_path, monkeypatch, nodes, listed, gpus, elsewhere, version):
    root = machine(tmp_path, nodes, listed)
    for nvml, fault in ((Nvml(fault=18), "Driver/library version mismatch"), (OSError("no such library"),) * 2):

        def load(name, nvml=nvml):
            if isinstance(nvml, OSError):
                raise nvml
            return nvml

        monkeypatch.setattr(ctypes, "CDLL", load)
        assert ask_driver(root) == Driver(gpus, version, elsewhere, str(fault))


def test_the_version_of_the_open_kernel_module(tmp_path, monkeypatch):
    root = machine(tmp_path, 1, 1)
    (root / "proc/driver/nvidia/version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder@U22)\n"
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Nvml(fault=18))
    assert ask_driver(root).version == "580.65.06"


CANNOT = "8 GPUs here (NVIDIA H100 80GB HBM3, driver 535.129.03) cannot be used: PyTorch 2.14.1+cu130 is built for CUDA"


@pytest.fixture
def too_old(monkeypatch):
    """A machine with eight GPUs whose driver is too old."""
    monkeypatch.setattr(devices, "ask_driver", lambda: EIGHT)
    monkeypatch.setattr(devices, "ask_torch", lambda: CUDA_13)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(devices, "ask_driver", lambda: Driver())
    monkeypatch.setattr(devices, "ask_torch", lambda: HIDDEN)


@pytest.mark.parametrize("main, arguments", [
    (cli.main, "--model none --source synthetic"),
    (replay_command, "none.json --model none"),
    (verify.main, "none.json"),
    (evaluation.main, "--model none"),
])  # fmt: skip
def test_every_program_refuses_gpus_that_cannot_be_used(too_old, monkeypatch, capfd, main, arguments):
    for more, begins, ends in (
        ([], f"error: {CANNOT}", "; or give --device cpu to use the CPU\n"),
        (["--device", "cuda:1"], f"error: {CANNOT}", "; or give --device cpu to use the CPU\n"),
        (["--device", "meta"], "error: device meta is neither cpu nor cuda nor cuda:N", "cuda:N\n"),
        (["--device", "cpu"], "error: ", "\n"),  # it goes on, and finds that nothing else is there
    ):
        monkeypatch.setattr(sys, "argv", ["program", *arguments.split(), *more])
        with pytest.raises(SystemExit) as ended:
            run(main)
        said = capfd.readouterr().err
        assert (ended.value.code, said.count("\n")) == (2, 1) and said.startswith(begins) and said.endswith(ends)
        assert (CANNOT in said) == (more in ([], ["--device", "cuda:1"]))


def test_evaluation_reports_that_it_uses_the_cpu_with_one_process(no_gpu, monkeypatch):
    assert evaluation.find_device(Settings(), Rank()) == ("cpu", "no GPU found: using the CPU")
    assert evaluation.find_device(Settings(device="cpu"), Rank(local_world_size=8)) == ("cpu", "")
    assert count_processes(0, "") == 1
    assert count_processes(2, "") == 2
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    with pytest.raises(InputError, match="SLURM gave this job 8 GPUs, and none is visible here"):
        count_processes(0, "")
    assert count_processes(0, "cpu") == 1
    monkeypatch.setattr(devices, "ask_torch", lambda: Torch("2.14.1", "13.0", count=4, bfloat16=True))
    with pytest.raises(InputError, match="8 processes for 4 GPUs"):
        count_processes(0, "")
    with pytest.raises(InputError, match="8 processes for 4 GPUs"):
        evaluation.find_device(Settings(), Rank(local_world_size=8))
    with pytest.raises(InputError, match="runs as one process"):
        evaluation.find_device(Settings(processes=4), Rank())
    monkeypatch.delenv("SLURM_GPUS_ON_NODE")
    assert count_processes(0, "") == 4
    assert evaluation.find_device(Settings(), Rank(local_world_size=4)) == ("cuda", "")
    assert count_processes(0, "cuda:3") == 1
    assert evaluation.find_device(Settings(device="cuda:3"), Rank()) == ("cuda:3", "")


@pytest.mark.skipif(bool(devices.ask_torch().count), reason="a GPU would be used")
def test_pytorch_is_not_imported_where_no_gpu_can_be(tmp_path):
    for name, gpu in (("null", False), ("nvidia-uvm", True), ("kfd", True), ("dxg", True)):
        root = tmp_path / name
        (root / "dev").mkdir(parents=True)
        (root / "dev" / name).touch()
        assert may_have_gpus(root) is gpu
    asks = (
        "import sys; from qwen_vl_streaming import devices as d\nd.ask_driver, d.may_have_gpus = d.Driver, lambda: {}\n"
        "print(d.look({{}}), 'torch' in sys.modules)"
    )
    for there in (False, True):
        done = subprocess.run([sys.executable, "-c", asks.format(there)], capture_output=True, text=True)
        assert done.stdout.endswith(f" {there}\n") and "none='no GPU found'" in done.stdout, done.stderr


@pytest.mark.skipif(bool(devices.ask_torch().count), reason="a GPU would be used")
def test_an_evaluation_run_reports_the_cpu_once(made, tmp_path):
    for device, times in (("", 1), ("cpu", 0)):
        log = tmp_path / f"{device}.log"
        said = finish(start(made, tmp_path / f"out{device}", log, device=device, limit=2, max_new_tokens=4), log)
        assert said.count("using the CPU\n") == times
        assert "captioning, group: 2/2 videos in" in said and "\r" not in said


def test_metrics_choose_a_device_only_if_they_need_one(too_old, monkeypatch):
    monkeypatch.setattr("metrics.scorecard.check_java", lambda: None)
    monkeypatch.setattr("metrics.scorecard.find_checkpoint", lambda name: name)
    assert prepare_scoring(Settings()).device == "cpu"
    with pytest.raises(InputError, match="cannot be used"):
        prepare_scoring(Settings(bleurt="somewhere"))
    assert prepare_scoring(Settings(bleurt="somewhere", device="cpu")).device == "cpu"


def test_training_refuses_gpus_that_cannot_be_used(too_old, made, tmp_path, capsys, monkeypatch):
    said = refused(flags(made, tmp_path / "out", use_cpu=False), capsys, monkeypatch)
    assert CANNOT in said and said.endswith("; or give --use_cpu True to use the CPU")


def test_training_a_large_model_on_a_cpu_requires_a_flag(no_gpu, made, tmp_path, capsys, monkeypatch):
    large = tmp_path / "large"
    Qwen2_5_VLConfig().save_pretrained(large)  # of 76B; no weights are needed to count them
    said = refused(flags(made, tmp_path / "out", model_name_or_path=large, use_cpu=False), capsys, monkeypatch)
    assert "no GPU found: using the CPU, for which a model of 75," in said and "million parameters is too large" in said
    assert said.endswith("train where PyTorch can use a GPU, or give --use_cpu True")
    assert not (tmp_path / "out").exists()
    said = refused(flags(made, tmp_path / "out", model_name_or_path=large), capsys, monkeypatch)
    assert "too large" not in said


def test_weights_are_also_counted_with_zero_3():
    """transformers would create and partition the weights of any model, and fail on the meta device."""
    zero = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    try:
        empty = empty_model(tiny_config(), SimpleNamespace(deepspeed="zero3.json", hf_deepspeed_config=zero))
        assert is_deepspeed_zero3_enabled()
    finally:
        unset_hf_deepspeed_config()
    assert empty.num_parameters() == tiny_model().num_parameters()


def test_a_gpu_without_bfloat16_is_reported(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training_device, "look", lambda environment: Devices(1, bfloat16=False))
    said = refused(flags(made, tmp_path / "out", use_cpu=False, bf16=True), capsys, monkeypatch)
    assert said.startswith("error: --bf16 True: no GPU of this machine supports bfloat16: give --bf16 False")


STAND_IN = """
from qwen_vl_streaming import devices
devices.ask_driver = lambda: devices.Driver(("NVIDIA H100 80GB HBM3",) * 8, "535.129.03")
devices.ask_torch = lambda: devices.Torch("2.14.1+cu130", "13.0", fault="the driver on your system is too old")
"""


def test_without_a_usable_gpu_the_launcher_hides_the_gpus_of_the_driver(tmp_path):
    """PyTorch's optimizers query the current GPU if NVML counts some, even if CUDA does not start on them."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif 'qwen_vl_streaming.launch' in sys.orig_argv:\n    print(repr("
    )
    with (tmp_path / "sitecustomize.py").open("a") as file:
        file.write("os.environ['CUDA_VISIBLE_DEVICES']))\n    os._exit(0)\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(devices.__file__).parents[1]}"}
    script = Path(__file__).parents[1] / "code/qwen-vl-finetune/scripts/sft.sh"
    done = subprocess.run(["bash", script, "--use_cpu", "True"], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["''"], done.stderr


def test_the_launcher_refuses_gpus_that_cannot_be_used(tmp_path):
    """sft.sh itself, whose Python starts with a stand-in for the machine."""
    (tmp_path / "sitecustomize.py").write_text(STAND_IN)
    library = Path(devices.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{library}", "SLURM_GPUS_ON_NODE": "8"}
    script = Path(__file__).parents[1] / "code/qwen-vl-finetune/scripts/sft.sh"
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"error: {CANNOT}") and "--use_cpu True" in done.stderr


@pytest.mark.parametrize("words, count", [
    ("--use_cpu True", "0"), ("--use_cpu", "0"), ("--max_steps 3 --use_cpu=yes", "0"),
    ("--use_cpu False", "8"), ("--bf16 True -x", "8"),
])  # fmt: skip
def test_how_many_gpus_the_launcher_uses(monkeypatch, capsys, words, count):
    monkeypatch.setattr(training_device, "look", lambda environment: Devices(8, bfloat16=True))
    monkeypatch.setattr(sys, "argv", ["sft.sh", *words.split()])
    training_device.main()
    assert capsys.readouterr().out.strip() == count
