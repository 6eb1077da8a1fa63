"""Run a recorded session again, serially and by one full pass over its timeline, and compare every token.

    python -m qwen_vl_streaming.replay RECORD --model MODEL [--video FILE | --clips FILE] [--dtype float32]

Neither uses pages or passes: `reference.py` and `model.forward`, over the stock layers, say what should have come out.
Exit status 1 where a token differs that is not a near tie of two words. That the times and figures of a record are true
is not shown by this, only that it does not contradict itself.
"""

import argparse
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache

from .common.errors import InputError, OneLineParser, run
from .common.paths import PROJECT, find_folder, find_model, find_video, look_up
from .common.progress import quiet_libraries
from .common.ties import tie_margin
from .devices import DEVICE_HELP, choose_device, look
from .model.modeling_qwen2_5_vl import load_model
from .model.prompts import clip_pixels, load_processor
from .reference import Streams, caption
from .sessions import GREEDY
from .sessions.record import Record, clip_hash, identity, read_record
from .timeline.attention import dense_mask
from .timeline.plan import Window
from .timeline.positions import timeline_positions
from .timeline.timeline import ANSWER, CLIP, HEADER, NOTHING, PROMPT, TAIL, Schedule, make_schedule, make_timeline
from .timeline.variants import get_variant
from .video.clip_recorder import read_clips
from .video.frames import PixelBudget, read_video
from .video.sources import synthetic_clips

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROWS = 2048
"""Of a full pass, at a time."""
MOST_ROWS = 200_000
"""Of a full pass in all, whose keys and values are held."""


@dataclass(frozen=True)
class Difference:
    """A token that a replay would have written otherwise."""

    how: str
    """"serial" or "full pass"."""
    index: int
    slot: int
    recorded: int
    replayed: int
    margin: float
    """By how much the full pass puts the other token's logit, after the penalty, above that of the recorded one; below
    0 where only the serial run would have written it."""
    allowed: float
    """A margin up to this is a tie, which the number type's rounding decides: see `tie_margin`."""

    @property
    def tie(self) -> bool:
        return abs(self.margin) <= self.allowed

    def __str__(self) -> str:
        return (
            f"{self.how}: token {self.index} (slot {self.slot}) was {self.recorded}, comes out as {self.replayed}, "
            f"margin {self.margin:.3g}{', a tie' if self.tie else ''}"
        )


def replay(record: Record, model, clips: Sequence[Tensor], tie: float | None = None) -> list[Difference]:
    """Where the tokens of `record` come out otherwise; none where all are the same. `clips` are those that were fed.
    `tie` is the margin up to which a difference is a tie, by default what the model's number type rounds.

    The serial run is free: after its first difference it says something else, and only that one is listed. The full
    pass is given the recorded tokens, and says of each what it would have written. Raises InputError where the model
    or the clips are not the recorded ones, or there are no clips enough.
    """
    mine, theirs = identity(model), record.model
    if mine["fingerprint"] != theirs["fingerprint"]:
        raise InputError(f"the record is of the model {theirs['path']!r}, and {mine['path']!r} has other weights")
    check_clips(record, clips)
    if not record.tokens:
        return []
    template = record.template
    newest = max(*record.tokens, *template.prompt, *template.tail, *template.header, template.video)
    if newest >= model.config.text_config.vocab_size:
        raise InputError(f"the record has token {newest}, which {mine['path']!r} does not know")
    check_schedule(record)
    seen = clips[: len(record.counts)]
    with torch.no_grad():
        tokens = [
            clip.to(model.device, model.dtype)
            if len(clip) == record.layout.tokens_per_clip
            else model.perceive(clip[None], record.layout.grid)[0]
            for clip in seen
        ]
    # Of a session that was broken off, the last clip was not the video's last: one more, that nothing saw.
    counts = record.counts
    if not record.complete:
        tokens, counts = [*tokens, torch.zeros_like(tokens[0])], [*counts, 0]
    visual = torch.stack(tokens)
    serial = _serially(record, model, visual, counts)
    apart = next((i for i, token in enumerate(serial) if token != record.tokens[i]), None)
    if apart is None and len(serial) < len(record.tokens):
        raise ValueError(f"the serial run ends after {len(serial)} tokens of {len(record.tokens)}")
    found = []
    for index, logits in _full_pass(record, model, visual, counts):
        recorded, best = record.tokens[index], int(logits.argmax())
        allowed = tie_margin(logits, model.dtype) if tie is None else tie
        for how, token in (("serial", serial[index] if index == apart else recorded), ("full pass", best)):
            if token != recorded:
                margin = float(logits[token] - logits[recorded])
                found.append(Difference(how, index, record.slots[index], recorded, token, margin, allowed))
    return found


