"""The command line of `live`, and the source, variant and files that it names.

Knows nothing of sessions.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from ..common.errors import InputError, OneLineParser
from ..common.paths import PROJECT, find_model, look_up
from ..devices import DEVICE_HELP, choose_device, look
from ..model.loading import DTYPES
from ..model.prompts import QUESTIONS
from ..model.quantization import WEIGHTS, WEIGHTS_HELP
from ..model.trained import MODEL
from ..sessions import GREEDY, MODES
from ..timeline.variants import ENVIRONMENT_VARIABLE, VARIANTS, Variant
from ..video.opening import SYNTHETIC
from ..video.pixel_budget import BUDGETS
from .setup import CLIPS, TOKENS_AFTER_END, TOKENS_PER_CLIP

RECORDS = Path("live_output")
REPLACED = "an existing file is replaced"
LIMITS = {
    "deadline": (1e-6, 1e6),
    "speed": (1e-3, 1e6),
    "fps": (1e-2, 1e3),
    "reconnect_seconds": (0, 1e6),
    "max_clips": (1, 10**6),
    "max_new_tokens": (1, 10**8),
    "penalty": (1e-2, 1e2),
}
"""The smallest and the largest value of numeric flags."""


def parse(description: str | None) -> argparse.Namespace:
    """Parse the command line. Values that are wrong by themselves end the program with an error line."""
    parser = OneLineParser(
        prog="python -m qwen_vl_streaming.live",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="folder or hub id of a checkpoint")
    add(
        "--source",
        required=True,
        help=f"a video file, /dev/videoN, rtsp://..., http://... or {SYNTHETIC} (a moving test picture)",
    )
    add("--variant", choices=VARIANTS, help=f"default: {ENVIRONMENT_VARIABLE}, else the checkpoint's variant")
    add(
        "--force",
        action="store_true",
        help="allow a checkpoint that was trained as another variant or with another position rule",
    )
    add("--question", default=QUESTIONS[-1], help="default: %(default)s")
    add(
        "--way",
        choices=MODES,
        help="execution mode; all write the same tokens: serial alternates between clips and tokens; fused computes "
        "both in one forward step (one GPU); pipelined computes clips in a second process (two GPUs) (default: fused "
        "if the variant allows it, else serial)",
    )
    add(
        "--schedule",
        help=f"tokens per clip: wait-K writes K, random-K K on average, {GREEDY} as many as there is time for, {MODEL} "
        f"what the model decides, and {MODEL}-M at most M of these (default: as the checkpoint was trained)",
    )
    add(
        "--behind",
        choices=("wait", "skip"),
        default="wait",
        help="what happens to clips when the model falls behind: they wait, or are skipped in favor of the newest one "
        "(default: %(default)s)",
    )
    add(
        "--deadline",
        type=float,
        metavar="SECONDS",
        help=f"time from a clip to the last token of its slot (with {GREEDY}, to the first); later tokens count as a "
        "missed deadline (default: until the source's next clip is complete)",
    )
    add("--speed", type=float, default=1.0, help="factor of real time, for files and the synthetic scene (default: 1)")
    add("--fps", type=float, default=2.0, help="frames sampled per second of video (default: 2)")
    for name in ("--min-pixels-per-frame", "--max-pixels-per-frame", "--max-pixels-per-video"):
        add(name, type=int, metavar="N", help="default: as the checkpoint was trained")
    add(
        "--budget",
        choices=BUDGETS,
        help="which number of frames --max-pixels-per-video is divided by, for a file: its own, or that of the longest "
        "video (default: as the checkpoint was trained; cameras and streams always use the longest)",
    )
    add(
        "--reconnect-seconds",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="how long to try to reconnect to a stream (default: 10)",
    )
    add("--max-clips", type=int, metavar="N", help=f"watch at most N clips (default: {CLIPS}; with --window, all)")
    add(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"write at most N tokens (default: {TOKENS_PER_CLIP} for each of --max-clips; with --window, any "
        f"number, but at most {TOKENS_AFTER_END} after the end of the source)",
    )
    add(
        "--window",
        type=int,
        nargs=2,
        metavar=("CLIPS", "TOKENS"),
        help="limit attention to the prompt and the newest clips and tokens, for endless streams",
    )
    add(
        "--penalty",
        type=float,
        default=1.15,
        help="repetition penalty, as --repetition-penalty of eval.sh; 1 turns it off (default: %(default)s)",
    )
    add("--chunk", type=int, metavar="N", help="visual tokens per forward step (default: a whole clip)")
    add(
        "--record",
        type=Path,
        metavar="FILE",
        help=f"where to write the record of the session; {REPLACED} (default: {RECORDS}/<time>-<variant>-<pid>.json)",
    )
    add(
        "--keep",
        type=Path,
        metavar="FILE",
        help=f"save the frames that were fed, so that a camera or stream can be replayed; {REPLACED}",
    )
    add("--device", default="", help=DEVICE_HELP)
    add("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on the CPU")
    add("--weights", choices=WEIGHTS, help=WEIGHTS_HELP)
    arguments = parser.parse_args()
    check_limits(parser, arguments, LIMITS)
    arguments.model = find_model(arguments.model, PROJECT)
    if not (arguments.source == SYNTHETIC or arguments.source.startswith("/dev/") or "://" in arguments.source):
        arguments.source = str(look_up(arguments.source, PROJECT))
    for value, of in zip(arguments.window or (), ("max_clips", "max_new_tokens"), strict=False):
        if not 1 <= value <= LIMITS[of][1]:
            parser.error(f"--window {str(value)[:20]} must be from 1 to {LIMITS[of][1]}")
    arguments.device, arguments.device_line = choose_device(arguments.device, look(os.environ))
    return arguments


def check_limits(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, limits: Mapping[str, tuple[float, float]]
) -> None:
    """End the program with an error line if a flag that is given is not within its `limits`."""
    for name, (least, most) in limits.items():
        if (value := getattr(arguments, name)) is not None and not least <= value <= most:
            parser.error(f"--{name.replace('_', '-')} {str(value)[:20]} must be from {least:.10g} to {most:.10g}")


def record_place(arguments: argparse.Namespace, variant: Variant) -> Path:
    """Where the record is written. Raises InputError if it or --keep cannot be written, or would replace the source or
    each other."""
    record = arguments.record or RECORDS / time.strftime(f"%Y%m%d-%H%M%S-{variant.name}-{os.getpid()}.json")
    for path in filter(None, (record, arguments.keep)):
        check_output(path, arguments.source)
    if arguments.keep and _same(record, arguments.keep):
        raise InputError(f"--record and --keep are both {record}: give two different files")
    return record


def check_output(path: Path, source: str | Path | None) -> None:
    """Raises InputError if `path` cannot be written, or is the file `source`. Changes nothing."""
    folder = path.absolute().parent
    while not os.path.exists(folder):
        folder = folder.parent
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path} cannot be written (it is not a file): give another file")
    try:  # with a name as long as the real one; permissions do not tell, root has them all
        with tempfile.NamedTemporaryFile(prefix=f"{path.name}.{os.getpid()}.live.", suffix=".part", dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): give another file") from error
    if source is not None and _same(path, source):
        raise InputError(f"{path} is the source, which would be overwritten: give another file")


def _same(one: str | Path, other: str | Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)
