"""Fine-tune a Qwen2.5-VL under one of the six variants. Launched by scripts/sft.sh through launch.py and rank.py."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from qwen_vl_streaming.common.errors import InputError, OneLineParser
from qwen_vl_streaming.common.paths import check_videos
from qwen_vl_streaming.common.progress import Progress, quiet_libraries
from qwen_vl_streaming.launch.failing import tell
from qwen_vl_streaming.launch.signals import STOPPED, speaks
from qwen_vl_streaming.model.base_files import BaseFiles
from qwen_vl_streaming.model.hub import model_folder
from qwen_vl_streaming.model.modeling_qwen2_5_vl import load_config, load_model
from qwen_vl_streaming.model.prompts import QUESTIONS, load_processor, make_template
from qwen_vl_streaming.model.trained import check_trained, training_keys
from qwen_vl_streaming.timeline.attention import make_mask
from qwen_vl_streaming.video.frames import choose_reader
from torch import distributed
from transformers import ProgressCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_flash_attn_2_available

from .arguments import OUTPUT, ROOT, DataArguments, ModelArguments, SftArguments
from .checkpointing import CannotSave, KeepingTrainer, add_up, newest_checkpoint, save_whole, saving
from .data import IGNORED, Evened, Order, StreamingDataset, collate
from .device import check_size
from .flags_help import HelpfulParser
from .folder import check_folder, make_folder, only_one
from .param_groups import check_parts, describe_parts, make_optimizer, make_trainable
from .prescan import find_bad
from .record import RunRecord, Throughput, Work, describe_run, draw_curves, one_tensorboard, write_throughput
from .rows import hold_out, read_rows, without
from .skipped import Skipped

logger = logging.getLogger(__name__)


class StreamingTrainer(KeepingTrainer):
    """Trainer that builds the mask on the device and leaves bad samples out, counted and written down."""

    def __init__(
        self,
        *args,
        parallel: bool,
        implementation: str,
        record: RunRecord,
        facts: dict,
        skipped: Skipped,
        base: BaseFiles,
        said: dict,
        **kwargs,
    ):
        """`base` holds the files that are saved beside the weights, `said` what their config.json says of training."""
        super().__init__(*args, **kwargs)
        self.parallel, self.implementation, self.base, self.said = parallel, implementation, base, said
        self.record, self.facts, self.skipped = record, facts, skipped

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        visual, text = inputs.pop("visual"), inputs.pop("text")
        mask = make_mask(visual, text, self.parallel, self.implementation, inputs.pop("sample", None))
        return super().compute_loss(model, {**inputs, "attention_mask": mask}, return_outputs, num_items_in_batch)

    def _get_train_sampler(self, train_dataset=None):
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        shuffled = self.args.train_sampling_strategy == "random"
        self.order = Order(self.train_dataset, seed, shuffled, self.args.dataloader_drop_last)
        return self.order

    def _run_epoch(self, *args, **kwargs):
        # In a run that goes on in the midst of an epoch, accelerate does not tell it to the order that several
        # processes share: they would go on in the order of the first.
        self.order.set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    def create_optimizer(self, model=None):
        self.optimizer_cls_and_kwargs = make_optimizer(self.model if model is None else model, self.args)
        return super().create_optimizer(model)

    def begin(self, progress):
        known = progress or {"step": 0, "bad": {}, "work": {}}
        self.record.start(self.facts, known["step"])
        one_tensorboard(self, known["step"])
        self.skipped.begin(known["bad"])
        self.throughput = Throughput(self.args.device, Work(**known["work"]))
        self.add_callback(self.throughput)

    def report(self) -> None:
        """Draw and write down what was done so far. Called by all processes at once."""
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
            self.base.write(Path(output_dir or self.args.output_dir), self.said)

    def kept(self):
        return {"bad": self.skipped.reasons, "work": asdict(self.throughput.work())}

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, targets = super().get_batch_samples(self.throughput.timed(epoch_iterator), num_batches, device)
        tallies = [batch.pop("tally") for batch in batches]
        self.skipped.add([bad for tally in tallies for bad in tally["bad"]], device)
        for tally in tallies:
            self.throughput.count(tally["samples"], tally["tokens"])
        # A step of nothing but bad samples has no targets to divide by.
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
        loss, targets = add_up([loss, float(targets)], self.args.device)
        metrics = {"eval_loss": loss / max(targets, 1)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class Steps(ProgressCallback):
    """Trainer's own, with a bar that a log can hold."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            steps = {"total": state.max_steps, "initial": state.global_step, "unit": "step"}
            self.training_bar = Progress(desc="training", dynamic_ncols=True, **steps)
        self.current_step = state.global_step


