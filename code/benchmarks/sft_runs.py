"""Starts the training runs of sft.py and plans.py, ends them, and shows how long they took to start."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import kernels
import psutil
from qwen_vl_streaming.common.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
FINETUNE = ROOT / "code/qwen-vl-finetune"
SFT = ["bash", str(FINETUNE / "scripts/sft.sh")]
BUDGET = {"min_pixels_per_frame": 50_176, "max_pixels_per_frame": 78_400}
"""364 x 196 is kept, and 1920 x 1080 is resized to it."""


@dataclass(frozen=True)
class Run:
    """One training run."""

    nodes: int
    each: int
    """Processes of a node."""
    configuration: str
    """A DeepSpeed configuration as for sft.sh, or `none`."""
    repeat: int = 1
    """Counts the same run, where it is given several times."""

    @classmethod
    def parse_all(cls, texts: Sequence[str]) -> list["Run"]:
        """Parse several, of which some may be the same."""
        return [replace(cls.parse(text), repeat=texts[: index + 1].count(text)) for index, text in enumerate(texts)]

    @classmethod
    def parse(cls, text: str) -> "Run":
        """Parse a text such as 2:zero3.json or 2x2:zero2.json. Raises InputError if it is malformed."""
        found = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*):(.+)", text)
        if not found or (found[1] and found[3] == "none"):
            raise InputError(
                f"--runs {text}: give [NODESx]PROCESSES:CONFIGURATION, such as 2:zero3.json, 2x2:zero2.json or 1:none"
            )
        return cls(int(found[1] or 1), int(found[2]), found[3])

    @property
    def processes(self) -> int:
        """Of all nodes."""
        return self.nodes * self.each

    @property
    def name(self) -> str:
        """Name of the output folder."""
        nodes = f"{self.nodes}x" if self.nodes > 1 else ""
        again = f"-{self.repeat}" if self.repeat > 1 else ""
        return f"{nodes}{self.each}-{Path(self.configuration).stem}{again}"


def add_hook(environment: dict[str, str], folder: Path, text: str) -> None:
    """Let the Python processes of a run start with the program `text`, which is written below `folder`."""
    hook = folder / "hook"
    hook.mkdir(exist_ok=True)
    (hook / "sitecustomize.py").write_text(text)
    further = environment.get("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    environment["PYTHONPATH"] = os.pathsep.join([str(hook), further]).rstrip(":")


def empty_cache(folder: Path) -> None:
    """Have all runs that write to `folder` share one cache of compiled code, which is empty now."""
    cache = folder / "compiled"
    shutil.rmtree(cache, ignore_errors=True)
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TRITON_CACHE_DIR": str(cache / "triton")}


def log_of(output: Path, rank: int) -> Path:
    """The log of a node of the run with the folder `output`."""
    return output.with_suffix(f".{rank}.log" if rank else ".log")


def launch(
    command: list[str],
    flags: dict,
    further: Sequence[str],
    environment: dict[str, str],
    output: Path,
    arguments,
    rank: int = 0,
) -> subprocess.Popen:
    """Start a training of `arguments.steps` steps by `command`, with `flags` and `further` ones. Its log is beside the
    folder `output`, also that of a further node, by its `rank`."""
    if rank == 0:
        shutil.rmtree(output, ignore_errors=True)
    output.parent.mkdir(exist_ok=True)
    flags = {
        "output_dir": output,
        "max_steps": arguments.steps,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        **BUDGET,
        "max_pixels_per_video": 2 * arguments.seconds * BUDGET["max_pixels_per_frame"],
        **flags,
    }
    options = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    environment = {**os.environ, "QWEN2_5_VL_VARIANT": arguments.variant, **environment}
    with log_of(output, rank).open("w") as file:
        return subprocess.Popen([*command, *options, *further], env=environment, stdout=file, stderr=subprocess.STDOUT)


def start(
    chosen: Run, arguments, further: list[str], checkpoint: Path, data: Path
) -> tuple[list[subprocess.Popen], Path]:
    """Start a run. Returns the process of each node and its output folder."""
    processes, cpu = str(chosen.each), arguments.device == "cpu"
    flags = {
        "gradient_accumulation_steps": arguments.batch // (arguments.per_device * chosen.processes),
        "per_device_train_batch_size": arguments.per_device,
        **({"bf16": False} if cpu or arguments.float32 else {}),
    }
    environment = {
        "QWEN2_5_VL_MODEL_PATH": str(checkpoint),
        "QWEN2_5_VL_TRAIN_DATA": str(data),
        "NPROC_PER_NODE": processes,
        "DEEPSPEED_CONFIG": chosen.configuration,
    }
    if chosen.configuration == "none":
        environment["PYTHONPATH"] = os.pathsep.join([str(FINETUNE), os.environ.get("PYTHONPATH", "")])
        launcher = [sys.executable, "-m", "qwen_vl_streaming.launch", "--standalone", "--nproc_per_node", processes]
        files = ["--model_name_or_path", str(checkpoint), "--train_data", str(data)]
        command = [*launcher, "-m", "qwenvl.rank", *files, *(["--use_cpu", "True"] if cpu else [])]
    else:
        command = SFT
    output = arguments.folder / "runs" / chosen.name
    if arguments.profile:
        add_hook(environment, arguments.folder, kernels.HOOK)
        environment[kernels.FOLDER] = str(output)
    if chosen.nodes == 1:
        return [launch(command, flags, further, environment, output, arguments)], output
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment |= {
            "NNODES": str(chosen.nodes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
        }
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(chosen.processes)))).split(",")
    nodes = []
    for rank in range(chosen.nodes):
        own = ",".join(gpus[rank * chosen.each :][: chosen.each])
        node = {"NODE_RANK": str(rank), **({} if cpu else {"CUDA_VISIBLE_DEVICES": own})}
        nodes.append(launch(command, flags, further, environment | node, output, arguments, rank))
    return nodes, output


def end(process: subprocess.Popen) -> None:
    """Kill a run and its workers unless it has ended."""
    if process.poll() is None:
        for each in (*psutil.Process(process.pid).children(recursive=True), process):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                each.kill()
        process.wait()


def finish(process: subprocess.Popen, log: Path, limit: float) -> bool:
    """Wait for a run. If it fails or exceeds `limit` seconds, kill it, print the end of its log and return False."""
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        status = f"none (killed after {limit:.0f} s)"
        end(process)
    if status != 0:
        lines = log.read_text(errors="replace").splitlines()
        print(f"{log.stem}: exit status {status}; its log ends:", *lines[-25:], sep="\n    ", flush=True)
    return status == 0


def delete_weights(output: Path) -> None:
    """Delete those of a run: at the real size they would soon fill the disk."""
    for weights in output.glob("*.safetensors"):
        weights.unlink()


def show_startup(startups: dict[str, dict[str, float]]) -> None:
    """Print the seconds to the first step of each run, and of their parts."""
    parts = list(dict.fromkeys(part for startup in startups.values() for part in startup))
    print(f"\n{'seconds to first step':<24}{'all':>12}" + "".join(f"{part:>12}" for part in parts))
    for name, startup in startups.items():
        seconds = [sum(startup.values()), *(startup.get(part, 0) for part in parts)]
        print(f"{name:<24}" + "".join(f"{each:>12.1f}" for each in seconds), flush=True)
