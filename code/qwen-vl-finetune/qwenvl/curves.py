"""Loss curves of a run, as a PNG and in TensorBoard."""

import io
from collections.abc import Iterable
from pathlib import Path

from qwen_vl_streaming.common.files import write_file
from transformers import Trainer
from transformers.integrations import TensorBoardCallback


def continue_tensorboard(trainer: Trainer, step: int) -> None:
    """Make a run that resumes from `step` continue its TensorBoard curves, and purge the steps that are repeated."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and trainer.is_world_process_zero():
            from torch.utils.tensorboard import SummaryWriter

            callback.tb_writer = SummaryWriter(str(Path(trainer.args.output_dir) / "runs"), purge_step=step + 1)


def draw_curves(history: Iterable[dict], path: Path, title: str) -> bool:
    """Plot training loss, evaluation loss if there is one, and gradient norm over optimizer steps into a PNG. Returns
    False where no loss was logged."""
    history = list(history)
    if not any("loss" in entry for entry in history):
        return False
    from matplotlib.figure import Figure  # only one process of a run draws

    figure = Figure(figsize=(7, 6), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True)
    for axes, name, label, style in (
        (top, "loss", "training", "-"),
        (top, "eval_loss", "held out", "o-"),
        (bottom, "grad_norm", None, "-"),
    ):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, linewidth=1, markersize=4, label=label)
    top.set(ylabel="loss (nats per answer token)", title=title, ylim=(0, None))
    bottom.set(xlabel="optimizer step", ylabel="gradient norm before clipping", ylim=(0, None))
    top.legend()
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    png = io.BytesIO()
    figure.savefig(png, dpi=120, format="png")
    write_file(path, png.getvalue(), report=False)
    return True
