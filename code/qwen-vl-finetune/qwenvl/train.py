"""Fine-tune a Qwen2.5-VL under one of the six variants. Launched by scripts/sft.sh, alone or by torchrun."""

import json
import logging
import os
from pathlib import Path

import matplotlib
import torch
from qwen_vl_streaming.attention import make_mask
from qwen_vl_streaming.errors import InputError, OneLineParser, run
from qwen_vl_streaming.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration, load_model
from qwen_vl_streaming.prompts import load_processor
from qwen_vl_streaming.video import choose_reader
from transformers import HfArgumentParser, Trainer
from transformers.trainer_utils import get_last_checkpoint

from .arguments import ROOT, DataArguments, ModelArguments, SftArguments
from .data import StreamingDataset, collate, read_rows

matplotlib.use("Agg")
from matplotlib import pyplot

logger = logging.getLogger(__name__)


class StreamingTrainer(Trainer):
    """Trainer that builds the mask on the device and leaves bad samples out, counted and written down."""

    def __init__(self, *args, parallel: bool, implementation: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.parallel, self.implementation = parallel, implementation
        self.bad: dict[str, str] = {}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self._write_down(inputs.pop("bad"))
        visual, text = inputs.pop("visual"), inputs.pop("text")
        mask = make_mask(visual, text, self.parallel, self.implementation)
        return super().compute_loss(model, {**inputs, "attention_mask": mask}, return_outputs, num_items_in_batch)

    def _write_down(self, bad: list[tuple[str, str]]) -> None:
        """Count bad samples into skipped.jsonl. Raises InputError when there are too many of them."""
        new = {video_id: reason for video_id, reason in bad if video_id not in self.bad}
        self.bad |= new
        for video_id, reason in new.items():
            logger.warning("left out %s: %s", video_id, reason)
            with (Path(self.args.output_dir) / "skipped.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"video_id": video_id, "reason": reason}, ensure_ascii=False) + "\n")
        if new and len(self.bad) > self.args.max_bad_share * len(self.train_dataset):
            raise InputError(
                f"{len(self.bad)} of {len(self.train_dataset)} samples are bad, the last because {reason}; see "
                f"{self.args.output_dir}/skipped.jsonl and mend the data, or raise --max_bad_share"
            )


def freeze(model: Qwen2_5_VLForConditionalGeneration, arguments: ModelArguments) -> None:
    """Freeze, parameter by parameter, what the --tune flags leave out. Tied embeddings go with the language model."""
    merger = {id(parameter) for parameter in model.model.visual.merger.parameters()}
    vision = {id(parameter) for parameter in model.model.visual.parameters()} - merger
    for parameter in model.parameters():
        part = (
            arguments.tune_mm_mlp
            if id(parameter) in merger
            else arguments.tune_mm_vision
            if id(parameter) in vision
            else arguments.tune_mm_llm
        )
        parameter.requires_grad_(part)


def draw_loss(history: list[dict], path: Path, title: str) -> None:
    """The loss curve as a picture."""
    points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    if not points:
        logger.warning("no loss curve: the run was shorter than --logging_steps")
        return
    steps, losses = zip(*points, strict=True)
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, losses, linewidth=1)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per answer token)", title=title, ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def save_whole(trainer: Trainer, folder: Path) -> None:
    """Save model and processor into `folder`, config.json last: without it the folder is no checkpoint."""
    beside = folder / "being_saved"
    trainer.save_model(str(beside))
    if trainer.is_world_process_zero():
        for path in sorted(beside.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, folder / path.name)
        beside.rmdir()
    trainer.accelerator.wait_for_everyone()


def refuse_other_variant(folder: Path, variant: str) -> None:
    config = folder / "config.json"
    if config.exists() and (other := json.loads(config.read_text()).get("streaming_variant")) not in (None, variant):
        raise InputError(f"{folder} holds a model trained as {other}, not {variant}: give another --output_dir")


class Parser(OneLineParser, HfArgumentParser):
    """Flags from the three dataclasses, errors in one line."""


def main() -> None:
    parser = Parser((ModelArguments, DataArguments, SftArguments), prog="sft.sh", description=__doc__)
    model_arguments, data_arguments, arguments, unknown = parser.parse_args_into_dataclasses(
        return_remaining_strings=True
    )
    if unknown:
        parser.error(f"unknown flags: {' '.join(unknown)}")
    logging.basicConfig(level=logging.INFO if arguments.process_index == 0 else logging.WARNING, format="%(message)s")
    output, variant = Path(arguments.output_dir), model_arguments.rules
    refuse_other_variant(output, variant.name)
    implementation = model_arguments.implementation(arguments.device.type == "cuda")

    rows = read_rows(Path(data_arguments.train_data))
    processor = load_processor(model_arguments.model_name_or_path)
    model = load_model(
        model_arguments.model_name_or_path, implementation, torch.bfloat16 if arguments.bf16 else torch.float32
    )
    model.config.streaming_variant, model.config.wait_k = variant.name, model_arguments.wait_k
    freeze(model, model_arguments)
    dataset = StreamingDataset(
        rows,
        ROOT,
        processor,
        model.config.vision_config.tokens_per_second,
        variant,
        model_arguments.schedule,
        data_arguments.budget,
        data_arguments.model_max_length,
        seed=arguments.seed,
        reader=choose_reader(os.environ),
        keep_frames=data_arguments.keep_frames,
    )
    trainer = StreamingTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collate,
        processing_class=processor,
        parallel=variant.parallel,
        implementation=implementation,
    )
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    logger.info("%s: %d samples, %.1f M trainable parameters", variant.name, len(rows), trainable / 1e6)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(output)) if output.is_dir() else None)
    save_whole(trainer, output)
    if trainer.is_world_process_zero():
        draw_loss(trainer.state.log_history, output / "loss.png", f"Training loss, {variant.name}")
        logger.info("checkpoint: %s   loss curve: %s   left out: %d", output, output / "loss.png", len(trainer.bad))


if __name__ == "__main__":
    run(main)
