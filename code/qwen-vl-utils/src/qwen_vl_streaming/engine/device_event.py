"""CUDA events and asynchronous copies, each of which also works on the CPU."""

from collections.abc import Sequence

import torch


def to_device(values: torch.Tensor | Sequence[int], device: torch.device) -> torch.Tensor:
    """Copies a CPU tensor, or a list of integers, to `device` without blocking the host."""
    values = torch.as_tensor(values)
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


class DeviceEvent:
    """A CUDA event recorded on the current stream, or a no-op on the CPU."""

    def __init__(self, device: torch.device):
        self.event = None
        if device.type == "cuda":
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(device))

    def query(self) -> bool:
        """Whether all work that was queued before the event has completed."""
        return self.event is None or self.event.query()

    def synchronize(self) -> None:
        """Blocks the host until the event has completed."""
        if self.event is not None:
            self.event.synchronize()

    def stream_wait(self, tensor: torch.Tensor) -> None:
        """Makes the current stream wait for the event, so that it can read `tensor`, which the event's stream wrote.
        The host does not block."""
        if self.event is not None:
            current = torch.cuda.current_stream(tensor.device)
            current.wait_event(self.event)
            tensor.record_stream(current)
