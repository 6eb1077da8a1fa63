"""Creates the demo's data set in the format of PE-Video on the hub, without any download.

    python code/demo/make_data.py --output DIR

writes `DIR/train/*.tar` and `DIR/test/*.tar`, WebDataset shards of `<id>.mp4` (H.264) and `<id>.json`, and
`DIR/truth.jsonl`, which lists what happens at which second and is used by check.py and show.py only. Each split also
has some videos that mani_data.py must drop, and some with an empty caption or a broken video file. scenes.py creates
the scenes. The same settings give the same bytes. Does not depend on tokenizers and models.
"""

import io
import json
import math
import multiprocessing
import os
import random
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageDraw
from qwen_vl_streaming.common.errors import InputError, OneLineParser, run
from qwen_vl_streaming.common.files import write_file
from qwen_vl_streaming.common.progress import Progress
from scenes import OPENING, OTHER_OPENING, Scene, count_words, draw, make_quiet_scene, make_scene

RATE = (3.1, 4.4)
"""Words per second of an ordinary caption; mani_data.py keeps 3 to 5."""
MODEL_SIZE = 84
"""Side in pixels to which the model resizes frames."""


@dataclass(frozen=True)
class Kind:
    """A kind of video: ranges of duration in seconds and of words per second, and whether mani_data.py keeps it."""

    seconds: tuple[float, float] = (5.0, 12.0)
    rate: tuple[float, float] = RATE
    kept: bool = True


KINDS = {
    "ordinary": Kind(),
    "other_opening": Kind(),
    "short": Kind(seconds=(4.0, 4.8), kept=False),
    "long": Kind(seconds=(31.0, 33.0), kept=False),
    "slow": Kind(seconds=(8.0, 12.0), rate=(1.5, 2.8), kept=False),
    "fast": Kind(rate=(3.1, 4.0), kept=False),
    "empty": Kind(kept=False),
    "broken": Kind(kept=False),
}
QUIET_SECONDS = (10.0, 18.0)
DROPPED = tuple(name for name, kind in KINDS.items() if not kind.kept)
LONG_SIZE = 56


