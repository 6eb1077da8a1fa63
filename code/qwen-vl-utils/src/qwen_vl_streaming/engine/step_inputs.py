"""All integers that a step of live streams reads, as one tensor that is copied to the device at once."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .step_request import StepRequest
from .stream_state import ROW_FIELDS, RUN_INDEX, TEXT_ROW


class StepInputs:
    """The inputs of steps of some of S slots, with D decode rows and n chunks of W rows: R = D + n W rows.

    For each row these are: position (3), cache index (0: idle row), what it may attend to (4), token id, index in the
    text run and in the clip (-1: neither). Then the batch slot of each decode row and of each chunk. Then for each
    decode row, of what its slot does: the row to choose a token from (-1: the last hidden state), whether to choose,
    and the text row that the token becomes.
    """

    def __init__(
        self,
        batch_slots: int,
        decode_rows: int,
        chunks: int,
        chunk_size: int,
        text_capacity: int,
        device: torch.device,
    ):
        self.batch_slots, self.decode_rows, self.chunks, self.chunk_size = batch_slots, decode_rows, chunks, chunk_size
        self.text_rows = text_capacity + 1
        self.rows = decode_rows + chunks * chunk_size
        count = ROW_FIELDS * self.rows + (decode_rows + chunks) + 3 * decode_rows
        self.values = torch.zeros(count, dtype=torch.long, device=device)

    def split(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of the three parts of `values`: (ROW_FIELDS, R), (D + n,) and (3, D)."""
        sizes = ROW_FIELDS * self.rows, self.decode_rows + self.chunks, 3 * self.decode_rows
        table, slots, choices = values.split(sizes)
        return table.view(ROW_FIELDS, self.rows), slots, choices.view(3, self.decode_rows)

    def set(self, requests: Sequence[StepRequest]) -> None:
        """Copies the inputs of a step for `requests` to the device. Does not block the host."""
        self.values.copy_(self.pack(requests), non_blocking=True)

    def pack(self, requests: Sequence[StepRequest]) -> Tensor:
        """The inputs of a step for `requests`, each of a different slot, on the CPU. The decode rows are of these slots
        and then of others, which do nothing, so that no two rows write the state of one slot. Idle rows may attend to
        what the rows beside them do. Otherwise attention would have to evaluate its mask for every key of their query
        block."""
        values = torch.zeros(len(self.values), dtype=torch.long, pin_memory=self.values.is_cuda)
        table, slots, (choose, sample, next_row) = (part.numpy() for part in self.split(values))
        table[4], table[9:], choose[:] = 1, -1, -1
        slots[: self.decode_rows] = self._decode_slots([request.batch_slot.index for request in requests])
        chunk = 0
        for row, request in enumerate(requests):
            batch_slot = request.batch_slot
            if count := len(request.prefill):
                begin, own = self.decode_rows + chunk * self.chunk_size, request.chunks(self.chunk_size)
                rows, seen, last = table[:, begin : begin + count], table[4:8], begin + count - 1
                rows[:] = request.prefill.table[:ROW_FIELDS]
                rows[RUN_INDEX] = batch_slot.cache_index(request.prefill)
                choose[row] = last
                seen[:, last + 1 : begin + own * self.chunk_size] = seen[:, last, None]
                if self.batch_slots == self.chunks == 1 and not len(request.decode):
                    seen[:, 0] = seen[:, begin]
                slots[self.decode_rows + chunk : self.decode_rows + chunk + own] = batch_slot.index
                chunk += own
            if len(request.decode):
                table[:, row] = request.decode.table[:ROW_FIELDS, 0]
                table[RUN_INDEX, row] = batch_slot.text.cache_index(int(table[RUN_INDEX, row]))
                choose[row] = row
            sample[row], next_row[row] = request.sample, request.next_row % self.text_rows
        table[TEXT_ROW] = np.where(table[TEXT_ROW] < 0, -1, table[TEXT_ROW] % self.text_rows)
        return values

    def _decode_slots(self, used: list[int]) -> np.ndarray:
        """D different slots, those in `used` first."""
        others = np.delete(np.arange(self.batch_slots), used)
        return np.concatenate([np.array(used, dtype=np.int64), others])[: self.decode_rows]
