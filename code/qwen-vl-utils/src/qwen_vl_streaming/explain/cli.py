"""Shows a variant as text, JSON or a picture: `python -m qwen_vl_streaming.explain --help`.

Everything shown comes from timeline, positions and attention. Needs no model.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from itertools import compress
from pathlib import Path

import torch
from torch import Tensor

from ..common import files
from ..common.errors import InputError, OneLineParser
from ..timeline.attention import dense_mask
from ..timeline.positions import timeline_positions
from ..timeline.timeline import CLIP, HEADER, NOTHING, PARTS, Layout, Timeline, make_schedule, make_timeline
from ..timeline.variants import ENVIRONMENT_VARIABLE, VARIANTS, Variant, chosen_variant, get_variant
from .summary import Span, describe, find_spans, find_steps, sizes, token_names

TAIL_TOKENS = 3  # <|vision_end|><|im_end|>\n
HEADER_TOKENS = 3  # <|im_start|>assistant\n
CLIPS, ANSWER_TOKENS, WAIT_K = 4, 14, 3
REPLACED = ("clips", "answer", "wait_k")  # by --schedule
MAX_TOKENS = 5_000  # the mask grows quadratically
WIDTH = 100
NOTE = """A token also attends to itself and to the tokens before it in its own line.
fed: index in feed order. position: time t, height h, width w; if only one is given, all are equal.
row predicts: 34 → a0 means that the model predicts a0 at row 34.
"""


def attends(timeline: Timeline, queries: Sequence[int]) -> list[list[int]]:
    """For the tokens at the feed indices `queries`, the feed indices that each may attend to."""
    rows, keys = timeline.rows, range(len(timeline.rows))
    query = torch.tensor(queries)[None]
    mask = dense_mask(rows.visual[None], rows.text[None], timeline.variant.parallel, query)[0, 0]
    return [list(compress(keys, row.tolist())) for row in mask]


def as_dict(timeline: Timeline) -> dict:
    """The timeline as plain lists: `variant`, `tokens` in feed order, `attends` and `produces`."""
    rows = timeline.rows
    columns = (rows.part, rows.clip, rows.index, rows.slot, timeline_positions(timeline).T)
    return {
        "variant": timeline.variant.name,
        "tokens": [
            {"part": PARTS[part], "clip": clip, "index": index, "slot": slot, "position": position}
            for part, clip, index, slot, position in zip(*(column.tolist() for column in columns), strict=True)
        ],
        "attends": attends(timeline, range(len(rows))),
        "produces": [None if answer == NOTHING else answer for answer in timeline.produces.tolist()],
    }


def as_text(timeline: Timeline) -> str:
    """The timeline for a terminal: what is done at the same time, then each span of tokens in feed order."""
    variant = timeline.variant
    when, count, sees = describe(variant)
    return "\n".join(
        [
            f"{variant.name}   in the paper: {variant.paper}",
            f"  It {when}; {sees}.",
            f"  Positions: {count}.",
            f"  {sizes(timeline)}",
            "",
            *_lanes(timeline),
            "",
            *_table(timeline),
            "",
        ]
    )


def _lanes(timeline: Timeline) -> list[str]:
    """Two lines, watching and speaking, with time from left to right. The middle of a long video is omitted."""
    cells = [
        (f"clip {step.clip}" if step.clip else "", token_names(step.start, step.stop) if step.stop > step.start else "")
        for step in find_steps(timeline)
    ]
    wide = max(len(cell) for pair in cells for cell in pair)
    most = (WIDTH - 14) // (wide + 3)
    if len(cells) > most:
        half = (most - 1) // 2
        cells = [*cells[:half], ("…", "…"), *cells[-half:]]
    lanes = zip(("watching", "speaking"), zip(*cells, strict=True), strict=True)
    return [f"  {name}  │ " + " │ ".join(cell.ljust(wide) for cell in lane).rstrip() for name, lane in lanes]


def _table(timeline: Timeline) -> list[str]:
    """One line per span of tokens, with aligned columns."""
    spans = find_spans(timeline, by_slot=True)
    seen = attends(timeline, [each.stop - 1 for each in spans])
    positions = timeline_positions(timeline)
    table = [("slot", "fed", "token", "n", "position", "attends to", "row predicts")]
    slot = 0
    for at, each in enumerate(spans):
        table.append(
            (
                str(each.fed) if each.fed > slot else "",
                _range(each.start, each.stop - 1),
                each.name,
                str(len(each)),
                _position(each, positions[:, each.start : each.stop]),
                _seen(spans[:at], set(seen[at])),
                _predicts(timeline, each),
            )
        )
        slot = each.fed
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  " + "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table]


def _range(low: int, high: int) -> str:
    return f"{low}–{high}" if high > low else f"{low}"


def _position(each: Span, positions: Tensor) -> str:
    low, high = positions.amin(1).tolist(), positions.amax(1).tolist()
    if each.part != CLIP:  # the three numbers of text are equal
        return _range(low[0], high[0])
    return "  ".join(f"{axis} {_range(*ends)}" for axis, *ends in zip("thw", low, high, strict=True))


def _seen(before: list[Span], keys: set[int]) -> str:
    """What the last token of a span attends to among the spans `before` it."""
    seen = [each for each in before if each.start in keys]
    if len(seen) == len(before):
        return "all before it" if before else ""
    clips = [each.clip for each in seen if each.part == CLIP]
    names = [each.name for each in seen if each.part < CLIP]
    names += [f"clip{'s' * (len(clips) > 1)} {_range(clips[0], clips[-1])}"] if clips else []
    names += [each.name for each in seen if each.part > CLIP]
    return ", ".join(names) + ("; no text" if all(each.part >= HEADER for each in before if each not in seen) else "")


def _predicts(timeline: Timeline, each: Span) -> str:
    """The rows of a span that predict answer tokens, and which tokens."""
    answers = timeline.produces[each.start : each.stop]
    rows = (answers != NOTHING).nonzero().squeeze(1)
    if not len(rows):
        return ""
    first, last = int(rows[0]), int(rows[-1])
    return (
        f"{_range(each.start + first, each.start + last)} → {token_names(int(answers[first]), int(answers[last]) + 1)}"
    )


def at_least_one(text: str) -> int:
    if not re.fullmatch(r"0{0,9}[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a whole number of at least 1, below a billion")
    return int(text)


def grid(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,8})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not rows x columns, such as 2x3")
    return int(match[1]), int(match[2])


def slot_counts(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[0-9]{1,4}(,[0-9]{1,4}){0,999}", text):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a list of tokens per slot, such as 3,1,1,4")
    return tuple(map(int, text.split(",")))


def make_parser() -> OneLineParser:
    parser = OneLineParser(
        prog="python -m qwen_vl_streaming.explain",
        description="Show how a variant feeds, attends, counts positions and predicts, as text, JSON or a picture. "
        "Clips are one second apart and two position steps a second, as in Qwen2.5-VL.",
    )
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help=f"{', '.join(VARIANTS)}, or all (default: {ENVIRONMENT_VARIABLE} if it is set, else all)",
    )
    for flag, kind, default, metavar, meaning in (
        ("--prompt", at_least_one, 5, "TOKENS", "tokens up to and including <|vision_start|>"),
        ("--clips", at_least_one, CLIPS, "N", "clips of the video"),
        ("--grid", grid, "2x3", "HxW", "visual tokens of a clip after merging, rows x columns"),
        ("--answer", at_least_one, ANSWER_TOKENS, "TOKENS", "tokens of the answer, <|im_end|> included"),
        ("--wait-k", at_least_one, WAIT_K, "K", "answer tokens written in each slot before the last"),
    ):
        unset = flag.strip("-").replace("-", "_") in REPLACED
        parser.add_argument(
            flag, type=kind, default=None if unset else default, metavar=metavar, help=f"{meaning} (default: {default})"
        )
    parser.add_argument(
        "--schedule",
        type=slot_counts,
        metavar="K1,K2,...",
        help="answer tokens written in each slot, such as 3,1,1,4, instead of --clips, --answer and --wait-k; of a "
        "model that decides when to speak, they include the end-of-slot tokens",
    )
    parser.add_argument("--format", choices=("text", "json", "png"), default="text", help="default: text")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
    return parser


def make_timelines(args: argparse.Namespace) -> list[Timeline]:
    """The timelines to show. Raises InputError for an unknown variant and for sizes that are too large."""
    name = args.variant or chosen_variant("all")
    variants = list(VARIANTS.values()) if name == "all" else [get_variant(name)]
    layout = Layout(args.prompt, TAIL_TOKENS, HEADER_TOKENS, args.grid)
    if args.schedule and any(getattr(args, name) is not None for name in REPLACED):
        raise InputError("--schedule replaces --clips, --answer and --wait-k: give either")
    if args.schedule and not sum(args.schedule):
        raise InputError("--schedule has no token: give at least one")
    clips = len(args.schedule) if args.schedule else args.clips or CLIPS
    answer = sum(args.schedule) if args.schedule else args.answer or ANSWER_TOKENS
    length = layout.prompt + clips * layout.tokens_per_clip + layout.tail + layout.header + answer
    if length > MAX_TOKENS:
        raise InputError(f"{length} tokens are too many to show, the maximum is {MAX_TOKENS}: give smaller sizes")

    def counts(variant: Variant) -> tuple[int, ...]:
        if args.schedule and variant.streams:
            return args.schedule
        return make_schedule(f"wait-{args.wait_k or WAIT_K}", variant, clips).counts(answer)

    return [make_timeline(variant, layout, counts(variant)) for variant in variants]


def render(args: argparse.Namespace) -> bytes:
    """The requested output, as the bytes of a file."""
    timelines = make_timelines(args)
    if args.format == "png":
        from .picture import draw_png  # matplotlib is slow to import, and text and JSON do not need it

        pace = max((1, *args.schedule[:-1])) if args.schedule else args.wait_k or WAIT_K
        return draw_png(timelines, pace)
    if args.format == "text":
        return "\n\n".join([*map(as_text, timelines), NOTE]).encode()
    objects = [json.dumps(as_dict(timeline)) for timeline in timelines]
    return (objects[0] if len(objects) == 1 else f"[{', '.join(objects)}]").encode() + b"\n"


def write_file(path: Path, data: bytes) -> None:
    """Replaces `path` as a whole. Raises InputError if it cannot be written."""
    try:
        files.write_file(path, data, report=False)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write {str(path)!r} ({reason}): give a writable file") from error


def write_out(data: bytes) -> None:
    """Writes to standard output. Raises InputError if that fails, but BrokenPipeError where the pipe is closed."""
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
    except BrokenPipeError:
        raise  # `run` handles it
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes the rest at exit
        raise InputError(f"cannot write to standard output ({error.strerror}): give --output FILE") from error


def main() -> None:
    args = make_parser().parse_args()
    if args.format == "png" and args.output is None and sys.stdout.isatty():
        raise InputError("a picture cannot be shown on a terminal: give --output FILE")
    data = render(args)
    if args.output is None:
        write_out(data)
    else:
        write_file(args.output, data)
