"""What each process of the evaluation does: decode videos ahead of the model, caption them in batches, and write a row
as soon as a caption is complete. Knows nothing about other processes and about metrics."""

import contextlib
import functools
import logging
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

import torch
from qwen_vl_streaming.common.ending import lost_worker, start_worker
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.paths import find_video
from qwen_vl_streaming.common.video_part import video_part
from qwen_vl_streaming.engine.batch import Job, caption_all
from qwen_vl_streaming.model.loading import load_config, load_model
from qwen_vl_streaming.model.prompts import QUESTIONS, clip_pixels, load_processor, make_template, spoken
from qwen_vl_streaming.sessions import caption_sessions
from qwen_vl_streaming.stream import Caption
from qwen_vl_streaming.timeline.positions import check_clips
from qwen_vl_streaming.timeline.segments import check_segments
from qwen_vl_streaming.timeline.variants import Variant
from qwen_vl_streaming.video.frames import FRAMES_PER_CLIP, Video, read_video
from qwen_vl_streaming.video.pixel_budget import SIDE_FACTOR, PixelBudget
from ranks import Rank
from results import SKIPPED_FIELDS, Row, appender, rows_part, skipped_part
from schedules import Schedules
from settings import ROOT
from torch.utils.data import DataLoader, Dataset
from transformers.utils.logging import disable_progress_bar

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """All that a process needs to know to caption videos."""

    rows: list[dict]
    """Rows of the data: the videos without a caption, the longest first."""
    data: str
    out: Path
    """The result file. Parts are written beside it."""
    model: str
    device: str
    """cpu, cuda (the GPU with the local rank's number) or cuda:N."""
    dtype: str
    weights: str | None
    """The precision of the linear layers, one of `quantization.WEIGHTS`, or None for that of the checkpoint."""
    video_root: Path | None
    """A further folder in which `video_path` is looked up."""
    variant: Variant
    schedules: Schedules
    budget: PixelBudget
    reader: str | None
    max_clips: int
    """What the model's positions have room for. A longer video is skipped before it is decoded."""
    batch_size: int
    memory: int | None
    """Bytes for keys and values; None for most of the GPU's free memory."""
    penalty: float
    max_new_tokens: int
    loaders: int
    """Processes that decode videos."""
    end_of_slot: str | None = None
    """The token with which the checkpoint ends slots, if it was trained to."""


@dataclass(frozen=True)
class PreparedVideo:
    """A decoded video, or the reason why it is skipped."""

    video_id: str
    job: Job | None = None
    reason: str = ""

    def pin_memory(self) -> "PreparedVideo":
        """Called by the DataLoader, so that copies to the GPU overlap with compute."""
        return replace(self, job=replace(self.job, pixels=self.job.pixels.pin_memory())) if self.job else self


class VideoDataset(Dataset):
    """Decodes videos. A DataLoader runs it in worker processes."""

    def __init__(self, plan: Plan, processor, tokens_per_second: int):
        self.plan, self.processor, self.tokens_per_second = plan, processor, tokens_per_second
        questions = {row["question"] or QUESTIONS[-1] for row in plan.rows}
        self.templates = {question: make_template(processor, question, plan.end_of_slot) for question in questions}

    def __len__(self) -> int:
        return len(self.plan.rows)

    def __getitem__(self, index: int) -> PreparedVideo:
        row, plan = self.plan.rows[index], self.plan
        video_id = row["video_id"]
        try:
            path = find_video(row["video_path"], ROOT, plan.video_root)
            video = read_video(
                path, part=video_part(row), budget=plan.budget, reader=plan.reader, max_clips=plan.max_clips
            )
            if "segments" in row:
                check_times(row, video)
            schedule = plan.schedules.of(video_id, video.clips)
        except InputError as error:
            return PreparedVideo(video_id, reason=str(error))
        pixels, grid = clip_pixels(self.processor, video.frames)
        template = self.templates[row["question"] or QUESTIONS[-1]]
        layout = template.layout(grid, self.tokens_per_second * video.seconds_per_clip)
        try:
            check_clips(plan.variant, layout, video.clips)
        except InputError as error:
            return PreparedVideo(video_id, reason=f"video {path}: {error}")
        pixels = pixels.to(getattr(torch, plan.dtype))  # the model's type: half as many bytes to copy to the GPU
        return PreparedVideo(video_id, Job(video_id, pixels, layout, template, schedule))


