"""Values that all processes of a run agree on. Does not depend on what they stand for."""

import torch
from torch import distributed


def all_reduce(values: list[float], device: torch.device, op=distributed.ReduceOp.SUM) -> list[float]:
    """`values` summed (or reduced with `op`) over all processes, element by element. Called by all of them."""
    if not distributed.is_initialized():
        return values
    reduced = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(reduced, op)
    return reduced.tolist()


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true on any process. Called by all of them."""
    return bool(all_reduce([float(flag)], device)[0])
