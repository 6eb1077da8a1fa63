"""torchrun, whose exit status says what went wrong: 2 where a process refused its input with one plain line."""

import logging
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        main(sys.argv[1:])
    except ChildFailedError as error:
        first = min(error.failures.values(), key=lambda failure: failure.timestamp)
        if first.exitcode != 2:
            print(f"error: process {first.global_rank} ended with status {first.exitcode}", file=sys.stderr)
        sys.exit(2 if first.exitcode == 2 else 1)
