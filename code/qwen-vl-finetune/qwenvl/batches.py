"""From samples to the batches of training: their order, padding and packing. Does not depend on rows and videos."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .data import IGNORED, Sample, StreamingDataset


class PaddedDataset(torch.utils.data.Dataset):
    """`samples`, padded with blank ones to a multiple of `multiple`. With the batch size of all processes together, no
    sample is repeated to fill the last batch."""

    def __init__(self, samples: StreamingDataset, multiple: int):
        self.samples, self.multiple = samples, multiple

    def __len__(self) -> int:
        return math.ceil(len(self.samples) / self.multiple) * self.multiple

    def __getitem__(self, index: int) -> Sample:
        if index < len(self.samples):
            return self.samples[index]
        return self.samples.blank(self.samples.templates[0])


class EpochSampler(torch.utils.data.Sampler):
    """Indices of `samples` for an epoch, shuffled by `seed` plus the epoch, with the blank samples last."""

    def __init__(self, samples: PaddedDataset, seed: int, shuffle: bool = True, drop_last: bool = False):
        """`drop_last` drops an incomplete last batch instead of padding it."""
        self.real, self.padded, self.multiple = len(samples.samples), len(samples), samples.multiple
        self.seed, self.shuffle, self.drop_last, self.epoch = seed, shuffle, drop_last, 0

    def __len__(self) -> int:
        return self.real // self.multiple * self.multiple if self.drop_last else self.padded

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.real))
        if self.shuffle:
            order = torch.randperm(self.real, generator=torch.Generator().manual_seed(self.seed + self.epoch)).tolist()
        return iter([*order, *range(self.real, self.padded)][: len(self)])


def first_fit(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """First-fit packing of samples of these `lengths` into rows of at most `tokens` tokens: the indices of each row."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index, length in enumerate(lengths):
        row = next((i for i, free in enumerate(room) if free >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(tokens)
        rows[row].append(index)
        room[row] -= length
    return rows


def pack(samples: Sequence[Sample], tokens: int) -> list[list[Sample]]:
    """The samples of each row that `first_fit` makes."""
    return [[samples[i] for i in row] for row in first_fit([len(sample.input_ids) for sample in samples], tokens)]


@dataclass
class HostTensor:
    """A tensor that stays in host memory, pinned, until it is used: Trainer puts all batches of an optimizer step on
    the GPU at once, and their pixels would take gigabytes there."""

    tensor: Tensor

    def pin_memory(self, *_) -> "HostTensor":
        """Called by DataLoader."""
        return HostTensor(self.tensor.pin_memory())


def collate_for_trainer(samples: Sequence[Sample], pack_tokens: int = 0) -> dict:
    """`collate`, with the pixels as a HostTensor, and the grids too, which the model reads on the host."""
    batch = collate(samples, pack_tokens)
    return batch | {name: HostTensor(batch[name]) for name in ("pixel_values_videos", "video_grid_thw")}


def collate(samples: Sequence[Sample], pack_tokens: int = 0) -> dict:
    """A batch of right-padded rows: one sample per row, or packed into rows of `pack_tokens`.

    Padding needs no mask, since no token attends to what follows it, and has no labels. `sample` (rows, tokens) numbers
    the samples of packed rows from 1, and is 0 for padding. `tally` is not an input of the model: it has the number of
    samples that are trained on, without blank ones, the number of their tokens, and the bad samples.
    """
    rows = pack(samples, pack_tokens) if pack_tokens else [[sample] for sample in samples]
    length = pack_tokens or max(len(sample.input_ids) for sample in samples)

    def pad_rows(tensors: Iterable[list[Tensor]], value: int = 0) -> Tensor:
        """(..., rows, tokens), from a tensor (..., tokens) for each sample of a row."""
        joined = [torch.cat(row, dim=-1) for row in tensors]
        padded = [nn.functional.pad(row, (0, length - row.shape[-1]), value=value) for row in joined]
        return torch.stack(padded, dim=-2)

    def stack(name: str, value: int = 0) -> Tensor:
        return pad_rows(([getattr(sample, name) for sample in row] for row in rows), value)

    batch = {name: stack(name) for name in ("input_ids", "visual", "text", "position_ids")}
    batch["labels"] = stack("labels", IGNORED)
    for name, flags in ("visual_rows", stack("clip")), ("score", batch["labels"] != IGNORED):
        batch[name] = flags.flatten().nonzero().squeeze(1)
    if pack_tokens:
        batch["sample"] = pad_rows([torch.full_like(s.input_ids, n) for n, s in enumerate(row, 1)] for row in rows)
    in_order = [sample for row in rows for sample in row]
    batch["pixel_values_videos"] = torch.cat([sample.pixel_values for sample in in_order])
    batch["video_grid_thw"] = torch.stack([sample.grid_thw for sample in in_order])
    trained = [len(sample.input_ids) for sample in samples if (sample.labels != IGNORED).any()]
    bad = [sample.bad for sample in samples if sample.bad]
    return {**batch, "tally": {"samples": len(trained), "tokens": sum(trained), "bad": bad}}
