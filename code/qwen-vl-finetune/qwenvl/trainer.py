"""The Trainer of the streaming variants: masks, skipped samples, evaluation, and the reports of a run."""

import logging
import math
from dataclasses import asdict
from pathlib import Path

import torch
from qwen_vl_streaming.common.progress import Progress
from qwen_vl_streaming.model.base_files import BaseFiles
from qwen_vl_streaming.timeline.attention import make_mask
from transformers import ProgressCallback, TrainerCallback

from .batches import EpochSampler
from .checkpointing import saving
from .collectives import all_reduce
from .curves import continue_tensorboard, draw_curves
from .data import IGNORED
from .param_groups import make_optimizer
from .record import RunRecord
from .resumable import ResumableTrainer
from .skipped import Skipped
from .startup import Startup
from .throughput import Throughput, Work, write_throughput
from .training_arguments import PAPER_SAMPLES

logger = logging.getLogger(__name__)


class StreamingTrainer(ResumableTrainer):
    """Trainer that builds the attention mask on the device, and skips bad samples and reports them."""

    def __init__(
        self,
        *args,
        parallel: bool,
        implementation: str,
        record: RunRecord,
        facts: dict,
        skipped: Skipped,
        startup: Startup,
        base: BaseFiles,
        added_config: dict,
        **kwargs,
    ):
        """`parallel` and `implementation` are those of `make_mask`; `facts` is what `record` compares when the run
        resumes; `base` holds the files saved beside the weights, with `added_config` in their config.json."""
        super().__init__(*args, **kwargs)
        self.parallel, self.implementation, self.base, self.added_config = parallel, implementation, base, added_config
        self.record, self.facts, self.skipped, self.startup = record, facts, skipped, startup

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        visual, text = inputs.pop("visual"), inputs.pop("text")
        packed = inputs.pop("sample", None), inputs.pop("feed", None)
        mask = make_mask(visual, text, self.parallel, self.implementation, *packed)
        pixels = inputs["pixel_values_videos"].tensor.to(self.args.device, non_blocking=True)
        grids = inputs["video_grid_thw"].tensor
        inputs = {**inputs, "pixel_values_videos": pixels, "video_grid_thw": grids, "attention_mask": mask}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def get_train_dataloader(self):
        """The workers read at least as many batches ahead as Trainer takes at once, those of a step, so that the device
        does not wait for them. At most PAPER_SAMPLES samples, because host memory holds them."""
        loader, workers = super().get_train_dataloader(), self.args.dataloader_num_workers
        if workers and self.args.dataloader_prefetch_factor is None:
            most = max(1, PAPER_SAMPLES // self.args.per_device_train_batch_size)
            ahead = min(self.args.gradient_accumulation_steps, most)
            loader.base_dataloader.prefetch_factor = max(2, math.ceil(ahead / workers))
        return loader

    def _get_train_sampler(self, train_dataset=None):
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        shuffle = self.args.train_sampling_strategy == "random"
        self.sampler = EpochSampler(self.train_dataset, seed, shuffle, self.args.dataloader_drop_last)
        return self.sampler

    def _run_epoch(self, *args, **kwargs):
        # With several processes, accelerate does not set the epoch of the sampler in a run that resumes within an
        # epoch: the order would be that of the first epoch.
        self.sampler.set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    def floating_point_ops(self, inputs):
        """0, which means unknown: throughput.json has what was done. Trainer would count the parameters after every
        forward pass, which takes the host several milliseconds with adapters."""
        return 0

    def create_optimizer(self, model=None):
        self.optimizer_cls_and_kwargs = make_optimizer(self.model if model is None else model, self.args)
        return super().create_optimizer(model)

    def on_resume(self, progress):
        state = progress or {"step": 0, "bad": {}, "work": {}}
        self.record.start(self.facts, state["step"])
        continue_tensorboard(self, state["step"])
        self.skipped.start(state["bad"])
        self.throughput = Throughput(self.args.device, Work(**state["work"]))
        self.add_callback(self.throughput)
        self.add_callback(FirstStep(self.startup, self.record))

    def resume_state(self):
        return {"bad": self.skipped.reasons, "work": asdict(self.throughput.work())}

    def report(self) -> None:
        """Write the loss curves and throughput.json. Called by all processes at once."""
        work, output = self.throughput.work(), Path(self.args.output_dir)
        if self.is_world_process_zero():
            picture = output / "loss.png"
            with saving(output):
                drawn = draw_curves(self.state.log_history, picture, f"Training, {self.facts['variant']}")
                write_throughput(work, output / "throughput.json")
            logger.info("curves: %s", picture if drawn else "none, since no loss was logged: see --logging_steps")

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.base.write(Path(output_dir or self.args.output_dir), self.added_config)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self.startup.end("optimizer")
        batches, targets = super().get_batch_samples(self.throughput.timed(epoch_iterator), num_batches, device)
        self.startup.end("first batch")
        tallies = [batch.pop("tally") for batch in batches]
        self.skipped.add([bad for tally in tallies for bad in tally["bad"]], device)
        for tally in tallies:
            self.throughput.count(tally["samples"], tally["tokens"])
        # A step of only bad samples has no targets to divide by.
        return batches, targets.clamp(min=1)

    def evaluate(self, *_, **__):
        """Mean loss per answer token over the held-out samples."""
        self.model_wrapped.eval()
        loss, targets, bad = 0.0, 0, []
        for batch in self.get_eval_dataloader():
            bad += batch.pop("tally")["bad"]
            with torch.no_grad(), self.compute_loss_context_manager():
                mean = self.compute_loss(self.model_wrapped, self._prepare_inputs(batch))
            if count := int((batch["labels"] != IGNORED).sum()):
                loss, targets = loss + mean.item() * count, targets + count
        self.skipped.add(bad, self.args.device)
        loss, targets = all_reduce([loss, float(targets)], self.args.device)
        metrics = {"eval_loss": loss / max(targets, 1)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class FirstStep(TrainerCallback):
    """Reports and records how long the run took until its first step has ended."""

    def __init__(self, startup: Startup, record: RunRecord):
        self.startup, self.record = startup, record

    def on_step_end(self, args, state, control, **kwargs):
        if "first step" not in self.startup.seconds:
            self.startup.end("first step")
            self.record.note_first_step(self.startup.seconds)
            logger.info("%s", self.startup)


class StepProgress(ProgressCallback):
    """Trainer's progress bar, which writes plain lines to a log."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            steps = {"total": state.max_steps, "initial": state.global_step, "unit": "step"}
            self.training_bar = Progress(desc="training", dynamic_ncols=True, **steps)
        self.current_step = state.global_step
