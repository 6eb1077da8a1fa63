"""Random live sessions and their expected results. Tests print the seeds."""

import os
import random
import time
from dataclasses import dataclass, replace

import torch
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.engine.step_runner import StepRunner
from qwen_vl_streaming.model.prompts import Template
from qwen_vl_streaming.reference import Streams, caption
from qwen_vl_streaming.sessions import Session
from qwen_vl_streaming.timeline.timeline import Layout, ModelSchedule, Schedule
from qwen_vl_streaming.timeline.variants import VARIANTS, Variant
from tiny import VOCABULARY, random_template, tiny_model

PARALLEL = [variant for variant in VARIANTS.values() if variant.parallel]
MANY = int(os.environ.get("SESSIONS", 100))
"""Number of random sessions; set SESSIONS=1000 for a thorough run."""
END_OF_SLOT = 150
"""The end-of-slot token of `deciding_model`."""


@dataclass
class Case:
    """A session to run: its arguments, and a script of when clips arrive."""

    variant: Variant
    template: Template
    layout: Layout
    pixels: torch.Tensor
    schedule: str | Schedule
    most: int
    chunk: int | None
    steps: list[int]
    """Most session steps before each clip arrives: none for a burst, many for a stall."""
    late: int | None = None
    """Most session steps between the last clip and the end of the video. None: the last clip is fed as such."""

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
    # A random end token is rarely generated, so that most answers reach their maximum length. With the default one, the
    # tiny model ends answers early.
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
    """Feed the clips according to the script of `case` and generate until the session is done."""
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
    """The caption of the reference implementation for `case`, with `counts` tokens per slot."""
    with torch.no_grad():
        tokens = model.perceive(case.pixels, case.layout.grid)
    if not complete:  # the session was done before the last clip was known: add one that no token attends to
        tokens = torch.cat([tokens, torch.zeros_like(tokens[:1])])
    quotas = (counts + [0] * len(tokens))[: len(tokens) - 1 + bare]
    streams = Streams(model, case.variant, [case.template], [case.layout], bare=bare)
    return caption(streams, [tokens], [Schedule(tuple(quotas))], case.most)[0]


def check(model, case: Case, session: Session) -> None:
    """Assert that the session generated the reference tokens for its counts, and that its slots follow its schedule."""
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


Running = list[tuple[Case, Session, list]]
"""Sessions of a pool with their cases, and an item for each clip that was fed."""


def feed_some(draw: random.Random, running: Running, chances: tuple[float, ...] = (0.5,)) -> None:
    """Feed some of the sessions their next clip."""
    for case, session, fed in running:
        if len(fed) < len(case.pixels) and draw.random() < draw.choice(chances):
            fed.append(1)
            session.feed(case.pixels[len(fed) - 1], last=len(fed) == len(case.pixels))


def close_done(running: Running) -> Running:
    """Close the sessions that are done, and remove them from `running`. Returns them."""
    done = [each for each in running if each[1].done]
    running[:] = [each for each in running if not each[1].done]
    for _, session, _ in done:
        session.close()
    return done


def most_of(case: Case) -> int:
    """M of a case with schedule model-M."""
    return int(case.schedule.removeprefix("model-"))


@torch.no_grad()
def decided(model, case: Case, complete: bool = True, bare: bool = False):
    """The caption of the reference implementation, which decides by itself when slots end."""
    visual = model.perceive(case.pixels, case.layout.grid)
    if not complete:  # the session was done before the last clip was known: add one that no token attends to
        visual = torch.cat([visual, torch.zeros_like(visual[:1])])
    streams = Streams(model, case.variant, [case.template], [case.layout], bare=bare)
    schedule = ModelSchedule(len(visual) + bare, most_of(case))
    # A session has at most `most` tokens, for it may not know the number of clips, for which `caption` adds some.
    return caption(streams, [visual], [schedule], case.most - schedule.most_tokens(0))[0]


def check_deciding(model, case: Case, session: Session) -> None:
    """Assert that the session wrote the reference tokens, and ended its slots at the same tokens."""
    scheduler, mine = session.scheduler, session.caption()
    plain = decided(model, case, scheduler.complete, scheduler.bare)
    assert (mine.tokens, mine.slots) == (plain.tokens, plain.slots)
    assert session.counts == plain.schedule[: len(session.counts)]


def no_memory():
    raise torch.OutOfMemoryError("no memory left")


def no_model():
    """The `load` function of a PerceptionClient, which fails to find a model."""
    raise InputError("no Qwen2.5-VL could be loaded from 'nowhere'")


def double_model():
    return tiny_model().double()


def slowly_compiled_model():
    """A model in whose process a session of another size takes 4 s to open."""
    StepRunner.warm_up = lambda self, sample=True: time.sleep(4)
    return tiny_model()


def deciding_model():
    """A model that writes END_OF_SLOT about every third token, at random: its logit varies most."""
    model = tiny_model()
    model.lm_head.weight.data[END_OF_SLOT] *= 4
    return model


def deciding_case(draw: random.Random, variant: Variant, may_be_late: bool = False) -> Case:
    """A case in which the model decides when a slot ends."""
    case = random_case(draw, variant, f"model-{draw.randint(1, 5)}", may_be_late)
    end = -1 if draw.random() < 0.8 else case.template.end
    case.template, case.most = replace(case.template, end_of_slot=END_OF_SLOT, end=end), draw.randint(1, 30)
    return case


class Unopenable:
    """A message that the perception process cannot unpickle."""

    def __reduce__(self):
        return no_memory, ()
