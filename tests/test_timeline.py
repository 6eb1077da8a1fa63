"""Feed order, targets and schedules, against cases worked out by hand and against the rules stated differently."""

import random
import time

import pytest
import torch
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.timeline.timeline import (
    ANSWER,
    CLIP,
    HEADER,
    NOTHING,
    PARTS,
    TAIL,
    Layout,
    Rows,
    Schedule,
    make_schedule,
    make_timeline,
)
from qwen_vl_streaming.timeline.variants import VARIANTS
from tiny import random_counts

SEED = time.time_ns() % 100_000
LAYOUT = Layout(prompt=2, tail=1, header=2, grid=(1, 2))
SHORT = {"prompt": "p", "clip": "v", "tail": "t", "header": "h", "answer": "a"}


def feed_order(timeline) -> str:
    """The feed order in short: v1 for the tokens of clip 1, a0 for answer token 0."""
    names = []
    for part, clip, index in zip(
        *(getattr(timeline.rows, name).tolist() for name in ("part", "clip", "index")), strict=True
    ):
        name = SHORT[PARTS[part]]
        names.append(name + str(clip if part == CLIP else index))
    return " ".join(names)


def test_feed_order_by_hand():
    expected = {
        "origin": "p0 p1 v1 v1 v2 v2 v3 v3 t0 h0 h1 a0 a1 a2 a3 a4 a5",
        "interleave": "p0 p1 v1 v1 h0 h1 a0 a1 v2 v2 a2 a3 v3 v3 t0 a4 a5",
        "group": "p0 p1 v1 v1 h0 h1 a0 v2 v2 a1 a2 v3 v3 t0 a3 a4 a5",
    }
    expected |= {"batch": expected["origin"], "overlap": expected["group"], "gap": expected["group"]}
    for name, variant in VARIANTS.items():
        counts = (2, 2, 2) if variant.streams else (0, 0, 6)
        assert feed_order(make_timeline(variant, LAYOUT, counts)) == expected[name], name


def test_an_empty_slot_delays_the_waiting_token():
    """Slots 1 and 3 write nothing: the header's last token and a1 wait until the next token is due."""
    order = feed_order(make_timeline(VARIANTS["group"], LAYOUT, (0, 2, 0, 1)))
    assert order == "p0 p1 v1 v1 h0 v2 v2 h1 a0 v3 v3 v4 v4 t0 a1 a2"


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda v: v.name)
def test_targets_name_the_right_next_token(variant):
    """Each answer token is predicted exactly once, by the row that the rules name."""
    print("seed", SEED)
    draw = random.Random(SEED)
    for _ in range(50):
        counts = random_counts(draw, variant)
        timeline = make_timeline(variant, LAYOUT, counts)
        rows, produces = timeline.rows, timeline.produces
        assert sorted(produces[produces != NOTHING].tolist()) == list(range(sum(counts)))
        for row in (produces != NOTHING).nonzero().squeeze(1).tolist():
            answer = int(produces[row])
            slot = int(rows.slot[(rows.part == ANSWER) & (rows.index == answer)])
            # A row attends to nothing after the slot in which it writes, and to all of that slot's clip.
            seen = rows[: row + 1]
            assert int(seen.clip.max()) == slot
            assert int(((seen.part == CLIP) & (seen.clip == slot)).sum()) == LAYOUT.tokens_per_clip
            assert int((seen.part == TAIL).sum()) == (LAYOUT.tail if slot == len(counts) else 0)
            if variant.parallel or (answer == 0 and counts[0]):
                before = (HEADER, LAYOUT.header - 1) if answer == 0 else (ANSWER, answer - 1)
                assert (int(rows.part[row]), int(rows.index[row])) == before
            else:
                following = rows[row + 1]
                assert (int(following.part), int(following.index)) == (ANSWER, answer)


def test_the_last_token_of_an_answer_that_ends_early_is_fed_in_the_next_slot():
    """It would produce that slot's first token. a0 waits for clip 2, and a2, the end, for clip 3 but not clip 4."""
    order = feed_order(make_timeline(VARIANTS["gap"], LAYOUT, (1, 2, 0, 0)))
    assert order == "p0 p1 v1 v1 h0 h1 v2 v2 a0 a1 v3 v3 a2 v4 v4 t0"
    assert feed_order(make_timeline(VARIANTS["gap"], LAYOUT, (3,))) == "p0 p1 v1 v1 t0 h0 h1 a0 a1 a2"


def test_an_empty_last_clip():
    """When a live source ends there is no clip 3, but the tail and the rest still belong to slot 3."""
    expected = {
        "interleave": "p0 p1 v1 v1 h0 h1 a0 v2 v2 a1 a2 t0 a3",
        "overlap": "p0 p1 v1 v1 h0 h1 v2 v2 a0 a1 t0 a2 a3",
        "batch": "p0 p1 v1 v1 v2 v2 t0 h0 h1 a0 a1 a2 a3",
    }
    for name, order in expected.items():
        counts = (1, 2, 1) if VARIANTS[name].streams else (0, 0, 4)
        timeline = make_timeline(VARIANTS[name], LAYOUT, counts, bare=True)
        assert feed_order(timeline) == order and timeline.bare and timeline.counts == counts and timeline.clips == 3
        assert timeline.rows.clip[timeline.rows.part == TAIL].tolist() == [3]
    with pytest.raises(InputError, match="at least one clip"):
        make_timeline(VARIANTS["group"], LAYOUT, (1,), bare=True)