def check_clips(record: Record, clips: Sequence[Tensor]) -> None:
    """Raises InputError where `clips` are not those that were fed."""
    if len(clips) < len(record.hashes):
        raise InputError(f"the record is of {len(record.hashes)} clips, and {len(clips)} were given")
    for number, (clip, known) in enumerate(zip(clips, record.hashes, strict=False), 1):
        if clip_hash(clip) != known:
            raise InputError(f"clip {number} is not the one that was recorded: give the same video, read the same way")


def check_schedule(record: Record) -> None:
    """Raises InputError where slots are not as long as the recorded schedule says. What the last one may write depends
    on more than that, and `greedy` says nothing."""
    variant, slots = get_variant(record.variant), len(record.counts)
    if record.schedule == GREEDY:
        return
    asked = record.schedule
    schedule = make_schedule(asked, variant, slots + 1) if isinstance(asked, str) else Schedule(tuple(asked))
    quotas = schedule.quotas if variant.streams else (0,) * slots
    for slot, (count, quota) in enumerate(zip(record.counts[:-1], quotas, strict=False), 1):
        if count != quota:
            raise InputError(
                f"the record contradicts itself: {count} words in slot {slot}, of which {asked} has {quota}"
            )


def _window(record: Record) -> Window | None:
    return None if record.window is None else Window(*record.window)


def _serially(record: Record, model, visual: Tensor, counts: Sequence[int]) -> list[int]:
    variant = get_variant(record.variant)
    options = record.penalty, _window(record), record.bare
    streams = Streams(model, variant, [record.template], [record.layout], *options)
    (written,) = caption(streams, [visual], [Schedule(tuple(counts[:-1]))], len(record.tokens))
    return written.tokens


