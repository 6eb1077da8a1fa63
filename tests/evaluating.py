"""Runs of the evaluation in separate processes, which tests can kill. They start quickly, as in training.py."""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

import forked
import psutil
import torch
from training import fork_server, free_port
from waiting import SECONDS

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
    """Skip slow parts of the evaluation in this process, and inject the fault `act`."""
    torch.set_num_threads(1)
    import eval as evaluation
    import ranks

    ranks.POLL = 0.05
    evaluation.prepare_scoring = evaluation.score_rows = lambda *_: None  # Java takes seconds and is tested separately
    if not act:
        return
    if act.startswith("hold "):
        return _hold(*act.removeprefix("hold ").split(" ", 2))
    import captioning

    loaded, captioned = captioning.load_model, captioning.caption_all

    def load_model(*given):
        if act == "kill worker":
            psutil.Process().children()[0].kill()
            time.sleep(0.2)  # until the end of the worker is signalled
        return loaded(*given)

    def caption_all(*given, **options):
        if act == "bug":
            raise ZeroDivisionError("division by zero")
        if act == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return captioned(*given, **options)

    captioning.load_model, captioning.caption_all = load_model, caption_all


def _hold(rank: str, rows: str, file: str) -> None:
    """Make process `rank`, or all, wait after a number of `rows` with captions, as long as `file` exists."""
    import captioning

    appender, written, end = captioning.appender, [], time.monotonic() + 2 * SECONDS

    @contextlib.contextmanager
    def holding(*given):
        with appender(*given) as append:

            def appended(row):
                append(row)
                if "result" in row:  # else its video was skipped
                    written.append(row)
                if len(written) >= int(rows) and rank in ("all", os.environ.get("RANK", "0")):
                    while os.path.exists(file) and time.monotonic() < end:
                        time.sleep(0.02)

            yield appended

    captioning.appender = holding


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


def _launch(arguments: list[str], log: Path, act: str | None, processes: int, nodes: int, rank: int, port: int):
    """Start the launcher as eval.sh does, with this file instead of rank.py."""
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {"PYTHONPATH": paths, "ACT": act or "", "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    where = ["--nproc_per_node", processes, "--nnodes", nodes, "--node_rank", rank, "--master_addr", "127.0.0.1"]
    return forked.Launched(
        ["--max_restarts", 1, *where, "--master_port", port, __file__, *arguments], log, **environment
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
    """Start a run on the videos of `made` and append its output to `log`. `changes` are flags, such as `batch_size=8`.
    Several processes or nodes are started by the launcher. `act` is a fault in each process: "kill worker" kills a
    decoding worker while the model loads, "bug" raises ZeroDivisionError, "memory" raises OutOfMemoryError. "hold RANK
    ROWS FILE" makes this process, or all, wait after so many rows as long as the file exists."""
    checkpoint, data = made
    given = {"model": checkpoint, "data": data, "output-dir": output, **FLAGS}
    given |= {name.replace("_", "-"): value for name, value in changes.items()}
    arguments = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    if processes > 1 or nodes > 1:
        return _launch(arguments, log, act, processes, nodes, node_rank, port or free_port())
    process = fork_server().Process(target=_run, args=(arguments, log, act))
    process.start()
    return process


def finish(process, log: Path, status: int = 0) -> str:
    """Wait for a run and assert that it exits with `status`. Returns the log of this run and those before it."""
    process.join(2 * SECONDS)
    assert process.exitcode == status, log.read_text()
    return log.read_text()


def rank_of(launcher: forked.Launched, rank: int) -> psutil.Process:
    """The process of `rank` that the launcher has started."""
    for process in psutil.Process(launcher.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):  # another child has just ended
            if forked.rank_of(process) == str(rank):
                return process
    raise AssertionError(f"the launcher has no process of rank {rank}")


def finished(output: Path, pattern: str = "*") -> set[str]:
    """Ids of the videos for which a run has written rows: in its parts that match `pattern` and, if `pattern` is "*",
    in its result file."""
    found = set()
    for path in [
        *output.glob(f"*.parts/{pattern}.rows.jsonl"),
        *(output.glob("*_infer.json") if pattern == "*" else []),
    ]:
        with contextlib.suppress(FileNotFoundError):  # the parts have just been merged
            found |= {json.loads(line)["video_id"] for line in path.read_bytes().split(b"\n")[:-1]}
    return found


def wait_for_rows(output: Path, count: int, process, pattern: str = "*") -> None:
    """Wait until `count` videos are finished or the run has ended."""
    while process.exitcode is None and len(finished(output, pattern)) < count:
        time.sleep(0.01)


def rows(output: Path, variant: str = "group") -> list[dict]:
    """The rows of a result file, with `seconds` set to 0, since it differs between runs."""
    lines = (output / f"{variant}_infer.json").read_text().splitlines()
    return [{**json.loads(line), "seconds": 0} for line in lines]


if __name__ == "__main__":  # a process that the launcher has started
    from qwen_vl_streaming.launch.signals import die_with_launcher

    die_with_launcher()
    _prepare(os.environ["ACT"])
    import eval as evaluation

    evaluation.program()
