"""Captions a file, a camera or a stream from Python while it arrives: `live` without the terminal."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from .common.errors import InputError
from .common.paths import find_model
from .devices import choose_device, look
from .live.options import check_output
from .live.setup import load_on, most_clips, open_watch, read_checkpoint
from .model.prompts import QUESTIONS
from .sessions import Session
from .video.opening import Source, open_source
from .video.pixel_budget import PixelBudget

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
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        weights: str | None = None,
        force: bool = False,
    ):
        """Loads the model. Raises InputError if that is not possible.

        Args:
            model: A folder or a hub id.
            variant: One of the names in `VARIANTS`. Default: QWEN2_5_VL_VARIANT, else the variant that the checkpoint
                was trained with.
            device: "cpu", "cuda" or "cuda:N". Default: a GPU, if there is one.
            dtype: Default: bfloat16 on a GPU, float32 on the CPU.
            weights: "int8" or "fp8" quantizes the linear layers of the language model, to half their memory. Default:
                as in the checkpoint.
            force: Use a checkpoint even if it was trained with another variant.
        """
        where, message = choose_device("" if device is None else str(device), look(os.environ), 'device="cpu"')
        if message:
            logger.warning(message)
        path = find_model(str(model), Path.cwd())
        self.checkpoint = read_checkpoint(path, variant, where, dtype, force, "force=True", weights, "weights")
        self.config, self.variant = self.checkpoint.config, self.checkpoint.variant
        self.processor = self.checkpoint.processor
        self.model = load_on(path, where, self.checkpoint.dtype, weights)
        self.session: Session | None = None
        """The session of the newest `watch`: its tokens with their slots and times."""

    def watch(
        self,
        source: str | Path | Source,
        *,
        question: str | None = None,
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
                `Source`, whose help has an example.
            question: What is asked about the video. Default: the question of the evaluation.
            schedule: "wait-K", "random-K", "greedy", or "model" for a checkpoint that was trained to decide when to
                speak. Default: as the checkpoint was trained.
            mode: "serial", "fused", or "pipelined", which needs two GPUs and starts a process: a script must call it
                below `if __name__ == "__main__":`. Default: fused if the variant can.
            speed: Of a file, in multiples of real time.
            fps: Frames per second that the model sees. Two frames are a clip.
            max_clips: Clips to watch at most. Default: 300, or any number with a `window`.
            max_new_tokens: Tokens to write at most. Default: 8 per clip; with a `window` any number, but at most 300
                after the end of the source.
            window: Limits attention to the newest clips and tokens, for endless streams.
            skip: If the model cannot keep up, skip to the newest clip instead of letting clips wait.
            record: File for a record of the session, see `replay`. An existing file is replaced.
        """
        if not isinstance(source, str | Path | Source):
            raise InputError(
                f"the source is a {type(source).__name__}: give a path, an address, or for your own clips a Source, "
                "made with a function that yields them"
            )
        if record is not None:
            film = source.about.get("video", {}).get("path") if isinstance(source, Source) else source
            check_output(Path(record), film)
        name = "the source"
        if not isinstance(source, Source):
            most, name = most_clips(max_clips, window), f"source {source}"
            budget = PixelBudget.trained(self.config)
            source = open_source(str(source), budget, fps=fps, speed=speed, max_clips=most, cut=not skip)
        with open_watch(
            self.checkpoint,
            lambda: self.model,
            source,
            QUESTIONS[-1] if question is None else question,
            mode=mode,
            schedule=schedule,
            max_clips=max_clips,
            max_new_tokens=max_new_tokens,
            window=window,
            skip=skip,
            record=record,
            name=name,
        ) as watch:
            self.session = watch.session
            for text, second in watch.texts():
                if text:
                    yield Piece(text, second)