def check_attention(implementation: str, device: torch.device) -> None:
    """Raises InputError where the attention `implementation` cannot train on `device`."""
    if "flash" in implementation and not is_flash_attn_2_available():
        raise InputError(f"--attention {implementation} is not installed here: use auto, or see requirements.txt")
    if "flex" in implementation and device.type == "cpu":
        raise InputError(f"--attention {implementation} does not train on a CPU: use auto or sdpa")


def check_same_model(model: str, sha256: str, device: torch.device) -> None:
    """Called by all processes at once; raises InputError on all of them where they see other contents of `model`."""
    (first,) = broadcast_object_list([sha256])
    (others,) = add_up([float(sha256 != first)], device)
    if others:
        raise InputError(
            f"not every machine has the same {model}: give one folder that all reach, or fetch it anew on each with "
            "`hf download`"
        )


class Parser(OneLineParser, HelpfulParser):
    """Flags from the three dataclasses. Raises InputError for what cannot be parsed."""

    def error(self, message):
        raise InputError(f"{message} (see --help)")

    def _print_message(self, message, file=None):
        if speaks():
            super()._print_message(message, file)


def parse() -> tuple[ModelArguments, DataArguments, SftArguments]:
    """The flags, and what they ask to be set up before anything else. Raises InputError."""
    parser = Parser((ModelArguments, DataArguments, SftArguments), prog="sft.sh", description=__doc__)
    *groups, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown flags: {' '.join(unknown)}")
    arguments = groups[-1]
    arguments.output_dir = arguments.output_dir or str(OUTPUT / f"qwen2_5vl-pe-{groups[0].variant}")
    quiet_libraries(arguments.process_index == 0)
    logging.basicConfig(level=logging.INFO if arguments.process_index == 0 else logging.WARNING, format="%(message)s")
    if not speaks():
        logging.getLogger(model_folder.__module__).setLevel(logging.ERROR)  # what the first says is enough
    if arguments.deepspeed:
        import deepspeed

        # On a CPU nothing else sets DeepSpeed's communication up, and it would build a faster one with a compiler that
        # may not be there.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(verbose=False)
        # Several times a step it calls what torch has since given another name.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    return tuple(groups)