@dataclass(frozen=True)
class DataConfig:
    """Settings of `make_dataset`."""

    output: Path
    """Folder of the data set. If it has a data set with the same settings, only missing shards are created."""
    train_videos: int = 1200
    """Ordinary videos in the split `train`."""
    test_videos: int = 120
    """Ordinary videos in the split `test`."""
    dropped: int = 2
    """Additional videos per split of each kind that mani_data.py must drop."""
    other_openings: int = 0
    """Additional videos per split with captions that do not begin "The video shows"."""
    seed: int = 0
    """Random seed."""
    size: int = 168
    """Side of a frame, in pixels."""
    shard_videos: int = 100
    """Videos per shard."""
    segments: bool = False
    """Rows also have `segments`: each sentence with the second in which its event happens."""
    quiet: bool = False
    """Ordinary videos last 10 to 18 seconds, and nothing happens during long stretches. Their captions have about two
    words per second, so mani_data.py needs --min-tokens-per-second 0."""

    def __post_init__(self) -> None:
        for name in ("train_videos", "test_videos", "dropped", "other_openings", "seed"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be 0 or more")
        if self.shard_videos < 1:
            raise InputError(f"--shard-videos is {self.shard_videos}: it must be 1 or more")
        if self.size < 56 or self.size % 2:
            raise InputError(f"--size is {self.size}: it must be even and 56 or more")


@dataclass(frozen=True)
class Sample:
    """One video to create: its id, split and kind, and the random seed of everything else."""

    video_id: str
    split: str
    kind: str
    seed: str
    segments: bool = False
    quiet: bool = False

    def scene(self) -> tuple[Scene, int]:
        """Create the scene. Returns it with its frames per second."""
        kind, rng = KINDS[self.kind], random.Random(self.seed)
        fps = rng.choice((24, 30))
        opening = OTHER_OPENING if self.kind == "other_opening" else OPENING
        if self.quiet and self.kind == "ordinary":
            return make_quiet_scene(rng, round(rng.uniform(*QUIET_SECONDS) * fps) / fps, opening), fps
        frames = round(rng.uniform(*kind.seconds) * fps)
        scene = make_scene(rng, frames / fps, kind.rate, opening)
        if self.kind == "empty":
            scene.caption = ""
        while self.kind == "fast" and count_words(scene.caption) < 5.2 * scene.seconds:
            scene.caption += " The background is plain."
        return scene, fps


def plan(config: DataConfig) -> dict[str, list[Sample]]:
    """The samples of each split in shard order. Ids are numbers as strings, as in PE-Video."""
    samples = {}
    rng = random.Random(f"{config.seed}/plan")
    extra = [kind for kind in DROPPED for _ in range(config.dropped)] + ["other_opening"] * config.other_openings
    kinds = {"train": ["ordinary"] * config.train_videos + extra, "test": ["ordinary"] * config.test_videos + extra}
    ids = iter(rng.sample(range(10**6, 10**9), sum(map(len, kinds.values()))))
    for split, names in kinds.items():
        rng.shuffle(names)
        samples[split] = [
            Sample(str(next(ids)), split, name, f"{config.seed}/{split}/{i}", config.segments, config.quiet)
            for i, name in enumerate(names)
        ]
    return samples


def encode(scene: Scene, fps: int, size: int) -> bytes:
    """Encode the scene as an H.264 MP4 file of size × size pixels."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast", "crf": "20", "threads": "1"})
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        # Reuse one reformatter: creating it costs more than using it.
        reformatter, drawn, frame = VideoReformatter(), None, None
        for index in range(round(scene.seconds * fps)):
            state = scene.visible(index / fps)
            if state != drawn:
                pixels = np.asarray(draw(scene, index / fps, size))
                rgb = av.VideoFrame.from_ndarray(pixels, "rgb24")
                drawn, frame = state, reformatter.reformat(rgb, format="yuv420p", threads=1)
            frame.pts, frame.time_base = index, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def render(sample: Sample, size: int) -> tuple[Sample, bytes, dict]:
    """Create a sample's MP4 file and its JSON with PE-Video's fields."""
    scene, fps = sample.scene()
    size = LONG_SIZE if sample.kind == "long" else size
    video = encode(scene, fps, size)
    if sample.kind == "broken":
        video = video[: len(video) // 3]
    things = sorted({word for event in scene.events for word in (event.shape, event.colour)})
    row = {
        "video_id": sample.video_id,
        "category": "shapes",
        "fps": fps,
        "width": size,
        "height": size,
        "video_duration_in_s": round(scene.seconds, 3),
        "keywords": ", ".join(things),
        "model_caption": f"Coloured shapes on a plain background: {', '.join(things)}.",
        "human_caption": scene.caption,
    }
    if sample.segments and scene.caption == " ".join(scene.sentences):
        row["segments"] = scene.segments()
    return sample, video, row


def truth(sample: Sample) -> dict:
    """A sample's row of truth.jsonl: its caption and events; `dropped` is why mani_data.py drops it, or null."""
    scene, _ = sample.scene()
    return {
        "video_id": sample.video_id,
        "split": sample.split,
        "dropped": None if KINDS[sample.kind].kept else sample.kind,
        "caption": scene.caption,
        "events": [asdict(event) for event in scene.events],
    }


def make_dataset(config: DataConfig, workers: int = 1, progress: bool = False) -> None:
    """Write the data set that `config` describes; existing shards are kept.

    Raises InputError if the folder has a data set with other settings.
    """
    settings = {**asdict(config), "output": None}
    for name in ("segments", "quiet"):  # as in data sets made before there were these settings
        if not settings[name]:
            del settings[name]
    saved = config.output / "make_data.json"
    if saved.exists() and json.loads(saved.read_text()) != settings:
        raise InputError(f"{config.output} has a data set with other settings: give another --output, or delete it")
    config.output.mkdir(parents=True, exist_ok=True)
    write_file(saved, json.dumps(settings, indent=1))

    shards, splits = {}, plan(config)
    for split, samples in splits.items():
        for start in range(0, len(samples), config.shard_videos):
            path = config.output / split / f"{split}-{start // config.shard_videos:05d}.tar"
            if not path.exists():
                shards[path] = samples[start : start + config.shard_videos]

    todo = [sample for samples in shards.values() for sample in samples]
    bar = Progress(total=len(todo), desc="draw", unit="video", disable=not progress)
    with bar, _mapper(workers if len(todo) > 1 else 1) as each:
        rendered = iter(each(partial(render, size=config.size), todo))

        def next_rendered() -> tuple[Sample, bytes, dict]:
            one = next(rendered)
            bar.update()
            return one

        for path, samples in shards.items():
            write_file(path, _tar(next_rendered() for _ in samples))
    rows = [json.dumps(truth(sample)) + "\n" for samples in splits.values() for sample in samples]
    write_file(config.output / "truth.jsonl", "".join(rows))


@contextmanager
def _mapper(workers: int) -> Iterator[Callable[..., Iterable]]:
    """An ordered lazy map, in this process or in `workers` new ones."""
    if workers <= 1:
        yield map
        return
    # Spawn instead of fork: a forked process inherits locks held by other threads.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield partial(pool.imap, chunksize=4)


def _tar(rendered: Iterable[tuple[Sample, bytes, dict]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for sample, video, row in rendered:
            for ending, content in (("mp4", video), ("json", json.dumps(row).encode())):
                entry = tarfile.TarInfo(f"{sample.video_id}.{ending}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def read_shards(folder: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the members of the shards in a folder whose names are `wanted`."""
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as archive:
            for entry in archive:
                if wanted(entry.name):
                    yield entry.name, archive.extractfile(entry).read()


def preview(config: DataConfig, path: Path) -> None:
    """Write a picture of eight test videos: one frame per second at the model's resolution, and the caption."""
    cell, columns = MODEL_SIZE + 6, math.ceil(QUIET_SECONDS[1]) if config.quiet else 12
    samples = [sample for sample in plan(config)["test"] if sample.kind == "ordinary"][:8]
    sheet = Image.new("RGB", (columns * cell, max(1, len(samples)) * (cell + 22)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, sample in enumerate(samples):
        top = number * (cell + 22)
        _, video, row = render(sample, config.size)
        for second, frame in _frame_each_second(video, row["fps"]):
            sheet.paste(frame.resize((MODEL_SIZE, MODEL_SIZE), Image.Resampling.BICUBIC), (second * cell, top))
        pen.text((2, top + cell), f"{row['video_duration_in_s']:.1f} s: {row['human_caption']}", "black")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")


def _frame_each_second(video: bytes, fps: int) -> Iterator[tuple[int, Image.Image]]:
    """Yield (second, frame at the middle of that second) of an MP4 file."""
    with av.open(io.BytesIO(video)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index % fps == fps // 2:
                yield index // fps, frame.to_image()


def main() -> None:
    parser = OneLineParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the data set")
    for name, default, text in (
        ("train-videos", 1200, "ordinary videos in the split train"),
        ("test-videos", 120, "ordinary videos in the split test"),
        ("dropped", 2, "videos per split of each kind that mani_data.py must drop"),
        ("other-openings", 0, 'videos per split with captions that do not begin "The video shows"'),
        ("seed", 0, "random seed"),
        ("size", 168, "side of a frame in pixels"),
        ("shard-videos", 100, "videos per shard"),
        ("workers", os.cpu_count(), "worker processes"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--segments", action="store_true", help="write each sentence with its time, as `segments`")
    parser.add_argument("--quiet", action="store_true", help="videos with long stretches in which nothing happens")
    parser.add_argument("--preview", type=Path, help="only write a picture of some test videos to this PNG file")
    arguments = vars(parser.parse_args())
    picture, workers = arguments.pop("preview"), arguments.pop("workers")
    config = DataConfig(**arguments)
    if picture:
        preview(config, picture)
        print(f"wrote {picture}")
    else:
        make_dataset(config, workers, progress=True)
        print(f"wrote {config.output}: train, test and truth.jsonl")


if __name__ == "__main__":
    run(main)
