"""Plans a training run. sft.sh runs it before the launcher.

    python -m qwenvl.planner PROCESSES_PER_NODE NODES [--plan] [--gpus 8xH100-80GB] [flags of train.py ...]

The plan goes to stderr, and the flags that it adds to stdout, one word a line; with --plan or --gpus the plan goes to
stdout alone. A flag that the user gives, or DEEPSPEED_CONFIG, is never changed. A run that resumes keeps its settings.
"""

import argparse
import sys

from qwen_vl_streaming.common.errors import InputError, run


def main() -> None:
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
        _write(flags)
        return
    from .gpus import gpus_here, parse_gpus

    gpus = parse_gpus(options.gpus, int(nodes)) if options.gpus is not None else gpus_here(int(processes), int(nodes))
    text, flags = request.plan(gpus)
    print(text, file=sys.stdout if only_show else sys.stderr)
    if only_show:
        given = {word.split("=")[0].lstrip("-") for word in words if word.startswith("--")}
        print("  flags: " + " ".join(f"--{name} {value}" for name, value in flags.items() if name not in given))
    else:
        _write(flags)


def _write(flags: dict[str, object]) -> None:
    for name, value in flags.items():
        print(f"--{name}\n{value}")


if __name__ == "__main__":
    run(main)