def test_the_fields_of_each_token():
    rows = make_timeline(VARIANTS["interleave"], LAYOUT, (1, 1)).rows
    assert [PARTS[part][0] for part in rows.part] == list("ppcchhaccta")
    assert rows.clip.tolist() == [0, 0, 1, 1, 0, 0, 0, 2, 2, 2, 0]
    assert rows.index.tolist() == [0, 1, 0, 1, 0, 1, 0, 0, 1, 0, 1]
    assert rows.slot.tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 2]
    assert rows.visual.tolist() == [name in "ct" for name in "ppcchhaccta"]
    assert rows.text.tolist() == [name in "ha" for name in "ppcchhaccta"]
    offline = make_timeline(VARIANTS["origin"], LAYOUT, (0, 2)).rows
    assert offline.slot.tolist() == [0] * 7 + [2] * 4


def test_rows_of_one_part():
    rows = Rows.of(ANSWER, 3, clip=7, slot=5, first=4)
    assert len(rows) == 3 and rows.part.tolist() == [ANSWER] * 3 and rows.index.tolist() == [4, 5, 6]
    assert rows.clip.tolist() == [7] * 3 and rows.slot.tolist() == [5] * 3
    plain = Rows.of(CLIP, 2)
    assert [getattr(plain, name).tolist() for name in ("clip", "index", "slot")] == [[0, 0], [0, 1], [0, 0]]


@pytest.mark.parametrize("size", [{"prompt": 0}, {"tail": 0}, {"header": -1}, {"grid": (0, 3)}, {"grid": (3, 0)}])
def test_a_layout_needs_positive_sizes(size):
    sizes = {"prompt": 1, "tail": 1, "header": 1, "grid": (1, 1), "steps_per_clip": 0.1}
    assert Layout(**sizes).tokens_per_clip == 1 and Layout(**{**sizes, "grid": (2, 5)}).tokens_per_clip == 10
    assert Layout(1, 1, 1, (1, 1)).steps_per_clip == 2
    for wrong in (size, {"steps_per_clip": 0}):
        with pytest.raises(
            ValueError, match=r"^a layout's sizes must be at least 1, and its steps_per_clip above 0: got Layout\("
        ):
            Layout(**{**sizes, **wrong})


def test_schedules():
    streaming, offline = VARIANTS["group"], VARIANTS["batch"]
    assert make_schedule("wait-3", streaming, 4).counts(14) == (3, 3, 3, 5)
    assert make_schedule("wait-3", streaming, 4).counts(5) == (3, 2, 0, 0)
    assert make_schedule("wait-3", offline, 4).counts(5) == (0, 0, 0, 5)
    assert make_schedule("random-3", streaming, 9, seed=1) == make_schedule("random-3", streaming, 9, seed=1)
    drawn = make_schedule("random-3", streaming, 500, seed=SEED).quotas
    assert set(drawn) == {1, 2, 3, 4, 5}
    schedule = Schedule((2, 0, 1))
    assert schedule.clips == 4 and [schedule.quota(slot) for slot in (1, 2, 3, 4)] == [2, 0, 1, float("inf")]
    assert schedule.counts(1) == (1, 0, 0, 0) and schedule.counts(3) == (2, 0, 1, 0) and schedule.counts(9)[-1] == 6
    with pytest.raises(ValueError, match=r"^a slot must write at least 0 tokens, got \(1, -1\)$"):
        Schedule((1, -1))


def test_a_schedule_is_for_its_number_of_clips():
    for text in ("wait-3", "random-3"):
        for clips in (1, 2, 7):
            for variant in VARIANTS.values():
                schedule = make_schedule(text, variant, clips)
                assert schedule.clips == clips and schedule == make_schedule(text, variant, clips, seed=0)
                assert len(schedule.quotas) == clips - 1 and bool(sum(schedule.quotas)) == (
                    variant.streams and clips > 1
                )
    assert make_schedule("random-9", VARIANTS["gap"], 9, 0) != make_schedule("random-9", VARIANTS["gap"], 9, 1)


@pytest.mark.parametrize("text", ["wait", "wait-0", "wait-x", "sometimes-3", "wait-3 ", ""])
def test_an_unknown_schedule_is_refused(text):
    with pytest.raises(InputError, match="wait-K or random-K"):
        make_schedule(text, VARIANTS["group"], 4)


def test_no_caption_and_no_clip_are_refused():
    with pytest.raises(InputError, match=r"^a caption needs at least one token: remove the sample from the data$"):
        make_timeline(VARIANTS["group"], LAYOUT, (0, 0))
    with pytest.raises(InputError, match=r"^a video needs at least one clip \(two frames\): remove it from the data$"):
        make_timeline(VARIANTS["group"], LAYOUT, ())
    with pytest.raises(ValueError, match=r"^batch writes in the last slot only, got counts \(1, 2\)$"):
        make_timeline(VARIANTS["batch"], LAYOUT, [1, 2])


def test_building_is_fast_and_linear():
    """A sample of 30 clips and 3,000 tokens stores a few integers per token, and no (L, L) tensor."""
    timeline = make_timeline(VARIANTS["overlap"], Layout(40, 3, 3, (9, 10)), (3,) * 29 + (30,))
    assert len(timeline.rows) > 2800
    numbers = sum(getattr(timeline.rows, name).numel() for name in ("part", "clip", "index", "slot"))
    assert numbers + timeline.produces.numel() == 5 * len(timeline.rows)
    assert timeline.produces.dtype == torch.int64
