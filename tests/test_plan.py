"""A plan's two numbers per token are equivalent to the mask."""

import random

import pytest
import torch
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.timeline.attention import dense_mask
from qwen_vl_streaming.timeline.plan import Window, make_plan
from qwen_vl_streaming.timeline.positions import timeline_positions
from qwen_vl_streaming.timeline.timeline import ANSWER, HEADER, PROMPT, Layout, Schedule, make_timeline
from qwen_vl_streaming.timeline.variants import VARIANTS
from tiny import random_counts


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_plan_matches_the_mask(variant, seed):
    print("seed", seed)
    draw = random.Random(f"{variant.name} {seed}")
    layout = Layout(draw.randint(1, 5), 2, draw.randint(1, 3), (draw.randint(1, 3), draw.randint(1, 3)))
    schedule = Schedule(tuple(random_counts(draw, variant)[:-1]))
    most = draw.randint(1, 12)
    timeline = make_timeline(variant, layout, schedule.counts(most))
    rows = timeline.rows
    mask = dense_mask(rows.visual[None], rows.text[None], variant.parallel)[0, 0]
    plan = make_plan(variant, layout, schedule, most)
    for run, which in ((plan.visual, ~rows.text), (plan.text, rows.text)):
        own = mask[which]
        for seen, keys in ((run.seen_visual, ~rows.text), (run.seen_text, rows.text)):
            beginning = torch.arange(int(keys.sum())) < seen[:, None]
            assert torch.equal(own[:, keys], beginning)
        assert torch.equal(run.positions, timeline_positions(timeline)[:, which])
        assert torch.equal(run.produces, timeline.produces[which])
    assert plan.schedule is schedule and len(plan.visual) + len(plan.text) == len(rows)
    assert plan.slots(most) == rows.slot[rows.part == ANSWER].tolist()


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("variant", [v for v in VARIANTS.values() if v.streams], ids=lambda v: v.name)
def test_a_plan_does_not_depend_on_how_long_the_answer_becomes(variant, seed):
    print("seed", seed)
    draw = random.Random(f"{variant.name} {seed}")
    layout = Layout(3, 2, 2, (2, 3))
    schedule = Schedule(tuple(draw.randint(0, 3) for _ in range(draw.randint(0, 4))))
    long = make_plan(variant, layout, schedule, 20)
    short = make_plan(variant, layout, schedule, draw.randint(1, 19))
    # The row of the last token produces nothing, so it does not matter if it would attend to more.
    fed = len(short.text) - 1
    for field in ("positions", "seen_visual", "seen_text"):
        assert torch.equal(getattr(short.text, field)[..., :fed], getattr(long.text, field)[..., :fed]), field


def in_window(window, rows, query, key) -> bool:
    """The docstring of Window for one pair of tokens, of which `query` is fed later. The tail belongs to the last
    clip."""
    if rows.part[key] in (PROMPT, HEADER):
        return True
    before = rows[: query + 1]
    if rows.part[key] == ANSWER:
        return int((before.part[key + 1 :] == ANSWER).sum()) < window.tokens
    return int(rows.clip[key]) > int(before.clip.max()) - window.clips


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_window_hides_old_clips_and_old_tokens(variant, seed):
    print("seed", seed)
    draw = random.Random(f"{variant.name} {seed}")
    layout = Layout(draw.randint(1, 4), 2, 2, (draw.randint(1, 2), draw.randint(1, 3)))
    counts = random_counts(draw, variant, most_clips=7)
    window = Window(draw.randint(1, 3), draw.randint(1, 5))
    rows = make_timeline(variant, layout, counts).rows
    length = len(rows)
    mask = window.mask(layout, rows.text, len(counts))
    assert mask.shape == (length, length)
    for query in range(length):
        for key in range(query):
            assert mask[query, key] == in_window(window, rows, query, key), (query, key)
    some = slice(draw.randrange(length), None)
    assert torch.equal(window.mask(layout, rows.text, len(counts), some), mask[some])


def test_the_start_of_a_window_by_hand():
    """Prompt 3, clips of 2 tokens, header 2; a window of 2 clips and 3 tokens."""
    layout, window = Layout(3, 2, 2, (1, 2)), Window(2, 3)
    seen_visual, seen_text = torch.tensor([1, 3, 4, 5, 7, 8, 9, 11]), torch.tensor([0, 0, 2, 3, 4, 5, 6, 9])
    visual, text = (start.tolist() for start in window.start(layout, seen_visual, seen_text, None))
    assert visual == [3, 3, 3, 3, 3, 5, 5, 7]  # clip 3 starts at token 8, clip 4 at token 10
    assert text == [2, 2, 2, 2, 2, 2, 3, 6]
    both = zip(seen_visual.tolist(), seen_text.tolist(), strict=True)
    assert [window.start(layout, *seen, None) for seen in both] == [*zip(visual, text, strict=True)]
    # With 3 clips in total, tokens 10 and 11 are the tail.
    assert window.start(layout, seen_visual, seen_text, 3)[0].tolist() == [3, 3, 3, 3, 3, 5, 5, 5]
    assert window.start(layout, 11, 9, 3) == (5, 6)


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0)])
def test_a_window_needs_a_clip_and_a_token(sizes):
    assert Window(1, 1) == Window(1, 1)
    with pytest.raises(
        InputError, match=f"^a window must have at least 1 clip and 1 token, not {sizes[0]} and {sizes[1]}$"
    ):
        Window(*sizes)
