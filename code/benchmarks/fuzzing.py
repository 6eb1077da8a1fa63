"""The command line and the loop of the fuzzers. Inputs run in the process of sandbox.py; see there."""

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from qwen_vl_streaming.common.errors import InputError, OneLineParser
from qwen_vl_streaming.common.progress import Progress
from sandbox import Sandbox

SECONDS_PER_INPUT = 60  # the metrics alone take 20 s on a loaded machine
MEMORY_MIB = 1024  # by which the process may grow


def outcome_of(program: Callable[[], object]) -> str:
    """Run a program's function and return how it ends: "accepted", "refused" for an InputError, or its exit status.

    Raises any other exception, and AssertionError for an InputError that is not one short line.
    """
    try:
        program()
    except InputError as error:
        if "\n" in str(error) or len(str(error)) > 3000:
            raise AssertionError(f"not one short line: {str(error)[:500]!r}") from error
        return "refused"
    except SystemExit as error:
        return f"status {error.code}"
    return "accepted"


def main(description: str, program: str, counts: dict[str, int], folder: str | None = None, **bounds: int) -> None:
    """The command line of a fuzzer. Exits with status 1 if there are findings.

    `counts` gives the kinds of input and how many of each are tried by default. For each kind, the module `program` has
    a function of that name, which takes a folder and returns a `sandbox.Try`. The folders are created in `folder`;
    `bounds` are passed to `fuzz`.
    """
    parser = OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for what, count in counts.items():
        parser.add_argument(f"--{what}", type=int, default=count, help="number of inputs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument("--only", type=int, help="try only the input with this number of each kind")
    arguments = parser.parse_args()
    findings = 0
    with tempfile.TemporaryDirectory(dir=folder) as name:
        for what in counts:
            if count := getattr(arguments, what):
                prepare = f"{program}:{what}"
                findings += fuzz(prepare, count, arguments.seed, Path(name) / what, arguments.only, **bounds)
    sys.exit(1 if findings else 0)


def fuzz(
    prepare: str,
    count: int,
    seed: int,
    folder: Path,
    only: int | None = None,
    *,
    seconds: int = SECONDS_PER_INPUT,
    memory_mib: int = MEMORY_MIB,
) -> int:
    """Try `count` inputs, or input `only`, print their outcomes, and return the number of findings.

    `prepare` names a function as module:function; it takes a folder and returns a `sandbox.Try`. An input may take
    `seconds`, and the process may grow by `memory_mib`.
    """
    what = prepare.partition(":")[2]
    outcomes: Counter[str] = Counter()
    findings, sandbox, peak = 0, None, 0
    numbers = range(count) if only is None else [only]
    for number in Progress(numbers, desc=what, unit="input"):
        if sandbox is None:
            sandbox = Sandbox(prepare, seed, folder / "work", seconds)
        result = sandbox.try_input(number)
        if result is None:
            finding = sandbox.stop()
            sandbox = None
        else:
            finding = result["finding"]
            outcomes.update(result["outcomes"])
            peak = max(peak, result["grown"])
            if result["grown"] > memory_mib << 20:
                finding += f"memory grew by {result['grown'] >> 20} MiB"
        if finding:
            findings += 1
            print(f"{what} {number} of seed {seed}: {finding}", flush=True)
    if sandbox:
        sandbox.stop()
    print(f"{len(numbers)} {what} of seed {seed}: {findings} findings, memory grew by at most {peak >> 20} MiB")
    for outcome, times in outcomes.most_common():
        print(f"  {times:8d} {outcome}")
    return findings
