"""Run a recorded session again, serially and in one full forward pass, and compare every token.

    python -m qwen_vl_streaming.replay RECORD --model MODEL [--video FILE | --clips FILE] [--dtype float32]

Exit status 1 if a token differs and is not a near tie of two tokens. A replay does not prove the times and statistics
of a record, only that the record does not contradict itself.
"""

import argparse
import math
import os
import sys
from pathlib import Path

from ..common.errors import InputError, OneLineParser
from ..common.paths import PROJECT, find_model, find_video_root, look_up
from ..common.progress import quiet_libraries
from ..devices import DEVICE_HELP, choose_device, look
from ..model.loading import DTYPES, load_model
from ..model.prompts import load_processor
from ..sessions.record import describe_precision, read_record
from .clips import check_clips, video_clips
from .compare import replay


def main() -> None:
    parser = OneLineParser(
        prog="python -m qwen_vl_streaming.replay", description="Run a recorded session again and compare every token."
    )
    parser.add_argument("record", type=Path, help="a session's record")
    parser.add_argument("--model", required=True, help="folder or hub id of the model that was recorded")
    parser.add_argument("--video", help="the video file (default: the file named in the record)")
    parser.add_argument("--video-root", default="", metavar="DIR", help="folder in which to look for that video")
    parser.add_argument("--clips", metavar="FILE", help="frames saved by live --keep, instead of a video")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as recorded")
    parser.add_argument("--device", default="", help=DEVICE_HELP)
    parser.add_argument(
        "--tie",
        type=float,
        help="differences up to this margin are ties: they are listed, but do not fail (default: the rounding error of "
        "the dtype, 1e-4 in float32)",
    )
    arguments = parser.parse_args()
    if arguments.tie is not None and not 0 <= arguments.tie < math.inf:
        raise InputError(f"--tie {arguments.tie} must be a number of at least 0")
    quiet_libraries()
    device, line = choose_device(arguments.device, look(os.environ))
    sys.exit(_main(arguments, device, line))


def _main(arguments: argparse.Namespace, device: str, line: str) -> int:
    record = read_record(look_up(arguments.record, PROJECT))
    checkpoint = find_model(arguments.model, PROJECT)
    video_root = find_video_root(arguments.video_root, PROJECT)
    kept = arguments.clips and look_up(arguments.clips, PROJECT)
    dtype = arguments.dtype or record.model["dtype"]
    if dtype not in DTYPES:
        raise InputError(f"record {arguments.record} has dtype {dtype}: replay it with --dtype {' or '.join(DTYPES)}")
    clips = video_clips(record, load_processor(checkpoint), arguments.video, kept, video_root)
    check_clips(record, clips)
    if line:
        print(line, file=sys.stderr)
    model = load_model(checkpoint, "sdpa", DTYPES[dtype], record.model.get("weights"), device).to(device).eval()
    differences = replay(record, model, clips, arguments.tie)
    for difference in differences:
        print(difference)
    beyond = sum(not difference.tie for difference in differences)
    same = f"{len(differences)} differences, {beyond} of them not ties" if differences else "all the same"
    recorded = f"{record.variant}, {record.way}, recorded in {describe_precision(record.model)}"
    print(f"{len(record.tokens)} tokens, {recorded}, replayed in {dtype}: {same}")
    return 1 if beyond else 0