class Prefetcher:
    """Yields the claimed videos, decoded by worker processes while the model runs. They come in the order of the
    claims, the longest first, so that the memory is planned for the longest."""

    def __init__(self, videos: VideoDataset, device: torch.device, claims: Iterator[int]):
        self.videos, self.claims = videos, claims
        self.pending: deque[str] = deque()
        """Ids of the videos that were claimed and are not decoded yet."""
        loaders = videos.plan.loaders
        self.loader = iter(
            DataLoader(
                videos,
                batch_size=None,
                sampler=self._sample(),
                num_workers=loaders,
                multiprocessing_context="fork" if loaders else None,
                pin_memory=device.type == "cuda",
                worker_init_fn=functools.partial(start_decoder, parent=os.getpid()),
            )
        )

    def _sample(self) -> Iterator[int]:
        for index in takewhile(lambda index: index < len(self.videos), self.claims):
            self.pending.append(self.videos.plan.rows[index]["video_id"])
            yield index

    def __iter__(self) -> Iterator[PreparedVideo]:
        for video in self.loader:
            self.pending.popleft()
            yield video

    @contextlib.contextmanager
    def naming_fatal_videos(self) -> Iterator[None]:
        """Raises InputError, naming the candidates, where a video killed the process that decoded it."""
        try:
            yield
        except RuntimeError as error:
            if (how := lost_worker(error)) is None:
                raise
            fix = f"it was decoding one of the videos {', '.join(self.pending)}: remove that one from the data"
            raise InputError(
                f"a decoding process {how}: {fix if self.pending else 'run the same command again'}, "
                "try FORCE_QWENVL_VIDEO_READER=pyav, or use fewer --workers if memory is short"
            ) from error


def caption_videos(plan: Plan, rank: Rank, claims: Iterator[int], on_done: Callable[[], object]) -> None:
    """Caption the videos whose indices in `plan.rows` come from `claims`, until one is past the end. `on_done` is
    called for each video that was captioned or skipped.

    Raises InputError where the checkpoint cannot be loaded, for a video that does not fit in memory, and for one that
    kills its decoder. Any other bad video is skipped, and written down with the reason.
    """
    if not plan.rows:
        return
    device = torch.device("cuda", rank.local_rank) if plan.device == "cuda" else torch.device(plan.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    disable_progress_bar()  # each process would show its own while it loads the model
    processor = load_processor(plan.model)
    videos = VideoDataset(plan, processor, load_config(plan.model).vision_config.tokens_per_second)
    prefetcher = Prefetcher(videos, device, claims)  # decoding starts here, while the model loads
    rows = {row["video_id"]: row for row in plan.rows}
    with prefetcher.naming_fatal_videos():
        model = load_model(plan.model, "sdpa", getattr(torch, plan.dtype), plan.weights, device).to(device).eval()
    part = str(rank.rank)
    with (
        prefetcher.naming_fatal_videos(),
        appender(rows_part(plan.out, part)) as write_caption,
        appender(skipped_part(plan.out, part), SKIPPED_FIELDS) as write_skipped,
    ):

        def jobs() -> Iterator[Job]:
            for video in prefetcher:
                if video.job:
                    yield video.job
                else:
                    write_skipped({"video_id": video.video_id, "reason": video.reason})
                    on_done()

        start = time.perf_counter()
        # A model that decides when a slot ends has no plan in advance, and runs as live sessions do.
        caption_jobs = caption_all
        if plan.schedules.most is not None:
            caption_jobs = functools.partial(caption_sessions, clip_tokens=most_clip_tokens(plan.budget))
        for job, caption in caption_jobs(
            model,
            plan.variant,
            jobs(),
            batch_size=plan.batch_size,
            memory=plan.memory,
            penalty=plan.penalty,
            max_new_tokens=plan.max_new_tokens,
        ):
            now = time.perf_counter()
            end_of_slot = job.template.end_of_slot
            text = processor.tokenizer.decode(spoken(caption.tokens, end_of_slot), skip_special_tokens=True).strip()
            clip = job.layout.steps_per_clip / videos.tokens_per_second
            write_caption(make_row(rows[job.key], text, caption, plan.variant, now - start, clip, end_of_slot))
            start = now
            on_done()


def most_clip_tokens(budget: PixelBudget) -> int:
    """Visual tokens of the largest clips that `budget` allows, those of short videos."""
    return int(budget.most(FRAMES_PER_CLIP)) // SIDE_FACTOR**2


def check_times(row: dict, video: Video) -> None:
    """Raises InputError, with the row's place in the data, if its segments have invalid times or end after the video.
    They may have any order, because they are not written."""
    try:
        check_segments(row["segments"], video.clips * video.seconds_per_clip, when=None)
    except InputError as error:
        raise InputError(f"{row['place']}: {error}") from error


def start_decoder(worker: int, parent: int) -> None:
    """Called first in a worker that decodes. It leaves signals and log messages to its parent, and ends with it."""
    start_worker(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger().setLevel(logging.WARNING)


def make_row(
    row: dict,
    text: str,
    caption: Caption,
    variant: Variant,
    seconds: float,
    clip: float = 1.0,
    end_of_slot: int | None = None,
) -> Row:
    """A row of the result file. `clip` is the duration of a clip of the video in seconds; it is in the row if it is not
    1, which it is for a video of less than 2 frames a second. `end_of_slot` is the id of the checkpoint's end-of-slot
    token, if it has one."""
    return {
        "video_id": row["video_id"],
        "annotation": row["annotation"],
        "task": row["task"],
        "result": text,
        "variant": variant.name,
        "schedule": caption.schedule,
        "tokens": caption.tokens,
        "slots": caption.slots,
        "clips": len(caption.schedule),
        "seconds": round(seconds, 4),
        **({} if clip == 1 else {"seconds_per_clip": clip}),
        **({} if end_of_slot is None else {"end_of_slot": end_of_slot}),
        **({"segments": row["segments"]} if "segments" in row else {}),
    }