@torch.no_grad()
def _full_pass(record: Record, model, visual: Tensor, counts: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """For each recorded token its index and the logits (V,), after the penalty, that one pass over all gives for it.
    The pass goes ROWS rows at a time: its mask would else take memory by the square."""
    template = record.template
    timeline = make_timeline(get_variant(record.variant), record.layout, counts, record.bare)
    rows, window, cache, device = timeline.rows, _window(record), DynamicCache(), model.device
    if len(rows) > MOST_ROWS:
        raise InputError(f"a full pass over {len(rows)} tokens is more than {MOST_ROWS}: replay a shorter session")
    ids = torch.full((len(rows),), template.video)
    for part, source in (
        (PROMPT, template.prompt),
        (TAIL, template.tail),
        (HEADER, template.header),
        (ANSWER, record.tokens),
    ):
        ids[rows.part == part] = torch.tensor(source)[rows.index[rows.part == part]]
    positions, clip = timeline_positions(timeline)[:, None], rows.part[None] == CLIP
    predicts = timeline.produces != NOTHING
    seen = torch.zeros(model.config.text_config.vocab_size, dtype=torch.bool, device=device)
    seen[[*template.prompt, template.video, *template.tail, *template.header]] = True
    visual_tokens = iter(visual.flatten(0, 1).split([int(part.sum()) for part in clip[0].split(ROWS)]))
    for first in range(0, len(rows), ROWS):
        end = min(first + ROWS, len(rows))
        own = slice(first, end)
        flags = rows.visual[None, :end], rows.text[None, :end]
        mask = dense_mask(*flags, timeline.variant.parallel, torch.arange(first, end)[None])
        if window is not None:
            mask &= window.mask(record.layout, rows.text, timeline.clips, own)[:, :end]
        scored = model(
            input_ids=ids[None, own].to(device),
            position_ids=positions[..., own].to(device),
            attention_mask=mask.to(device),
            visual_tokens=next(visual_tokens),
            visual_rows=clip[:, own].to(device),
            past_key_values=cache,
            score=predicts[None, own].to(device),
        ).logits.float()
        for index, logits in zip(timeline.produces[own][predicts[own]].tolist(), scored, strict=True):
            if index:
                seen[record.tokens[index - 1]] = True
            weaker = torch.where(logits < 0, logits * record.penalty, logits / record.penalty)
            yield index, torch.where(seen, weaker, logits)


def video_clips(
    record: Record,
    processor,
    path: str | Path | None = None,
    kept: str | Path | None = None,
    video_root: Path | None = None,
) -> list[Tensor]:
    """The clips that the recorded session was fed: of the video in `path`, by default of what the record names, looked
    up as in `find_video` and read as it says; or the frames in `kept`, which a live session kept."""
    if kept is not None:
        return list(clip_pixels(processor, read_clips(kept))[0])
    try:
        return _named_clips(record.about, processor, path, video_root)
    except InputError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(
            f"what the record says of its source is not what a session wrote ({error}): give --clips"
        ) from error


def _named_clips(about: dict, processor, path: str | Path | None, video_root: Path | None) -> list[Tensor]:
    """See `video_clips`."""
    video = dict(about.get("video") or {})
    named = video.pop("path", None)
    if path is None and named is None and "synthetic" in about:
        scene, count = about["synthetic"], max(about["clips"], default=0) + 1
        clips = synthetic_clips(count, speed=float("inf"), fps=scene["fps"], size=tuple(scene["size"]))
        frames = torch.cat([clip.frames for clip in clips])
    elif path is None and named is None:
        raise InputError("the record names no video file: give one with --video, or with --clips what was kept of it")
    else:
        budget = PixelBudget(**video.pop("budget")) if "budget" in video else None
        frames = read_video(find_video(path or named, PROJECT, video_root), budget=budget, **video).frames
    clips = list(clip_pixels(processor, frames)[0])
    fed = about.get("clips", range(len(clips)))
    if min(fed, default=0) < 0 or max(fed, default=0) >= len(clips):
        raise InputError(f"the record is of clip {max(fed) + 1} of a video, and {len(clips)} were given")
    return [clips[index] for index in fed]


def main() -> None:
    parser = OneLineParser(description="Run a recorded session again and compare every token.")
    parser.add_argument("record", type=Path, help="a session's record")
    parser.add_argument("--model", required=True, help="folder or hub id of the model that was recorded")
    parser.add_argument("--video", help="the video file (default: the one that the record names)")
    parser.add_argument("--video-root", default="", metavar="DIR", help="where else that video is looked up")
    parser.add_argument("--clips", metavar="FILE", help="what a live session has kept with --keep, instead of a video")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as recorded")
    parser.add_argument("--device", default="", help=DEVICE_HELP)
    parser.add_argument(
        "--tie",
        type=float,
        help="differences up to this margin are ties: shown, and no failure (default: what the number type rounds, "
        "1e-4 in float32)",
    )
    arguments = parser.parse_args()
    if arguments.tie is not None and not 0 <= arguments.tie < math.inf:
        raise InputError(f"--tie {arguments.tie}: give a margin of at least 0")
    quiet_libraries()
    device, line = choose_device(arguments.device, look(os.environ))
    sys.exit(_main(arguments, device, line))


def _main(arguments: argparse.Namespace, device: str, line: str) -> int:
    record = read_record(look_up(arguments.record, PROJECT))
    checkpoint = find_model(arguments.model, PROJECT)
    video_root = find_folder(arguments.video_root, PROJECT, "the video root")
    kept = arguments.clips and look_up(arguments.clips, PROJECT)
    dtype = arguments.dtype or record.model["dtype"]
    if dtype not in DTYPES:
        raise InputError(f"record {arguments.record} is of type {dtype}: replay it with --dtype {' or '.join(DTYPES)}")
    clips = video_clips(record, load_processor(checkpoint), arguments.video, kept, video_root)
    check_clips(record, clips)
    if line:
        print(line, file=sys.stderr)
    model = load_model(checkpoint, "sdpa", DTYPES[dtype]).to(device).eval()
    differences = replay(record, model, clips, arguments.tie)
    for difference in differences:
        print(difference)
    beyond = sum(not difference.tie for difference in differences)
    same = f"{len(differences)} differences, {beyond} of them no ties" if differences else "all the same"
    recorded = f"{record.variant}, {record.way}, recorded in {record.model['dtype']}"
    print(f"{len(record.tokens)} tokens, {recorded}, replayed in {dtype}: {same}")
    return 1 if beyond else 0


if __name__ == "__main__":
    run(main)
