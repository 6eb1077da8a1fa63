"""The model decides when a slot ends: streamed equals full, in every variant, mode and batch. Tests print the seeds."""

import random
import time
from dataclasses import replace

import pytest
import torch
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.reference import Streams, caption
from qwen_vl_streaming.sessions import SessionPool, open_session
from qwen_vl_streaming.timeline.attention import dense_mask
from qwen_vl_streaming.timeline.positions import timeline_positions
from qwen_vl_streaming.timeline.timeline import CLIP, NOTHING, Layout, ModelSchedule, make_timeline
from qwen_vl_streaming.timeline.variants import VARIANTS
from sessions import PARALLEL, play, random_case
from tiny import random_template, timeline_ids, tiny_model

SEED = time.time_ns() % 100_000
STREAMING = [variant for variant in VARIANTS.values() if variant.streams]
END_OF_SLOT = 150


@pytest.fixture(scope="module")
def model():
    """A model that writes the end-of-slot token at random: its logit varies most."""
    model = tiny_model()
    model.lm_head.weight.data[END_OF_SLOT] *= 4
    return model


def deciding_case(draw: random.Random, variant, may_be_late: bool = False, clips: int | None = None):
    case = random_case(draw, variant, f"model-{draw.randint(1, 5)}", may_be_late)
    case.template = replace(
        case.template, end_of_slot=END_OF_SLOT, end=-1 if draw.random() < 0.8 else case.template.end
    )
    case.most = draw.randint(1, 30)
    if clips:
        case.pixels = torch.randn(clips, *case.pixels.shape[1:], generator=torch.Generator().manual_seed(1))
        case.steps = [draw.choice([0, 0, 1, 3, 20]) for _ in range(clips)]
    return case


@torch.no_grad()
def reference(model, case, complete: bool = True, bare: bool = False):
    visual = model.perceive(case.pixels, case.layout.grid)
    if not complete:  # the session was done before the last clip was known: add one that no token attends to
        visual = torch.cat([visual, torch.zeros_like(visual[:1])])
    schedule = ModelSchedule(len(visual) + bare, int(case.schedule.removeprefix("model-")))
    return caption(
        Streams(model, case.variant, [case.template], [case.layout], bare=bare), [visual], [schedule], case.most
    )[0]


def test_all(model):
    from collections import Counter

    how = Counter()
    print("seed", SEED)
    for n in range(200):
        draw = random.Random(f"{SEED} {n}")
        variant = draw.choice(STREAMING)
        case = deciding_case(draw, variant, may_be_late=True)
        mode = draw.choice(["serial", "fused"]) if variant.parallel else "serial"
        print(n, variant.name, mode, case.schedule, case.steps, case.late)
        with open_session(
            model, variant, case.template, case.layout, mode=mode, ahead=draw.choice([0, 1, 2]), **case.options
        ) as s:
            play(s, case)
        plain = reference(model, case, s.scheduler.complete, s.scheduler.bare)
        mine = s.caption()
        if s.scheduler.complete or True:
            assert (mine.tokens, mine.slots) == (plain.tokens, plain.slots)
        most = int(case.schedule[6:])
        left = 0
        for slot, count in enumerate(mine.schedule[:-1]):
            toks = mine.tokens[left : left + count]
            left += count
            how[
                "silent" if count == 1 and toks == [END_OF_SLOT] else "token" if toks[-1:] == [END_OF_SLOT] else "bound"
            ] += 1
    print(how)
