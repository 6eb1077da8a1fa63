"""Work that is not lost: whole checkpoints, the one to resume from, and an orderly stop on SIGTERM.

A checkpoint is written into `being_saved` and renamed to `checkpoint-N` when every process has written its part, so
one that is called `checkpoint-N` is whole. Knows nothing of samples, masks and what a loss is.
"""

import contextlib
import json
import logging
import math
import os
import pickle
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object
from qwen_vl_streaming.common.ending import start_worker
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.model.checkpoint import of_file
from safetensors import SafetensorError
from torch import distributed
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import sort_checkpoints

logger = logging.getLogger(__name__)

BEING_SAVED, BEING_REMOVED = "being_saved", "being_removed"
PROGRESS = "progress.json"
"""Written last into a checkpoint. It holds what `kept` gave, and the size and SHA-256 of each other file."""
WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
STATE = "trainer_state.json"
FINITE = ("loss", "train_loss", "eval_loss", "grad_norm")
"""What is logged, and stops a run where it is NaN or infinite."""
DAMAGED = (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError)
"""What files raise that are not as they were written."""


class CannotSave(InputError):
    """Something that must be saved cannot be written. One process alone meets it, and others may wait for that."""

    of_one = True


def add_up(values: list[float], device: torch.device, take=distributed.ReduceOp.SUM) -> list[float]:
    """The sums (or what `take` says) of `values` over all processes, element by element."""
    if not distributed.is_initialized():
        return values
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(sums, take)
    return sums.tolist()


def write_whole(path: Path, text: str) -> None:
    """Write `path` whole or not at all, for a reader at any time and after a power cut."""
    beside = path.with_name(f".{path.name}.part")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


@contextlib.contextmanager
def saving(where: Path) -> Iterator[None]:
    """Raises CannotSave for what goes wrong with the disk while something is written into `where`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
        if isinstance(error, RuntimeError):
            if "inline_container" not in reason and "unexpected pos" not in reason:
                raise
            reason = "the disk is full, or fails"  # of which torch.save tells only so
        raise CannotSave(
            f"{where} cannot be written ({reason}): make room, and the same command goes on from the newest whole "
            "checkpoint"
        ) from error


@contextlib.contextmanager
def loading(checkpoint: str | Path) -> Iterator[None]:
    """Raises InputError for what cannot be read of a checkpoint that is to be gone on from."""
    try:
        yield
    except (torch.OutOfMemoryError, distributed.DistError):
        raise
    except DAMAGED as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"{checkpoint} is damaged ({reason:.200}): remove it, and the run goes on from the one before, if any"
        ) from error


def read_json(path: Path) -> dict:
    """An object that a run has left. Raises InputError where it is broken."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is broken ({error}): remove it, or give another --output_dir") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is broken (it holds no object): remove it, or give another --output_dir")
    return found


def remove(folder: Path) -> None:
    """Remove a folder; one that is removed only in part no longer bears its name."""
    away = folder.with_name(BEING_REMOVED)
    shutil.rmtree(away, ignore_errors=True)
    if folder.exists():
        folder.rename(away)
        shutil.rmtree(away)


def sync(paths: Iterable[Path]) -> None:
    """Have the disk hold these files, and the names in these folders."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def save_whole(trainer: Trainer, folder: Path) -> None:
    """Save model and processor into `folder`, config.json last: without it the folder is no checkpoint."""
    beside = folder / BEING_SAVED
    with saving(folder):
        trainer.save_model(str(beside))
        if trainer.is_world_process_zero():
            if not any(beside.glob("*.safetensors")):
                raise RuntimeError(f"no weights were saved into {beside}")
            for path in sorted(beside.iterdir(), key=lambda path: path.name == "config.json"):
                os.replace(path, folder / path.name)
            beside.rmdir()
    trainer.accelerator.wait_for_everyone()


def whole_checkpoints(output: Path) -> list[Path]:
    """Those that this program has written in `output`, by their steps."""
    return [Path(path) for path in sort_checkpoints(str(output)) if (Path(path) / PROGRESS).exists()]


def newest_checkpoint(output: Path) -> str | None:
    """The whole checkpoint in `output` with the most steps."""
    return next((str(path) for path in reversed(whole_checkpoints(output))), None)


@contextlib.contextmanager
def only_data(checkpoint: str | None) -> Iterator[None]:
    """What is unpickled of `checkpoint` meanwhile is data: DeepSpeed reads its states with a torch.load that may run
    any code in them. Raises InputError where they hold more."""
    if not checkpoint:
        yield
        return
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    known = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
    before = os.environ.get(WEIGHTS_ONLY)
    os.environ[WEIGHTS_ONLY] = "1"
    try:
        with torch.serialization.safe_globals(known):
            yield
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{checkpoint} holds code, which is not run: remove it, and the run goes on from the one before, if any"
        ) from error
    finally:
        if before is None:
            del os.environ[WEIGHTS_ONLY]
        else:
            os.environ[WEIGHTS_ONLY] = before


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file below `folder` but PROGRESS and hidden ones, by its path from there."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / PROGRESS)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files if not path.name.startswith(".")}


def hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of these files in `folder`, several at a time."""
    names = list(names)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: of_file(folder / name), names), strict=True))


