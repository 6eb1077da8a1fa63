"""Positions against cases worked out by hand, against those of the release, and across variants."""

import json
import random
import time

import pytest
import torch
from qwen_vl_streaming.timeline.positions import StreamPositions, row_positions, timeline_positions
from qwen_vl_streaming.timeline.timeline import ANSWER, CLIP, HEADER, PROMPT, TAIL, Layout, Rows, make_timeline
from qwen_vl_streaming.timeline.variants import VARIANTS
from released_positions import FIXTURE
from tiny import VIDEO, random_counts, tiny_model

SEED = time.time_ns() % 100_000
LAYOUT = Layout(prompt=5, tail=3, header=3, grid=(2, 3), steps_per_clip=2.0)


def of(timeline, part, clip=None, slot=None):
    """Positions of a part, as a list of (t, h, w)."""
    rows = timeline.rows
    chosen = rows.part == part
    if clip is not None:
        chosen &= rows.clip == clip
    if slot is not None:
        chosen &= rows.slot == slot
    return [tuple(p) for p in timeline_positions(timeline)[:, chosen].T.tolist()]


def text(*numbers):
    return [(n, n, n) for n in numbers]


def clip_at(t, h, w):
    return [(t, h + row, w + column) for row in range(2) for column in range(3)]


def test_offline_by_hand():
    """What follows a video starts one after its largest position. For one clip this is its last column, 7; for four
    clips two steps apart it is the time of the last one, 11."""
    for counts, tail, header, answer in (
        ((2,), (8, 9, 10), (11, 12, 13), (14, 15)),
        ((0, 0, 0, 2), (12, 13, 14), (15, 16, 17), (18, 19)),
    ):
        for name, text_at in (("origin", (header, answer)), ("batch", ((0, 1, 2), (3, 4)))):
            timeline = make_timeline(VARIANTS[name], LAYOUT, counts)
            assert of(timeline, PROMPT) == text(0, 1, 2, 3, 4)
            for clip in range(1, len(counts) + 1):
                assert of(timeline, CLIP, clip=clip) == clip_at(5 + 2 * (clip - 1), 5, 5)
            assert of(timeline, TAIL) == text(*tail)
            assert of(timeline, HEADER) == text(*text_at[0])
            assert of(timeline, ANSWER) == text(*text_at[1])


def test_group_and_gap_by_hand():
    for name, start in (("group", 0), ("gap", 10_000)):
        timeline = make_timeline(VARIANTS[name], LAYOUT, (2, 2, 1))
        assert of(timeline, CLIP, clip=3) == clip_at(9, 5, 5)
        assert of(timeline, TAIL) == text(10, 11, 12)
        assert of(timeline, HEADER) == text(*range(start, start + 3))
        assert of(timeline, ANSWER) == text(*range(start + 3, start + 8))


def test_interleave_by_hand():
    timeline = make_timeline(VARIANTS["interleave"], LAYOUT, (2, 2, 1))
    assert of(timeline, CLIP, clip=1) == clip_at(5, 5, 5)
    assert of(timeline, HEADER) == text(8, 9, 10)
    assert of(timeline, ANSWER, slot=1) == text(11, 12)
    assert of(timeline, CLIP, clip=2) == clip_at(13, 13, 13)
    assert of(timeline, ANSWER, slot=2) == text(16, 17)
    assert of(timeline, CLIP, clip=3) == clip_at(18, 18, 18)
    assert of(timeline, TAIL) == text(21, 22, 23)
    assert of(timeline, ANSWER, slot=3) == text(24)


def test_overlap_by_hand():
    """Round 1 ends at 7; header and two tokens run to 12, clip 2 to 10: round 2 ends at 12. Clip 3 and its tail
    run to 18, two tokens to 14: round 3 ends at 18."""
    timeline = make_timeline(VARIANTS["overlap"], LAYOUT, (2, 2, 1))
    assert of(timeline, CLIP, clip=1) == clip_at(5, 5, 5)
    assert of(timeline, HEADER) == text(8, 9, 10)
    assert of(timeline, ANSWER, slot=1) == text(11, 12)
    assert of(timeline, CLIP, clip=2) == clip_at(8, 8, 8)
    assert of(timeline, ANSWER, slot=2) == text(13, 14)
    assert of(timeline, CLIP, clip=3) == clip_at(13, 13, 13)
    assert of(timeline, TAIL) == text(16, 17, 18)
    assert of(timeline, ANSWER, slot=3) == text(19)


