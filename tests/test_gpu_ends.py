"""On two GPUs, where processes wait for each other in NCCL: any failure of one process ends the run within 30 seconds,
and the same command resumes. Run with `pytest -s`; takes some minutes, mostly for starting."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from qwen_vl_streaming.launch.signals import STOPPED
from test_ends import FINETUNE, ends, left
from training import flags, free_port, history

pytestmark = pytest.mark.gpu
ROOT = FINETUNE.parents[1]


class Runs:
    """Runs of one training on two GPUs, in one folder."""

    def __init__(self, made: tuple[Path, Path], folder: Path):
        self.folder, self.out = folder, folder / "out"
        changes = {"use_cpu": False, "bf16": True, "attention": "sdpa", "dataloader_num_workers": 4}
        changes |= {"gradient_accumulation_steps": 1, "num_train_epochs": 5, "save_steps": 5}
        changes |= {"pack_tokens": 0, "compile_layers": False}  # with a fault, sft.sh does not plan
        rows = [json.loads(line) for line in made[1].read_text().splitlines()]
        many = [{**row, "video_id": f"{row['video_id']} {time}"} for time in range(40) for row in rows]
        (folder / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
        self.arguments = flags((made[0], folder / "many.jsonl"), self.out, **changes)
        environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
        paths = [str(FINETUNE), *filter(None, sys.path)]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        self.environment = {**environment, "NPROC_PER_NODE": "2", "DEEPSPEED_CONFIG": "zero2.json"}

    def start(self, name: str, fault: str = "") -> tuple[subprocess.Popen, Path]:
        """Start the run with sft.sh, or with an injected fault."""
        log = self.folder / name
        command = ["bash", str(FINETUNE / "scripts/sft.sh"), *self.arguments]
        if fault:
            command = [sys.executable, "-m", "qwen_vl_streaming.launch", "--nproc_per_node", "2", "--nnodes", "1"]
            command += ["--node_rank", "0", "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
            command += ["-m", "faulty", *self.arguments, "--deepspeed", str(FINETUNE / "zero2.json")]
        environment = {**self.environment, "LOG": str(log), "FAULT": fault}
        print(f"\n{name}: started", end="", flush=True)
        with log.open("w") as said:
            return subprocess.Popen(command, env=environment, stdout=said, stderr=said), log

    def wait_for_step(self, launcher: subprocess.Popen, log: Path, step: int) -> list[psutil.Process]:
        """Wait until the checkpoint after `step` exists, and a moment longer; returns the processes."""
        until = time.monotonic() + 120
        while not any(int(path.name[11:]) >= step for path in self.out.glob("checkpoint-*")):
            assert launcher.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.02)
        time.sleep(0.3)
        print(f", has reached step {step}", end="", flush=True)
        return sorted(psutil.Process(launcher.pid).children(), key=lambda process: int(process.environ()["RANK"]))

    def end(self, launcher: subprocess.Popen, log: Path, status: int) -> str:
        began = time.monotonic()
        line = ends(launcher, log, status, 200)
        print(f", ended after {time.monotonic() - began:.1f} s with status {status}: {line or 'no error'}", flush=True)
        return line

    def newest(self) -> int:
        return max((int(path.name[11:]) for path in self.out.glob("checkpoint-*")), default=0)


@pytest.fixture
def runs(made, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("fewer than two CUDA devices")
    runs = Runs(made, tmp_path)
    yield runs
    for log in tmp_path.glob("*.log"):
        for process in left(log):
            process.kill()


def test_a_run_on_two_gpus_always_ends(runs):
    """Every start resumes from what the previous one has saved."""
    launcher, log = runs.start("worker killed.log")
    _, second = runs.wait_for_step(launcher, log, 5)
    workers = [child for child in second.children() if child.cmdline() == second.cmdline()]
    workers[0].kill()
    began = time.monotonic()
    assert "process 1: a data worker " in runs.end(launcher, log, 1) and time.monotonic() - began < 30

    launcher, log = runs.start("process killed.log")
    first, second = runs.wait_for_step(launcher, log, runs.newest() + 5)
    second.kill()  # the first waits for it in NCCL
    began = time.monotonic()
    assert "process 1 was killed by SIGKILL" in runs.end(launcher, log, 1) and time.monotonic() - began < 30
    assert not first.is_running()

    launcher, log = runs.start("launcher killed.log")
    runs.wait_for_step(launcher, log, runs.newest() + 5)
    launcher.kill()
    launcher.wait()
    began = time.monotonic()
    while left(log):
        assert time.monotonic() - began < 30
        time.sleep(0.1)
    print(f", gone after {time.monotonic() - began:.1f} s", flush=True)

    line = runs.end(*runs.start("out of GPU memory.log", f"gpu for real 1 {runs.newest() + 3}"), 1)
    assert "process 1: out of GPU memory (CUDA out of memory" in line and "omit the flags" in line

    line = runs.end(*runs.start("NCCL error.log", f"nccl 0 {runs.newest() + 3}"), 1)
    assert "process 0: the connection to another process was lost" in line

    launcher, log = runs.start("SIGTERM.log")
    runs.wait_for_step(launcher, log, runs.newest() + 5)
    launcher.send_signal(signal.SIGTERM)
    runs.end(launcher, log, STOPPED)
    stopped = runs.newest()
    found = history(runs.out)
    assert sorted(found) == list(range(1, stopped + 1))
