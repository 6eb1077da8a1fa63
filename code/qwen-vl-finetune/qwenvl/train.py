"""Fine-tune a Qwen2.5-VL under one of the six variants. Launched by scripts/sft.sh, alone or by torchrun."""

import json
import logging
import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from qwen_vl_streaming.attention import make_mask
from qwen_vl_streaming.errors import InputError, OneLineParser, run
from qwen_vl_streaming.modeling_qwen2_5_vl import load_model
from qwen_vl_streaming.prompts import load_processor
from qwen_vl_streaming.video import choose_reader
from transformers import HfArgumentParser
from transformers.integrations import is_deepspeed_zero3_enabled

from .arguments import ROOT, DataArguments, ModelArguments, SftArguments
from .data import IGNORED, StreamingDataset, collate, hold_out, read_rows
from .keeping import STOPPED, KeepingTrainer, add_up, save_whole
from .parts import check_parts, describe_parts, make_optimizer, make_trainable
from .record import RunRecord, Throughput, Work, describe_run, draw_curves, one_tensorboard, write_throughput
from .skipped import Skipped

logger = logging.getLogger(__name__)


class StreamingTrainer(KeepingTrainer):
    """Trainer that builds the mask on the device and leaves bad samples out, counted and written down."""

    def __init__(self, *args, parallel: bool, implementation: str, record: RunRecord, facts: dict, **kwargs):
        super().__init__(*args, **kwargs)
        self.parallel, self.implementation = parallel, implementation
        self.record, self.facts = record, facts

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        visual, text = inputs.pop("visual"), inputs.pop("text")
        mask = make_mask(visual, text, self.parallel, self.implementation, inputs.pop("sample", None))
        return super().compute_loss(model, {**inputs, "attention_mask": mask}, return_outputs, num_items_in_batch)

    def create_optimizer(self, model=None):
        self.optimizer_cls_and_kwargs = make_optimizer(self.model if model is None else model, self.args)
        return super().create_optimizer(model)

    def begin(self, progress):
        known = progress or {"step": 0, "bad": {}, "work": {}}
        if progress:
            self.record.refuse_another(self.facts)
        self.record.start(self.facts, known["step"])
        one_tensorboard(self, known["step"])
        first = self.is_world_process_zero()
        everything = len(self.train_dataset) + len(self.eval_dataset or ())
        output = Path(self.args.output_dir)
        self.skipped = Skipped(output, everything, self.args.max_bad_share, known["bad"], first)
        self.throughput = Throughput(self.args.device, Work(**known["work"]))
        self.add_callback(self.throughput)

    def kept(self):
        return {"bad": self.skipped.reasons, "work": asdict(self.throughput.work())}

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, targets = super().get_batch_samples(self.throughput.timed(epoch_iterator), num_batches, device)
        self.skipped.add([bad for batch in batches for bad in batch.pop("bad")], device)
        for batch in batches:
            self.throughput.count(len(batch["video_grid_thw"]), batch["position_ids"])
        # A step of nothing but bad samples has no targets to divide by.
        return batches, targets.clamp(min=1)

    def evaluate(self, *_, **__):
        """Mean loss per answer token over the held-out samples."""
        self.model_wrapped.eval()
        loss, targets, bad = 0.0, 0, []
        for batch in self.get_eval_dataloader():
            bad += batch.pop("bad")
            with torch.no_grad(), self.compute_loss_context_manager():
                mean = self.compute_loss(self.model_wrapped, self._prepare_inputs(batch))
            if count := int((batch["labels"] != IGNORED).sum()):
                loss, targets = loss + mean.item() * count, targets + count
        self.skipped.add(bad, self.args.device)
        loss, targets = add_up([loss, float(targets)], self.args.device)
        metrics = {"eval_loss": loss / max(targets, 1)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def refuse_other_variant(folder: Path, variant: str) -> None:
    config = folder / "config.json"
    if config.exists() and (other := json.loads(config.read_text()).get("streaming_variant")) not in (None, variant):
        raise InputError(f"{folder} holds a model trained as {other}, not {variant}: give another --output_dir")


def speaks() -> bool:
    """Whether this is the process of its machine that says what all of them would."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


class Parser(OneLineParser, HfArgumentParser):
    """Flags from the three dataclasses, errors in one line."""

    def _print_message(self, message, file=None):
        if speaks():
            super()._print_message(message, file)


def main() -> None:
    parser = Parser((ModelArguments, DataArguments, SftArguments), prog="sft.sh", description=__doc__)
    model_arguments, data_arguments, arguments, unknown = parser.parse_args_into_dataclasses(
        return_remaining_strings=True
    )
    if unknown:
        parser.error(f"unknown flags: {' '.join(unknown)}")
    logging.basicConfig(level=logging.INFO if arguments.process_index == 0 else logging.WARNING, format="%(message)s")
    if arguments.deepspeed:
        import deepspeed

        # On a CPU nothing else sets DeepSpeed's communication up, and it would build a faster one with a compiler that
        # may not be there.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(verbose=False)
    output, variant = Path(arguments.output_dir), model_arguments.rules
    refuse_other_variant(output, variant.name)
    record = RunRecord(output, arguments.process_index == 0)
    (finished,) = broadcast_object_list([record.finished])
    if finished:
        logger.info("%s was finished at %s: nothing is left to train; give another --output_dir", output, finished)
        return
    implementation = model_arguments.implementation(arguments.device.type == "cuda")
    check_parts(model_arguments, arguments)
    if model_arguments.compile_layers and is_deepspeed_zero3_enabled():
        raise InputError(
            "--compile_layers does not work under ZeRO-3: set DEEPSPEED_CONFIG=zero2.json, or leave it out"
        )

    path = Path(data_arguments.train_data)
    rows, held_out = hold_out(read_rows(path), arguments.eval_share, arguments.eval_samples, arguments.seed)
    facts = describe_run(model_arguments, data_arguments, arguments, len(rows), len(held_out))
    processor = load_processor(model_arguments.model_name_or_path)
    model = load_model(
        model_arguments.model_name_or_path, implementation, torch.bfloat16 if arguments.bf16 else torch.float32
    )
    model.config.streaming_variant, model.config.wait_k = variant.name, model_arguments.wait_k
    if model_arguments.compile_layers:
        model.compile_layers()
    model = make_trainable(model, model_arguments, arguments)
    make_dataset = partial(
        StreamingDataset,
        root=ROOT,
        processor=processor,
        tokens_per_second=model.config.vision_config.tokens_per_second,
        variant=variant,
        schedule=model_arguments.schedule,
        budget=data_arguments.budget,
        max_length=data_arguments.longest,
        seed=arguments.seed,
        reader=choose_reader(os.environ),
        keep_frames=data_arguments.keep_frames,
    )
    trainer = StreamingTrainer(
        model=model,
        args=arguments,
        train_dataset=make_dataset(rows),
        eval_dataset=make_dataset(held_out) if held_out else None,
        data_collator=partial(collate, pack_tokens=data_arguments.pack_tokens),
        processing_class=processor,
        parallel=variant.parallel,
        implementation=implementation,
        record=record,
        facts=facts,
    )
    logger.info("%s: %d samples; trains %s", variant.name, len(rows), describe_parts(model, arguments))
    try:
        done = trainer.train_on()
    except InputError as error:
        record.end(trainer.state.global_step, str(error))
        raise
    if not done:
        record.end(trainer.state.global_step, "stopped by SIGTERM")
        logger.info("stopped by SIGTERM, and step %d is saved: the same command goes on", trainer.state.global_step)
        sys.exit(STOPPED)
    save_whole(trainer, output)
    work = trainer.throughput.work()
    if trainer.is_world_process_zero():
        draw_curves(trainer.state.log_history, output / "loss.png", f"Training, {variant.name}")
        write_throughput(work, output / "throughput.json")
        left_out = len(trainer.skipped.reasons)
        logger.info("checkpoint: %s   curves: %s   left out: %d", output, output / "loss.png", left_out)
    record.end(trainer.state.global_step, "finished", finished=True)


if __name__ == "__main__":
    run(main, speaks())
