"""Two numbers a token say what the mask says."""

import random

import pytest
import torch
from qwen_vl_streaming.attention import dense_mask
from qwen_vl_streaming.plan import make_plan
from qwen_vl_streaming.positions import timeline_positions
from qwen_vl_streaming.timeline import ANSWER, Layout, Schedule, make_timeline
from qwen_vl_streaming.variants import VARIANTS
from tiny import random_counts


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_plan_sees_what_the_mask_allows(variant, seed):
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
    # The row of the last token is fed to no end: where it would see more, nothing is made of it.
    fed = len(short.text) - 1
    for field in ("positions", "seen_visual", "seen_text"):
        assert torch.equal(getattr(short.text, field)[..., :fed], getattr(long.text, field)[..., :fed]), field
