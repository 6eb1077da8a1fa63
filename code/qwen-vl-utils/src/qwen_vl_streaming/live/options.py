"""What `live` can be asked: its command line, and the source, variant and files that this names.

Knows nothing of sessions.
"""

import argparse
import functools
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..common.errors import InputError, OneLineParser
from ..common.paths import PROJECT, find_model, look_up
from ..devices import DEVICE_HELP, choose_device, look
from ..model.prompts import QUESTIONS
from ..model.trained import check_trained
from ..replay import DTYPES
from ..sessions import GREEDY, MODES
from ..timeline.variants import ENVIRONMENT_VARIABLE, VARIANTS, Variant, chosen_variant, get_variant
from ..video.frames import BUDGETS, FRAMES_PER_CLIP, PixelBudget, read_video, sampled_rate
from ..video.index import index_video
from ..video.sources import Clip, paced_clips, synthetic_clips
from ..video.streams import stream_clips

logger = logging.getLogger(__name__)

SYNTHETIC = "synthetic"
SCENE = (280, 504)
"""Height and width of the synthetic scene, before it is resized as a stream's frames are."""
RECORDS = Path("live_output")
REPLACED = "an earlier file is replaced"
CLIPS = 300
"""Watched at most, where --max-clips does not say and there is no window."""
TOKENS_PER_CLIP = 8
"""Written at most, likewise, for each clip."""
LIMITS = {
    "deadline": (1e-6, 1e6),
    "speed": (1e-3, 1e6),
    "fps": (1e-2, 1e3),
    "reconnect_seconds": (0, 1e6),
    "max_clips": (1, 10**6),
    "max_new_tokens": (1, 10**8),
    "penalty": (1e-2, 1e2),
}
"""The least and the most of what is a number."""


def parse(description: str) -> argparse.Namespace:
    """The command line, on which all that is wrong by itself is refused."""
    parser = OneLineParser(
        prog="python -m qwen_vl_streaming.live",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="folder or hub id of a checkpoint")
    add("--source", required=True, help=f"a video file, /dev/videoN, rtsp://..., http://... or {SYNTHETIC}")
    add("--variant", choices=VARIANTS, help=f"default: {ENVIRONMENT_VARIABLE}, else what the checkpoint was trained as")
    add(
        "--force",
        action="store_true",
        help="use a checkpoint that was trained as another variant or under another position rule",
    )
    add("--question", default=QUESTIONS[-1], help="default: %(default)s")
    add("--way", choices=MODES, help="default: fused where the variant allows it, else serial")
    add("--schedule", help=f"wait-K, random-K or {GREEDY}, as fast as it can (default: wait-K with the checkpoint's K)")
    add(
        "--behind",
        choices=("wait", "skip"),
        default="wait",
        help="what clips do when it cannot keep up: wait until it gets to them, or be skipped for the newest (default: "
        "%(default)s)",
    )
    add(
        "--deadline",
        type=float,
        metavar="SECONDS",
        help=f"what a slot has from its clip to its last word, or to its beginning where it is {GREEDY}; later is a "
        "missed deadline (default: until the source's next clip is there)",
    )
    add("--speed", type=float, default=1.0, help="times real time, for files and the synthetic scene (default: 1)")
    add("--fps", type=float, default=2.0, help="frames sampled a second of video (default: 2)")
    for name in ("--min-pixels-per-frame", "--max-pixels-per-frame", "--max-pixels-per-video"):
        add(name, type=int, metavar="N", help="default: as the checkpoint was trained")
    add(
        "--budget",
        choices=BUDGETS,
        help="which frames of a file share the pixels of a video: those that it has, or as many as the longest has "
        "(default: as the checkpoint was trained; a camera or stream is always sized as the longest)",
    )
    add(
        "--reconnect-seconds",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="how long a stream that broke off is tried again (default: 10)",
    )
    add("--max-clips", type=int, metavar="N", help=f"watch at most these (default: {CLIPS}; with --window, all)")
    add(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"write at most these (default: {TOKENS_PER_CLIP} for each of --max-clips; with --window, any number)",
    )
    add(
        "--window",
        type=int,
        nargs=2,
        metavar=("CLIPS", "TOKENS"),
        help="keep only the newest clips and tokens in sight, of a stream that may go on for ever",
    )
    add("--penalty", type=float, default=1.15, help="repetition penalty; 1 turns it off (default: %(default)s)")
    add("--chunk", type=int, metavar="N", help="visual tokens that ride in a pass, fused (default: a whole clip)")
    add("--record", type=Path, metavar="FILE", help=f"{REPLACED} (default: {RECORDS}/<time>-<variant>-<pid>.json)")
    add(
        "--keep",
        type=Path,
        metavar="FILE",
        help=f"keep the frames that were fed, so that a stream can be replayed; {REPLACED}",
    )
    add("--device", default="", help=DEVICE_HELP)
    add("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on the CPU")
    arguments = parser.parse_args()
    for name, (least, most) in LIMITS.items():
        if (value := getattr(arguments, name)) is not None and not least <= value <= most:
            parser.error(f"--{name.replace('_', '-')} {str(value)[:20]} must be from {least:.10g} to {most:.10g}")
    arguments.model = find_model(arguments.model, PROJECT)
    if not (arguments.source == SYNTHETIC or arguments.source.startswith("/dev/") or "://" in arguments.source):
        arguments.source = str(look_up(arguments.source, PROJECT))
    for value, of in zip(arguments.window or (), ("max_clips", "max_new_tokens"), strict=False):
        if not 1 <= value <= LIMITS[of][1]:
            parser.error(f"--window {str(value)[:20]} must be from 1 to {LIMITS[of][1]}")
    device, arguments.device_line = choose_device(arguments.device, look(os.environ))
    arguments.device = torch.device(device)
    return arguments


