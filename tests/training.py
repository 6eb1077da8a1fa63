"""Runs of the training program in separate processes, which tests can kill. They start quickly, because a fork server
has imported everything."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.forkserver import ensure_running
from pathlib import Path

import psutil
import refusing
import torch
from waiting import SECONDS

FLAGS = {
    "variant": "group",
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "num_train_epochs": 3,
    "dataloader_num_workers": 0,
    "min_pixels_per_frame": 3136,
    "max_pixels_per_frame": 3136,
}


def flags(made: tuple[Path, Path], output: Path, **changes) -> list[str]:
    """Command line of a run on the eight videos of `made`: 4 steps per epoch and 12 in total, if run by one process."""
    checkpoint, data = made
    given = {"model_name_or_path": checkpoint, "train_data": data, "output_dir": output, **FLAGS, **changes}
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


def _run(arguments: list[str], log: Path, environment: dict, act: str | None, step: int) -> None:
    with log.open("a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # for data workers, as when the program is started directly
    torch.set_num_threads(1)
    torch.compiler.set_default_backend("aot_eager")  # the default one takes minutes, and needs a C++ compiler
    sys.argv = ["sft.sh", *arguments]
    from qwen_vl_streaming.launch.failing import run_rank
    from qwenvl import rank, resumable, train

    if act == "slow save":
        saved = torch.save

        def save(what, path, *rest, **options):
            if "optimizer" in str(path) and f"checkpoint-{step}" in str(path):
                Path(path).write_bytes(b"half")
                log.with_suffix(".saving").touch()
                time.sleep(60)
            saved(what, path, *rest, **options)

        torch.save = save
    elif act == "kill at the end":
        train.save_final_model = lambda trainer, folder: os.kill(os.getpid(), signal.SIGKILL)
    elif act:
        original = resumable.StopOnSigterm.on_step_end

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                # Sent by another process, and to data workers too, as SLURM does.
                ours = [str(process.pid) for process in (*psutil.Process().children(), psutil.Process())]
                subprocess.run(["kill", f"-{act[3:]}", *ours])
                until = time.monotonic() + SECONDS
                while act == "SIGTERM" and not self.requested and time.monotonic() < until:
                    time.sleep(0.01)  # another thread may have received the signal
            original(self, args, state, control, **kwargs)

        resumable.StopOnSigterm.on_step_end = on_step_end
    run_rank(train.main, rank.GPU, rank.HOST)


def start(arguments: list[str], log: Path, act: str | None = None, step: int = 0, **environment: str):
    """Start a run and append its output to `log`. It receives the signal `act` after optimizer step `step`. With "slow
    save", it blocks while it saves that step. With "kill at the end", it is killed before it saves the final model."""
    process = fork_server().Process(target=_run, args=(arguments, log, environment, act, step))
    process.start()
    return process


def fork_server():
    """A context of multiprocessing whose processes are forks of a server that has imported all programs. All tests
    share it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "qwenvl.train",
            "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
            "captioning",
            "torch.distributed.run",
            "deepspeed",
        ]
    )
    before = os.environ.get("PYTHONPATH")
    try:
        # The server imports modules before it receives sys.path.
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def free_port() -> int:
    """A port below those that the system hands out, so that nobody else is given it before it is opened."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(max(1024, lowest - 20_000), lowest)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("", port))
            return port


def start_many(processes: int, arguments: list[str], log: Path, **actions) -> list:
    """Start a run with several processes. `actions` (act, step) apply to the last one."""
    number, port = str(processes), str(free_port())
    common = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start(arguments, log, RANK=str(r), LOCAL_RANK=str(r), **common, **(actions if r == processes - 1 else {}))
        for r in range(processes)
    ]


def start_two(arguments: list[str], log: Path, **actions) -> list:
    return start_many(2, arguments, log, **actions)


def spoil(video: Path, copy: Path) -> Path:
    """Copy an MP4 and overwrite its frames with zeros: its header is valid, but its frames do not decode."""
    data = bytearray(video.read_bytes())
    start = data.index(b"mdat") + 4
    end = start - 8 + int.from_bytes(data[start - 8 : start - 4], "big")
    data[start:end] = bytes(end - start)
    copy.write_bytes(data)
    return copy


def finish(process, status: int = 0, seconds: float = 2 * SECONDS) -> None:
    """Wait for a run and assert that it exits with `status`."""
    process.join(seconds)
    assert process.exitcode == status


def refused(arguments: list[str], capsys, monkeypatch) -> str:
    """Run the program with `arguments` in this process. Asserts that it exits with status 2 and prints a single error
    line, which is returned."""
    from qwen_vl_streaming.common.errors import run
    from qwenvl import train

    monkeypatch.setattr("sys.argv", ["sft.sh", *arguments])
    return refusing.refused(run, capsys, train.main)


def history(output: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step, from the newest checkpoint of a run."""
    newest = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    entries = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: (entry["loss"], entry["grad_norm"]) for entry in entries if "loss" in entry}
