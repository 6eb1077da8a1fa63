"""Feed order, targets and schedules, against cases worked out by hand and against the rules told another way."""

import random
import time

import pytest
import torch
from qwen_vl_streaming.errors import InputError
from qwen_vl_streaming.timeline import (
    ANSWER,
    CLIP,
    HEADER,
    NOTHING,
    PARTS,
    TAIL,
    Layout,
    Schedule,
    make_schedule,
    make_timeline,
)
from qwen_vl_streaming.variants import VARIANTS
from tiny import random_counts

SEED = time.time_ns() % 100_000
LAYOUT = Layout(prompt=2, tail=1, header=2, grid=(1, 2))
SHORT = {"prompt": "p", "clip": "v", "tail": "t", "header": "h", "answer": "a"}


def told(timeline) -> str:
    """The feed order as a person would write it: v1 for clip 1's tokens, a0 for answer token 0."""
    words = []
    for part, clip, index in zip(
        *(getattr(timeline.rows, name).tolist() for name in ("part", "clip", "index")), strict=True
    ):
        name = SHORT[PARTS[part]]
        words.append(name + str(clip if part == CLIP else index))
    return " ".join(words)


def test_feed_order_by_hand():
    expected = {
        "origin": "p0 p1 v1 v1 v2 v2 v3 v3 t0 h0 h1 a0 a1 a2 a3 a4 a5",
        "interleave": "p0 p1 v1 v1 h0 h1 a0 a1 v2 v2 a2 a3 v3 v3 t0 a4 a5",
        "group": "p0 p1 v1 v1 h0 h1 a0 v2 v2 a1 a2 v3 v3 t0 a3 a4 a5",
    }
    expected |= {"batch": expected["origin"], "overlap": expected["group"], "gap": expected["group"]}
    for name, variant in VARIANTS.items():
        counts = (2, 2, 2) if variant.streams else (0, 0, 6)
        assert told(make_timeline(variant, LAYOUT, counts)) == expected[name], name


def test_an_empty_slot_keeps_the_waiting_token_waiting():
    """Slots 1 and 3 write nothing: the header's last token and a1 wait until their next word is due."""
    order = told(make_timeline(VARIANTS["group"], LAYOUT, (0, 2, 0, 1)))
    assert order == "p0 p1 v1 v1 h0 v2 v2 h1 a0 v3 v3 v4 v4 t0 a1 a2"


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda v: v.name)
def test_targets_name_the_right_next_token(variant):
    """Every answer token is predicted exactly once, by the row that the rules name."""
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
            # A row sees nothing from after the slot that it writes in, and all of that slot's clip.
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


def test_schedules():
    streaming, offline = VARIANTS["group"], VARIANTS["batch"]
    assert make_schedule("wait-3", streaming, 4).counts(14) == (3, 3, 3, 5)
    assert make_schedule("wait-3", streaming, 4).counts(5) == (3, 2, 0, 0)
    assert make_schedule("wait-3", offline, 4).counts(5) == (0, 0, 0, 5)
    assert make_schedule("random-3", streaming, 9, seed=1) == make_schedule("random-3", streaming, 9, seed=1)
    drawn = make_schedule("random-3", streaming, 500, seed=SEED).quotas
    assert set(drawn) == {1, 2, 3, 4, 5}
    assert Schedule((2, 1)).quota(3) == float("inf")


@pytest.mark.parametrize("text", ["wait", "wait-0", "wait-x", "sometimes-3", "wait-3 ", ""])
def test_an_unknown_schedule_is_refused(text):
    with pytest.raises(InputError, match="wait-K or random-K"):
        make_schedule(text, VARIANTS["group"], 4)


def test_no_caption_and_no_clip_are_refused():
    with pytest.raises(InputError, match="at least one token"):
        make_timeline(VARIANTS["group"], LAYOUT, (0, 0))
    with pytest.raises(InputError, match="at least one clip"):
        make_timeline(VARIANTS["group"], LAYOUT, ())


def test_building_is_fast_and_linear():
    """A 30-clip, 3,000-token sample holds a handful of numbers a token: no (L, L) tensor is made."""
    timeline = make_timeline(VARIANTS["overlap"], Layout(40, 3, 3, (9, 10)), (3,) * 29 + (30,))
    assert len(timeline.rows) > 2800
    numbers = sum(getattr(timeline.rows, name).numel() for name in ("part", "clip", "index", "slot"))
    assert numbers + timeline.produces.numel() == 5 * len(timeline.rows)
    assert timeline.produces.dtype == torch.int64