def overlap_token_by_token(timeline) -> dict:
    """The rounds of `overlap` as DESIGN defines them, one token at a time."""
    layout, positions = timeline.layout, {}
    rows = timeline.rows
    clip_end, text_end, slot_start = {}, {}, {}
    for clip in range(1, timeline.clips + 1):
        base = layout.prompt if clip == 1 else slot_start[clip - 1]
        for index in range(layout.tokens_per_clip):
            row, column = divmod(index, layout.grid[1])
            positions[CLIP, clip, index] = (base, base + row, base + column)
        clip_end[clip] = max(max(positions[CLIP, clip, i]) for i in range(layout.tokens_per_clip))
        if clip == timeline.clips:
            for index in range(layout.tail):
                clip_end[clip] += 1
                positions[TAIL, clip, index] = (clip_end[clip],) * 3
        position = slot_start[clip] = max(clip_end[clip], text_end.get(clip - 1, 0)) + 1
        for part in (HEADER, ANSWER):
            for index in sorted(rows.index[(rows.part == part) & (rows.slot == clip)].tolist()):
                positions[part, 0, index] = (position,) * 3
                text_end[clip] = position
                position += 1
    for index in range(layout.prompt):
        positions[PROMPT, 0, index] = (index,) * 3
    return positions


def test_overlap_follows_its_definition():
    print("seed", SEED)
    draw = random.Random(SEED)
    for _ in range(50):
        layout = Layout(
            draw.randint(1, 6), draw.randint(1, 4), draw.randint(1, 4), (draw.randint(1, 5), draw.randint(1, 5))
        )
        timeline = make_timeline(VARIANTS["overlap"], layout, random_counts(draw, VARIANTS["overlap"]))
        rows, expected = timeline.rows, overlap_token_by_token(timeline)
        keys = zip(rows.part.tolist(), rows.clip.tolist(), rows.index.tolist(), strict=True)
        positions = timeline_positions(timeline)
        assert [tuple(p) for p in positions.T.tolist()] == [expected[key] for key in keys]
        assert positions.dtype == torch.int64


def released(prompt: int, clips: int, grid: tuple[int, int], steps: float, text_tokens: int) -> list[list[int]]:
    """Positions (L, 3) by the released rule, token by token: text starts one after the largest number so far, and the
    tokens of a clip are at (time, row, column) past the first position of the video."""
    positions = [[i] * 3 for i in range(prompt)]
    for clip in range(clips):
        for row in range(grid[0]):
            for column in range(grid[1]):
                positions.append([prompt + int(clip * steps), prompt + row, prompt + column])
    for _ in range(text_tokens):
        positions.append([max(map(max, positions)) + 1] * 3)
    return positions


def origin(prompt: int, clips: int, grid: tuple[int, int], seconds: float, text_tokens: int):
    """The timeline of `origin` for that video, two position steps a second, and `text_tokens` tokens after it."""
    layout = Layout(prompt, 1, 1, grid, 2 * seconds)
    return make_timeline(VARIANTS["origin"], layout, [0] * (clips - 1) + [text_tokens - 2])


RELEASED = json.loads(FIXTURE.read_text())


@pytest.mark.parametrize("case", RELEASED, ids=lambda c: f"{c['transformers']}-{c['clips']}x{c['seconds']:.2f}s")
def test_origin_equals_transformers_at_the_release(case):
    timeline = origin(case["prompt"], case["clips"], case["grid"], case["seconds"], case["text"])
    assert timeline_positions(timeline).tolist() == case["positions"]


def test_origin_follows_the_released_rule():
    """Also for values between those of the fixture. vLLM and SGLang compute the same."""
    print("seed", SEED)
    draw = random.Random(SEED)
    for _ in range(100):
        sizes = draw.randint(1, 9), draw.randint(1, 30), (draw.randint(1, 12), draw.randint(1, 12))
        seconds, text_tokens = draw.randint(1, 24) / 8, draw.randint(3, 9)
        expected = released(*sizes, 2 * seconds, text_tokens)
        assert timeline_positions(origin(*sizes, seconds, text_tokens)).T.tolist() == expected


@pytest.mark.parametrize("clips", [1, 30])
def test_the_pinned_transformers_differs_only_after_a_video(clips):
    """What follows a video starts max(rows, columns) past the video's first position, inside the video's range.

    If this fails for 30 clips, transformers has returned to the rule of the release: remove the second half, and the
    mention of the versions that differ from `positions.RULE`.
    """
    model, sizes = tiny_model(), (4, clips, (2, 3))
    timeline = origin(*sizes, 1.0, 5)
    prompt, layout = (0, 0, 0, 188), timeline.layout
    ids = torch.tensor([[*prompt, *[VIDEO] * clips * layout.tokens_per_clip, *[1] * 5]])
    stock, _ = model.model.get_rope_index(
        ids,
        mm_token_type_ids=(ids == VIDEO).int() * 2,
        video_grid_thw=torch.tensor([[clips, 4, 6]]),
        second_per_grid_ts=torch.tensor([1.0]),
    )
    ours, stock = timeline_positions(timeline), stock[:, 0]
    assert torch.equal(ours[:, :-5], stock[:, :-5])
    if clips == 1:
        assert torch.equal(ours, stock)
    else:
        assert ours[0, -5:].tolist() == [63, 64, 65, 66, 67]
        assert stock[0, -5:].tolist() == [7, 8, 9, 10, 11]


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda v: v.name)
def test_an_empty_last_clip_takes_no_position(variant):
    """When a live source ends, the tail and what follows have the same positions as after the clip before."""
    whole = make_timeline(variant, LAYOUT, (2, 3, 4) if variant.streams else (0, 0, 9))
    bare = make_timeline(variant, LAYOUT, (2, 3, 0, 4) if variant.streams else (0, 0, 0, 9), bare=True)
    for part in (CLIP, TAIL, HEADER, ANSWER):
        assert of(bare, part) == of(whole, part)
    assert of(bare, TAIL) == {"interleave": text(22, 23, 24), "overlap": text(16, 17, 18)}.get(
        variant.name, text(10, 11, 12)
    )


