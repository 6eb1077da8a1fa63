"""Two processes for the launcher that start faster than training. The second fails as the argument says. The first
blocks and ignores SIGTERM, as a training process in a collective does; with "peer", it reports a lost connection."""

import os
import signal
import sys
import time
from pathlib import Path


def wait(*_) -> None:
    while True:
        time.sleep(1)


def main(what: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.environ["RANK"] == "0" and what != "peer":
        wait()
    from functools import partial

    import torch
    from qwen_vl_streaming.common.ending import start_worker
    from qwen_vl_streaming.common.errors import InputError
    from qwen_vl_streaming.launch import failing
    from qwenvl import rank

    class Squares(torch.utils.data.Dataset):
        def __len__(self):
            return 1000

        def __getitem__(self, index):
            if what == "worker bug" and index == 9:
                raise KeyError("human_caption")
            if what == "worker killed" and index == 9:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.01)
            return index**2

    def begin(worker, parent):
        start_worker(parent)

    def train() -> None:
        if what == "gpu":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand more")
        if what == "peer" and os.environ["RANK"] == "0":
            raise RuntimeError("[pair.cc:545] Read error [127.0.0.1]:1: Connection reset by peer")
        if what == "peer":
            mine = Path(os.environ[failing.ERROR_FILE])
            other = mine.parent.with_name("0") / mine.name
            while not other.exists():  # the report comes before the end that it is a consequence of
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "refused":
            failing.EXIT_TIMEOUT = 2
            try:
                raise InputError("checkpoint-3 is damaged: remove it")
            except InputError as error:
                failing.report(error)
                wait()  # as in a collective
        init = partial(begin, parent=os.getpid())
        for _ in torch.utils.data.DataLoader(Squares(), batch_size=None, num_workers=4, worker_init_fn=init):
            pass

    failing.run_rank(train, rank.GPU, rank.HOST)


if __name__ == "__main__":
    main(sys.argv[1])
