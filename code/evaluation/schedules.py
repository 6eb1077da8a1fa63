"""The schedule of each video: a named one, or counts from a file. Knows nothing about models and rows."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.paths import find_path
from qwen_vl_streaming.timeline.timeline import (
    MAX_PER_SLOT,
    SCHEDULE_NAME,
    ModelSchedule,
    Schedule,
    make_schedule,
    model_schedule_most,
)
from qwen_vl_streaming.timeline.variants import Variant

FORMS = f"give wait-K, random, random-K with K from 1 to {MAX_PER_SLOT}, model, or a file of counts"


@dataclass(frozen=True)
class Schedules:
    name: str
    """wait-K, random-K, model-M or the name of the file."""
    variant: Variant
    seed: int = 0
    """For random schedules, which differ from video to video."""
    counts: Mapping[str, list[int]] = field(default_factory=dict)
    """From the file: k_1 … k_N or k_1 … k_{N-1} by video id."""
    sha256: str = ""
    """Of the file."""

    @property
    def most(self) -> int | None:
        """M of model-M, where the model decides; else None."""
        return None if self.sha256 else model_schedule_most(self.name)

    def of(self, video_id: str, clips: int) -> Schedule | ModelSchedule:
        """The schedule of a video. Raises InputError if the file's counts are for another number of clips."""
        if self.most is not None:
            return ModelSchedule(clips, self.most)
        if not self.sha256:
            return make_schedule(self.name, self.variant, clips, f"{self.seed} {video_id}")
        counts = self.counts[video_id]
        if len(counts) not in (clips, clips - 1):
            raise InputError(
                f"{self.name} has {len(counts)} counts for video {video_id}, which has {clips} clips: "
                f"give {clips}, or {clips - 1} without the last slot, which writes all remaining tokens"
            )
        return Schedule(tuple(counts[: clips - 1]))


def choose_schedules(
    text: str, variant: Variant, wait_k: int, seed: int, video_ids: Iterable[str], root: Path
) -> Schedules:
    """The schedules given by `text`: wait-K, random-K, random (with the checkpoint's `wait_k`), model-M, the path of a
    file (looked up here and in `root`), or the empty string for the checkpoint's own wait-K.

    Raises InputError for anything else, and for a file without valid counts for each of `video_ids`.
    """
    text = {"": f"wait-{wait_k}", "random": f"random-{wait_k}"}.get(text, text)
    if SCHEDULE_NAME.fullmatch(text) or model_schedule_most(text) is not None:
        return Schedules(text, variant, seed)
    try:
        path = find_path(text, root, "the schedule")
        data = path.read_bytes()
    except (InputError, OSError):
        raise InputError(f"unknown schedule {text[:80]!r}, which is not a file either: {FORMS}") from None
    if not variant.streams:
        raise InputError(f"--schedule {text}: {variant.name} writes only after the whole video: remove --schedule")
    counts = _read(path, data)
    missing = [video_id for video_id in video_ids if video_id not in counts]
    if missing:
        raise InputError(f"{path} has no counts for video {missing[0]} ({len(missing)} videos are missing): add them")
    return Schedules(path.name, variant, counts=counts, sha256=hashlib.sha256(data).hexdigest())


def _read(path: Path, data: bytes) -> dict[str, list[int]]:
    """Counts by video id. The file is an object {video_id: counts}, or JSON Lines of such objects or of rows with
    `video_id` and `schedule`, such as a result file."""
    try:
        text = data.decode("utf-8-sig")
        try:
            objects = [json.loads(text)]
        except ValueError:
            objects = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON or JSON Lines ({error}): {FORMS}") from None
    found: dict[str, list[int]] = {}
    for number, one in enumerate(objects, 1):
        if not isinstance(one, dict):
            raise InputError(f"{path}, object {number}: not an object with counts by video id: fix it")
        if "video_id" in one and "schedule" in one:
            one = {str(one["video_id"]): one["schedule"]}
        for video_id, counts in one.items():
            place, numbers = f"{path}, video {video_id}", counts if isinstance(counts, list) else [None]
            if not all(type(count) is int and 0 <= count <= MAX_PER_SLOT for count in numbers):
                raise InputError(f"{place}: {counts!r:.80} is not a list of counts from 0 to {MAX_PER_SLOT}: fix it")
            if video_id in found:
                raise InputError(f"{place}: it occurs twice: fix it")
            found[video_id] = counts
    return found
