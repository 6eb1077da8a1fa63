"""Reads one of the server's own sources for one viewer, in a thread. Its name is all that the viewer learns of it."""

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..common.errors import InputError
from ..live.intake import Intake
from ..model.frame_patches import split_frames
from ..video.opening import open_source
from ..video.sources import Clip
from .catalog import FPS, ServedModel
from .frames import PreparedClip, encode_picture

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """What is known before the first clip is shown."""

    size: tuple[int, int]
    """(height, width) of the frames."""
    seconds: float
    """Of a clip."""
    count: int | None
    """Clips, if known."""
    about: dict
    """For the record."""


@dataclass(frozen=True)
class ShownClip:
    clip: PreparedClip
    pictures: list[bytes]
    """The frames as JPEG."""
    times: list[float]
    completed: float
    last: bool


class OwnSource:
    """Calls `notify` in the event loop with Opened, then, after `begin`, with each ShownClip, and with None or
    an error at the end."""

    def __init__(
        self,
        name: str,
        address: str,
        model: ServedModel,
        dtype: torch.dtype,
        most: int | None,
        notify: Callable[[Opened | ShownClip | Exception | None], None],
    ):
        self.name, self.address, self.model, self.dtype, self.most = name, address, model, dtype, most
        self.notify, self.loop = notify, asyncio.get_running_loop()
        self.go, self.stopped = threading.Event(), False
        self.intake: Intake | None = None
        self.keep: Callable[[Clip], None] | None = None
        """Called in the thread with each clip, if set."""
        self.thread = threading.Thread(target=self._run, name=f"source {name}", daemon=True)
        self.thread.start()

    def begin(self) -> None:
        self.go.set()

    def stop(self) -> None:
        self.stopped = True
        self.go.set()
        if self.intake is not None:
            self.intake.wake()

    def _notify(self, what: Opened | ShownClip | Exception | None) -> None:
        if not self.stopped:
            try:
                self.loop.call_soon_threadsafe(self.notify, what)
            except RuntimeError:  # the loop is closed: the server has ended
                self.stopped = True

    def _run(self) -> None:
        try:
            self._read()
        except Exception as error:  # reported to the viewer without its text, which may name the address
            logger.error("source %s: %s", self.name, error)
            self._notify(InputError(f"source {self.name} cannot be read"))
        finally:
            if self.intake is not None:
                self.intake.stop()

    def _read(self) -> None:
        source = open_source(self.address, self.model.budget, fps=FPS, max_clips=self.most)
        self.intake = intake = Intake(source, self.model.processor, name=self.name)
        size, seconds = intake.measure()
        self._notify(Opened(size, seconds, source.count, source.about))
        self.go.wait()
        if self.stopped:
            return
        intake.begin()
        while not self.stopped:
            if intake.waiting:
                self._show(intake)
            elif intake.over:
                if intake.fault:
                    raise intake.fault
                return self._notify(None)
            else:
                intake.wait()

    def _show(self, intake: Intake) -> None:
        clip, pixels = intake.take()
        if self.keep is not None:
            self.keep(clip)
        pictures = [encode_picture(frame) for frame in clip.frames]
        times = [round(float(time), 3) for time in clip.timestamps]
        prepared = PreparedClip(split_frames(pixels, self.dtype), lambda: pixels)
        self._notify(ShownClip(prepared, pictures, times, clip.completed, clip.last))
