"""Opens a session on a source: the model, the perception process, the first clip's size, compilation, the session."""

import contextlib
import datetime
import functools
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..common.errors import InputError
from ..common.numbers import MOST, check_count
from ..engine.step_runner import StepRunner
from ..model.hub import model_folder
from ..model.loading import load_config, load_model, tokens_per_second
from ..model.prompts import clip_pixels, load_processor, make_template
from ..model.quantization import check_precision
from ..model.trained import check_trained, choose_schedule, end_of_slot
from ..sessions import GREEDY, PerceptionClient, Session, open_session
from ..timeline.plan import Window
from ..timeline.positions import check_clips, clips_before_text
from ..timeline.timeline import make_schedule, model_schedule_most
from ..timeline.variants import Variant, chosen_variant, get_variant
from ..video.frames import FRAMES_PER_CLIP
from ..video.opening import Source
from .intake import Intake
from .screen import Pieces
from .watch import Watch

logger = logging.getLogger(__name__)

CLIPS = 300
"""Clips watched at most, by default and without a window."""
TOKENS_PER_CLIP = 8
"""Tokens written at most per clip, by default and without a window."""
TOKENS_AFTER_END = 300
"""Tokens written at most after the end of the source, by default and with a window; as in evaluation."""
WARM_UP_STEPS = 12


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, and how its model runs. The weights are not loaded."""

    path: str
    """A folder or a hub id."""
    config: Any
    processor: Any
    variant: Variant
    device: torch.device
    dtype: torch.dtype
    weights: str | None = None
    """The precision of the linear layers, one of `quantization.WEIGHTS`, or None for that of the checkpoint."""


def read_checkpoint(
    path: str,
    variant: str | None,
    device: str,
    dtype: torch.dtype | None,
    force: bool,
    flag: str,
    weights: str | None = None,
    weights_flag: str = "--weights",
) -> Checkpoint:
    """Read all of a checkpoint but its weights.

    Args:
        variant: A name. Default: QWEN2_5_VL_VARIANT, else the variant that the checkpoint was trained with.
        dtype: Default: bfloat16 on a GPU, float32 on the CPU.
        force: Allow a checkpoint that was trained differently; else the error names `flag`, with which it is allowed.
        weights: See `Checkpoint`; errors name `weights_flag`.

    Raises InputError.
    """
    config = load_config(path)
    chosen = get_variant(variant or chosen_variant(getattr(config, "streaming_variant", None) or "group"))
    if not force:
        check_trained(config, path, chosen, f"{flag} to use it anyway")
    where = torch.device(device)
    dtype = dtype or (torch.bfloat16 if where.type == "cuda" else torch.float32)
    check_precision(weights, where, dtype, weights_flag)
    return Checkpoint(path, config, load_processor(path), chosen, where, dtype, weights)


def check_schedule(text: str | None, config, checkpoint: str, variant: Variant) -> str:
    """`choose_schedule`, and check that `variant` can have it. Raises InputError."""
    schedule = choose_schedule(text, config, checkpoint, variant)
    if schedule != GREEDY and model_schedule_most(schedule) is None:
        make_schedule(schedule, variant, 1)
    return schedule


def load_on(path: str, device: str, dtype: torch.dtype, weights: str | None = None):
    """Load the model. The perception process calls this too."""
    if torch.device(device).index is not None:
        torch.cuda.set_device(device)  # else pinned memory takes up memory of the first GPU, for a CUDA context
    return load_model(path, "sdpa", dtype, weights, device).to(device).eval()


def start_perception(path: str, device: torch.device, dtype: torch.dtype, weights: str | None) -> PerceptionClient:
    """Start a perception process on another GPU. Raises InputError if there is only one."""
    where = "cpu"
    if device.type == "cuda":
        if torch.cuda.device_count() < 2:
            raise InputError("the pipelined mode needs two GPUs, but found one: use fused")
        where = f"cuda:{((device.index or 0) + 1) % torch.cuda.device_count()}"
    return PerceptionClient(functools.partial(load_on, path, where, dtype, weights))


def warm_up(session: Session, pixels: torch.Tensor) -> StepRunner:
    """Run a short session, so that compilation is over before the source starts. Returns its runner, for reuse."""
    with session:
        if session.max_clips > 1:
            session.feed(pixels)
        session.feed(pixels, last=True)
        for _ in range(WARM_UP_STEPS):
            if not session.idle:
                session.step()
    return session.runner


def most_clips(max_clips: int | None, window: tuple[int, int] | None) -> int | None:
    """How many clips to watch at most, or None for all."""
    return CLIPS if max_clips is None and window is None else max_clips


@contextlib.contextmanager
def open_watch(
    checkpoint: Checkpoint,
    load: Callable[[], torch.nn.Module],
    source: Source,
    question: str,
    *,
    mode: str | None = None,
    schedule: str | None = None,
    max_clips: int | None = None,
    max_new_tokens: int | None = None,
    window: tuple[int, int] | None = None,
    skip: bool = False,
    record: str | Path | None = None,
    about: dict | None = None,
    keep: Callable[[torch.Tensor], None] | None = None,
    name: str = "the source",
    **options,
) -> Iterator[Watch]:
    """Opens a session on `source`, and closes it at the end. Yields the `Watch` that runs it, and reads a file from its
    beginning.

    Args:
        load: Returns the model, on the device of `checkpoint`.
        mode: Default: fused if the variant can, else serial.
        schedule: Default: the one that the checkpoint was trained with.
        max_clips: Default: CLIPS, or any number with a `window`.
        max_new_tokens: Default: TOKENS_PER_CLIP per clip, or with a `window` any number until the source ends and
            TOKENS_AFTER_END after that.
        skip, keep: See `Watch`.
        about: Added to the record, besides the question, what a replay needs, and the clips that were fed.
        name: Of the source, in messages.
        options: See `Session`.

    Raises InputError, and as `load` does.
    """
    config, variant, processor = checkpoint.config, checkpoint.variant, checkpoint.processor
    template = make_template(processor, question, end_of_slot(config))
    decode = functools.partial(processor.tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    for what, count, limit in (("max_clips", max_clips, MOST), ("max_new_tokens", max_new_tokens, sys.maxsize)):
        if count is not None:
            check_count(what, count, most=limit)
    Window.of(window)
    most = most_clips(max_clips, window)
    after_end = TOKENS_AFTER_END if max_new_tokens is None and window is not None else None
    if max_new_tokens is None:
        max_new_tokens = sys.maxsize if most is None else TOKENS_PER_CLIP * most
    options |= {
        "mode": ("fused" if variant.parallel else "serial") if mode is None else mode,
        "schedule": check_schedule(schedule, config, checkpoint.path, variant),
        "max_clips": CLIPS if most is None else most,
        "max_new_tokens": max_new_tokens,
        "window": window,
    }
    with contextlib.ExitStack() as stack:
        if mode == "pipelined":
            options["perception_client"] = stack.enter_context(
                start_perception(
                    str(model_folder(checkpoint.path)), checkpoint.device, checkpoint.dtype, checkpoint.weights
                )
            )
        model = load()
        intake = Intake(source, processor, skip, name)
        stack.callback(intake.stop)
        size, seconds = intake.measure()
        pixels, grid = clip_pixels(processor, torch.zeros(FRAMES_PER_CLIP, 3, *size, dtype=torch.uint8))
        layout = template.layout(grid, tokens_per_second(config) * seconds)
        check_clips(variant, layout, 1)
        room = clips_before_text(variant, layout)
        if room is not None and room < min(count for count in (most, source.count, sys.maxsize) if count is not None):
            length = datetime.timedelta(seconds=round(room * seconds))
            logger.warning(
                "%s can watch %d clips (%s) before their positions reach those of the text: the answer is finished "
                "there; use group, which has no such limit",
                variant.name,
                room,
                length,
            )
            most = room
        opened = functools.partial(open_session, model, variant, template, layout, **options)
        if checkpoint.device.type == "cuda":
            opened = functools.partial(opened, runner=warm_up(opened(), pixels[0]))
        about = {"question": question, **(about or {}), **source.about}
        session = stack.enter_context(opened(record=record, about=about))
        watch = Watch(session, intake, Pieces(decode, template.end_of_slot), seconds, most, skip, keep, after_end)
        about["clips"] = watch.clips
        yield watch
