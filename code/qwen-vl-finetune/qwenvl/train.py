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
from accelerate.utils import broadcast_object_list, gather_object
from qwen_vl_streaming.common.errors import InputError, OneLineParser
from qwen_vl_streaming.common.paths import check_videos
from qwen_vl_streaming.common.progress import quiet_libraries
from qwen_vl_streaming.launch.failing import report
from qwen_vl_streaming.launch.signals import STOPPED, is_local_main_process
from qwen_vl_streaming.model.base_files import BaseFiles
from qwen_vl_streaming.model.hub import model_folder
from qwen_vl_streaming.model.modeling_qwen2_5_vl import compile_layers, load_config, load_model
from qwen_vl_streaming.model.prompts import QUESTIONS, load_processor, make_template
from qwen_vl_streaming.model.trained import check_trained, end_of_slot, training_keys
from qwen_vl_streaming.video.frames import choose_reader
from torch import distributed
from transformers import PretrainedConfig, ProgressCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_flash_attn_2_available

from .arguments import ROOT, DataArguments, ModelArguments, SftArguments, default_output
from .checkpointing import SaveError, newest_checkpoint, save_final_model
from .collectives import any_process
from .data import PaddedDataset, StreamingDataset, collate_for_trainer
from .device import check_size
from .flags_help import HelpfulParser
from .folder import check_folder, lock_folder, make_folder
from .headers import CHANNEL, Headers
from .param_groups import check_parts, describe_parts, make_trainable
from .prescan import scan
from .record import RunRecord, describe_run, recorded_arguments
from .rows import exclude, hold_out, read_rows
from .skipped import Skipped
from .trainer import StepProgress, StreamingTrainer
from .zero3 import choose_linear, gather_whole_layers

logger = logging.getLogger(__name__)


class Parser(OneLineParser, HelpfulParser):
    """Flags from the three dataclasses. Raises InputError for what cannot be parsed."""

    def error(self, message):
        raise InputError(f"{message} (see --help)")

    def parse_known_args(self, args=None, namespace=None):
        """A run that resumes keeps the accumulation that it was started with, unless the flag is given."""
        found, unknown = super().parse_known_args(args, namespace)
        if found.gradient_accumulation_steps is None:
            recorded = recorded_arguments(Path(found.output_dir or default_output(found.variant)))
            found.gradient_accumulation_steps = recorded.get("gradient_accumulation_steps")
        return found, unknown

    def _print_message(self, message, file=None):
        if is_local_main_process():
            super()._print_message(message, file)


def parse() -> tuple[ModelArguments, DataArguments, SftArguments]:
    """Parse the command line, and set up logging and DeepSpeed. Raises InputError."""
    kinds = (ModelArguments, DataArguments, SftArguments)
    parser = Parser(kinds, prog="sft.sh", description=__doc__)
    *groups, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if "--weights" in unknown:
        raise InputError("--weights quantizes a model to run it: training has no such flag, leave it out")
    if unknown:
        parser.error(f"unknown flags: {' '.join(unknown)}")
    arguments = groups[-1]
    arguments.output_dir = arguments.output_dir or str(default_output(groups[0].variant))
    quiet_libraries(arguments.process_index == 0)
    logging.basicConfig(level=logging.INFO if arguments.process_index == 0 else logging.WARNING, format="%(message)s")
    if not is_local_main_process():
        logging.getLogger(model_folder.__module__).setLevel(logging.ERROR)  # the first process logs the same
    if arguments.deepspeed:
        import deepspeed

        # On a CPU nothing else initializes DeepSpeed's communication, and it would compile a faster backend with a
        # compiler that may be missing.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(verbose=False)
        # DeepSpeed calls a function that torch has renamed, several times a step.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    return tuple(groups)


def check_attention(implementation: str, device: torch.device) -> None:
    """Raises InputError where the attention `implementation` cannot train on `device`."""
    if "flash" in implementation and not is_flash_attn_2_available():
        raise InputError(f"--attention {implementation} is not installed: use auto, or see requirements.txt")
    if "flex" in implementation and device.type == "cpu":
        raise InputError(f"--attention {implementation} does not train on a CPU: use auto or sdpa")


def check_same_model(model: str, sha256: str, device: torch.device) -> None:
    """Called by all processes at once; raises InputError on all of them where `model` differs between nodes."""
    (first,) = broadcast_object_list([sha256])
    if any_process(sha256 != first, device):
        raise InputError(
            f"{model} is not the same on every node: give a folder on shared storage, or download it again on each "
            "node with `hf download`"
        )


def check_checkpointing(layers: int | None, training: SftArguments, config: PretrainedConfig) -> None:
    """Raises InputError where so many `layers` cannot be recomputed."""
    if layers is None:
        return
    if not (training.gradient_checkpointing or training.activation_checkpointing):
        raise InputError(f"--checkpoint_layers {layers} contradicts --gradient_checkpointing False: omit one of them")
    if layers > (most := config.text_config.num_hidden_layers):
        raise InputError(f"--checkpoint_layers {layers}: the model has {most} layers: give at most that, or omit it")


