"""What one process of the evaluation does: it decodes videos ahead of the model, has them captioned, and writes a row
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
from crew import Place
from qwen_vl_streaming.common.ending import lost_worker, start_worker
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.paths import find_video
from qwen_vl_streaming.engine.batch import Job, caption_all
from qwen_vl_streaming.model.modeling_qwen2_5_vl import load_config, load_model
from qwen_vl_streaming.model.prompts import QUESTIONS, clip_pixels, load_processor, make_template
from qwen_vl_streaming.reference import Caption
from qwen_vl_streaming.timeline.positions import check_clips
from qwen_vl_streaming.timeline.variants import Variant
from qwen_vl_streaming.video.frames import PixelBudget, read_video
from results import SKIPPED_FIELDS, Appender, Row, rows_part, skipped_part
from schedules import Schedules
from torch.utils.data import DataLoader, Dataset
from transformers.utils.logging import disable_progress_bar

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """All that a process has to know; it travels to other processes."""

    rows: list[dict]
    """Of the data: the videos that have no caption yet, the longest first."""
    out: Path
    """The result file, beside which the parts are."""
    model: str
    device: str
    """cpu, cuda, which is the GPU of the process's number, or cuda:N."""
    dtype: str
    root: Path
    """The project's."""
    video_root: Path | None
    """Where else `video_path` is looked up."""
    variant: Variant
    schedules: Schedules
    budget: PixelBudget
    reader: str | None
    max_clips: int
    """Which the model's positions have room for: a longer video is skipped before it is decoded."""
    batch_size: int
    memory: int | None
    """Bytes for keys and values; None: most of what the GPU has free."""
    penalty: float
    max_new_tokens: int
    loaders: int
    """Processes that decode."""
    threads: int | None
    """Of torch on a CPU; None: as many as it takes by itself."""


@dataclass(frozen=True)
class Watched:
    """A video ready for the model, or the reason why there is none."""

    video_id: str
    job: Job | None = None
    reason: str = ""

    def pin_memory(self) -> "Watched":
        """Called by the data loader, so that pixels travel to the GPU beside its work."""
        return replace(self, job=replace(self.job, pixels=self.job.pixels.pin_memory())) if self.job else self


class Videos(Dataset):
    """Decodes videos; a data loader runs it in processes of its own."""

    def __init__(self, work: Work, processor, tokens_per_second: int):
        self.work, self.processor, self.tokens_per_second = work, processor, tokens_per_second
        questions = {row["question"] or QUESTIONS[-1] for row in work.rows}
        self.templates = {question: make_template(processor, question) for question in questions}

    def __len__(self) -> int:
        return len(self.work.rows)

    def __getitem__(self, index: int) -> Watched:
        row, work = self.work.rows[index], self.work
        video_id = row["video_id"]
        try:
            path = find_video(row["video_path"], work.root, work.video_root)
            video = read_video(path, budget=work.budget, reader=work.reader, max_clips=work.max_clips)
            schedule = work.schedules.of(video_id, video.clips)
        except InputError as error:
            return Watched(video_id, reason=str(error))
        pixels, grid = clip_pixels(self.processor, video.frames)
        template = self.templates[row["question"] or QUESTIONS[-1]]
        layout = template.layout(grid, self.tokens_per_second * video.seconds_per_clip)
        try:
            check_clips(work.variant, layout, video.clips)
        except InputError as error:
            return Watched(video_id, reason=f"video {path}: {error}")
        pixels = pixels.to(getattr(torch, work.dtype))  # as the model takes them: half as many bytes go to a GPU
        return Watched(video_id, Job(video_id, pixels, layout, template, schedule))


class Ahead:
    """The claimed videos, decoded by other processes beside the model's work. They come in the order of the claims: the
    longest first, as the memory wants them."""

    def __init__(self, videos: Videos, device: torch.device, claims: Iterator[int]):
        self.videos, self.claims = videos, claims
        self.waiting: deque[str] = deque()
        """Ids of the videos that were claimed and did not come yet."""
        loaders = videos.work.loaders
        self.loader = iter(
            DataLoader(
                videos,
                batch_size=None,
                sampler=self._note(),
                num_workers=loaders,
                multiprocessing_context="fork" if loaders else None,
                pin_memory=device.type == "cuda",
                worker_init_fn=functools.partial(begin_worker, parent=os.getpid()),
            )
        )

    def _note(self) -> Iterator[int]:
        for place in takewhile(lambda place: place < len(self.videos), self.claims):
            self.waiting.append(self.videos.work.rows[place]["video_id"])
            yield place

    def __iter__(self) -> Iterator[Watched]:
        for watched in self.loader:
            self.waiting.popleft()
            yield watched

    @contextlib.contextmanager
    def naming_the_fatal(self) -> Iterator[None]:
        """Raises InputError where a file has killed the process that decoded it."""
        try:
            yield
        except RuntimeError as error:
            if (how := lost_worker(error)) is None:
                raise
            what = f"it was decoding one of the videos {', '.join(self.waiting)}: leave that out of the data"
            raise InputError(
                f"a process that decodes {how}: {what if self.waiting else 'give the same command again'}, "
                "try FORCE_QWENVL_VIDEO_READER=pyav, or fewer --workers where memory is short"
            ) from error


def watch(work: Work, place: Place, claims: Iterator[int], tell: Callable[[], object]) -> None:
    """Caption the videos whose places in `work.rows` come from `claims`, until one is past the end, in the process that
    stands at `place`. `tell` is called for each video that has its row or was left out.

    Raises InputError where the checkpoint cannot be loaded, for a video that the memory does not hold, and for one that
    kills whoever decodes it. Any other bad video is left out, with its reason.
    """
    if not work.rows:
        return
    device = torch.device("cuda", place.local) if work.device == "cuda" else torch.device(work.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif work.threads:
        torch.set_num_threads(work.threads)
    disable_progress_bar()  # of the loading, which would be told by each process
    processor = load_processor(work.model)
    videos = Videos(work, processor, load_config(work.model).vision_config.tokens_per_second)
    ahead = Ahead(videos, device, claims)  # from here on videos are decoded, beside the loading of the model
    rows = {row["video_id"]: row for row in work.rows}
    with ahead.naming_the_fatal():
        model = load_model(work.model, "sdpa", getattr(torch, work.dtype)).to(device).eval()
    with (
        ahead.naming_the_fatal(),
        Appender(rows_part(work.out, place.name)) as captioned,
        Appender(skipped_part(work.out, place.name), SKIPPED_FIELDS) as skipped,
    ):

        def jobs() -> Iterator[Job]:
            for watched in ahead:
                if watched.job:
                    yield watched.job
                else:
                    skipped.append({"video_id": watched.video_id, "reason": watched.reason})
                    tell()

        began = time.perf_counter()
        for job, caption in caption_all(
            model,
            work.variant,
            jobs(),
            batch_size=work.batch_size,
            memory=work.memory,
            penalty=work.penalty,
            max_new_tokens=work.max_new_tokens,
        ):
            now = time.perf_counter()
            text = processor.tokenizer.decode(caption.tokens, skip_special_tokens=True).strip()
            captioned.append(make_row(rows[job.key], text, caption, work.variant, now - began))
            began = now
            tell()


def begin_worker(worker: int, parent: int) -> None:
    """A process that decodes leaves news, and signals, to the one that it works for, and ends with it."""
    start_worker(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger().setLevel(logging.WARNING)


def make_row(row: dict, text: str, caption: Caption, variant: Variant, seconds: float) -> Row:
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
    }
