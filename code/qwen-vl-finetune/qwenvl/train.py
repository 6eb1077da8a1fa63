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
from peft import PeftModel
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.paths import PROJECT, check_videos
from qwen_vl_streaming.common.progress import quiet_libraries
from qwen_vl_streaming.launch.failing import report
from qwen_vl_streaming.launch.signals import STOPPED, is_local_main_process
from qwen_vl_streaming.model.base_files import BaseFiles
from qwen_vl_streaming.model.hub import model_folder
from qwen_vl_streaming.model.loading import load_model
from qwen_vl_streaming.model.modeling_qwen2_5_vl import compile_layers
from qwen_vl_streaming.model.trained import end_of_slot, training_keys
from qwen_vl_streaming.video.frames import choose_reader
from torch import distributed
from transformers import PretrainedConfig, PreTrainedModel, ProgressCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from .argument_checks import keep_workers
from .arguments import DataArguments, ModelArguments, dataset_options
from .batches import PaddedDataset, collate_for_trainer
from .checkpointing import SaveError, newest_checkpoint, save_final_model
from .data import StreamingDataset
from .folder import lock_folder, make_folder
from .headers import CHANNEL, Headers
from .param_groups import describe_parts, make_trainable
from .parser import FlagParser
from .prescan import scan
from .record import RunRecord, describe_run, recorded_arguments
from .rows import exclude, file_of, hold_out, read_rows
from .run_checks import check_arguments, check_same_machines, check_same_model, load_matching_processor
from .skipped import Skipped
from .startup import Startup
from .trainer import StepProgress, StreamingTrainer
from .training_arguments import SftArguments, default_output
from .zero3 import choose_linear, gather_whole_layers

logger = logging.getLogger(__name__)


class Parser(FlagParser):
    def parse_known_args(self, args=None, namespace=None):
        """A run that resumes keeps the accumulation that it was started with, unless the flag is given."""
        found, unknown = super().parse_known_args(args, namespace)
        if found.gradient_accumulation_steps is None:
            recorded = recorded_arguments(Path(found.output_dir or default_output(found.variant)))
            found.gradient_accumulation_steps = recorded.get("gradient_accumulation_steps")
        return found, unknown


def parse() -> tuple[ModelArguments, DataArguments, SftArguments]:
    """Parse the command line, and set up logging and DeepSpeed. Raises InputError."""
    parser = Parser(__doc__)
    *groups, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if "--weights" in unknown:
        raise InputError("--weights quantizes a model to run it: training has no such flag, leave it out")
    if unknown:
        parser.error(f"unknown flags: {' '.join(unknown)}")
    arguments = groups[-1]
    keep_workers(arguments, groups[1].keep_frames)
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
        # transformers accumulates itself and gives accelerate 1, which then warns that DeepSpeed has more.
        logging.getLogger("accelerate.accelerator").addFilter(
            lambda record: "Gradient accumulation steps mismatch" not in record.getMessage()
        )
    return tuple(groups)


def known_headers(is_main: bool) -> Headers:
    """What the planner has read of videos and captions, where there was one."""
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


def main(startup: Startup | None = None) -> None:
    with process_group():
        train(*parse(), startup or Startup())


def train(
    model_arguments: ModelArguments, data_arguments: DataArguments, arguments: SftArguments, startup: Startup
) -> None:
    """Train, or resume, as the arguments say. Raises InputError, and SystemExit where SIGTERM stops the run."""
    output, variant, checkpoint = Path(arguments.output_dir), model_arguments.rules, model_arguments.model_name_or_path
    implementation = model_arguments.choose_attention(arguments.device.type == "cuda", data_arguments.pack_tokens > 0)
    config = check_arguments(model_arguments, arguments, implementation)
    check_same_machines(model_arguments, data_arguments, arguments)
    base = BaseFiles.of(model_folder(checkpoint, weights=False))

    every_row = read_rows(data_arguments.train_data)
    check_videos((row["video_path"] for row in every_row), PROJECT, data_arguments.video_folder)
    find = partial(file_of, root=PROJECT, video_root=data_arguments.video_folder)
    rows, held_out = hold_out(every_row, arguments.eval_share, arguments.eval_samples, arguments.seed, find)
    make_dataset = partial(
        StreamingDataset,
        **dataset_options(model_arguments, data_arguments),
        processor=load_matching_processor(checkpoint, config),
        tokens_per_second=config.vision_config.tokens_per_second,
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

        startup.end("data")
        model = prepare_model(implementation, model_arguments, arguments)
        startup.end("model")
        trainer = StreamingTrainer(
            model=model,
            args=arguments,
            train_dataset=PaddedDataset(make_dataset(rows), batch),
            eval_dataset=PaddedDataset(make_dataset(held_out), eval_batch) if held_out else None,
            data_collator=partial(
                collate_for_trainer,
                pack_tokens=data_arguments.pack_tokens,
                reorder=variant.parallel and implementation == "flex_attention",
            ),
            base=base,
            added_config=added_config(model_arguments, data_arguments, config, facts["model_sha256"]),
            parallel=variant.parallel,
            implementation=implementation,
            record=record,
            facts=facts,
            skipped=skipped,
            startup=startup,
        )
        logger.info("%s: %d samples; training %s", variant.name, len(rows), describe_parts(model, arguments))
        if not arguments.disable_tqdm:
            trainer.remove_callback(ProgressCallback)
            trainer.add_callback(StepProgress)
        run_trainer(trainer)


def prepare_model(
    implementation: str, arguments: ModelArguments, training: SftArguments
) -> PreTrainedModel | PeftModel:
    """The model to train, with its `implementation` of attention. Raises InputError where it cannot be loaded."""
    sharded = is_deepspeed_zero3_enabled()
    if sharded:
        choose_linear(training.hf_deepspeed_config.config["zero_optimization"], arguments.compile_layers)
    dtype = torch.bfloat16 if training.bf16 else torch.float32
    model = load_model(arguments.model_name_or_path, implementation, dtype)
    model.checkpointed_layers = arguments.checkpoint_layers
    model = make_trainable(model, arguments, training)
    if arguments.compile_layers:
        compile_layers(model)
    if sharded:
        gather_whole_layers(model)
    return model


def added_config(model: ModelArguments, data: DataArguments, base: PretrainedConfig, base_sha256: str) -> dict:
    """What training adds to the config of the `base` model."""
    added = {"pixel_budget": asdict(data.pixel_budget)}
    if model.decides:
        added |= {"end_of_slot": model.end_of_slot, "max_tokens_per_slot": model.max_tokens_per_slot}
    elif end_of_slot(base):  # None overrides that of the base
        added |= {"end_of_slot": None, "max_tokens_per_slot": None}
    if model.lora_enable:
        added["base_sha256"] = base_sha256
    return training_keys(model.rules, model.wait_k, **added)


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
