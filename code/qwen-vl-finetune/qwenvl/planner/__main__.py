"""Plans a training run. sft.sh runs it before the launcher.

    python -m qwenvl.planner PROCESSES_PER_NODE NODES [--plan] [--gpus 8xH100-80GB] [flags of train.py ...]

The plan goes to stderr, and the flags that it adds to stdout, one word a line; with --plan or --gpus the plan goes to
stdout alone. A flag that the user gives, or DEEPSPEED_CONFIG, is never changed. A run that resumes keeps its settings.
"""

import argparse
import contextlib
import sys

from qwen_vl_streaming.common.errors import InputError, run


def main() -> None:
    with contextlib.redirect_stdout(sys.stderr):  # libraries print there
        shown, flags = plan()
    if shown:
        print(shown)
    for name, value in flags.items():
        print(f"--{name}\n{value}")


def plan() -> tuple[str, dict[str, object]]:
    """What goes to stdout: the plan, if only that is asked for, else the flags."""
    processes, nodes, *words = sys.argv[1:]
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--plan", action="store_true")
    own.add_argument("--gpus")
    options, words = own.parse_known_args(words)
    only_show = options.plan or options.gpus is not None
    if options.gpus is None and not int(processes):
        raise InputError("--plan: no GPU found; give those to plan for, such as --gpus 8xH100-80GB")

    from .request import Request  # imports transformers

    request = Request.parse(words)
    if not only_show and (flags := request.resumed()):
        print(f"plan: the settings that {request.output} was started with", file=sys.stderr)
        return "", flags
    from .gpus import gpus_here, parse_gpus
    from .plan import command_line

    gpus = parse_gpus(options.gpus, int(nodes)) if options.gpus is not None else gpus_here(int(processes), int(nodes))
    text, flags = request.plan(gpus)
    if only_show:
        return f"{text}\n  flags: {command_line(flags)}", {}
    print(text, file=sys.stderr)
    return "", flags


if __name__ == "__main__":
    run(main)
