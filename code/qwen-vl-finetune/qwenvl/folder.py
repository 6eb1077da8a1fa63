"""The output folder: one that can be written to, holds nothing of another run, and is held by one run at a time.

Knows nothing of what a run is made of.
"""

import contextlib
import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from accelerate.utils import broadcast_object_list
from qwen_vl_streaming.common.errors import InputError
from transformers.trainer_utils import sort_checkpoints

from .checkpointing import BEING_REMOVED, BEING_SAVED, PROGRESS, read_json

logger = logging.getLogger(__name__)

LOCK = ".lock"
FILES = (LOCK, "config.json", "loss.png", "run.json", "skipped.jsonl", "throughput.json")
FOLDERS = (BEING_REMOVED, BEING_SAVED, "runs")
MODELS = ("*.safetensors", "*.bin", "*.index.json", "config.json")
"""Of a model, whoever has left it."""


def check_folder(folder: Path, variant: str, model: str) -> None:
    """Raises InputError for the folder of the `model` to begin with, for one with a model of another variant or one
    that no run has left there, and for one with checkpoints that this program did not write or that are only there in
    part."""
    for name in (*FILES, *FOLDERS):
        path = folder / name
        if os.path.exists(path) and os.path.isdir(path) != (name in FOLDERS):
            raise InputError(f"{path} is in the way of what a run writes there: move it, or give another --output_dir")
    if Path(model).is_dir() and folder.resolve() == Path(model).resolve():
        raise InputError(f"--output_dir {folder} is the model to begin with, which would be lost: give another")
    if not os.path.isdir(folder):
        return
    config = folder / "config.json"
    if config.exists() and (other := read_json(config).get("streaming_variant")) not in (None, variant):
        raise InputError(f"{folder} holds a model trained as {other}, not {variant}: give another --output_dir")
    theirs = next((path for pattern in MODELS for path in folder.glob(pattern)), None)
    if theirs and not (folder / "run.json").exists():
        raise InputError(f"{theirs} is not of a run, and would be lost: give another --output_dir")
    for path in map(Path, sort_checkpoints(str(folder))):
        if not (path / PROGRESS).exists():
            raise InputError(
                f"{path} has no {PROGRESS}, so it is of another program or not all there: "
                "move it away, or give another --output_dir"
            )


def make_folder(folder: Path) -> None:
    """Raises InputError where nothing can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"--output_dir {folder} cannot be written to ({error.strerror}): give another") from error


@contextlib.contextmanager
def only_one(folder: Path, first: bool) -> Iterator[None]:
    """Hold `folder` for this run, by its `first` process. Entered by all processes at once; on all of them raises
    InputError where another run holds it."""
    with contextlib.ExitStack() as stack:
        taken = False
        if first:
            lock = stack.enter_context((folder / LOCK).open("a"))
            try:
                # Unlike flock's, this lock does not stay with data workers that outlive the process for a moment.
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                taken = True
            except OSError as error:
                logger.warning("%s cannot be locked (%s): start no other run there meanwhile", folder, error.strerror)
        (taken,) = broadcast_object_list([taken])
        if taken:
            raise InputError(f"another run is at work in {folder}: wait for it, stop it, or give another --output_dir")
        yield
