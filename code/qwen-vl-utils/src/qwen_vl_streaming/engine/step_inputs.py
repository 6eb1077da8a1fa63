"""All integers that a step of live streams reads, as one tensor that is copied to the device at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..timeline.timeline import CLIP
from .device_event import to_device
from .step_request import StepRequest

ROW_FIELDS = 11
"""Integers that describe a row, see `StepInputs`."""


class StepInputs:
    """The inputs of steps with one decode row for each of S slots and n chunks of W rows: R = S + n W rows.

    For each row these are: position (3), cache index (0: idle row), what it may attend to (4), token id, index in the
    text run and in the clip (-1: neither). Then the batch slot of each chunk. Then for each slot: the row to choose a
    token from (-1: the last hidden state), whether to choose, and the text row that the token becomes.
    """

    def __init__(self, batch_slots: int, chunks: int, chunk_size: int, text_capacity: int, device: torch.device):
        self.batch_slots, self.chunks, self.chunk_size = batch_slots, chunks, chunk_size
        self.text_rows = text_capacity + 1
        self.rows = batch_slots + chunks * chunk_size
        self.values = torch.zeros(ROW_FIELDS * self.rows + chunks + 3 * batch_slots, dtype=torch.long, device=device)

    def split(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of the three parts of `values`: (ROW_FIELDS, R), (n,) and (3, S)."""
        rows = ROW_FIELDS * self.rows
        table, chunk_slots, choices = values[:rows], values[rows : rows + self.chunks], values[rows + self.chunks :]
        return table.view(ROW_FIELDS, self.rows), chunk_slots, choices.view(3, self.batch_slots)

    def set(self, requests: Sequence[StepRequest]) -> None:
        """Copies the inputs of a step for `requests` to the device. Does not block the host."""
        self.values.copy_(to_device(self.pack(requests), self.values.device), non_blocking=True)

    def pack(self, requests: Sequence[StepRequest]) -> Tensor:
        """The inputs of a step for `requests`, on the CPU. Idle rows may attend to what the rows beside them do.
        Otherwise attention would have to evaluate its mask for every key of their query block."""
        values = torch.zeros(len(self.values), dtype=torch.long)
        table, chunk_slots, (choose, sample, next_row) = self.split(values)
        table[4], table[9:], choose[:] = 1, -1, -1
        chunk = 0
        for request in requests:
            batch_slot, index = request.batch_slot, request.batch_slot.index
            begin = self.batch_slots + chunk * self.chunk_size
            for due, first in ((request.prefill, begin), (request.decode, index)):
                if not len(due):
                    continue
                rows, text, clip = slice(first, first + len(due)), due.rows.text, due.rows.part == CLIP
                table[:3, rows] = due.positions
                for run, flags in ((batch_slot.visual, ~text), (batch_slot.text, text)):
                    if flags.any():
                        table[3, rows][flags] = run.cache_index(due.run_index[flags])
                table[4, rows], table[5, rows], table[6:8, rows] = due.seen_visual, due.seen_text, due.window_start
                table[8, rows] = due.ids
                table[9, rows] = (due.run_index % self.text_rows).where(text, -1)
                table[10, rows] = due.rows.index.where(clip, -1)
                choose[index] = first + len(due) - 1
            if own := request.chunks(self.chunk_size):
                seen, last = table[4:8], begin + len(request.prefill) - 1
                seen[:, last + 1 : begin + own * self.chunk_size] = seen[:, last, None]
                if self.batch_slots == self.chunks == 1 and not len(request.decode):
                    seen[:, 0] = seen[:, begin]
                chunk_slots[chunk : chunk + own] = index
                chunk += own
            sample[index], next_row[index] = request.sample, request.next_row % self.text_rows
        return values
