"""Creates the demo's data set in the format of PE-Video on the hub, without any download.

    python code/demo/make_data.py --output DIR

writes `DIR/train/*.tar` and `DIR/test/*.tar`, WebDataset shards of `<id>.mp4` (H.264) and `<id>.json`, and
`DIR/truth.jsonl`, which lists what happens at which second and is used by check.py and show.py only. Each split also
has some videos that mani_data.py must drop, and some with an empty caption or a broken video file. samples.py chooses
the videos, scenes.py creates the scenes. The same settings give the same bytes. Does not depend on tokenizers and
models.
"""

import io
import json
import math
import multiprocessing
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
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
from samples import KINDS, QUIET_SECONDS, DataConfig, Sample, plan
from scenes import Scene, draw

MODEL_SIZE = 84
"""Side in pixels to which the model resizes frames."""
LONG_SIZE = 56
"""Side in pixels of the frames of long videos."""


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