def check_same_machines(model: ModelArguments, data: DataArguments, training: SftArguments) -> None:
    """Called by all processes at once; raises InputError on all of them where their GPUs or their plans differ."""
    cuda = training.device.type == "cuda"
    zero = training.hf_deepspeed_config.config["zero_optimization"]["stage"] if training.deepspeed else None
    mine = {
        "GPU": torch.cuda.get_device_name(training.device) if cuda else "none",
        "ZeRO stage": zero,
        "--per_device_train_batch_size": training.per_device_train_batch_size,
        "--gradient_accumulation_steps": training.gradient_accumulation_steps,
        "--pack_tokens": data.pack_tokens,
        "--gradient_checkpointing": bool(training.activation_checkpointing),
        "--checkpoint_layers": model.checkpoint_layers,
        "--compile_layers": model.compile_layers,
    }
    every = gather_object([mine])
    for name, value in every[0].items():
        others = [each[name] for each in every if each[name] != value]
        if others:
            fix = "use GPUs of one kind" if name == "GPU" else "give all nodes the flags that the first one printed"
            raise InputError(f"the processes differ in {name}: {value} on the first, {others[0]} on another: {fix}")


def check_arguments(model: ModelArguments, training: SftArguments, implementation: str) -> PretrainedConfig:
    """The model's config, once the arguments are known to fit it. Raises InputError, before any weight is loaded."""
    checkpoint, variant = model.model_name_or_path, model.rules
    check_folder(Path(training.output_dir), variant.name, checkpoint)
    check_attention(implementation, training.device)
    config = load_config(checkpoint)
    if not model.force:
        check_trained(config, checkpoint, variant, "--force True to continue from it anyway")
    if training.cpu_message:
        if training.cpu_is_fallback:
            check_size(config, training, training.cpu_message)
        logger.info(training.cpu_message)
    check_parts(model, training)
    check_checkpointing(model.checkpoint_layers, training, config)
    return config


def load_matching_processor(checkpoint: str, config: PretrainedConfig):
    """Raises InputError where the tokenizer of `checkpoint` and its `config` disagree."""
    processor = load_processor(checkpoint)
    if (video := make_template(processor, QUESTIONS[-1]).video) != config.video_token_id:
        raise InputError(
            f"{checkpoint} has the video token {config.video_token_id} in config.json and {video} in its tokenizer: "
            "copy the checkpoint again, with its own processor"
        )
    return processor


def known_headers(is_main: bool) -> Headers:
    """What the planner has read of the videos, where there was one."""
    (known,) = broadcast_object_list([Headers.take(Path(os.environ.get(CHANNEL, ""))) if is_main else None])
    return known


