"""The training program with an injected fault, started as `-m faulty` instead of `-m qwenvl.rank`. The environment
variable FAULT is `WHAT RANK STEP`: the fault, the rank in which it occurs (or "all"), and the optimizer step."""

import atexit
import errno
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import torch
from qwen_vl_streaming.common.errors import InputError
from qwenvl import rank
from qwenvl.data import StreamingDataset
from qwenvl.resumable import StopOnSigterm
from torch.distributed import DistBackendError

RAISED = {
    "gpu": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "host": lambda: MemoryError(),
    "nccl": lambda: DistBackendError("NCCL error in: ../x.cpp:1, remote process exited or there was a network error"),
    "bug": lambda: ZeroDivisionError("division by zero"),
    "refused": lambda: InputError("checkpoint-7 is damaged: remove it"),
    "disk": lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
}


def block() -> None:
    while True:
        time.sleep(1)


def act(what: str) -> None:
    if what == "thread":  # Python would wait for the thread at exit
        threading.Thread(target=block).start()
        atexit.register(block)
        raise RAISED["bug"]()
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "kill worker":
        psutil.Process().children()[0].kill()
        time.sleep(60)
    if what == "stop worker":
        psutil.Process().children()[0].terminate()
    if what == "stop all":  # SLURM signals all processes of a job, too
        launcher = psutil.Process(os.getppid())
        subprocess.run(["kill", *(str(each.pid) for each in (*launcher.children(recursive=True), launcher))])
    if what == "gpu for real":
        torch.empty(2**46, dtype=torch.uint8, device="cuda")
    if what in RAISED:
        raise RAISED[what]()


def main() -> None:
    what, target, step = os.environ["FAULT"].rsplit(maxsplit=2)
    mine, step = target in ("all", os.environ["RANK"]), int(step)
    if mine and what == "worker":
        read_video, main_process = StreamingDataset._video, os.getpid()

        def _video(self, index):
            if os.getpid() != main_process and not index % 2:
                raise KeyError("human_caption")
            return read_video(self, index)

        StreamingDataset._video = _video
    elif mine and what.startswith("save "):
        original = torch.save

        def save(what_, path, *rest, **options):
            if f"checkpoint-{step}" in str(path):
                act(what.removeprefix("save "))
            original(what_, path, *rest, **options)

        torch.save = save
    elif mine:
        original = StopOnSigterm.on_step_end

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                act(what)
            while (
                what == "stop all" and not self.requested and state.global_step == step
            ):  # another thread may receive the signal
                time.sleep(0.01)
            original(self, args, state, control, **kwargs)

        StopOnSigterm.on_step_end = on_step_end
    rank.main()


if __name__ == "__main__":
    if os.environ.get("FAULT"):
        main()
    else:
        sys.exit("FAULT is not set")
