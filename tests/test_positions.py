"""Positions against cases worked out by hand, against stock transformers, and across variants."""

import random
import time

import pytest
import torch
from qwen_vl_streaming.positions import row_positions, timeline_positions
from qwen_vl_streaming.timeline import ANSWER, CLIP, HEADER, PROMPT, TAIL, Layout, make_timeline
from qwen_vl_streaming.variants import VARIANTS
from tiny import VIDEO, random_counts, random_template, timeline_ids, tiny_model

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
    """Two clips two steps apart; as in stock transformers, what follows a video starts max(rows, columns) on."""
    for name, header, answer in (("origin", (11, 12, 13), (14, 15)), ("batch", (0, 1, 2), (3, 4))):
        timeline = make_timeline(VARIANTS[name], LAYOUT, (0, 2))
        assert of(timeline, PROMPT) == text(0, 1, 2, 3, 4)
        assert of(timeline, CLIP, clip=1) == clip_at(5, 5, 5)
        assert of(timeline, CLIP, clip=2) == clip_at(7, 5, 5)
        assert of(timeline, TAIL) == text(8, 9, 10)
        assert of(timeline, HEADER) == text(*header)
        assert of(timeline, ANSWER) == text(*answer)


def test_group_and_gap_by_hand():
    for name, start in (("group", 0), ("gap", 10_000)):
        timeline = make_timeline(VARIANTS[name], LAYOUT, (2, 2, 1))
        assert of(timeline, CLIP, clip=3) == clip_at(9, 5, 5)
        assert of(timeline, TAIL) == text(8, 9, 10)
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


def overlap_told_slowly(timeline) -> dict:
    """The rounds of `overlap` as DESIGN's sentence has them, one token after the other."""
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


def test_overlap_is_what_its_sentence_says():
    print("seed", SEED)
    draw = random.Random(SEED)
    for _ in range(50):
        layout = Layout(
            draw.randint(1, 6), draw.randint(1, 4), draw.randint(1, 4), (draw.randint(1, 5), draw.randint(1, 5))
        )
        timeline = make_timeline(VARIANTS["overlap"], layout, random_counts(draw, VARIANTS["overlap"]))
        rows, expected = timeline.rows, overlap_told_slowly(timeline)
        keys = zip(rows.part.tolist(), rows.clip.tolist(), rows.index.tolist(), strict=True)
        assert [tuple(p) for p in timeline_positions(timeline).T.tolist()] == [expected[key] for key in keys]


@pytest.mark.parametrize("seconds", [1.0, 0.5, 1.3333334, 2 / 1.87])
def test_origin_equals_stock(seconds):
    """The positions that transformers computes itself for the same ids, at any sampled rate."""
    print("seed", SEED)
    draw = random.Random(SEED)
    model = tiny_model()
    for _ in range(10):
        template = random_template(draw)
        grid = (draw.randint(1, 5), draw.randint(1, 5))
        clips = draw.randint(1, 30)
        steps = model.config.vision_config.tokens_per_second * seconds
        timeline = make_timeline(VARIANTS["origin"], template.layout(grid, steps), [0] * (clips - 1) + [7])
        ids = timeline_ids(timeline, template, list(range(7)))[None]
        stock, _ = model.model.get_rope_index(
            ids,
            mm_token_type_ids=(ids == VIDEO).int() * 2,
            video_grid_thw=torch.tensor([[clips, grid[0] * 2, grid[1] * 2]]),
            second_per_grid_ts=torch.tensor([seconds]),
        )
        assert torch.equal(timeline_positions(timeline), stock[:, 0])


def test_other_variants_differ_from_origin_where_they_should():
    """batch, group and gap keep the visual side and move the text; interleave and overlap move both."""
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
    """What was known when a token was fed is enough to place it."""
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
