"""Rows to training batches: the timeline of each sample, its positions, labels and pixels.

A bad sample is left out: in its place stands a blank one without labels, which adds nothing to the loss but
keeps every process in step, and its id and reason travel with the batch. Knows nothing of models and masks.

    B samples   L tokens   N clips
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.paths import find_video
from qwen_vl_streaming.model.prompts import QUESTIONS, Template, answer_ids, clip_pixels, make_template
from qwen_vl_streaming.timeline.positions import check_clips, timeline_positions
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
from qwen_vl_streaming.video.frames import PixelBudget, Video, read_video
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

IGNORED = -100


@dataclass
class Sample:
    input_ids: Tensor  # (L,)
    position_ids: Tensor  # (3, L)
    visual: Tensor  # (L,) bool
    text: Tensor  # (L,) bool
    labels: Tensor  # (L,)
    pixel_values: Tensor  # (patches, pixels of a patch)
    grid_thw: Tensor  # (3,)
    bad: tuple[str, str] | None = None
    """Video id and reason, where this is the blank in place of a bad sample."""

    @property
    def time(self) -> Tensor:
        return self.position_ids[0]

    @property
    def height(self) -> Tensor:
        return self.position_ids[1]

    @property
    def width(self) -> Tensor:
        return self.position_ids[2]


class StreamingDataset(torch.utils.data.Dataset):
    """Samples as one pass over the timeline of `variant` takes them."""

    def __init__(
        self,
        rows: Sequence[dict],
        root: Path,
        processor,
        tokens_per_second: int,
        variant: Variant,
        schedule: str,
        budget: PixelBudget,
        max_length: int,
        seed: int = 0,
        reader: str | None = None,
        keep_frames: bool = False,
        video_root: Path | None = None,
    ):
        """`root` is the project's; `video_path` is looked up as in `find_video`."""
        self.rows, self.root, self.processor, self.tokens_per_second = rows, root, processor, tokens_per_second
        self.variant, self.schedule, self.budget, self.max_length = variant, schedule, budget, max_length
        self.seed, self.reader, self.video_root = seed, reader, video_root
        self.templates = [make_template(processor, question) for question in QUESTIONS]
        self.asked: dict[str, Template] = {}
        self.kept: dict[int, Video] | None = {} if keep_frames else None
        self.side = processor.video_processor.merge_size * processor.video_processor.patch_size
        """Pixels that a visual token covers, in rows and in columns."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row, template = self.rows[index], self.template(index)
        try:
            video = self._video(index)
            sample = self._sample(video, row["human_caption"], template)
            answer = int((sample.labels != IGNORED).sum())
            per_clip = video.frames.shape[-2] * video.frames.shape[-1] // self.side**2
            self.check(video.clips, per_clip, template, answer)
        except InputError as error:
            return self.blank(template, (str(row["video_id"]), str(error)))
        return sample

    def path(self, index: int) -> Path:
        """Where the video of sample `index` is. Raises InputError where it is not there."""
        return find_video(self.rows[index]["video_path"], self.root, self.video_root)

    def template(self, index: int) -> Template:
        """What stands around the video: the row's own question, or one of the paper's, drawn by the row's id."""
        row = self.rows[index]
        if not (question := row.get("question")):
            return self.templates[random.Random(f"{self.seed} {row['video_id']}").randrange(len(self.templates))]
        if question not in self.asked:
            self.asked[question] = make_template(self.processor, question)
        return self.asked[question]

    def check(self, clips: int, tokens_per_clip: int, template: Template, answer: int) -> None:
        """Raises InputError for a sample of these sizes that cannot be trained on; `answer` counts `<|im_end|>`."""
        if self.variant.streams and answer - 1 < clips:
            raise InputError(
                f"its caption has {answer - 1} tokens for {clips} clips, so that some slots would stay silent: "
                "leave it out, or train an offline variant"
            )
        length = len(template.prompt) + len(template.tail) + len(template.header) + clips * tokens_per_clip + answer
        if length > self.max_length:
            raise InputError(f"its {length} tokens are more than the model length {self.max_length}: raise that")

    def check_room(self) -> None:
        """Raises InputError where a model length is too short for any sample."""
        around = min(len(t.prompt) + len(t.tail) + len(t.header) for t in {*map(self.template, range(len(self)))})
        least = around + math.ceil(self.budget.min_pixels_per_frame / self.side**2) + 2
        if least > self.max_length:
            raise InputError(
                f"a question, one clip and one word are {least} tokens, more than the model length {self.max_length}: "
                "raise --model_max_length, and --pack_tokens where it is given"
            )

    def blank(self, template: Template, bad: tuple[str, str] | None = None) -> Sample:
        """A sample of one black clip, without labels."""
        black = torch.zeros(2, 3, self.side, self.side, dtype=torch.uint8)
        sample = self._sample(Video(black, torch.tensor([0.0, 0.5]), 2.0, "blank"), "blank", template)
        sample.labels.fill_(IGNORED)
        sample.bad = bad
        return sample

    def _video(self, index: int) -> Video:
        if self.kept is not None and index in self.kept:
            return self.kept[index]
        most = self.max_length // math.ceil(self.budget.min_pixels_per_frame / self.side**2)
        video = read_video(self.path(index), budget=self.budget, reader=self.reader, max_clips=most)
        if self.kept is not None:
            self.kept[index] = video
        return video

    def _sample(self, video: Video, caption: str, template) -> Sample:
        answer = answer_ids(self.processor, template, caption)
        pixels, grid = clip_pixels(self.processor, video.frames)
        clips = len(pixels)
        layout = template.layout(grid, self.tokens_per_second * video.seconds_per_clip)
        check_clips(self.variant, layout, clips)
        counts = make_schedule(self.schedule, self.variant, clips).counts(len(answer))
        timeline = make_timeline(self.variant, layout, counts)
        rows = timeline.rows

        ids = torch.full((len(rows),), template.video)
        for part, tokens in ((PROMPT, template.prompt), (TAIL, template.tail), (HEADER, template.header)):
            ids[rows.part == part] = torch.tensor(tokens)
        written = torch.tensor(answer)
        ids[rows.part == ANSWER] = written[rows.index[rows.part == ANSWER]]
        assert int((rows.part == CLIP).sum()) == clips * grid[0] * grid[1]
        merge = self.processor.video_processor.merge_size
        return Sample(
            input_ids=ids,
            position_ids=timeline_positions(timeline),
            visual=rows.visual,
            text=rows.text,
            labels=torch.where(timeline.produces == NOTHING, IGNORED, written[timeline.produces]),
            pixel_values=pixels.flatten(0, 1),
            grid_thw=torch.tensor([clips, grid[0] * merge, grid[1] * merge]),
        )


