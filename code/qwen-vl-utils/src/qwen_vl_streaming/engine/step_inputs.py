"""All integers that a step of live streams reads, as one tensor that is copied to the device at once."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .step_request import StepRequest
from .stream_state import ROW_FIELDS, RUN_INDEX, TEXT_ROW


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
        self.values.copy_(self.pack(requests), non_blocking=True)

    def pack(self, requests: Sequence[StepRequest]) -> Tensor:
        """The inputs of a step for `requests`, on the CPU. Idle rows may attend to what the rows beside them do.
        Otherwise attention would have to evaluate its mask for every key of their query block."""
        values = torch.zeros(len(self.values), dtype=torch.long, pin_memory=self.values.is_cuda)
        table, chunk_slots, (choose, sample, next_row) = (part.numpy() for part in self.split(values))
        table[4], table[9:], choose[:] = 1, -1, -1
        chunk = 0
        for request in requests:
            batch_slot, index = request.batch_slot, request.batch_slot.index
            if count := len(request.prefill):
                begin, own = self.batch_slots + chunk * self.chunk_size, request.chunks(self.chunk_size)
                rows, seen, last = table[:, begin : begin + count], table[4:8], begin + count - 1
                rows[:] = request.prefill.table[:ROW_FIELDS]
                rows[RUN_INDEX] = batch_slot.cache_index(request.prefill)
                choose[index] = last
                seen[:, last + 1 : begin + own * self.chunk_size] = seen[:, last, None]
                if self.batch_slots == self.chunks == 1 and not len(request.decode):
                    seen[:, 0] = seen[:, begin]
                chunk_slots[chunk : chunk + own] = index
                chunk += own
            if len(request.decode):
                table[:, index] = request.decode.table[:ROW_FIELDS, 0]
                table[RUN_INDEX, index] = batch_slot.text.cache_index(int(table[RUN_INDEX, index]))
                choose[index] = index
            sample[index], next_row[index] = request.sample, request.next_row % self.text_rows
        table[TEXT_ROW] = np.where(table[TEXT_ROW] < 0, -1, table[TEXT_ROW] % self.text_rows)
        return values
