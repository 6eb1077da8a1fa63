"""Points in what a device was given to do, and ways to give it more without waiting. Knows nothing of what that is."""

from collections.abc import Sequence

import torch

OTHERS_MAY_GO_ON = "thread_local"
"""For recording a CUDA graph while other threads use the GPU: one that pins memory would break it off."""


def put(numbers: torch.Tensor | Sequence[int], device: torch.device) -> torch.Tensor:
    """A tensor of the CPU, or numbers, on `device`; the host does not wait for what that is at."""
    numbers = torch.as_tensor(numbers)
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)


class DeviceEvent:
    """Passed once the device has done all that its current stream was given before. On a CPU it has."""

    def __init__(self, device: torch.device):
        self.event = None
        if device.type == "cuda":
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(device))

    def query(self) -> bool:
        return self.event is None or self.event.query()

    def synchronize(self) -> None:
        """Have the host wait."""
        if self.event is not None:
            self.event.synchronize()

    def stream_wait(self, tensor: torch.Tensor) -> None:
        """Have the device's current stream wait, which may then read `tensor` of the marked one."""
        if self.event is not None:
            now = torch.cuda.current_stream(tensor.device)
            now.wait_event(self.event)
            tensor.record_stream(now)