class Evened(torch.utils.data.Dataset):
    """`samples`, and behind them blank ones up to a multiple of `of`: where that is what all processes take at once,
    none of them is handed a sample that another one has had."""

    def __init__(self, samples: StreamingDataset, of: int):
        self.samples, self.of = samples, of

    def __len__(self) -> int:
        return math.ceil(len(self.samples) / self.of) * self.of

    def __getitem__(self, index: int) -> Sample:
        if index < len(self.samples):
            return self.samples[index]
        return self.samples.blank(self.samples.templates[0])


class Order(torch.utils.data.Sampler):
    """The indices of `samples` for one epoch after the other: shuffled by `seed` and epoch, the blank ones last."""

    def __init__(self, samples: Evened, seed: int, shuffled: bool = True, drop_last: bool = False):
        """`drop_last` leaves out what is short of a multiple, in place of filling it up."""
        self.real, self.all, self.of = len(samples.samples), len(samples), samples.of
        self.seed, self.shuffled, self.drop_last, self.epoch = seed, shuffled, drop_last, 0

    def __len__(self) -> int:
        return self.real // self.of * self.of if self.drop_last else self.all

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.real))
        if self.shuffled:
            order = torch.randperm(self.real, generator=torch.Generator().manual_seed(self.seed + self.epoch)).tolist()
        return iter([*order, *range(self.real, self.all)][: len(self)])


def pack(samples: Sequence[Sample], tokens: int) -> list[list[Sample]]:
    """Rows of samples with at most `tokens` tokens each, every sample in the first row that has room for it."""
    rows: list[list[Sample]] = []
    left: list[int] = []
    for sample in samples:
        length = len(sample.input_ids)
        row = next((i for i, room in enumerate(left) if room >= length), len(rows))
        if row == len(rows):
            rows.append([])
            left.append(tokens)
        rows[row].append(sample)
        left[row] -= length
    return rows


def collate(samples: Sequence[Sample], pack_tokens: int = 0) -> dict:
    """A batch of rows padded at their ends: a row a sample, or packed into rows of `pack_tokens`.

    No token before a row's end may attend to what is behind it, so padding needs no mask of its own; it has no
    labels. `sample` numbers the samples of packed rows from 1, and the padding 0. `tally` is not the model's: it counts
    the samples that are trained on, which blank ones are not, and their tokens, and lists the bad ones.
    """
    rows = pack(samples, pack_tokens) if pack_tokens else [[sample] for sample in samples]

    def lay_out(name: str, value=0) -> Tensor:
        pieces = [torch.cat([getattr(sample, name) for sample in row]) for row in rows]
        batch = pad_sequence(pieces, batch_first=True, padding_value=value)
        return nn.functional.pad(batch, (0, pack_tokens - batch.shape[1]), value=value) if pack_tokens else batch

    batch = {name: lay_out(name) for name in ("input_ids", "visual", "text")}
    batch["position_ids"] = torch.stack([lay_out(name) for name in ("time", "height", "width")])
    batch["labels"] = lay_out("labels", IGNORED)
    if pack_tokens:
        numbers = [torch.cat([torch.full_like(s.input_ids, n) for n, s in enumerate(row, 1)]) for row in rows]
        padded = pad_sequence(numbers, batch_first=True)
        batch["sample"] = nn.functional.pad(padded, (0, pack_tokens - padded.shape[1]))
    in_order = [sample for row in rows for sample in row]
    batch["pixel_values_videos"] = torch.cat([sample.pixel_values for sample in in_order])
    batch["video_grid_thw"] = torch.stack([sample.grid_thw for sample in in_order])
    trained = [len(sample.input_ids) for sample in samples if (sample.labels != IGNORED).any()]
    bad = [sample.bad for sample in samples if sample.bad]
    return {**batch, "tally": {"samples": len(trained), "tokens": sum(trained), "bad": bad}}
