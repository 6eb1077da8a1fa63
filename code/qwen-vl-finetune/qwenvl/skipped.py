"""Samples that are left out: every process knows of all of them, and all of them stop together where they are many."""

import json
import logging
from pathlib import Path

import torch
from accelerate.utils import gather_object
from qwen_vl_streaming.common.errors import InputError

from .checkpointing import add_up, write_whole

logger = logging.getLogger(__name__)

SAID = 10
"""At most so many samples that are found at once are named in the log."""


class Skipped:
    """Bad samples with their reasons, written to skipped.jsonl. The same on every process."""

    def __init__(self, folder: Path, samples: int, most: float, first: bool):
        """`samples` in all, of which a share of at most `most` may be bad; the `first` process writes and speaks."""
        self.path, self.samples, self.most, self.first = folder / "skipped.jsonl", samples, most, first
        self.reasons: dict[str, str] = {}

    def begin(self, known: dict[str, str]) -> None:
        """Write down what is known as training begins, `known` from before included."""
        self.reasons |= known
        if self.first:
            self._write()

    def add(self, bad: list[tuple[str, str]], device: torch.device) -> None:
        """Learn of samples that any process had to leave out. Called by all processes at once.

        Raises InputError, on all of them, when there are too many.
        """
        (news,) = add_up([float(any(video_id not in self.reasons for video_id, _ in bad))], device)
        if not news:
            return
        new = {video_id: reason for video_id, reason in gather_object(list(bad)) if video_id not in self.reasons}
        self.reasons |= new
        if self.first:
            for video_id, reason in list(new.items())[:SAID]:
                logger.warning("left out %s: %s", video_id, reason)
            if len(new) > SAID:
                logger.warning("and %d more: see %s", len(new) - SAID, self.path)
            self._write()
        bad = len(self.reasons)
        if bad == self.samples or bad > self.most * self.samples:
            mend = "mend the data" if bad == self.samples else "mend the data, or raise --max_bad_share"
            last = list(new.values())[-1]
            raise InputError(
                f"{bad} of {self.samples} samples are bad, the last because {last}; see {self.path}: {mend}"
            )

    def _write(self) -> None:
        if not self.reasons:
            self.path.unlink(missing_ok=True)
            return
        rows = ({"video_id": video_id, "reason": reason} for video_id, reason in self.reasons.items())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
