"""sft.sh on one node, on several, and under SLURM: what it would run."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launchers import SLURM, check_several_nodes_need_srun, launched
from qwen_vl_streaming.launch.signals import STOPPED
from qwenvl.train import parse
from training import free_port
from waiting import SECONDS, until

SCRIPT = Path(__file__).parents[1] / "code/qwen-vl-finetune/scripts/sft.sh"
PYTHON = (
    'case "$1 $2" in -c*socket*) echo 40123 ;; "-m qwenvl.device" | "-m qwenvl.planner") echo {gpus} >&3 ;; '
    '*redact) shift 2; echo "+ $*" ;; esac'
)


@pytest.fixture
def launch(tmp_path):
    """Runs sft.sh with a `python` that prints `gpus` and a free port. Returns status, launcher flags and stderr."""
    script = tmp_path / "code/qwen-vl-finetune/scripts/sft.sh"
    script.parent.mkdir(parents=True)
    shutil.copy(SCRIPT, script)
    shutil.copy(SCRIPT.parents[2] / "launch.sh", tmp_path / "code")

    def run(*flags: str, scontrol: str = "exit 1", gpus: int = 4, **environment: str):
        return launched(["bash", script, *flags], tmp_path / "bin", PYTHON.format(gpus=gpus), scontrol, environment)

    return run


@pytest.mark.parametrize(
    "environment, nproc, nnodes, rank, address, port",
    [
        ({}, "4", "1", "0", "127.0.0.1", "40123"),
        ({"NPROC_PER_NODE": "2", "MASTER_PORT": "1234"}, "2", "1", "0", "127.0.0.1", "1234"),
        ({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}, "4", "2", "1", "10.0.0.1", "29500"),
        (SLURM, "8", "3", "2", "gpu07", "29821"),
        ({**SLURM, "SLURM_STEP_NODELIST": "a-1,b-2"}, "8", "3", "2", "a-1", "29821"),
        ({**SLURM, "SLURM_NNODES": "1", "SLURM_NODEID": "0"}, "8", "1", "0", "127.0.0.1", "40123"),
        ({**SLURM, "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "x", "NPROC_PER_NODE": "1"}, *"121x", "29821"),
        ({**SLURM, "scontrol": "echo first.host; echo second.host"}, "8", "3", "2", "first.host", "29821"),
    ],
)  # fmt: skip
def test_processes_nodes_and_addresses(launch, environment, nproc, nnodes, rank, address, port):
    status, flags, said = launch(**environment)
    assert (status, said) == (0, "")
    names = ("--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port")
    assert tuple(flags[name] for name in names) == (nproc, nnodes, rank, address, port)


def test_a_cpu_has_one_process_under_slurm(launch):
    for environment, processes in (({}, "1"), ({"NPROC_PER_NODE": "2"}, "2")):
        status, flags, _ = launch(gpus=0, **SLURM, **environment)
        assert (status, flags["--nproc_per_node"], flags["--bf16"]) == (0, processes, "False")


def test_a_run_without_a_plan(launch):
    """The flags are the user's own, and those of train.py alone."""
    status, flags, said = launch("--seed", "3", "--no_plan", "--optim", "galore_adamw")
    assert (status, said, flags["--seed"], flags["--optim"]) == (0, "", "3", "galore_adamw")
    assert flags["--deepspeed"] == "zero3.json" and "--no_plan" not in {*flags, *flags.values()}
    assert launch("--no_plan", DEEPSPEED_CONFIG="zero1.json")[1]["--deepspeed"] == "zero1.json"
    for word in ("--plan", "--gpus=L4"):
        status, _, said = launch(word, "--no_plan")
        assert (status, said) == (2, f"error: --no_plan contradicts {word.partition('=')[0]}: omit one of them\n")