def read_progress(checkpoint: Path) -> dict:
    """What `kept` gave at a checkpoint. Raises InputError where that, or another file of it, is not all there, and for
    a file that was not saved with it."""
    mend = f"remove {checkpoint}, and the run goes on from the one before, if there is one"
    try:
        progress = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))
        wanted = progress.pop("bytes", {})  # an earlier version did not tell
        progress.setdefault("sha256", {})
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{checkpoint / PROGRESS} is broken ({error!r}): {mend}") from error
    there = sizes(checkpoint)
    for name, size in wanted.items():
        if there.get(name) != size:
            was = "is missing" if name not in there else f"has {there[name]} bytes where {size} were saved"
            raise InputError(f"{checkpoint / name} {was}: {mend}")
    if wanted and (strange := sorted(there.keys() - wanted.keys())):
        raise InputError(f"{checkpoint / strange[0]} was not saved with this checkpoint: move it away")
    with loading(checkpoint):
        TrainerState.load_from_json(str(checkpoint / STATE))
    return progress


def begin_worker(worker: int, parent: int, then: Callable[[int], None] | None) -> None:
    """Starts data worker `worker` of the process `parent`, with what was to be called `then`."""
    start_worker(parent)
    if then:
        then(worker)


class StopOnSigterm(TrainerCallback):
    """From SIGTERM to any process, all of them save after the same optimizer step and end."""

    def __init__(self):
        self.asked = self.stopped = False
        self.before = signal.SIG_DFL

    def _ask(self, number, frame) -> None:
        self.asked = True

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)  # Trainer would go on with those of the checkpoint
        self.before = signal.signal(signal.SIGTERM, self._ask)

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGTERM, self.before)

    def on_step_end(self, args, state, control, **kwargs):
        (asked,) = add_up([float(self.asked)], args.device)
        if asked and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True


