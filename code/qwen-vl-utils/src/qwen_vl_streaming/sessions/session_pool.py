"""Many live sessions over one model, batched in each forward step, each at its own pace.

A pool has a fixed number of batch slots and a fixed memory; a session that does not fit is refused before anything
runs. In each round, every session that may write has a row in the forward step, and those with a prompt or a clip to
enter have a chunk of rows. If there are more of these than chunks, the sessions that have waited longest for one come
first. Steps of few sessions have few rows, however many slots the pool has. What a session writes does not depend on
the others.
"""

import functools
import logging
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..common.errors import InputError
from ..common.numbers import MOST, check_count, check_number, shown
from ..engine.kv_cache import PagedKVCache
from ..engine.step_runner import StepRunner, chunk_counts_of, decode_counts_of
from ..model.prompts import Template
from ..stream import PENALTY
from ..timeline.plan import Window
from ..timeline.timeline import Layout
from ..timeline.variants import Variant
from .modes import open_session
from .record import identity
from .session import Session
from .session_log import TimedToken

logger = logging.getLogger(__name__)

CHUNK_COUNTS = (0, 1, 2, 4, 8)
RESERVE = 0.15
"""Share of a GPU's free memory that is left for the vision encoder and for activations."""


def blocks_needed(layout: Layout, max_clips: int, max_new_tokens: int, window: tuple[int, int] | None) -> int:
    """Blocks of the key-value cache that a session with these limits takes, as `SessionPool.open` counts them."""
    limit = Window.of(window)
    return PagedKVCache.blocks_needed(*StepRunner.token_capacity(layout, max_clips, max_new_tokens, limit))


