"""Random live sessions, and what should come out of them. Seeds are printed by the tests."""

import os
import random
from dataclasses import dataclass, replace

import torch
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.model.prompts import Template
from qwen_vl_streaming.reference import Streams, caption
from qwen_vl_streaming.sessions import Session
from qwen_vl_streaming.timeline.timeline import Layout, Schedule
from qwen_vl_streaming.timeline.variants import VARIANTS, Variant
from tiny import VOCABULARY, random_template, tiny_model

PARALLEL = [variant for variant in VARIANTS.values() if variant.parallel]
MANY = int(os.environ.get("SESSIONS", 100))
"""How many random sessions are tried; set SESSIONS=1000 for a thorough run."""
SECONDS = 60
"""In which one short session must be over, however busy the machine is; longer means that it hangs."""


@dataclass
class Case:
    """A session to run: what is asked, and a script of what arrives when."""

    variant: Variant
    template: Template
    layout: Layout
    pixels: torch.Tensor
    schedule: str | Schedule
    most: int
    chunk: int | None
    steps: list[int]
    """Rounds that are run before each clip arrives: none in a burst, many in a stall."""
    late: int | None = None
    """Rounds after the last clip before it is known to be the last; None: it comes as the last."""

    @property
    def options(self) -> dict:
        return {
            "schedule": self.schedule,
            "max_new_tokens": self.most,
            "max_clips": len(self.pixels) + 1,
            "chunk": self.chunk,
        }


def random_case(
    draw: random.Random, variant: Variant, schedule: str | Schedule | None = None, may_be_late: bool = False
) -> Case:
    clips, grid = draw.randint(1, 5), (draw.randint(1, 3), draw.randint(1, 3))
    # Hardly ever said, so that most answers are as long as they may be; else the tiny model soon ends its turn.
    template = replace(random_template(draw), end=draw.randrange(VOCABULARY))
    if schedule is None:
        quotas = tuple(draw.randint(0, 4) if variant.streams else 0 for _ in range(clips - 1))
        schedule = draw.choice(["wait-1", "wait-3", "random-2", "greedy", Schedule(quotas)])
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    return Case(
        variant,
        template,
        template.layout(grid, draw.choice([2.0, 1.5, 2.6667])),
        torch.randn(clips, 4 * grid[0] * grid[1], 3 * 2 * 14 * 14, generator=generator),
        schedule,
        draw.randint(1, 14),
        draw.choice([None, 1, 2, 5]),
        [draw.choice([0, 0, 1, 2, 3, 6, 20]) for _ in range(clips)],
        draw.choice([None, None, 0, 1, 3, 20]) if may_be_late and not isinstance(schedule, Schedule) else None,
    )


def play(session: Session, case: Case) -> Session:
    """Feed the clips by the script of `case` and write to the end."""
    for number, (pixels, steps) in enumerate(zip(case.pixels, case.steps, strict=True), 1):
        for _ in range(steps):
            if session.idle:
                break
            session.step()
        session.feed(pixels, last=case.late is None and number == len(case.pixels))
    for _ in range(case.late or 0):
        if not session.idle:
            session.step()
    if case.late is not None:
        session.end()
    for _ in session.tokens():
        pass
    assert session.done
    return session


def expected(model, case: Case, counts: list[int], complete: bool, bare: bool):
    """What plain streams write for `case` where the slots are as long as `counts` says."""
    with torch.no_grad():
        tokens = model.perceive(case.pixels, case.layout.grid)
    if not complete:  # over before it was known which clip was the last: one more, that nothing saw
        tokens = torch.cat([tokens, torch.zeros_like(tokens[:1])])
    quotas = (counts + [0] * len(tokens))[: len(tokens) - 1 + bare]
    streams = Streams(model, case.variant, [case.template], [case.layout], bare=bare)
    return caption(streams, [tokens], [Schedule(tuple(quotas))], case.most)[0]


def check(model, case: Case, session: Session) -> None:
    """The session wrote what plain streams write with the same counts, and its slots are those it was asked for."""
    scheduler = session.scheduler
    plain = expected(model, case, session.counts, scheduler.complete, scheduler.bare)
    mine = session.caption()
    assert (mine.tokens, mine.slots) == (plain.tokens, plain.slots)
    assert session.counts == plain.schedule[: len(session.counts)]
    if session.greedy:
        return
    left = len(mine.tokens)
    for slot, count in enumerate(session.counts, 1):
        last = scheduler.complete and slot == scheduler.total
        assert count == (left if last else min(left, scheduler.quota(slot)))
        left -= count


def no_memory():
    raise torch.OutOfMemoryError("no memory left")


def no_model():
    """The `load` of a PerceptionClient that finds no model."""
    raise InputError("no Qwen2.5-VL could be loaded from 'nowhere'")


def double_model():
    return tiny_model().double()


class Unopenable:
    """A message that the perception process cannot read."""

    def __reduce__(self):
        return no_memory, ()