def test_the_help_begins_with_the_usage():
    """Without a warning of a library that finds no GPU."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("DS_ACCELERATOR", None)
    done = subprocess.run(["bash", SCRIPT, "--no_plan", "--help"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: bash scripts/sft.sh"), done.stdout[:300]


def test_one_task_per_node(launch):
    status, _, said = launch(**SLURM, SLURM_LOCALID="1")
    assert status == 2 and said.count("\n") == 1 and "--ntasks-per-node=1" in said


def test_several_nodes_without_srun_are_refused(launch):
    check_several_nodes_need_srun(launch)


@pytest.mark.parametrize("name, value", [
    ("NPROC_PER_NODE", "0"), ("NPROC_PER_NODE", "all"), ("NNODES", "two"), ("NNODES", "0"), ("NODE_RANK", "1"),
    ("NODE_RANK", "-1"), ("MASTER_PORT", "x"), ("MASTER_PORT", "70000"), ("MASTER_PORT", "0"),
    ("SLURM_GPUS_ON_NODE", "gpu:8"), ("SLURM_GPUS_ON_NODE", "2000"),
])  # fmt: skip
def test_invalid_numbers_are_refused(launch, name, value):
    status, _, said = launch(**{name: value})
    assert status == 2 and said.count("\n") == 1 and said.startswith(f"error: {name}={value}: give a whole number")


def test_a_number_may_start_with_zero(launch):
    assert launch(NNODES="12", NODE_RANK="08", MASTER_ADDR="x")[0] == 0


def launch_command(port: int, *what: str, nodes: int = 1, rank: int = 0) -> list[str]:
    command = [sys.executable, "-m", "qwen_vl_streaming.launch", "--nproc_per_node", "1", "--nnodes", str(nodes)]
    return [*command, "--node_rank", str(rank), "--master_addr", "127.0.0.1", "--master_port", str(port), *what]


def test_the_default_output_folder_names_the_variant(made, monkeypatch):
    monkeypatch.setenv("QWEN2_5_VL_VARIANT", "overlap")
    for given, variant in (([], "overlap"), (["--variant=gap"], "gap")):
        words = ["--train_data", str(made[1]), "--use_cpu", "True", "--bf16", "False", *given]
        monkeypatch.setattr("sys.argv", ["sft.sh", *words])
        assert parse()[-1].output_dir == str(SCRIPT.parents[1] / f"output/qwen2_5vl-pe-{variant}")


@pytest.fixture
def asleep(tmp_path):
    """Starts a launcher with one process that writes its id to a file and sleeps. Returns both."""
    (tmp_path / "asleep.py").write_text(
        "import os, time\nfrom pathlib import Path\nfrom qwen_vl_streaming.launch.signals import die_with_launcher\n"
        "die_with_launcher()\nPath('part').write_text(str(os.getpid()))\nPath('part').rename('id')\ntime.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[1]), *sys.path])}
    command = launch_command(free_port(), "-m", "asleep")
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as launcher:
        until((tmp_path / "id").exists)
        yield launcher, psutil.Process(int((tmp_path / "id").read_text()))
        launcher.kill()


def test_sigterm_before_training_stops_the_run(asleep):
    launcher, process = asleep
    launcher.terminate()
    assert launcher.wait(SECONDS) == STOPPED and "error" not in launcher.stderr.read()
    assert not process.is_running()


def test_ctrl_c_is_reported_in_one_line(asleep):
    launcher, process = asleep
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(SECONDS) == 128 + signal.SIGINT
    assert "stopped by SIGINT: the same command resumes" in (said := launcher.stderr.read())
    assert "SignalException" not in said
    assert not process.is_running()


def test_sigterm_to_one_process_is_an_error(asleep):
    launcher, process = asleep
    process.terminate()
    assert launcher.wait(SECONDS) == 1 and "error: process 0 was killed by SIGTERM: the same" in launcher.stderr.read()


def test_processes_end_with_their_launcher(asleep):
    launcher, process = asleep
    launcher.kill()
    until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_ends_a_node_that_waits_for_others(rank):
    command = launch_command(free_port(), "-m", "this", nodes=2, rank=rank)
    quiet = {**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR"}  # as sft.sh sets it
    with subprocess.Popen(command, cwd=SCRIPT.parents[1], env=quiet, stderr=subprocess.PIPE, text=True) as launcher:
        status = Path(f"/proc/{launcher.pid}/status")
        until(lambda: int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) >> signal.SIGTERM - 1 & 1)
        time.sleep(1)  # now it is waiting
        launcher.terminate()
        assert launcher.wait(SECONDS) == STOPPED
        assert launcher.stderr.read().splitlines()[-1].startswith("stopped by SIGTERM")


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = launch_command(taken.getsockname()[1], "-m", "this")
        done = subprocess.run(command, cwd=SCRIPT.parents[1], capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and [line.startswith("error: ") for line in lines].count(True) == 1
    assert "MASTER_PORT" in lines[-1] and "Traceback" not in done.stderr