def leave_out_bad(samples: StreamingDataset, skipped: Skipped, training: SftArguments) -> list[int]:
    """The lines of the data that are bad as far as can be known before training. Raises InputError for too many."""
    enough = max(1000, training.max_bad_share * len(samples))
    bad = find_bad(samples, enough, training.process_index, training.world_size, training.disable_tqdm)
    rows = [samples.rows[index] for index in bad]
    reasons = [(str(row["video_id"]), reason) for row, reason in zip(rows, bad.values(), strict=True)]
    skipped.add(reasons, training.device)
    return [row["line"] for row in rows]


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Destroys the process group: exiting without this can abort in a background thread. Not after a crash or
    CannotSave, when the others may wait for this process elsewhere."""
    try:
        yield
    except CannotSave:
        raise
    except (InputError, SystemExit) as error:
        tell(error)
        leave()
        raise
    leave()


def leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def main() -> None:
    with process_group():
        train(*parse())


def train(model_arguments: ModelArguments, data_arguments: DataArguments, arguments: SftArguments) -> None:
    output, variant, checkpoint = Path(arguments.output_dir), model_arguments.rules, model_arguments.model_name_or_path
    check_folder(output, variant.name, checkpoint)
    packed = data_arguments.pack_tokens > 0
    implementation = model_arguments.implementation(arguments.device.type == "cuda", packed)
    check_attention(implementation, arguments.device)
    config = load_config(checkpoint)
    if not model_arguments.force:
        check_trained(config, checkpoint, variant, "--force True to continue from it all the same")
    if arguments.cpu_line:
        if arguments.cpu_by_itself:
            check_size(config, arguments, arguments.cpu_line)
        logger.info(arguments.cpu_line)
    base = BaseFiles.of(model_folder(checkpoint, weights=False))
    check_parts(model_arguments, arguments)
    if model_arguments.compile_layers and is_deepspeed_zero3_enabled():
        raise InputError(
            "--compile_layers does not work under ZeRO-3: set DEEPSPEED_CONFIG=zero2.json, or leave it out"
        )

    every_row = read_rows(Path(data_arguments.train_data))
    check_videos((row["video_path"] for row in every_row), ROOT, data_arguments.video_folder)
    rows, held_out = hold_out(every_row, arguments.eval_share, arguments.eval_samples, arguments.seed)
    processor = load_processor(checkpoint)
    if (video := make_template(processor, QUESTIONS[-1]).video) != config.video_token_id:
        raise InputError(
            f"{checkpoint} has the video token {config.video_token_id} in config.json and {video} in its tokenizer: "
            "copy the checkpoint again, with the processor that belongs to it"
        )
    make_dataset = partial(
        StreamingDataset,
        root=ROOT,
        video_root=data_arguments.video_folder,
        processor=processor,
        tokens_per_second=config.vision_config.tokens_per_second,
        variant=variant,
        schedule=model_arguments.schedule,
        budget=data_arguments.pixel_budget,
        max_length=data_arguments.longest,
        seed=arguments.seed,
        reader=choose_reader(os.environ),
        keep_frames=data_arguments.keep_frames,
    )
    batch = arguments.per_device_train_batch_size * arguments.world_size
    eval_batch = arguments.per_device_eval_batch_size * arguments.world_size
    least = batch if arguments.dataloader_drop_last else 1
    rows = without(rows, [], least)
    everything = make_dataset(every_row)
    everything.check_room()
    make_folder(output)
    first = arguments.process_index == 0
    with only_one(output, first):
        record = RunRecord(output, first)
        finished, goes_on = broadcast_object_list([record.finished, newest_checkpoint(output)])
        skipped = Skipped(output, len(every_row), arguments.max_bad_share, first)
        begun = finished or goes_on
        left_out = record.left_out if begun else leave_out_bad(everything, skipped, arguments)
        facts = describe_run(model_arguments, data_arguments, arguments, len(every_row), len(held_out), left_out)
        check_same_model(checkpoint, facts["model_sha256"], arguments.device)
        if begun:
            record.refuse_another(facts)
        if finished:
            logger.info("%s was finished at %s: nothing is left to train; give another --output_dir", output, finished)
            return
        rows = without(rows, left_out, least)
        held_out = without(held_out, left_out, min(1, len(held_out)))

        model = load_model(checkpoint, implementation, torch.bfloat16 if arguments.bf16 else torch.float32)
        if model_arguments.compile_layers:
            model.compile_layers()
        model = make_trainable(model, model_arguments, arguments)
        more = {"pixel_budget": asdict(data_arguments.pixel_budget)}
        if model_arguments.lora_enable:
            more["base_sha256"] = facts["model_sha256"]
        trainer = StreamingTrainer(
            model=model,
            args=arguments,
            train_dataset=Evened(make_dataset(rows), batch),
            eval_dataset=Evened(make_dataset(held_out), eval_batch) if held_out else None,
            data_collator=partial(collate, pack_tokens=data_arguments.pack_tokens),
            base=base,
            said=training_keys(variant, model_arguments.wait_k, **more),
            parallel=variant.parallel,
            implementation=implementation,
            record=record,
            facts=facts,
            skipped=skipped,
        )
        logger.info("%s: %d samples; trains %s", variant.name, len(rows), describe_parts(model, arguments))
        if not arguments.disable_tqdm:
            trainer.remove_callback(ProgressCallback)
            trainer.add_callback(Steps)
        try:
            done = trainer.train_on()
        except CannotSave as error:
            tell(error)
            with contextlib.suppress(InputError):
                record.end(trainer.state.global_step, str(error))
            raise
        except InputError as error:
            tell(error)  # of what one process alone has met, the others know nothing, and a report would wait for them
            if record.record:
                trainer.report()
            record.end(trainer.state.global_step, str(error))
            raise
        if not done:
            trainer.report()
            record.end(trainer.state.global_step, "stopped by SIGTERM")
            logger.info("stopped by SIGTERM, and step %d is saved: the same command goes on", trainer.state.global_step)
            trainer.accelerator.wait_for_everyone()  # the first that ends has the others ended
            sys.exit(STOPPED)
        save_whole(trainer, output)
        trainer.report()
        logger.info("checkpoint: %s   left out: %d", output, len(skipped.reasons))
        record.end(trainer.state.global_step, "finished", finished=True)
