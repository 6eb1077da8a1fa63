"""Samples that are skipped: known to every process, written to skipped.jsonl, and the end of the run if too many."""

import json
import logging
from pathlib import Path

import torch
from accelerate.utils import gather_object
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.files import write_file

from .collectives import any_process

logger = logging.getLogger(__name__)

MAX_LOGGED = 10
"""Samples that are logged by name when more are found at once; the file has all."""


class Skipped:
    """Skipped samples by id, with their reasons. The same on every process."""

    def __init__(self, folder: Path, samples: int, max_share: float, is_main: bool):
        """At most the share `max_share` of all `samples` may be bad. The main process writes and logs."""
        self.path, self.samples, self.max_share = folder / "skipped.jsonl", samples, max_share
        self.is_main = is_main
        self.reasons: dict[str, str] = {}

    def start(self, known: dict[str, str]) -> None:
        """Write the file as training starts, with what is `known` from a checkpoint."""
        self.reasons |= known
        if self.is_main:
            self._write()

    def add(self, bad: list[tuple[str, str]], device: torch.device) -> None:
        """Add samples that any process has skipped, as (id, reason). Called by all processes at once.

        Raises InputError on all of them when there are too many.
        """
        if not any_process(any(video_id not in self.reasons for video_id, _ in bad), device):
            return
        new = {video_id: reason for video_id, reason in gather_object(list(bad)) if video_id not in self.reasons}
        self.reasons |= new
        if self.is_main:
            for video_id, reason in list(new.items())[:MAX_LOGGED]:
                logger.warning("skipped %s: %s", video_id, reason)
            if len(new) > MAX_LOGGED:
                logger.warning("skipped %d more: see %s", len(new) - MAX_LOGGED, self.path)
            self._write()
        count = len(self.reasons)
        if count == self.samples or count > self.max_share * self.samples:
            fix = "fix the data" if count == self.samples else "fix the data, or raise --max_bad_share"
            raise InputError(
                f"{count} of {self.samples} samples are bad, the last because {list(new.values())[-1]}; "
                f"see {self.path}: {fix}"
            )

    def _write(self) -> None:
        if not self.reasons:
            self.path.unlink(missing_ok=True)
            return
        rows = ({"video_id": video_id, "reason": reason} for video_id, reason in self.reasons.items())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), report=False)