def test_other_variants_differ_from_origin_where_they_should():
    """batch, group and gap keep the visual side and move the text. interleave and overlap move both."""
    layout = Layout(6, 2, 3, (2, 2))
    by_token = {}
    for name, variant in VARIANTS.items():
        timeline = make_timeline(variant, layout, (2, 2, 2) if variant.streams else (0, 0, 6))
        rows = timeline.rows
        keys = zip(rows.part.tolist(), rows.clip.tolist(), rows.index.tolist(), strict=True)
        by_token[name] = dict(zip(keys, map(tuple, timeline_positions(timeline).T.tolist()), strict=True))
    for name, positions in by_token.items():
        moved = {key[0] for key in positions if positions[key] != by_token["origin"][key]}
        expected = {
            "origin": set(),
            "interleave": {CLIP, TAIL, ANSWER, HEADER},
            "overlap": {CLIP, TAIL, ANSWER, HEADER},
        }
        assert moved == expected.get(name, {HEADER, ANSWER}), name


def test_positions_of_a_running_stream_do_not_depend_on_the_future():
    """What is known when a token is fed determines its position."""
    print("seed", SEED)
    draw = random.Random(SEED)
    layout = Layout(4, 2, 2, (2, 3))
    for variant in VARIANTS.values():
        counts = random_counts(draw, variant)
        timeline = make_timeline(variant, layout, counts)
        whole = timeline_positions(timeline)
        for row in range(len(timeline.rows)):
            slot = max(int(timeline.rows.clip[row]), int(timeline.rows.slot[row]))
            known = counts[: max(0, slot - 1)]
            clips = len(counts) if slot == len(counts) else None
            alone = row_positions(timeline.rows[row : row + 1], variant, layout, known, clips)
            assert torch.equal(alone[:, 0], whole[:, row]), (variant.name, row)


@pytest.mark.parametrize("side", ["both", "visual", "text"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_pieces_of_a_running_stream_start_where_their_rows_are(variant, side):
    """One `StreamPositions` for the whole stream, or for one side of it. Each piece is asked for when only the slots
    before it are known."""
    print("seed", SEED)
    draw = random.Random(f"{SEED} {variant.name} {side}")
    for _ in range(30):
        layout = Layout(*(draw.randint(1, 4) for _ in range(3)), (draw.randint(1, 4), draw.randint(1, 4)), 1.3)
        counts = [draw.choice((0, 0, 1, 2, 6)) for _ in range(draw.randint(25, 40))]
        if not variant.streams:
            counts = [0] * len(counts) + [9]
        timeline = make_timeline(variant, layout, counts, bare := draw.random() < 0.3)
        positions, running = timeline_positions(timeline), StreamPositions(variant, layout)
        which = {"both": timeline.rows.part >= 0, "visual": timeline.rows.visual, "text": timeline.rows.text}[side]
        for row in which.nonzero()[:, 0].tolist():
            part, clip, index, slot = (int(getattr(timeline.rows, name)[row]) for name in Rows.__annotations__)
            number = clip or slot
            known = counts[: max(number - 1, 0)] + [draw.randint(0, 9)] * draw.randint(0, 1)
            clips = len(counts) if number == len(counts) else None
            time, place = running.start(part, number, known, clips, bare and clips is not None)
            row_of, column = divmod(index, layout.grid[1]) if part == CLIP else (index, index)
            expected = [time + (0 if part == CLIP else index), place + row_of, place + column]
            assert positions[:, row].tolist() == expected


def test_time_is_rounded_as_by_the_release():
    """It multiplies in float32: 3 * 1.6666666 is 5 there, and 4.9999998 in float64."""
    print("seed", SEED)
    draw = random.Random(SEED)
    for _ in range(1000):
        clips, steps = draw.randint(1, 5000), draw.choice([5 / 3, draw.uniform(0.1, 9), draw.randint(1, 90) / 30])
        layout = Layout(1, 1, 1, (1, 1), steps)
        time = StreamPositions(VARIANTS["group"], layout).start(CLIP, clips, (), None)[0] - layout.prompt
        assert time == int((torch.tensor(clips - 1) * steps).long())
