"""Many live sessions over one model, batched pass by pass, each at its own pace.

A crowd has seats and memory for so many; who finds none is refused before anything runs. In each round every session
that may speak has a row in the pass, and those with a clip to take in have a piece of it; where a pass has too few,
those who have gone without for longest. Each session is the one of `session.py`: what it writes does not depend on
others.
"""

import functools
import logging
from collections.abc import Callable, Sequence

import torch

from ..common.errors import InputError
from ..engine.kv_cache import PagedKVCache
from ..engine.step_runner import StepRunner
from ..model.prompts import Template
from ..reference import PENALTY
from ..timeline.plan import Window
from ..timeline.timeline import Layout
from ..timeline.variants import Variant
from . import open_session
from .session import Session, Word

logger = logging.getLogger(__name__)

PIECES = (0, 1, 2, 4, 8)
RESERVE = 0.15
"""Part of a GPU's free memory that is left to the vision tower and to what a pass needs in between."""


class SessionPool:
    """Sessions that share one model. `open` lets one in; `step` does a round for all."""

    def __init__(
        self,
        model,
        batch_slots: int,
        layout: Layout,
        *,
        memory: int | None = None,
        max_clips: int = 60,
        max_new_tokens: int = 300,
        window: tuple[int, int] | None = None,
        pieces: Sequence[int] = PIECES,
        penalty: float = PENALTY,
    ):
        """At most `batch_slots` sessions at once, of which none has larger clips than `layout`, more of them than
        `max_clips`, more words than `max_new_tokens` or a larger `window`. Their keys and values take at most `memory`
        bytes, by default most of what a GPU has free, or as much as all seats can need. Raises InputError where not
        even one session fits.
        """
        if batch_slots < 1:
            raise InputError(f"a crowd of {batch_slots} seats must have at least 1")
        if max(pieces, default=0) < 1:
            raise InputError(f"pieces {tuple(pieces)} take no clip in: give at least one number above 0")
        self.limits = {"max_clips": max_clips, "max_new_tokens": max_new_tokens, "window": window}
        sight = None if window is None else Window(*window)
        self.model, self.sessions = model, []
        config = model.model.language_model.config
        each = PagedKVCache.block_bytes(config, model.dtype)
        visual, text = StepRunner.token_capacity(layout, max_clips, max_new_tokens, sight)
        need = PagedKVCache.blocks_needed(visual, text)
        if memory is None and model.device.type == "cuda":
            memory = int((1 - RESERVE) * torch.cuda.mem_get_info(model.device)[0])
        pages = need * batch_slots if memory is None else min(need * batch_slots, memory // each - 1)
        if pages < need:
            raise InputError(
                f"one session needs {need * each / 2**30:.3f} GiB for its keys and values, and there are "
                f"{memory / 2**30:.3f}: give it fewer clips, words or pixels, or more memory"
            )
        self.passes = StepRunner(
            model,
            batch_slots,
            pages,
            blocks_per_slot=need,
            text_capacity=text,
            clip_tokens=layout.tokens_per_clip,
            chunk_size=layout.tokens_per_clip + layout.tail,
            chunk_counts=[0, *(count for count in pieces if 0 < count < batch_slots), min(batch_slots, max(pieces))],
            windowed=window is not None,
            penalty=penalty,
        )
        self.passes.warm_up()
        self.passes.vision_encoder.capture(layout.grid, [size for size in pieces if size])

    def open(self, variant: Variant, template: Template, layout: Layout, *, way: str = "fused", **options) -> Session:
        """Let a session in, serial or fused; `options` as `open_session`'s. Raises InputError where no seat or memory
        is left for it, which harms nobody."""
        if way == "pipelined":
            raise InputError("a crowd's sessions share one model on one device: ask for fused or serial")
        session = open_session(
            self.model, variant, template, layout, way=way, passes=self.passes, **{**self.limits, **options}
        )
        self.sessions.append(session)
        return session

    @property
    def idle(self) -> bool:
        """Nothing can be done until another clip is fed to someone."""
        return all(session.closed or session.idle for session in self.sessions)

    def step(self) -> list[tuple[Session, Word]]:
        """One round for all: at most one pass, at most one word each. A session that is closed leaves. An error in a
        pass ends all of them, each with its record."""
        self.sessions = [session for session in self.sessions if not session.closed]
        running = [session for session in self.sessions if not session.idle]
        try:
            looks = [(session, *due) for session in running for due in session.looks_due()]
            if looks:
                sessions, clips, last = zip(*looks, strict=True)
                sights = self.passes.vision_encoder.encode(clips, [session.layout for session in sessions])
                for session, sight, is_last in zip(sessions, sights, last, strict=True):
                    session.have_looked([(sight, is_last)])
            asks, fed, room = [], [], self.passes.chunk_counts[-1]
            for session in running:
                ask = session.plan(room > len(fed))
                asks.append((session, ask))
                if ask is not None and len(ask.prefill):
                    fed.append(session)
            # Who had a piece is the last to have another.
            self.sessions = [session for session in self.sessions if session not in fed] + fed
            passing = [(session, ask) for session, ask in asks if ask is not None]
            written = self.passes.step([ask for _, ask in passing]) if passing else None
            for session, ask in passing:
                session.asked_for(ask, written)
            # Who asked for nothing may be late by a word that came long ago, while others go on.
            words = [
                (session, session.collect(not passing or (ask is None and session.word_there))) for session, ask in asks
            ]
        except BaseException as error:
            for mistake in self._end_all(functools.partial(Session.fail, error=error)):
                logger.error("%s", mistake)
            raise
        return [(session, word) for session, word in words if word is not None]

    def close(self) -> None:
        """Close all sessions, each with its record. Where that fails for some, raises the first error, once all are."""
        if errors := self._end_all(Session.close):
            raise errors[0]

    def _end_all(self, end: Callable[[Session], None]) -> list[Exception]:
        """The errors with which sessions ended, none of which kept others from their end."""
        errors = []
        for session in self.sessions:
            try:
                end(session)
            except Exception as error:
                errors.append(error)
        return errors

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
