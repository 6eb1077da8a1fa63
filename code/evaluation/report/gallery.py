"""The report's gallery: one frame per clip of a video, and the words that each result had written by then.

Words are decoded from token ids and slots with the tokenizer of the result's model. If a video or a tokenizer is
missing, the gallery says so. Nothing is downloaded. Knows nothing about HTML.
"""

import base64
import io
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path

from checked_results import source_rows
from metrics.lag import slot_texts
from PIL import Image
from qwen_vl_streaming.common.errors import InputError, first_line
from qwen_vl_streaming.common.paths import find_video, find_video_root, places
from qwen_vl_streaming.common.video_part import video_part
from qwen_vl_streaming.video.frames import choose_reader, read_video
from qwen_vl_streaming.video.pixel_budget import PixelBudget
from settings import ROOT
from transformers import AutoTokenizer

from report.loading import Result, find_model, without_folders

logger = logging.getLogger(__name__)

PICTURE = PixelBudget(784, 76_800, 2**40)
"""Frames on the page: about 320 × 240, whatever the model's input size."""
QUALITY = 80


@dataclass(frozen=True)
class GalleryCaption:
    """The caption of one result for one video."""

    result: Result
    caption: str
    pieces: list[str] | None
    """N texts, what each slot added; None if the tokenizer is missing."""
    counts: list[int]
    """Tokens that each slot wrote."""
    note: str = ""

    @property
    def words(self) -> list[tuple[int, str, str]]:
        """(slot, leading whitespace, added text) for each slot that added text."""
        added = [(slot, piece, piece.lstrip()) for slot, piece in enumerate(self.pieces or [], 1) if piece]
        return [(slot, piece[: len(piece) - len(rest)], rest) for slot, piece, rest in added]

    @property
    def ended(self) -> int:
        """The slot that wrote the last token; N if there are no tokens."""
        return max((slot for slot, count in enumerate(self.counts, 1) if count), default=len(self.counts))


@dataclass(frozen=True)
class GalleryVideo:
    """One video with the captions of all results."""

    video_id: str
    references: list[str]
    question: str
    clips: int
    times: list[str]
    """When each slot starts, such as `3 s`."""
    frames: list[str] = field(default_factory=list)
    """N data URIs, the last frame of each clip; empty if the video cannot be shown."""
    note: str = ""
    captions: list[GalleryCaption] = field(default_factory=list)


def choose_videos(results: Sequence[Result], count: int, ids: Sequence[str]) -> list[str]:
    """`ids`, or else `count` videos, of each task in turn the first that most results have. Raises InputError for an
    unknown id."""
    having: dict[str, Counter[str]] = {}
    for result in results:
        having.setdefault(result.task, Counter()).update(result.rows.keys())
    for video_id in ids:
        if not any(video_id in counts for counts in having.values()):
            raise InputError(f"--video-ids {video_id}: no result file has this video: give another id")
    if ids:
        return list(dict.fromkeys(ids))
    queues = [sorted(counts, key=lambda video_id: -counts[video_id]) for counts in having.values()]
    turns = [video_id for turn in zip_longest(*queues) for video_id in turn if video_id is not None]
    return list(dict.fromkeys(turns))[:count]


def make_video(results: Sequence[Result], video_id: str, tokenizers: "Tokenizers") -> GalleryVideo:
    """The gallery's view of one video, with every result that has it."""
    having = [result for result in results if video_id in result.rows]
    row = having[0].rows[video_id]
    references = row["annotation"] if isinstance(row["annotation"], list) else [row["annotation"]]
    captions = [make_caption(result, video_id, tokenizers) for result in having]
    clips = max(len(each.counts) for each in captions)
    times = [f"clip {clip}" for clip in range(1, clips + 1)]
    question, frames, note = row.get("question"), [], ""
    try:
        if any(len(each.counts) != clips for each in captions):
            raise InputError("the results have different numbers of clips for it")
        data = source_rows(having[0].path, having[0].args, [video_id])[video_id]
        question = question or data.get("question")
        seconds, frames = show_video(having[0], data, clips)
        times = [f"{clip * seconds:.3g} s" for clip in range(1, clips + 1)]
    except InputError as error:
        logger.warning("no frames for video %s: %s", video_id, error)
        note = f"No frames: {without_folders(str(error))}"
    references = [clean(str(each)) for each in references]
    return GalleryVideo(video_id, references, clean(str(question or "")), clips, times, frames, note, captions)


def make_caption(result: Result, video_id: str, tokenizers: "Tokenizers") -> GalleryCaption:
    row = result.rows[video_id]
    counts = [0] * row["clips"]
    for token, slot in zip(row["tokens"], row["slots"], strict=True):
        counts[slot - 1] += token != row.get("end_of_slot")  # which is not a part of the text
    try:
        tokenizer, note = tokenizers.of(result)
        pieces = slot_texts(row, partial(tokenizer.decode, skip_special_tokens=True))
    except ValueError as error:
        pieces, note = None, f"The timing of words is unknown: {without_folders(str(error))}"
    return GalleryCaption(result, clean(row["result"]), pieces, counts, note)


class Tokenizers:
    """Tokenizers by model. `instead`, a folder or a cached hub id, is used for models that are not on this machine.
    Raises InputError if it has no tokenizer."""

    def __init__(self, instead: str | None):
        self.load = cache(self._load)
        self.instead = None
        if instead:
            self.instead = next(filter(Path.is_dir, places(instead, ROOT)), None) or find_model(instead)
            if self.instead is None:
                raise InputError(f"--tokenizer {instead} is not on this machine: give a folder with a tokenizer")
            self.load(self.instead)

    def of(self, result: Result):
        """(tokenizer, note). Raises InputError if the model is missing and there is no substitute."""
        if result.model_folder:
            return self.load(result.model_folder), ""
        if self.instead:
            note = f"Decoded with the tokenizer in {self.instead.name}: {result.model_name} is missing."
            return self.load(self.instead), note
        raise InputError(f"{result.model_name} is not on this machine; give a substitute with --tokenizer")

    @staticmethod
    def _load(folder: Path):
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the Rust tokenizers raise no narrower type
            first = first_line(error)
            raise InputError(f"no tokenizer could be loaded from {folder} ({first})") from None


def show_video(result: Result, data: dict, clips: int) -> tuple[float, list[str]]:
    """Seconds per clip, and each clip's last frame as JPEG. Raises InputError if the video cannot be shown."""
    folder = find_video_root(str(result.args.get("video_root") or ""), ROOT)
    path = find_video(str(data["video_path"]), ROOT, folder)
    video = read_video(path, part=video_part(data), budget=PICTURE, reader=choose_reader(os.environ))
    if video.clips != clips:
        raise InputError(f"{path} has {video.clips} clips, but had {clips} when it was captioned")
    return video.seconds_per_clip, [jpeg(frame) for frame in video.frames[1::2].permute(0, 2, 3, 1).numpy()]


def jpeg(frame) -> str:
    """A frame (H, W, 3) uint8 as a data URI."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def clean(text: str) -> str:
    """`text` without characters that UTF-8 cannot encode."""
    return text.encode(errors="replace").decode()