def scan_data(samples: StreamingDataset, known: Headers, skipped: Skipped, training: SftArguments) -> list[int]:
    """The lines of the data that are known to be bad before training. Raises InputError for too many."""
    enough = max(1000, training.max_bad_share * len(samples))
    found = scan(samples, enough, training.process_index, training.world_size, training.disable_tqdm, known)
    if training.process_index == 0:
        for line in filter(None, (str(found.captions), str(found.late))):
            logger.info(line)
    bad = found.bad
    rows = [samples.rows[index] for index in bad]
    reasons = [(str(row["video_id"]), reason) for row, reason in zip(rows, bad.values(), strict=True)]
    skipped.add(reasons, training.device)
    return [row["line"] for row in rows]


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Destroys the process group: exiting without this can abort in a background thread. Not after a crash or a
    SaveError, when other processes may wait for this one in a collective."""
    try:
        yield
    except SaveError:
        raise
    except (InputError, SystemExit) as error:
        report(error)
        destroy_process_group()
        raise
    destroy_process_group()


def destroy_process_group() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def main() -> None:
    with process_group():
        train(*parse())


def train(model_arguments: ModelArguments, data_arguments: DataArguments, arguments: SftArguments) -> None:
    """Train, or resume, as the arguments say. Raises InputError, and SystemExit where SIGTERM stops the run."""
    output, variant, checkpoint = Path(arguments.output_dir), model_arguments.rules, model_arguments.model_name_or_path
    implementation = model_arguments.choose_attention(arguments.device.type == "cuda", data_arguments.pack_tokens > 0)
    config = check_arguments(model_arguments, arguments, implementation)
    check_same_machines(model_arguments, data_arguments, arguments)
    base = BaseFiles.of(model_folder(checkpoint, weights=False))

    every_row = read_rows(data_arguments.train_data)
    check_videos((row["video_path"] for row in every_row), ROOT, data_arguments.video_folder)
    rows, held_out = hold_out(every_row, arguments.eval_share, arguments.eval_samples, arguments.seed)
    make_dataset = partial(
        StreamingDataset,
        root=ROOT,
        video_root=data_arguments.video_folder,
        processor=load_matching_processor(checkpoint, config),
        tokens_per_second=config.vision_config.tokens_per_second,
        variant=variant,
        schedule=model_arguments.wait_schedule,
        uses_times=model_arguments.uses_times,
        max_tokens_per_slot=model_arguments.max_tokens_per_slot,
        end_of_slot=model_arguments.end_of_slot if model_arguments.decides else None,
        budget=data_arguments.pixel_budget,
        max_length=data_arguments.max_length,
        seed=arguments.seed,
        reader=choose_reader(os.environ),
        keep_frames=data_arguments.keep_frames,
    )
    batch = arguments.per_device_train_batch_size * arguments.world_size
    eval_batch = arguments.per_device_eval_batch_size * arguments.world_size
    minimum = batch if arguments.dataloader_drop_last else 1
    rows = exclude(rows, [], minimum)
    all_samples = make_dataset(every_row)
    all_samples.check_max_length()
    make_folder(output)
    is_main = arguments.process_index == 0
    known = known_headers(is_main)
    with lock_folder(output, is_main):
        record = RunRecord(output, is_main)
        finished, resume_from = broadcast_object_list([record.finished, newest_checkpoint(output)])
        skipped = Skipped(output, len(every_row), arguments.max_bad_share, is_main)
        started = finished or resume_from
        excluded = record.excluded if started else scan_data(all_samples, known, skipped, arguments)
        timed = any(map(all_samples.segments, range(len(every_row))))
        facts = describe_run(model_arguments, data_arguments, arguments, len(every_row), len(held_out), excluded, timed)
        check_same_model(checkpoint, facts["model_sha256"], arguments.device)
        if started:
            record.check_same_run(facts)
        if finished:
            logger.info("%s: training finished at %s; to train again, give another --output_dir", output, finished)
            return
        rows = exclude(rows, excluded, minimum)
        held_out = exclude(held_out, excluded, min(1, len(held_out)))

        sharded = is_deepspeed_zero3_enabled()
        if sharded:
            choose_linear(arguments.hf_deepspeed_config.config["zero_optimization"], model_arguments.compile_layers)
        model = load_model(checkpoint, implementation, torch.bfloat16 if arguments.bf16 else torch.float32)
        model.checkpointed_layers = model_arguments.checkpoint_layers
        model = make_trainable(model, model_arguments, arguments)
        if model_arguments.compile_layers:
            compile_layers(model)
        if sharded:
            gather_whole_layers(model)
        more = {"pixel_budget": asdict(data_arguments.pixel_budget)}
        if model_arguments.decides or end_of_slot(config):  # None overrides that of the base
            own = model_arguments.decides
            more["end_of_slot"] = model_arguments.end_of_slot if own else None
            more["max_tokens_per_slot"] = model_arguments.max_tokens_per_slot if own else None
        if model_arguments.lora_enable:
            more["base_sha256"] = facts["model_sha256"]
        trainer = StreamingTrainer(
            model=model,
            args=arguments,
            train_dataset=PaddedDataset(make_dataset(rows), batch),
            eval_dataset=PaddedDataset(make_dataset(held_out), eval_batch) if held_out else None,
            data_collator=partial(collate_for_trainer, pack_tokens=data_arguments.pack_tokens),
            base=base,
            added_config=training_keys(variant, model_arguments.wait_k, **more),
            parallel=variant.parallel,
            implementation=implementation,
            record=record,
            facts=facts,
            skipped=skipped,
        )
        logger.info("%s: %d samples; training %s", variant.name, len(rows), describe_parts(model, arguments))
        if not arguments.disable_tqdm:
            trainer.remove_callback(ProgressCallback)
            trainer.add_callback(StepProgress)
        run_trainer(trainer)


def run_trainer(trainer: StreamingTrainer) -> None:
    """Train to the end, to SIGTERM or to an error, and record how it ended."""
    record, skipped, output = trainer.record, trainer.skipped, Path(trainer.args.output_dir)
    try:
        completed = trainer.train_or_resume()
    except SaveError as error:
        report(error)
        with contextlib.suppress(InputError):
            record.end(trainer.state.global_step, str(error))
        raise
    except InputError as error:
        report(error)  # the report below is collective, and waits if only this process has failed
        if record.record:
            trainer.report()
        record.end(trainer.state.global_step, str(error))
        raise
    if not completed:
        trainer.report()
        record.end(trainer.state.global_step, "stopped by SIGTERM")
        logger.info(
            "stopped by SIGTERM; step %d is saved: run the same command to resume from it", trainer.state.global_step
        )
        trainer.accelerator.wait_for_everyone()  # the first process to exit makes the launcher end the others
        sys.exit(STOPPED)
    save_final_model(trainer, output)
    trainer.report()
    logger.info("checkpoint: %s   skipped samples: %d", output, len(skipped.reasons))
    record.end(trainer.state.global_step, "finished", finished=True)
