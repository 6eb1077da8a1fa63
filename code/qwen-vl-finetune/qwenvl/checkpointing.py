"""The files of a checkpoint: written completely or not at all, listed with their hashes, and checked before they load.

A checkpoint is written into `being_saved` and renamed to `checkpoint-N` once every process has written its part, so
`checkpoint-N` is always complete. Does not depend on what a step of training does.
"""

import contextlib
import json
import os
import pickle
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import patch_environment
from qwen_vl_streaming.common.errors import InputError, first_line
from qwen_vl_streaming.common.files import write_file
from qwen_vl_streaming.model.checkpoint import of_file
from safetensors import SafetensorError
from torch import distributed
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import sort_checkpoints

if TYPE_CHECKING:
    from transformers import Trainer  # slow, and the planner, which reads the record of a run, does not need it

BEING_SAVED, BEING_REMOVED = "being_saved", "being_removed"
PROGRESS = "progress.json"
"""Written last into a checkpoint: the state of the run, and the size and SHA-256 of each other file."""
STATE = "trainer_state.json"
DAMAGED = (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError)
"""What readers raise for files that are not as they were written."""
REMOVE = "remove it to resume from the previous checkpoint, if there is one"
OTHER_OUTPUT = "remove it, or give another --output_dir"


class SaveError(InputError):
    """A file cannot be written. Raised on one process only, while others may wait for it."""

    of_one = True


@contextlib.contextmanager
def saving(path: Path) -> Iterator[None]:
    """Raises SaveError for what goes wrong with the disk while something is written to `path`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        if isinstance(error, RuntimeError):
            if "inline_container" not in reason and "unexpected pos" not in reason:
                raise
            reason = "the disk is full or fails"  # torch.save says no more than that
        raise SaveError(
            f"{path} cannot be written ({reason}): free some space, then run the same command to resume from the "
            "newest complete checkpoint"
        ) from error


@contextlib.contextmanager
def loading(checkpoint: str | Path) -> Iterator[None]:
    """Raises InputError for what cannot be read of a checkpoint to resume from."""
    try:
        yield
    except (torch.OutOfMemoryError, distributed.DistError):
        raise
    except DAMAGED as error:
        reason = first_line(error)
        raise InputError(f"{checkpoint} is damaged ({reason:.200}): {REMOVE}") from error


@contextlib.contextmanager
def weights_only(checkpoint: str | None) -> Iterator[None]:
    """Restricts unpickling to tensors and plain data: DeepSpeed reads its states of `checkpoint` with a `torch.load`
    that could run any code in them. Raises InputError where they hold more."""
    if not checkpoint:
        yield
        return
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    allowed = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
    try:
        with patch_environment(TORCH_FORCE_WEIGHTS_ONLY_LOAD=1), torch.serialization.safe_globals(allowed):
            yield
    except pickle.UnpicklingError as error:
        raise InputError(f"{checkpoint} contains code, which is not run: {REMOVE}") from error


def remove(folder: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that a partly removed one is not taken for complete."""
    renamed = folder.with_name(BEING_REMOVED)
    shutil.rmtree(renamed, ignore_errors=True)
    if folder.exists():
        folder.rename(renamed)
        shutil.rmtree(renamed)


def sync(paths: Iterable[Path]) -> None:
    """Flush files, and the names in folders, to the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def save_final_model(trainer: "Trainer", folder: Path) -> None:
    """Save model and processor into `folder`, config.json last: without it the folder is not a checkpoint. Called by
    all processes."""
    partial = folder / BEING_SAVED
    with saving(folder):
        trainer.save_model(str(partial))
        if trainer.is_world_process_zero():
            if not any(partial.glob("*.safetensors")):
                raise RuntimeError(f"no weights were saved into {partial}")
            for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
                os.replace(path, folder / path.name)
            partial.rmdir()
    trainer.accelerator.wait_for_everyone()


def commit_checkpoint(partial: Path, final: Path, progress: dict) -> None:
    """Turn the folder `partial`, which all processes have written, into the checkpoint `final`, with `progress` and the
    hashes of its files. Called by one process; raises OSError."""
    size_of = sizes(partial)
    sync(partial.rglob("*"))
    manifest = {**progress, "bytes": size_of, "sha256": hashes(partial, size_of)}
    write_file(partial / PROGRESS, json.dumps(manifest), report=False)
    sync([partial])
    partial.rename(final)
    partial.parent.rmdir()
    sync([final.parent])


def complete_checkpoints(output: Path) -> list[Path]:
    """The checkpoints of this program in `output`, in the order of their steps."""
    return [Path(path) for path in sort_checkpoints(str(output)) if (Path(path) / PROGRESS).exists()]


def newest_checkpoint(output: Path) -> str | None:
    """The complete checkpoint in `output` with the most steps."""
    return next((str(path) for path in reversed(complete_checkpoints(output))), None)


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file in `folder` by its relative path, without PROGRESS and hidden files."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / PROGRESS)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files if not path.name.startswith(".")}


def hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of these files in `folder`, computed in parallel."""
    names = list(names)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: of_file(folder / name), names), strict=True))


def read_progress(checkpoint: Path) -> dict:
    """The state of the run at a checkpoint, with the `sha256` of its files. Raises InputError where a file is missing,
    has another size, or was not saved with the checkpoint."""
    fix = f"remove {checkpoint} to resume from the previous checkpoint, if there is one"
    try:
        progress = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))
        expected = progress.pop("bytes", {})  # earlier versions did not record it
        progress.setdefault("sha256", {})
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{checkpoint / PROGRESS} cannot be read ({error!r}): {fix}") from error
    found = sizes(checkpoint)
    for name, size in expected.items():
        if found.get(name) != size:
            problem = "is missing" if name not in found else f"has {found[name]} bytes, and {size} were saved"
            raise InputError(f"{checkpoint / name} {problem}: {fix}")
    if expected and (unexpected := sorted(found.keys() - expected.keys())):
        raise InputError(f"{checkpoint / unexpected[0]} was not saved with this checkpoint: move it")
    with loading(checkpoint):
        TrainerState.load_from_json(str(checkpoint / STATE))
    return progress