@dataclass(frozen=True)
class Source:
    clips: Callable[[], Iterator[Clip]]
    """Opens it: its time begins then."""
    seconds_per_clip: float
    size: tuple[int, int] | None
    """(height, width) of its frames, None where that is not known before the first."""
    about: dict
    """What a replay reads the clips from."""
    pace: float | None = None
    """Wall-clock seconds between its clips, None where that is its own affair."""
    count: int | None = None
    """How many they are, where that is known."""


def most_clips(arguments: argparse.Namespace) -> int | None:
    """How many clips are watched at most; None for any number of them."""
    return arguments.max_clips or (None if arguments.window else CLIPS)


def open_source(arguments: argparse.Namespace, budget: PixelBudget) -> Source:
    """What --source names. Raises InputError where it is not there, as far as that can be seen before it is opened."""
    name, fps, speed, most = arguments.source, arguments.fps, arguments.speed, most_clips(arguments)
    if name == SYNTHETIC:
        size = budget.size(*SCENE, frames=0)
        clips = functools.partial(synthetic_clips, most or sys.maxsize, speed=speed, fps=fps, size=size)
        about = {"synthetic": {"fps": fps, "size": list(size)}}
        seconds = FRAMES_PER_CLIP / fps
        return Source(clips, seconds, size, about, seconds / speed, most)
    if name.startswith("/dev/") or "://" in name:
        if speed != 1:
            raise InputError(f"--speed {speed:g}: only files and the synthetic scene can be hurried, not {name}")
        if name.startswith("/dev/") and not Path(name).exists():
            raise InputError(f"source {name} does not exist: check that the camera is connected")
        patience = arguments.reconnect_seconds
        clips = functools.partial(stream_clips, name, fps=fps, budget=budget, reconnect_seconds=patience)
        return Source(clips, FRAMES_PER_CLIP / fps, None, {})
    index = index_video(name)
    cut = {}
    if most and arguments.behind == "wait":
        end = most * FRAMES_PER_CLIP / sampled_rate(index, fps)
        if index.duration > end:
            logger.warning("%s lasts %.1f s, of which %g are watched: see --max-clips", name, index.duration, end)
            cut = {"end": end}
    video = read_video(name, fps=fps, budget=budget, index=index, **cut)
    logger.info("frames of %d x %d pixels: --budget %s", *reversed(video.frames.shape[2:]), budget.budget)
    about = {"video": {"path": os.path.abspath(name), "fps": fps, "budget": asdict(budget), **cut}}
    height, width = video.frames.shape[2:]
    clips, seconds = functools.partial(paced_clips, video, speed), video.seconds_per_clip
    return Source(clips, seconds, (height, width), about, seconds / speed, video.clips)


def choose_variant(arguments: argparse.Namespace, config) -> Variant:
    """Raises InputError where the checkpoint was trained otherwise, unless that is forced."""
    trained = getattr(config, "streaming_variant", None)
    variant = get_variant(arguments.variant or chosen_variant(trained or "group"))
    if not arguments.force:
        check_trained(config, arguments.model, variant, "--force to watch with it all the same")
    return variant


def record_place(arguments: argparse.Namespace, variant: Variant) -> Path:
    """Where the record goes. Raises InputError where it or --keep could not be written in the end, or would destroy
    the source or one another."""
    record = arguments.record or RECORDS / time.strftime(f"%Y%m%d-%H%M%S-{variant.name}-{os.getpid()}.json")
    for path in filter(None, (record, arguments.keep)):
        folder = path.absolute().parent
        while not os.path.exists(folder):
            folder = folder.parent
        if os.path.exists(path) and not os.path.isfile(path):
            raise InputError(f"{path} cannot be written (it is no file): name another file")
        try:  # a name as long as it is written under; permissions alone do not tell, root has them everywhere
            with tempfile.NamedTemporaryFile(prefix=f"{path.name}.{os.getpid()}.live.", suffix=".part", dir=folder):
                pass
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error.strerror}): name another file") from error
        if _same(path, arguments.source):
            raise InputError(f"{path} is the source, which would be lost: name another file")
    if arguments.keep and _same(record, arguments.keep):
        raise InputError(f"--record and --keep both name {record}: name two files")
    return record


def _same(one: str | Path, other: str | Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)
