"""The output folder: writable, without files of another run, and locked by one run at a time.

Does not know what a run consists of.
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
from qwen_vl_streaming.common.files import read_object
from transformers.trainer_utils import sort_checkpoints

from .checkpointing import BEING_REMOVED, BEING_SAVED, OTHER_OUTPUT, PROGRESS

logger = logging.getLogger(__name__)

LOCK = ".lock"
FILES = (LOCK, "config.json", "loss.png", "run.json", "skipped.jsonl", "throughput.json")
FOLDERS = (BEING_REMOVED, BEING_SAVED, "runs")
MODEL_FILES = ("*.safetensors", "*.bin", "*.index.json", "config.json")
"""Files that make a folder a model, of whatever program."""
MERGED = "merged"
"""Key of run.json in a folder that qwenvl.merge has written."""


def check_folder(folder: Path, variant: str, model: str) -> None:
    """Raises InputError if `folder` is the initial `model`, has a model of another variant or of another program, or
    has checkpoints that are incomplete or of another program."""
    for name in (*FILES, *FOLDERS):
        path = folder / name
        if os.path.exists(path) and os.path.isdir(path) != (name in FOLDERS):
            kind = "folder" if name in FOLDERS else "file"
            raise InputError(f"{path} is not a {kind}: move it, or give another --output_dir")
    if Path(model).is_dir() and folder.resolve() == Path(model).resolve():
        raise InputError(f"--output_dir {folder} is the initial model, which would be overwritten: give another")
    if not os.path.isdir(folder):
        return
    config = folder / "config.json"
    if config.exists() and (other := read_object(config, OTHER_OUTPUT).get("streaming_variant")) not in (None, variant):
        raise InputError(f"{folder} has a model trained as {other}, not {variant}: give another --output_dir")
    model_file = next((path for pattern in MODEL_FILES for path in folder.glob(pattern)), None)
    record = folder / "run.json"
    if model_file and not (record.exists() and MERGED not in read_object(record, OTHER_OUTPUT)):
        raise InputError(
            f"{model_file} was not written by a training run, and would be overwritten: give another --output_dir"
        )
    for path in map(Path, sort_checkpoints(str(folder))):
        if not (path / PROGRESS).exists():
            raise InputError(
                f"{path} has no {PROGRESS}, so it is incomplete or was written by another program: move it, or "
                "give another --output_dir"
            )


def make_folder(folder: Path) -> None:
    """Raises InputError where the folder cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"--output_dir {folder} cannot be written to ({error.strerror}): give another") from error


@contextlib.contextmanager
def lock_folder(folder: Path, is_main: bool) -> Iterator[None]:
    """Lock `folder` for this run; the main process holds the lock. Entered by all processes at once; raises InputError
    on all of them where another run holds it."""
    with contextlib.ExitStack() as stack:
        locked_by_other = False
        if is_main:
            lock = stack.enter_context((folder / LOCK).open("a"))
            try:
                # Unlike a lock of flock, this one is not inherited by data workers, which may outlive the process.
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                locked_by_other = True
            except OSError as error:
                logger.warning("%s cannot be locked (%s): do not start another run there", folder, error.strerror)
        (locked_by_other,) = broadcast_object_list([locked_by_other])
        if locked_by_other:
            raise InputError(f"another run is using {folder}: wait for it, stop it, or give another --output_dir")
        yield
