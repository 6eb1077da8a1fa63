"""Runs of the evaluation in processes of their own, which tests may kill. They start in a moment, as in training.py."""

import contextlib
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

import psutil
import torch

FLAGS = {
    "variant": "group",
    "device": "cpu",
    "workers": 0,
    "batch-size": 2,
    "max-new-tokens": 30,
    "min-pixels-per-frame": 3136,
    "max-pixels-per-frame": 3136,
}


def _run(arguments: list[str], log: Path, lost: float, act: str | None) -> None:
    with log.open("a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.setsid()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.argv = ["eval.sh", *arguments]
    import crew
    import eval as evaluation

    crew.POLL, crew.LOST = 0.05, lost
    evaluation.prepare_scoring = evaluation.score_rows = lambda *_: None  # Java takes seconds, and is tested elsewhere
    if act:
        import watching

        loaded, captioned = watching.load_model, watching.caption_all

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

        watching.load_model, watching.caption_all = load_model, caption_all
    evaluation.program()


def start(made: tuple[Path, Path], output: Path, log: Path, lost: float = 60, act: str | None = None, **changes):
    """Start a run over the videos of `made`, with flags given as `batch_size=8`; it writes what it says to `log`. `act`
    is what befalls each of its processes: "kill worker", one that decodes, while the model loads; "bug"; "memory"."""
    checkpoint, data = made
    given = {"model": checkpoint, "data": data, "output-dir": output, **FLAGS}
    given |= {name.replace("_", "-"): value for name, value in changes.items()}
    arguments = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    context = multiprocessing.get_context("forkserver")
    # Training's too: the server is the same for all tests, and what the first of them asks for is what it has.
    context.set_forkserver_preload(["qwenvl.train", "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl", "watching"])
    with contextlib.ExitStack() as stack:
        before = os.environ.get("PYTHONPATH")
        stack.callback(lambda: os.environ.update(PYTHONPATH=before) if before else os.environ.pop("PYTHONPATH"))
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        process = context.Process(target=_run, args=(arguments, log, lost, act))
        process.start()
    return process


def finish(process, log: Path, status: int = 0) -> str:
    """Wait for a run, which must end with `status`; returns what it and those before it have said."""
    process.join(120)
    assert process.exitcode == status, log.read_text()
    return log.read_text()


def crew_of(process) -> list[psutil.Process]:
    """The processes that watch for a run."""
    return psutil.Process(process.pid).children()


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
