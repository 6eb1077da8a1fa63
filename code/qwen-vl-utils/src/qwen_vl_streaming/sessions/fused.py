"""Rounds on one device in which clips enter in the forward steps that write tokens."""

from torch import Tensor

from ..common.errors import InputError
from ..common.numbers import shown
from ..engine.stream_state import DueRows, StreamState
from ..timeline.timeline import Layout
from .serial import SerialRounds

ENCODE_TOGETHER = 4
"""Clips that the vision encoder encodes at once, if so many wait: one alone does not fill a GPU."""


CHUNK_TOKENS, MOST_CHUNKS = 128, 4
"""Visual tokens of a chunk at least, and chunks at most, where the caller does not say. As `latency.py sweep` measured
them at 7B on an H200 (code/benchmarks/RESULTS.md): smaller chunks are slower than a whole clip."""


def choose_chunks(layout: Layout, quota: float) -> int:
    """In how many chunks a clip of `layout` enters, each beside a token of a slot that writes `quota` tokens, where the
    caller does not say."""
    return max(1, int(min(layout.tokens_per_clip // CHUNK_TOKENS, quota, MOST_CHUNKS)))


def check_chunks(chunks: int, chunk: int | None, mode: str, layout: Layout) -> None:
    """Raises InputError if a session in `mode` cannot divide its clips into `chunks` chunks."""
    most = layout.tokens_per_clip
    if type(chunks) is not int or not 1 <= chunks <= most:
        raise InputError(f"chunks {shown(chunks)} must be from 1 to the {most} visual tokens of a clip")
    if chunks > 1 and mode != "fused":
        raise InputError(f"chunks {chunks} is for mode fused: in {mode}, no token is written beside a clip")
    if chunk is not None:
        raise InputError(f"chunk {chunk} and chunks {chunks} both divide a clip: give one of them")


class FusedRounds(SerialRounds):
    """The next clip's rows enter beside the tokens of the slot before it: whole beside one token, or in chunks beside
    several. What is left of it once that slot is over enters with the first token that sees it. At most one clip enters
    ahead of its slot; more is not faster."""

    mode = "fused"

    def open(self) -> None:
        super().open()
        self.visual = StreamState(self.variant, self.template, self.layout, self.window)
        """The visual side, as far as clips have started to enter."""
        self.entering: DueRows | None = None
        """The rows left of the clip that is entering, ahead of its slot; may be empty. None: no clip is entering."""

    def clips_to_encode(self) -> list[Tensor]:
        if len(self.encoded) > 1:
            return []
        # The first clip is encoded alone: its slot waits for it.
        count = ENCODE_TOGETHER if self.encoded or self.entering is not None else 1
        return [self.waiting.popleft() for _ in range(min(len(self.waiting), count))]

    def _begin_slots(self) -> None:
        self._enter_ahead()
        entering = self.entering
        fits = entering is not None and len(self.lead) + len(entering) <= self.width_ahead
        if entering is not None and fits and self.scheduler.may_begin_slot:
            rows = self._begin_slot()
            # The clip's rows that are left enter with the first token that sees them.
            self.lead = self.lead + entering + rows[rows.text]
            self.entering = None
            self._enter_ahead()
        self._begin_tail()

    def _enter_ahead(self) -> None:
        """The next clip starts to enter once all rows of the one before have entered. Tokens do not wait for the vision
        encoder."""
        if self.entering is not None or not self.encoded or (len(self.lead) and self.lead.visual.any()):
            return
        if self.encoded[0].ready.query() or not self.scheduler.may_write:
            self.runner.set_clip_features(self.batch_slot, self.encoded.popleft())
            self.visual.stream.counts[:] = self.scheduler.counts
            rows = self.visual.feed_clip(self.scheduler.commit())
            self.entering = rows[rows.visual]

    def _rows_ahead(self, room: int) -> DueRows:
        if self.entering is None or not len(self.entering):
            return DueRows.empty()
        rows, self.entering = self.entering.split(room)
        return rows
