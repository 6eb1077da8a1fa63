"""Runs of the evaluation in processes of their own, which tests may kill. Single ones start in a moment, as in
training.py."""

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from training import free_port

FLAGS = {
    "variant": "group",
    "device": "cpu",
    "workers": 0,
    "batch-size": 2,
    "max-new-tokens": 30,
    "min-pixels-per-frame": 3136,
    "max-pixels-per-frame": 3136,
}


def _prepare(act: str | None) -> None:
    """Make this process a quick one, in which `act` happens."""
    torch.set_num_threads(1)
    import eval as evaluation
    import ranks

    ranks.POLL = 0.05
    evaluation.prepare_scoring = evaluation.score_rows = lambda *_: None  # Java takes seconds, and is tested elsewhere
    if not act:
        return
    import captioning

    loaded, captioned = captioning.load_model, captioning.caption_all

    def load_model(*given):
        if act == "kill worker":
            psutil.Process().children()[0].kill()
            time.sleep(0.2)  # in which the signal comes
        return loaded(*given)

    def caption_all(*given, **options):
        if act == "bug":
            raise ZeroDivisionError("division by zero")
        if act == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return captioned(*given, **options)

    captioning.load_model, captioning.caption_all = load_model, caption_all


def _run(arguments: list[str], log: Path, act: str | None) -> None:
    with log.open("a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.setsid()
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.argv = ["eval.sh", *arguments]
    _prepare(act)
    import eval as evaluation

    evaluation.program()


class Launched:
    """A launcher, with the names of multiprocessing's processes."""

    def __init__(self, run: subprocess.Popen):
        self.run, self.pid = run, run.pid

    @property
    def exitcode(self) -> int | None:
        return self.run.poll()

    def join(self, timeout: float | None = None) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.run.wait(timeout)


def _launch(arguments: list[str], log: Path, act: str | None, processes: int, nodes: int, rank: int, port: int):
    """Start the launcher as eval.sh does, with this file in the place of rank.py."""
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, "ACT": act or ""}
    environment |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    where = ["--nproc_per_node", processes, "--nnodes", nodes, "--node_rank", rank, "--master_addr", "127.0.0.1"]
    command = [sys.executable, "-m", "qwen_vl_streaming.launch", "--max_restarts", 1, *where, "--master_port", port]
    with log.open("a") as said:
        return Launched(
            subprocess.Popen(
                [*map(str, command), __file__, *arguments],
                env=environment,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        )


def start(
    made: tuple[Path, Path],
    output: Path,
    log: Path,
    act: str | None = None,
    processes: int = 1,
    nodes: int = 1,
    node_rank: int = 0,
    port: int = 0,
    **changes,
):
    """Start a run over the videos of `made`, with flags given as `batch_size=8`; it writes what it says to `log`.
    Several processes, or nodes, are started by the launcher. `act` is what befalls each process: "kill worker", one
    that decodes, while the model loads; "bug"; "memory"."""
    checkpoint, data = made
    given = {"model": checkpoint, "data": data, "output-dir": output, **FLAGS}
    given |= {name.replace("_", "-"): value for name, value in changes.items()}
    arguments = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    if processes > 1 or nodes > 1:
        return _launch(arguments, log, act, processes, nodes, node_rank, port or free_port())
    context = multiprocessing.get_context("forkserver")
    # Training's too: the server is the same for all tests, and what the first of them asks for is what it has.
    context.set_forkserver_preload(["qwenvl.train", "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl", "captioning"])
    with contextlib.ExitStack() as stack:
        before = os.environ.get("PYTHONPATH")
        stack.callback(lambda: os.environ.update(PYTHONPATH=before) if before else os.environ.pop("PYTHONPATH"))
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        process = context.Process(target=_run, args=(arguments, log, act))
        process.start()
    return process


def finish(process, log: Path, status: int = 0) -> str:
    """Wait for a run, which must end with `status`; returns what it and those before it have said."""
    process.join(120)
    assert process.exitcode == status, log.read_text()
    return log.read_text()


def rank_of(launcher: Launched, rank: int) -> psutil.Process:
    """A process that the launcher has started."""
    ranks = psutil.Process(launcher.pid).children()
    return next(process for process in ranks if process.environ().get("RANK") == str(rank))


def finished(output: Path, pattern: str = "*") -> set[str]:
    """Videos that an unfinished run has rows of, in its parts that fit `pattern` and, for all, in the file."""
    found = set()
    for path in [
        *output.glob(f"*.parts/{pattern}.rows.jsonl"),
        *(output.glob("*_infer.json") if pattern == "*" else []),
    ]:
        with contextlib.suppress(FileNotFoundError):  # the parts have just been brought together
            found |= {json.loads(line)["video_id"] for line in path.read_bytes().split(b"\n")[:-1]}
    return found


def wait_for_rows(output: Path, count: int, process, pattern: str = "*") -> None:
    """Until `finished` are `count`, or the run has ended."""
    while process.exitcode is None and len(finished(output, pattern)) < count:
        time.sleep(0.01)


def rows(output: Path, variant: str = "group") -> list[dict]:
    """The rows of a result file, byte for byte what was written but for the time that each took."""
    lines = (output / f"{variant}_infer.json").read_text().splitlines()
    return [{**json.loads(line), "seconds": 0} for line in lines]


if __name__ == "__main__":  # one process that the launcher has started
    from qwen_vl_streaming.launch.signals import die_with_launcher

    die_with_launcher()
    _prepare(os.environ["ACT"])
    import eval as evaluation

    evaluation.program()
