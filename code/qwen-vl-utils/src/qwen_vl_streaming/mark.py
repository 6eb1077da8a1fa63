"""Points in what a device was given to do. Knows nothing of what that is."""

import torch


class Mark:
    """Passed once the device has done all that its current stream was given before. On a CPU it has."""

    def __init__(self, device: torch.device):
        self.event = None
        if device.type == "cuda":
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(device))

    @property
    def passed(self) -> bool:
        return self.event is None or self.event.query()

    def wait(self) -> None:
        """Have the host wait."""
        if self.event is not None:
            self.event.synchronize()

    def hold(self, tensor: torch.Tensor) -> None:
        """Have the device's current stream wait, which may then read `tensor` of the marked one."""
        if self.event is not None:
            now = torch.cuda.current_stream(tensor.device)
            now.wait_event(self.event)
            tensor.record_stream(now)