class KeepingTrainer(Trainer):
    """Trainer that resumes from its last whole checkpoint as if it had never been away."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.saving = False
        self.progress: dict | None = None
        self.stop = StopOnSigterm()
        self.add_callback(self.stop)

    def train_on(self) -> bool:
        """Train from the last whole checkpoint, or from the start; False when SIGTERM has stopped it before its end."""
        checkpoint = self._checkpoint()
        if checkpoint:
            self.progress = read_progress(Path(checkpoint))
            self._check_hashes(Path(checkpoint), self.progress.pop("sha256"))
            logger.info("goes on from %s", checkpoint)
        self.begin(self.progress)
        with only_data(checkpoint):
            self.train(resume_from_checkpoint=checkpoint)
        return not self.stop.stopped

    def _check_hashes(self, checkpoint: Path, wanted: dict[str, str]) -> None:
        """Each process reads its share. On all of them raises InputError where a file is not as it was saved."""
        names = sorted(wanted)[self.args.process_index :: self.args.world_size]
        with loading(checkpoint):
            found = hashes(checkpoint, names)
        changed = gather_object([name for name in names if found[name] != wanted[name]])
        if changed:
            raise InputError(
                f"{checkpoint} is damaged ({min(changed)} has other contents than were saved): remove it, and the run "
                "goes on from the one before, if any"
            )

    def begin(self, progress: dict | None) -> None:
        """Called before training with what `kept` gave at the checkpoint; None at the start of a run."""

    def kept(self) -> dict:
        """What `begin` needs to go on from here. Called on every process; that of the first is kept."""
        return {}

    def _checkpoint(self) -> str | None:
        output = Path(self.args.output_dir)
        if self.args.should_save:
            output.mkdir(parents=True, exist_ok=True)
            for halves in (BEING_SAVED, BEING_REMOVED):
                shutil.rmtree(output / halves, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        mine = newest_checkpoint(output)
        (first,) = broadcast_object_list([mine])
        (others,) = add_up([float(first != mine)], self.args.device)
        if others:
            raise InputError(
                f"not every process sees {first or 'the same checkpoints'}: "
                "--output_dir must lie where all machines reach it"
            )
        return first

    def _get_dataloader(self, *args, **kwargs):
        loader = super()._get_dataloader(*args, **kwargs)
        then = loader.worker_init_fn
        loader.base_dataloader.worker_init_fn = partial(begin_worker, parent=os.getpid(), then=then)
        return loader

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with loading(resume_from_checkpoint):
            if not isinstance(self.model, PreTrainedModel):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
                return
            # Checkpoints hold the names that Qwen2.5-VL was published with. Trainer does not convert them: it would
            # find no weight that it knows, say so in a warning, and train on from where the run began.
            saved = type(self.model).from_pretrained(
                resume_from_checkpoint, dtype=self.model.dtype, attn_implementation="sdpa", trust_remote_code=False
            )
            self.model.load_state_dict(saved.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint):
        with loading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint):
        with loading(checkpoint):
            super()._load_rng_state(checkpoint)

    def log(self, logs, *args, **kwargs):
        """Raises InputError, on all processes at once, where a loss or the gradient is NaN or infinite."""
        super().log(logs, *args, **kwargs)
        for name in FINITE:
            if name in logs and not math.isfinite(logs[name]):
                raise InputError(
                    f"{name} is {float(logs[name])} at step {self.state.global_step}: lower --learning_rate, or look "
                    "for NaN or infinite weights in the model to begin with"
                )

    def _run_epoch(self, *args, **kwargs):
        if self.progress:
            # Trainer forgets the losses since it last logged.
            self._tr_loss += self.progress["loss_since_logged"]
            self._globalstep_last_logged = self.progress["last_logged"]
            self.progress = None
        if self.state.global_step >= self.state.max_steps:
            # Killed after its last step: Trainer would train one more.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial) -> str:
        return str(Path(self.args.output_dir) / BEING_SAVED) if self.saving else self.args.output_dir

    def _save(self, output_dir=None, state_dict=None) -> None:
        if state_dict:
            # DeepSpeed hands over copies, in which transformers cannot see that embeddings and lm_head are one.
            ties = self.model.all_tied_weights_keys
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in ties}
        super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model, trial) -> None:
        output = Path(self.args.output_dir)
        whole = output / f"checkpoint-{self.state.global_step}"
        if (whole / PROGRESS).exists():  # at the end of an epoch its last step may have been saved
            return
        beside = output / BEING_SAVED / whole.name
        (loss,) = add_up([self._tr_loss.item() / self.args.world_size], self.args.device)
        if not math.isfinite(loss):
            self.log({"loss": loss})
        self.saving = True
        with saving(output):
            super()._save_checkpoint(model, trial)
        self.saving = False
        progress = {
            "step": self.state.global_step,
            "last_logged": self._globalstep_last_logged,
            "loss_since_logged": loss,
            **self.kept(),
        }
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            with saving(output):
                bytes_of = sizes(beside)
                sync(beside.rglob("*"))
                write_whole(
                    beside / PROGRESS, json.dumps({**progress, "bytes": bytes_of, "sha256": hashes(beside, bytes_of)})
                )
                sync([beside])
                beside.rename(whole)
                beside.parent.rmdir()
                sync([output])
                for path in whole_checkpoints(output)[: -(self.args.save_total_limit or sys.maxsize)]:
                    remove(path)
        self.accelerator.wait_for_everyone()
