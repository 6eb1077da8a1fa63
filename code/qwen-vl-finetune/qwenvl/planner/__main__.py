"""Plans a training run. sft.sh runs it before the launcher.

    python -m qwenvl.planner PROCESSES_PER_NODE NODES [--plan] [--gpus 8xH100-80GB] [flags of train.py ...]

PROCESSES_PER_NODE is 0 for one a GPU. The plan goes to stderr. The answer to sft.sh is the number of GPUs that PyTorch
can use here, 0 for the CPU, which needs no plan, and then the flags that the plan adds, one word a line. With --plan or
--gpus the plan goes to stdout. A flag that the user gives, or DEEPSPEED_CONFIG, is never changed. A run that resumes
keeps its settings. With `--node RANK ADDRESS PORT` the plan is that of node 0, for the least memory of all nodes.
"""

import argparse
import contextlib
import os
import sys
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

from qwen_vl_streaming.common.errors import InputError, run
from qwen_vl_streaming.launch.answer import answer

from ..device import find_gpus


def main() -> None:
    with contextlib.redirect_stdout(sys.stderr):  # libraries print there
        shown, count, flags = plan()
    if shown:
        print(shown)
    else:
        answer("\n".join([str(count), *(f"--{name}\n{value}" for name, value in flags.items())]))


def plan() -> tuple[str, int, dict[str, object]]:
    """The plan, if only that is asked for, the number of GPUs that are here, and the flags."""
    processes, nodes, *words = sys.argv[1:]
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--plan", action="store_true")
    own.add_argument("--gpus")
    own.add_argument("--node", nargs=3)
    options, words = own.parse_known_args(words)
    only_show = options.plan or options.gpus is not None
    count = find_gpus(words) if options.gpus is None else 0
    if options.gpus is None and not count:
        if options.plan:
            raise InputError("--plan: no GPU found; give those to plan for, such as --gpus 8xH100-80GB")
        return "", 0, {}

    from ..headers import CHANNEL  # imports transformers
    from .gpus import Gpus, all_nodes, gpus_here, parse_gpus
    from .plan import command_line
    from .request import Request

    request = cache(partial(Request.parse, words))

    def look() -> dict:
        """What this node has. Raises InputError for flags that are refused."""
        request()
        return asdict(gpus_here(int(processes) or count))

    def decide(found: list[dict]) -> tuple[str, dict[str, object]]:
        """The text to show, and the flags."""
        if flags := request().resumed():
            return f"plan: the settings that {request().output} was started with", flags
        return request().plan(all_nodes([Gpus(**gpus) for gpus in found]))

    if options.gpus is not None:
        text, flags = request().plan(parse_gpus(options.gpus, int(nodes)))
    elif options.node and not only_show:
        from .nodes import agree

        rank, address, port = options.node
        text, flags = agree(int(rank), int(nodes), address, int(port), look, decide)
    else:
        text, flags = decide([look()] * int(nodes))
    if only_show:
        return f"{text}\n  flags: {command_line(flags)}", count, {}
    if (channel := os.environ.get(CHANNEL)) and request().headers.headers:
        request().headers.save(Path(channel))
    print(text, file=sys.stderr)
    return "", count, flags


if __name__ == "__main__":
    run(main)
