"""A Trainer that resumes exactly: it saves complete checkpoints, continues from the newest as if it had never stopped,
and saves on SIGTERM. Does not depend on samples, masks and losses."""

import logging
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from accelerate.utils import broadcast_object_list, gather_object
from qwen_vl_streaming.common.ending import start_worker
from qwen_vl_streaming.common.errors import InputError
from transformers import PreTrainedModel, Trainer, TrainerCallback

from .checkpointing import (
    BEING_REMOVED,
    BEING_SAVED,
    PROGRESS,
    REMOVE,
    commit_checkpoint,
    complete_checkpoints,
    hashes,
    loading,
    newest_checkpoint,
    read_progress,
    remove,
    saving,
    weights_only,
)
from .collectives import all_reduce, any_process

logger = logging.getLogger(__name__)

FINITE = ("loss", "train_loss", "eval_loss", "grad_norm")
"""Logged values that end a run when they are NaN or infinite."""


class StopOnSigterm(TrainerCallback):
    """After SIGTERM to any process, all of them save after the same optimizer step and stop."""

    def __init__(self):
        self.requested = self.stopped = False
        self.previous_handler = signal.SIG_DFL

    def _request(self, number, frame) -> None:
        self.requested = True

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)  # Trainer would keep the intervals of the checkpoint
        self.previous_handler = signal.signal(signal.SIGTERM, self._request)

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGTERM, self.previous_handler)

    def on_step_end(self, args, state, control, **kwargs):
        if any_process(self.requested, args.device) and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True


def init_worker(worker: int, parent: int, then: Callable[[int], None] | None) -> None:
    """The `worker_init_fn` of data workers of the process `parent`; calls the original one, `then`."""
    start_worker(parent)
    if then:
        then(worker)


class ResumableTrainer(Trainer):
    """Trainer that resumes from its newest complete checkpoint. Subclasses add state with `on_resume` and
    `resume_state`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.saving = False
        self.progress: dict | None = None
        self.stop = StopOnSigterm()
        self.add_callback(self.stop)

    def train_or_resume(self) -> bool:
        """Train from the newest complete checkpoint, or from the start. Returns False if SIGTERM stopped it early."""
        checkpoint = self._find_checkpoint()
        if checkpoint:
            self.progress = read_progress(Path(checkpoint))
            self._check_hashes(Path(checkpoint), self.progress.pop("sha256"))
            logger.info("resuming from %s", checkpoint)
        self.on_resume(self.progress)
        with weights_only(checkpoint):
            self.train(resume_from_checkpoint=checkpoint)
        return not self.stop.stopped

    def on_resume(self, progress: dict | None) -> None:
        """Called before training with what `resume_state` returned at the checkpoint; None at the start of a run."""

    def resume_state(self) -> dict:
        """What `on_resume` needs. Called on every process; that of the first is saved."""
        return {}

    def _check_hashes(self, checkpoint: Path, expected: dict[str, str]) -> None:
        """Each process reads its share. Raises InputError on all of them where a file has changed."""
        names = sorted(expected)[self.args.process_index :: self.args.world_size]
        with loading(checkpoint):
            found = hashes(checkpoint, names)
        changed = gather_object([name for name in names if found[name] != expected[name]])
        if changed:
            raise InputError(f"{checkpoint} is damaged ({min(changed)} has changed since it was saved): {REMOVE}")

    def _find_checkpoint(self) -> str | None:
        output = Path(self.args.output_dir)
        if self.args.should_save:
            output.mkdir(parents=True, exist_ok=True)
            for partial_folder in (BEING_SAVED, BEING_REMOVED):
                shutil.rmtree(output / partial_folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        mine = newest_checkpoint(output)
        (first,) = broadcast_object_list([mine])
        if any_process(first != mine, self.args.device):
            raise InputError(
                f"not every process sees {first or 'the same checkpoints'}: give an --output_dir on storage that all "
                "nodes share"
            )
        return first

    def _get_dataloader(self, *args, **kwargs):
        loader = super()._get_dataloader(*args, **kwargs)
        then = loader.worker_init_fn
        loader.base_dataloader.worker_init_fn = partial(init_worker, parent=os.getpid(), then=then)
        return loader

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with loading(resume_from_checkpoint):
            if not isinstance(self.model, PreTrainedModel):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
                return
            # Checkpoints have the parameter names of the published Qwen2.5-VL. Trainer does not convert them: it would
            # match no weight, only warn, and continue from the initial weights.
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
        """Raises InputError, on all processes at once, for a NaN or infinite loss or gradient norm."""
        super().log(logs, *args, **kwargs)
        for name in FINITE:
            if name in logs and not math.isfinite(logs[name]):
                raise InputError(
                    f"{name} is {float(logs[name])} at step {self.state.global_step}: lower --learning_rate, or check "
                    "the initial model for NaN or infinite weights"
                )

    def _run_epoch(self, *args, **kwargs):
        if self.progress:
            # Trainer does not restore the losses since the last log.
            self._tr_loss += self.progress["loss_since_logged"]
            self._globalstep_last_logged = self.progress["last_logged"]
            self.progress = None
        if self.state.global_step >= self.state.max_steps:
            # Killed after the last step: Trainer would run one more.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial) -> str:
        return str(Path(self.args.output_dir) / BEING_SAVED) if self.saving else self.args.output_dir

    def _save(self, output_dir=None, state_dict=None) -> None:
        if state_dict:
            # DeepSpeed passes copies, in which transformers cannot detect tied embeddings.
            ties = self.model.all_tied_weights_keys
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in ties}
        super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model, trial) -> None:
        output = Path(self.args.output_dir)
        final = output / f"checkpoint-{self.state.global_step}"
        if (final / PROGRESS).exists():  # the last step of an epoch may have been saved already
            return
        (loss,) = all_reduce([self._tr_loss.item() / self.args.world_size], self.args.device)
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
            **self.resume_state(),
        }
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            with saving(output):
                commit_checkpoint(output / BEING_SAVED / final.name, final, progress)
                for path in complete_checkpoints(output)[: -(self.args.save_total_limit or sys.maxsize)]:
                    remove(path)
        self.accelerator.wait_for_everyone()