class SessionPool:
    """Sessions that share one model. `open` adds one; `step` does a round for all."""

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
        chunk_counts: Sequence[int] = CHUNK_COUNTS,
        decode_counts: Sequence[int] | None = None,
        chunk: int | None = None,
        chunks: int = 1,
        clip_tokens: int | None = None,
        grids: Sequence[tuple[int, int]] | None = None,
        penalty: float = PENALTY,
    ):
        """Args:
            batch_slots: Sessions at once, at most.
            layout: Has the largest clips that a session of `max_clips` may have.
            memory: Bytes for keys and values; default: most of a GPU's free memory, on a CPU what all slots can need.
            max_clips, max_new_tokens, window: The most that a session may have of each.
            chunk_counts: How many clips may enter in one forward step; a step is padded to the next of these.
            decode_counts: How many sessions may take part in one forward step, beside all; a step is padded to the next
                of these. Default: as `decode_counts_of`.
            chunk: Visual tokens of a clip that enter in one step, at most those of the largest clip and the tail;
                default: a clip of `layout` and the tail. Larger clips take several steps.
            chunks: In how many chunks such a clip enters, if it is fused: see `Session`.
            clip_tokens: Visual tokens of a clip at most, where sessions of fewer clips may have larger ones.
            grids: Those of common clips, for which the vision encoder captures CUDA graphs; default: that of `layout`.
            penalty: Repetition penalty of all sessions.

        Raises InputError for a wrong number, and if not even one session fits.
        """
        counts = {"batch_slots": batch_slots, "max_clips": max_clips, "max_new_tokens": max_new_tokens}
        given = {"memory": memory, "chunk": chunk, "clip_tokens": clip_tokens}
        given = {what: count for what, count in given.items() if count is not None}
        for what, count in {**counts, **given}.items():
            check_count(what, count, most=sys.maxsize if what in ("memory", "max_new_tokens") else MOST)
        decode_counts = decode_counts_of(batch_slots) if decode_counts is None else decode_counts
        for what, several, least in (("chunk_counts", chunk_counts, 0), ("decode_counts", decode_counts, 1)):
            if not isinstance(several, Sequence):
                raise InputError(f"{what} {shown(several)} must be a list of numbers")
            for count in several:
                check_count(f"{what}: each", count, least)
        check_number("penalty", penalty)
        if max(chunk_counts, default=0) < 1:
            raise InputError(f"chunk_counts {tuple(chunk_counts)} let no clip enter: give at least one number above 0")
        self.limits = {"max_clips": max_clips, "max_new_tokens": max_new_tokens, "window": window}
        self.model, self.sessions, self.identity = model, [], None
        block_bytes = PagedKVCache.block_bytes(model.model.language_model.config, model.dtype)
        needed = blocks_needed(layout, **self.limits)
        _, text = StepRunner.token_capacity(layout, max_clips, max_new_tokens, Window.of(window))
        clip_tokens = max(clip_tokens or 0, layout.tokens_per_clip)
        whole = min(chunk or layout.tokens_per_clip + layout.tail, clip_tokens + layout.tail)
        if type(chunks) is not int or not 1 <= chunks <= whole:
            raise InputError(
                f"chunks {shown(chunks)} must be from 1 to the {whole} visual tokens that enter in one step"
            )
        if memory is None and model.device.type == "cuda":
            memory = int((1 - RESERVE) * torch.cuda.mem_get_info(model.device)[0])
        blocks = needed * batch_slots if memory is None else min(needed * batch_slots, memory // block_bytes - 1)
        if memory is not None and blocks < needed:
            raise InputError(
                f"one session needs {needed * block_bytes / 2**30:.3f} GiB for its keys and values, but only "
                f"{memory / 2**30:.3f} GiB are available: use fewer clips, tokens or pixels, or more memory"
            )
        counts = [*(count for count in chunk_counts if 0 < count < batch_slots), min(batch_slots, max(chunk_counts))]
        self.runner = StepRunner(
            model,
            batch_slots,
            blocks,
            blocks_per_slot=needed,
            text_capacity=text,
            clip_tokens=clip_tokens,
            chunk_size=-(-whole // chunks),
            decode_counts=decode_counts,
            chunk_counts=[0, *chunk_counts_of(chunks)[:-1], *(chunks * count for count in counts)],
            clip_chunks=chunks,
            windowed=window is not None,
            penalty=penalty,
        )
        self.runner.warm_up()
        for grid in dict.fromkeys(grids or [layout.grid]):
            self.runner.vision_encoder.capture(grid, [count for count in chunk_counts if count])

    def open(self, variant: Variant, template: Template, layout: Layout, *, mode: str = "fused", **options) -> Session:
        """Add a session, serial or fused, with `options` as in `open_session`. Raises InputError if no batch slot or
        not enough memory is free; the other sessions go on."""
        if mode == "pipelined":
            raise InputError("sessions of a pool share one model on one device: use fused or serial")
        options = {**self.limits, **options}
        if options.get("record") is not None:
            if self.identity is None:
                self.identity = identity(self.model)
            options["model_identity"] = self.identity
        session = open_session(self.model, variant, template, layout, mode=mode, runner=self.runner, **options)
        self.sessions.append(session)
        return session

    @property
    def idle(self) -> bool:
        """Nothing can be done until another clip is fed to one of the sessions."""
        return all(session.closed or session.idle for session in self.sessions)

    def step(self) -> list[tuple[Session, TimedToken]]:
        """One round for all: at most one forward step, at most one token each. Closed sessions are removed. An error
        ends all sessions, each with its record, and is raised."""
        self.sessions = [session for session in self.sessions if not session.closed]
        running = [session for session in self.sessions if not session.idle]
        try:
            self._encode(running)
            running = [session for session in running if not session.closed]
            requests, entering, room = [], [], self.runner.chunk_counts[-1]
            for session in running:
                request = session.rounds.plan(room)
                requests.append((session, request))
                if request is not None and len(request.prefill):
                    entering.append(session)
                    room -= request.chunks(self.runner.chunk_size)
            # A session that had a chunk goes to the end of the queue for the next.
            self.sessions = [session for session in self.sessions if session not in entering] + entering
            launched = [(session, request) for session, request in requests if request is not None]
            pending = self.runner.step([request for _, request in launched]) if launched else None
            for session, request in launched:
                session.rounds.requested(request, pending)
            tokens = []
            for session, request in requests:
                # A session that requested nothing reads its pending token now: other sessions may go on for long.
                wait = not launched or (request is None and session.rounds.token_ready)
                if (token := session.rounds.collect(wait)) is not None:
                    tokens.append((session, token))
        except BaseException as error:
            for other in self._end_all(functools.partial(Session.fail, error=error)):
                logger.error("%s", other)
            raise
        return tokens

    def _encode(self, running: Sequence[Session]) -> None:
        """Encode the clips that are due in all sessions at once."""
        due = [(session, clip) for session in running for clip in session.rounds.clips_to_encode()]
        if not due:
            return
        sessions, clips = zip(*due, strict=True)
        try:
            encoded = self.runner.vision_encoder.encode(clips, [session.layout for session in sessions])
        except (torch.OutOfMemoryError, MemoryError):
            encoded = None
        if encoded is None:  # outside the handler, in which the error still holds the memory of its frames
            return self._encode_one_by_one(due)
        for session, features in zip(sessions, encoded, strict=True):
            session.rounds.encoded.append(features)

    def _encode_one_by_one(self, due: Sequence[tuple[Session, Tensor]]) -> None:
        """After out of memory: only sessions whose clips do not fit even alone fail; the others go on."""
        for session, clip in due:
            if session.closed:
                continue
            try:
                session.rounds.encoded += self.runner.vision_encoder.encode([clip], [session.layout])
            except (torch.OutOfMemoryError, MemoryError) as error:
                try:
                    session.fail(error)
                except InputError as unwritten:
                    logger.error("%s", unwritten)

    def close(self) -> None:
        """Close all sessions, each with its record, and then raise the first error, if there was one."""
        if errors := self._end_all(Session.close):
            raise errors[0]

    def _end_all(self, end: Callable[[Session], None]) -> list[Exception]:
        """Call `end` for all sessions. Returns the errors that were raised."""
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
