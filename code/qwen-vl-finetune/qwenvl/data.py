"""From rows to training samples: the timeline of each, its positions, labels and pixels.

A bad sample is replaced by a blank one without labels, which adds nothing to the loss and keeps the processes in step;
it has the id and the reason. Does not depend on models and masks.

    L tokens
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from qwen_vl_streaming.common.data_rows import SEGMENT_TIMES
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.paths import find_video
from qwen_vl_streaming.common.video_part import video_part
from qwen_vl_streaming.model.prompts import (
    QUESTIONS,
    Template,
    answer_ids,
    answer_slots,
    clip_pixels,
    make_template,
    seconds_late,
)
from qwen_vl_streaming.timeline.positions import check_clips, timeline_positions
from qwen_vl_streaming.timeline.segments import arrival_times, check_segments, join_segments, slot_tokens
from qwen_vl_streaming.timeline.timeline import (
    ANSWER,
    CLIP,
    HEADER,
    NOTHING,
    PROMPT,
    TAIL,
    make_schedule,
    make_timeline,
)
from qwen_vl_streaming.timeline.variants import Variant
from qwen_vl_streaming.video.frames import Video, read_video
from qwen_vl_streaming.video.pixel_budget import PixelBudget
from torch import Tensor

IGNORED = -100


@dataclass
class Sample:
    input_ids: Tensor  # (L,)
    position_ids: Tensor  # (3, L)
    visual: Tensor  # (L,) bool
    text: Tensor  # (L,) bool
    clip: Tensor  # (L,) bool: the rows of visual tokens
    labels: Tensor  # (L,)
    pixel_values: Tensor  # (patches, pixels of a patch)
    grid_thw: Tensor  # (3,)
    bad: tuple[str, str] | None = None
    """Video id and reason, if this is the blank sample in place of a bad one."""


@dataclass(eq=False)
class StreamingDataset(torch.utils.data.Dataset):
    """Samples for one forward pass over the timeline of `variant`. Raises InputError if `end_of_slot` is not a token of
    the vocabulary."""

    rows: Sequence[dict]
    root: Path
    """The project's root. A row's `video_path` is looked up as in `find_video`."""
    processor: Any
    tokens_per_second: int
    variant: Variant
    schedule: str
    """That of rows without `segments`, or of all if not `uses_times`."""
    budget: PixelBudget
    max_length: int
    seed: int = 0
    reader: str | None = None
    keep_frames: bool = False
    """Cache decoded videos in memory."""
    video_root: Path | None = None
    uses_times: bool = True
    max_tokens_per_slot: int = 8
    """With times, the most tokens of a slot before the last."""
    end_of_slot: str | None = None
    """The token that ends each of these slots, unless it is full; None for none."""

    def __post_init__(self):
        self.templates = [make_template(self.processor, question, self.end_of_slot) for question in QUESTIONS]
        self.own_templates: dict[str, Template] = {}
        self.cache: dict[int, Video] = {}
        self.side = self.processor.video_processor.merge_size * self.processor.video_processor.patch_size
        """Height and width in pixels of the square that a visual token covers."""
        self.pixels_per_token = self.side**2

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        template = self.template(index)
        try:
            video = self._video(index)
            grid = video.frames.shape[-2] // self.side, video.frames.shape[-1] // self.side
            self.check(index, video.clips, grid, self.count_tokens(index), video.seconds_per_clip)
            sample = self._sample(video, self.slots(index, video.clips, video.seconds_per_clip), template)
        except InputError as error:
            return self.blank(template, (str(self.rows[index]["video_id"]), str(error)))
        return sample

    def segments(self, index: int) -> list[dict] | None:
        """The segments whose times give the schedule of sample `index`; None if it has none, or they are not used."""
        return self.rows[index].get("segments") if self.uses_times else None

    def segment_time(self, index: int) -> str:
        """When the text of a segment of sample `index` may be written: one of SEGMENT_TIMES."""
        return self.rows[index].get("segment_time") or SEGMENT_TIMES[0]

    def seconds_late(self, index: int, clips: int, seconds_per_clip: float) -> list[float]:
        """By how many seconds each word of a sample with `segments` is written late."""
        segments, arrivals = self.segments(index) or (), arrival_times(clips, seconds_per_clip)
        return seconds_late(self.processor, segments, arrivals, self.max_tokens_per_slot, self.segment_time(index))

    def caption(self, index: int) -> str:
        """The text of the answer. Raises InputError, with the row's place, for segments that are not in order."""
        row, segments = self.rows[index], self.segments(index)
        if segments is None and row["human_caption"] is not None:
            return row["human_caption"]
        self._check_segments(index)
        return join_segments(row["segments"]).text

    def count_tokens(self, index: int) -> int:
        """The tokens of the answer, `<|im_end|>` included. Raises InputError where `caption` does, and for a caption
        without tokens."""
        return len(answer_ids(self.processor, self.template(index), self.caption(index)))

    def slots(self, index: int, clips: int, seconds_per_clip: float) -> list[list[int]]:
        """The answer's tokens of each slot. Raises InputError where `count_tokens` does."""
        template, segments, most = self.template(index), self.segments(index), self.max_tokens_per_slot
        arrivals, end = arrival_times(clips, seconds_per_clip), template.end_of_slot
        if segments is not None and self.variant.streams:
            when = self.segment_time(index)
            return answer_slots(self.processor, template, segments, arrivals, most, when, end_of_slot=end)
        answer = answer_ids(self.processor, template, self.caption(index))
        schedule = make_schedule(self.schedule, self.variant, clips)  # that of a sample without times
        if end is not None:  # as if each token had the time of its slot
            counts = zip(arrivals, schedule.counts(len(answer) - 1), strict=True)
            times = [arrival for arrival, count in counts for _ in range(count)]
            return slot_tokens(answer[:-1], times, arrivals, most, template.end, end)
        tokens = iter(answer)
        return [list(islice(tokens, count)) for count in schedule.counts(len(answer))]

    def slot_ends(self, clips: int) -> int:
        """The most end-of-slot tokens of a sample."""
        return clips - 1 if self.end_of_slot is not None else 0

    def path(self, index: int) -> Path:
        """The video file of sample `index`. Raises InputError where there is none."""
        return find_video(self.rows[index]["video_path"], self.root, self.video_root)

    def template(self, index: int) -> Template:
        """The tokens around the video, with the row's own question or a random one of the paper's, seeded by its id."""
        row = self.rows[index]
        if not (question := row.get("question")):
            return self.templates[random.Random(f"{self.seed} {row['video_id']}").randrange(len(self.templates))]
        if question not in self.own_templates:
            self.own_templates[question] = make_template(self.processor, question, self.end_of_slot)
        return self.own_templates[question]

    def check(self, index: int, clips: int, grid: tuple[int, int], answer: int, seconds_per_clip: float) -> None:
        """Raises InputError if sample `index` cannot be trained on with these sizes. `grid` is a clip's visual tokens,
        rows × columns; `answer` includes `<|im_end|>`."""
        if self.segments(index) is not None:
            self._check_segments(index, clips * seconds_per_clip)
        elif self.variant.streams and self.end_of_slot is None and answer - 1 < clips:
            raise InputError(
                f"its caption has {answer - 1} tokens for {clips} clips, so some slots would have no token: remove it, "
                "or train an offline variant"
            )
        layout = self.template(index).layout(grid, self.tokens_per_second * seconds_per_clip)
        check_clips(self.variant, layout, clips)
        text = layout.header + answer + self.slot_ends(clips)
        length = layout.prompt + layout.tail + clips * layout.tokens_per_clip + text
        if length > self.max_length:
            raise InputError(
                f"its {length} tokens exceed the maximum length {self.max_length}: raise --model_max_length"
            )

    def _check_segments(self, index: int, seconds: float = math.inf) -> None:
        row = self.rows[index]
        try:
            check_segments(row["segments"], seconds, self.segment_time(index))
        except InputError as error:
            raise InputError(f"{row['place']}: {error}") from error

    def check_max_length(self) -> None:
        """Raises InputError where the maximum length is too small for every sample."""
        template = min(len(t.prompt) + len(t.tail) + len(t.header) for t in {*map(self.template, range(len(self)))})
        minimum = template + math.ceil(self.budget.min_pixels_per_frame / self.pixels_per_token) + 2
        if minimum > self.max_length:
            raise InputError(
                f"a question, one clip and one token of caption are {minimum} tokens, and the maximum length is "
                f"{self.max_length}: raise --model_max_length, and --pack_tokens if it is set"
            )

    def blank(self, template: Template, bad: tuple[str, str] | None = None) -> Sample:
        """A sample of one black clip, without labels."""
        black = torch.zeros(2, 3, self.side, self.side, dtype=torch.uint8)
        sample = self._sample(
            Video(black, torch.tensor([0.0, 0.5]), 2.0, "blank"),
            [answer_ids(self.processor, template, "blank")],
            template,
        )
        sample.labels.fill_(IGNORED)
        sample.bad = bad
        return sample

    def _video(self, index: int) -> Video:
        if index in self.cache:
            return self.cache[index]
        max_clips = self.max_length // math.ceil(self.budget.min_pixels_per_frame / self.pixels_per_token)
        path, row = self.path(index), self.rows[index]
        video = read_video(path, part=video_part(row), budget=self.budget, reader=self.reader, max_clips=max_clips)
        if self.keep_frames:
            self.cache[index] = video
        return video

    def _sample(self, video: Video, slots: list[list[int]], template: Template) -> Sample:
        answer = [token for slot in slots for token in slot]
        pixels, grid = clip_pixels(self.processor, video.frames)
        clips = len(pixels)
        layout = template.layout(grid, self.tokens_per_second * video.seconds_per_clip)
        timeline = make_timeline(self.variant, layout, list(map(len, slots)))
        rows = timeline.rows

        ids = torch.full((len(rows),), template.video)
        for part, tokens in ((PROMPT, template.prompt), (TAIL, template.tail), (HEADER, template.header)):
            ids[rows.part == part] = torch.tensor(tokens)
        answer_tokens = torch.tensor(answer)
        ids[rows.part == ANSWER] = answer_tokens[rows.index[rows.part == ANSWER]]
        assert int((rows.part == CLIP).sum()) == clips * grid[0] * grid[1]
        merge = self.processor.video_processor.merge_size
        return Sample(
            input_ids=ids,
            position_ids=timeline_positions(timeline),
            visual=rows.visual,
            text=rows.text,
            clip=rows.part == CLIP,
            labels=torch.where(timeline.produces == NOTHING, IGNORED, answer_tokens[timeline.produces]),
            pixel_values=pixels.flatten(0, 1),
            grid_thw=torch.tensor([clips, grid[0] * merge, grid[1] * merge]),
        )
