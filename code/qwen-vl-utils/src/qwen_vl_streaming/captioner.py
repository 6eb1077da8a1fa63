"""Captions a file, a camera or a stream from Python while it arrives: `live` without the terminal."""

import functools
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .common.paths import find_model
from .devices import choose_device, look
from .live.intake import Intake
from .live.options import CLIPS, TOKENS_PER_CLIP
from .live.screen import Pieces
from .live.setup import first_clip, load_on, no_clip, start_perception, warm_up
from .live.watch import Watch
from .model.hub import model_folder
from .model.modeling_qwen2_5_vl import load_config, tokens_per_second
from .model.prompts import QUESTIONS, clip_pixels, load_processor, make_template
from .model.trained import check_trained
from .sessions import Session, open_session
from .timeline.positions import check_clips, clips_before_text
from .timeline.variants import chosen_variant, get_variant
from .video.frames import FRAMES_PER_CLIP, PixelBudget
from .video.opening import Source, open_source

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """Text that was written at once, often a word with the space before it."""

    text: str
    second: float
    """Seconds of the source that had passed when its slot could begin."""


class Captioner:
    """A checkpoint that describes a video while it arrives.

    Example::

        captioner = Captioner("code/qwen-vl-finetune/output/qwen2_5vl-pe-group")
        for piece in captioner.watch("film.mp4"):
            print(f"{piece.second:g} s {piece.text}")
    """

    def __init__(
        self,
        model: str | Path,
        *,
        variant: str | None = None,
        device: str = "",
        dtype: torch.dtype | None = None,
        force: bool = False,
    ):
        """Loads the model. Raises InputError if that is not possible.

        Args:
            model: A folder or a hub id.
            variant: One of the names in `VARIANTS`. Default: QWEN2_5_VL_VARIANT, else the variant that the checkpoint
                was trained with.
            device: "cpu", "cuda" or "cuda:N". Default: a GPU, if there is one.
            dtype: Default: bfloat16 on a GPU, float32 on the CPU.
            force: Use a checkpoint even if it was trained with another variant.
        """
        self.name = find_model(str(model), Path.cwd())
        self.config = load_config(self.name)
        trained = getattr(self.config, "streaming_variant", None)
        self.variant = get_variant(variant or chosen_variant(trained or "group"))
        if not force:
            check_trained(self.config, self.name, self.variant, "force=True to use it anyway")
        where, message = choose_device(device, look(os.environ), 'device="cpu"')
        if message:
            logger.warning(message)
        self.device = torch.device(where)
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        self.processor = load_processor(self.name)
        self.model = load_on(self.name, where, self.dtype)
        self.session: Session | None = None
        """The session of the newest `watch`: its tokens with their slots and times."""

    def watch(
        self,
        source: str | Path | Source,
        *,
        question: str = QUESTIONS[-1],
        schedule: str | None = None,
        mode: str | None = None,
        speed: float = 1.0,
        fps: float = 2.0,
        max_clips: int | None = None,
        max_new_tokens: int | None = None,
        window: tuple[int, int] | None = None,
        skip: bool = False,
        record: str | Path | None = None,
    ) -> Iterator[Piece]:
        """Yields the answer piece by piece, each as soon as it is written. Raises InputError.

        Args:
            source: A video file, "/dev/videoN", an address such as "rtsp://...", "synthetic", or your own
                `Source`.
            question: What is asked about the video.
            schedule: "wait-K", "random-K" or "greedy". Default: the wait-K that the checkpoint was trained with.
            mode: "serial", "fused", or "pipelined", which needs two GPUs. Default: fused if the variant can.
            speed: Of a file, in multiples of real time.
            fps: Frames per second that the model sees. Two frames are a clip.
            max_clips: Clips to watch at most. Default: 300, or any number with a `window`.
            max_new_tokens: Tokens to write at most. Default: 8 per clip, or any number with a `window`.
            window: Limits attention to the newest clips and tokens, for endless streams.
            skip: If the model cannot keep up, skip to the newest clip instead of letting clips wait.
            record: File for a record of the session, see `replay`.
        """
        if mode is None:
            mode = "fused" if self.variant.parallel else "serial"
        limit = CLIPS if max_clips is None and window is None else max_clips
        if max_new_tokens is None:
            max_new_tokens = sys.maxsize if limit is None else TOKENS_PER_CLIP * limit
        if not isinstance(source, Source):
            budget = PixelBudget.trained(self.config)
            source = open_source(str(source), budget, fps=fps, speed=speed, max_clips=limit, cut=not skip)
        template = make_template(self.processor, question)
        with ExitStack() as stack:
            options = {
                "mode": mode,
                "schedule": f"wait-{getattr(self.config, 'wait_k', 3)}" if schedule is None else schedule,
                "max_clips": CLIPS if limit is None else limit,
                "max_new_tokens": max_new_tokens,
                "window": window,
            }
            if mode == "pipelined":
                options["perception_client"] = stack.enter_context(
                    start_perception(str(model_folder(self.name)), self.device, self.dtype)
                )
            intake = Intake(source.clips, self.processor, skip, source.pace, source.count)
            stack.callback(intake.stop)
            seconds = source.seconds_per_clip
            if source.size is None:
                intake.start(begun=False)
                clip = first_clip(intake, "the source")
                frames, seconds = clip.frames, clip.seconds or seconds
            else:
                frames = torch.zeros(FRAMES_PER_CLIP, 3, *source.size, dtype=torch.uint8)
            pixels, grid = clip_pixels(self.processor, frames)
            layout = template.layout(grid, tokens_per_second(self.config) * seconds)
            if source.count is not None:
                check_clips(self.variant, layout, min(limit or source.count, source.count))
            elif (room := clips_before_text(self.variant, layout)) is not None and (limit is None or room < limit):
                logger.warning("%s can watch %d clips: its answer is finished there", self.variant.name, room)
                limit = room
            opened = functools.partial(open_session, self.model, self.variant, template, layout, **options)
            if self.device.type == "cuda":
                opened = functools.partial(opened, runner=warm_up(opened(), pixels[0]))
            self.session = stack.enter_context(opened(record=record, about={"question": question, **source.about}))
            if source.size is None:
                intake.begin()
            else:
                intake.start()
            decode = functools.partial(
                self.processor.tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            pieces = Pieces(decode)
            screen: Any = _Log()  # `texts` only notes
            watch = Watch(self.session, intake, screen, pieces, seconds, limit, skip)
            second = 0.0
            for text, second in watch.texts():
                if text:
                    yield Piece(text, second)
            if text := pieces.rest():
                yield Piece(text, second)
            if not self.session.done:
                raise no_clip(intake, "the source")


class _Log:
    """Notes of a `Watch`, in the log."""

    def note(self, text: str) -> None:
        logger.warning(text)
