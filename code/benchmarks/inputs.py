"""Inputs of sft.py: H.264 files, captions, and checkpoints of the real shapes with random weights."""

import json
import os
import random
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import av
import numpy as np
import torch
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.files import atomic_folder
from qwen_vl_streaming.model.loading import load_config
from qwen_vl_streaming.model.prompts import load_processor
from qwen_vl_streaming.model.released import released_config
from training import ANSWER, find_device, random_model

MAKE_MODEL = Path(__file__).resolve().parents[1] / "demo/make_model.py"
SYLLABLES = ("ba", "ce", "di", "fo", "gu", "ha", "jin", "kel", "lor", "man", "nes", "pol", "qui", "ras", "ten", "wan")
BLOCK, TRAVEL = 14, 240
"""Pixels: side of a block of the pattern, and range of the camera's movement in both directions."""


@dataclass(frozen=True)
class Film:
    """Format of the generated video files."""

    width: int
    height: int
    fps: int
    seconds: int

    @classmethod
    def parse(cls, text: str, seconds: int) -> "Film":
        """Parse a text such as 364x196@8. Raises InputError if it is malformed."""
        try:
            size, fps = text.split("@")
            width, height = map(int, size.split("x"))
            return cls(width, height, int(fps), seconds)
        except ValueError as error:
            raise InputError(f"--video {text}: give WIDTHxHEIGHT@FPS, such as 364x196@8") from error


def make_video(film: Film, folder: Path, number: int) -> None:
    """Write an H.264 video of a camera that pans over a blurred pattern, so that every frame differs."""
    draw = np.random.default_rng(number)
    blocks = draw.integers(0, 256, (3, *((side + TRAVEL) // BLOCK + 2 for side in (film.height, film.width))))
    blurred = torch.nn.functional.interpolate(
        torch.from_numpy(blocks)[None].float(), scale_factor=BLOCK, mode="bicubic"
    )
    field = blurred[0].clamp(0, 255).permute(1, 2, 0).byte().numpy()
    path = folder / f"{number}.mp4"
    temporary = path.with_suffix(".part")
    with av.open(str(temporary), "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=film.fps)
        stream.width, stream.height, stream.pix_fmt = film.width, film.height, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.options = {"preset": "ultrafast", "x264-params": "log-level=none"}
        for index in range(film.seconds * film.fps):
            at = index / film.fps
            x, y = (round(TRAVEL / 2 * (1 + wave)) for wave in (np.sin(1.1 * at + number), np.cos(0.7 * at)))
            pixels = np.ascontiguousarray(field[y : y + film.height, x : x + film.width])
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, film.fps)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    temporary.replace(path)


def make_captions(count: int, seed: int) -> list[str]:
    """Captions of invented words, nearly all of which are one token of `make_tiny`'s tokenizer."""
    draw = random.Random(0)
    words = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 3))) for _ in range(400)]
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=ANSWER - 1)) for _ in range(count)]


def make_rows(film: Film, videos: int, captions: list[str], folder: Path) -> Path:
    """Write a JSONL file with a row per caption, which use `videos` video files in turn. Creates missing videos."""
    name = f"{film.width}x{film.height}@{film.fps}-{film.seconds}s"
    films = folder / name
    films.mkdir(parents=True, exist_ok=True)
    missing = [number for number in range(videos) if not (films / f"{number}.mp4").exists()]
    if missing:
        began = time.perf_counter()
        with ThreadPool(min(len(missing), os.cpu_count())) as pool:  # encoding releases the GIL
            pool.map(partial(make_video, film, films), missing, chunksize=1)
        print(f"generated {len(missing)} videos in {time.perf_counter() - began:.1f} s", flush=True)
    path = folder / f"{name}-{len(captions)}.jsonl"
    with path.open("w") as file:
        for number, caption in enumerate(captions):
            video = str(films / f"{number % videos}.mp4")
            row = {"video_id": str(number), "video_path": video, "human_caption": caption}
            print(json.dumps({**row, "video_duration_in_s": film.seconds}), file=file)
    return path


def make_tiny(folder: Path) -> Path:
    """Create the demo's small checkpoint, with a tokenizer trained on the words of `make_captions`."""
    checkpoint = folder / "tiny"
    if not checkpoint.exists():
        words = folder / "words"
        (words / "train").mkdir(parents=True, exist_ok=True)
        with tarfile.open(words / "train/0.tar", "w") as archive:
            for number, caption in enumerate(make_captions(100, seed=0)):
                (words / "caption.json").write_text(json.dumps({"human_caption": caption}))
                archive.add(words / "caption.json", f"{number}.json")
        subprocess.run([sys.executable, MAKE_MODEL, "--data", words, "--output", checkpoint], check=True)
    return checkpoint


def make_checkpoint(size: str, layers: int | None, folder: Path) -> Path:
    """Create a checkpoint of the real shape with random bf16 weights and the processor of the small checkpoint.

    Returns the existing checkpoint if there is one, and the small checkpoint for the size `tiny`. Uses a GPU if there
    is one.
    """
    tiny = make_tiny(folder)
    if size == "tiny":
        return tiny
    checkpoint = folder / f"{size}-{layers or 'all'}"
    if checkpoint.exists():
        return checkpoint
    began, small, config = time.perf_counter(), load_config(tiny), released_config(size, layers)
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        setattr(config, name, getattr(small, name))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config.text_config, name, getattr(small.text_config, name))
    model = random_model(config, find_device())
    with atomic_folder(checkpoint) as temporary:
        model.save_pretrained(temporary, max_shard_size="4GB")
        load_processor(tiny).save_pretrained(temporary)
    elapsed = time.perf_counter() - began
    print(f"{checkpoint.name}: {model.num_parameters() / 1e9:.2f}e9 weights saved in {elapsed:.1f} s", flush=True)
    return checkpoint
