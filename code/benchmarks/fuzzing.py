"""What the fuzzers share: their command line, mutations, and a watched process that tries one input after the other.

The process has its own home and temporary folder, no network, and bounds on memory and on the size of files. While it
tries an input, it notes what is opened for writing, removed or started outside its folder. Knows nothing about what is
tried.
"""

import argparse
import contextlib
import ctypes
import faulthandler
import gc
import importlib
import io
import json
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from qwen_vl_streaming.common.errors import InputError, OneLineParser, run
from qwen_vl_streaming.common.progress import Progress

CODE = Path(__file__).resolve().parents[1]
SECONDS_PER_INPUT = 60  # the metrics alone take 20 on a busy machine
SECONDS_TO_START = 300
MEMORY_MIB = 1024  # by which a process may grow
ADDRESS_SPACE, FILE_SIZE = 6 << 30, 1 << 28  # bytes that a process may take more than at its start, and write
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.remove": 1, "os.rename": 2, "os.mkdir": 1, "os.rmdir": 1, "os.link": 2, "os.symlink": 2, "os.chmod": 1}
"""Audit events with the number of their arguments that are paths."""
STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "subprocess.Popen", "socket.connect")
STARTED = ([sys.executable, "-m", "metrics.scoring"], [shutil.which("java"), "-version"])
"""What may be started: the metrics, which run in a process of their own, and Java to say its version."""
FORKS = "qwen_vl_streaming.common.bounded"
"""What may fork: it renders chat templates."""
Try = Callable[[random.Random], str | Iterable[str]]
"""Tries one input, and returns what came of it in a few words, or in several to count; an exception is a finding."""

JUNK = [b"\0", b"\xff", b'"', b"{", b"}", b"\\ud800", b"\\u0000", b"[" * 3000, b"\xef\xbb\xbf", b"\n", b"," * 9]
VALUES = [
    *(None, True, False, 0, -1, 1, 2, 0.5, -0.0, 1e-320, 1e308, 2**31, 2**63, 2**64, -(2**70), 10**400),
    *(float("nan"), float("inf"), -float("inf")),
    *(
        "",
        " ",
        "x",
        "\0",
        "\ud800",
        "é\u2028",
        "../../../up",
        "/etc/passwd",
        "." * 300,
        "x" * 70_000,
        "{0}",
        "<script>",
    ),
    *([], {}, [[]], [None], [-1], {"": []}, [0] * 1000, "wait-3", "random-2", "group", "origin", "nan"),
]


def mutate_bytes(data: bytes, draw: random.Random, most: int = 4) -> bytes:
    """Flip, cut, insert, repeat or take away, one to `most` times."""
    mutant = bytearray(data)
    for _ in range(draw.randint(1, most)):
        at = draw.randrange(len(mutant) + 1)
        length = draw.choice([1, 3, 17, 512])
        action = draw.randrange(6)
        if action == 0 and mutant:
            mutant[at % len(mutant)] ^= 1 << draw.randrange(8)
        elif action == 1:
            del mutant[at : at + length]
        elif action == 2:
            mutant[at:at] = draw.choice(JUNK)
        elif action == 3:
            mutant[at:at] = mutant[at : at + length]
        elif action == 4:
            mutant[at : at + length] = draw.randbytes(length)
        elif draw.random() < 0.3:
            del mutant[at:]
    return bytes(mutant)


def mutate_tree(data: object, draw: random.Random) -> object:
    """A copy of what JSON holds, in which one to three values were replaced, taken away, repeated or wrapped."""
    tree = json.loads(json.dumps(data))
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        places = list(_places(tree))
        if not places:
            return deepcopy(draw.choice(VALUES))
        container, key = draw.choice(places)
        action = draw.randrange(8)
        if action < 4:
            container[key] = deepcopy(draw.choice(VALUES))
        elif action == 4:
            del container[key]
        elif action == 5:
            container[key] = [deepcopy(container[key]) for _ in range(draw.randint(1, 3))]
        elif action == 6:
            container[key] = deepcopy(draw.choice([container for container, _ in places]))
        elif isinstance(container[key], bool) or not isinstance(container[key], int | float):
            container[key] = json.dumps(container[key])
        else:
            container[key] = draw.choice([-1, 10, 0.1]) * container[key] + draw.choice([0, 1, 0.5])
    return tree


def _places(tree: object) -> Iterable[tuple]:
    """Each (container, key) of a tree; of a long list only some."""
    if isinstance(tree, dict):
        keys = list(tree)
    elif isinstance(tree, list):
        keys = list(range(len(tree)))[:8]
    else:
        return
    for key in keys:
        yield tree, key
        yield from _places(tree[key])


def answer_of(program: Callable[[], object]) -> str:
    """Run a program's function and say how it ended: its InputError or status. Raises what is neither."""
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
    """The command line of a fuzzer: `counts` are how many inputs of each kind it tries by default, and the module
    `program` has a function of each kind's name, which returns a Try for a folder of its own. That is made in `folder`.
    `bounds` are those of `fuzz`. Ends with status 1 where there are findings."""
    parser = OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for what, count in counts.items():
        parser.add_argument(f"--{what}", type=int, default=count, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--only", type=int, help="try this one input of each kind that is asked for")
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
    """Try `count` inputs, or `only` that one, by what the function named `prepare`, as module:function, returns for a
    folder of its own. An input may take `seconds`, and the process may grow by `memory_mib`. Prints what came of them
    and returns the number of findings."""
    what = prepare.partition(":")[2]
    outcomes: Counter[str] = Counter()
    findings, worker, peak = 0, None, 0
    numbers = range(count) if only is None else [only]
    for number in Progress(numbers, desc=what, unit="input"):
        if worker is None:
            worker = Worker(prepare, seed, folder / "work", seconds)
        found = worker.ask(number)
        if found is None:
            told = worker.stop()
            worker = None
        else:
            told = found["finding"]
            outcomes.update(found["outcomes"])
            peak = max(peak, found["grown"])
            if found["grown"] > memory_mib << 20:
                told += f"memory grew by {found['grown'] >> 20} MiB"
        if told:
            findings += 1
            print(f"{what} {number} of seed {seed}: {told}", flush=True)
    if worker:
        worker.stop()
    print(f"{len(numbers)} {what} of seed {seed}: {findings} findings, memory grew by at most {peak >> 20} MiB")
    for outcome, times in outcomes.most_common():
        print(f"  {times:8d} {outcome}")
    return findings


class Worker:
    """A process that tries the inputs that it is asked to."""

    def __init__(self, prepare: str, seed: int, folder: Path, seconds: int):
        self.seconds = seconds
        for name in ("tmp", "home", "case"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        paths = [str(CODE / name) for name in ("benchmarks", "evaluation", "demo", "qwen-vl-finetune")]
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("QWEN2_5_VL", "HF_"))},
            **{
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "CUDA_VISIBLE_DEVICES": "",
                "PYTHONDONTWRITEBYTECODE": "1",
            },
            **{"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), "HF_HOME": str(folder / "home/hf")},
            "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
        }
        (folder / "yes").write_text("y\n" * 100_000)  # to whatever asks
        self.requests, theirs = os.pipe()[::-1], None
        self.answers = os.pipe()
        theirs = (self.requests[1], self.answers[1])
        start = "import sys, fuzzing; fuzzing.serve(*sys.argv[1:])"
        command = [sys.executable, "-c", start, prepare, *map(str, (seed, folder, seconds, *theirs))]
        self.log = folder / "log"
        with open(folder / "yes") as yes, open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                *(command,),
                **{"env": environment, "stdin": yes, "stdout": log, "stderr": log, "pass_fds": theirs, "cwd": folder},
                start_new_session=True,
            )
        for end in theirs:
            os.close(end)
        if self.hear(SECONDS_TO_START) is None:
            raise RuntimeError(f"the process did not start: {self.log.read_text()[-3000:]}")

    def ask(self, number: int) -> dict | None:
        """What came of the input of that number; None where the process has died or takes too long."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self.requests[0], f"{number}\n".encode())
        return self.hear(self.seconds)

    def hear(self, seconds: float) -> dict | None:
        text = b""
        while not text.endswith(b"\n"):
            if not select.select([self.answers[0]], [], [], seconds)[0]:
                return None
            if not (more := os.read(self.answers[0], 1 << 16)):
                return None
            text += more
        return json.loads(text)

    def stop(self) -> str:
        """End the process; returns how it ended, or where it was while it gave no answer."""
        try:
            told = f"the process has died with status {self.process.wait(1)}"
        except subprocess.TimeoutExpired:
            told = f"no answer in {self.seconds} s"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # and what it has started
        self.process.wait()
        for end in (self.requests[0], self.answers[0]):
            os.close(end)
        return f"{told}\n{self.log.read_text(errors='replace')[-2000:]}"


def _known(command: list) -> bool:
    return any(command[: len(known)] == known for known in STARTED)


class Watch:
    """Notes what is written, removed or started outside `folder` while `on`."""

    def __init__(self, folder: Path):
        self.folder, self.on, self.seen = str(folder), False, []
        self.grown = 0  # of what was forked, in bytes
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event == "open":
            if isinstance(arguments[0], str | bytes) and arguments[2] is not None and arguments[2] & WRITES:
                self.check(event, arguments[0])
        elif event in CHANGES:
            for path in arguments[: CHANGES[event]]:
                self.check(event, path)
        elif event in STARTS and not (
            (event == "subprocess.Popen" and _known(list(arguments[1])))
            or (event == "os.fork" and sys._getframe(1).f_globals.get("__name__") == FORKS)
        ):
            self.seen.append(f"{event} {arguments!r:.200}")

    def check(self, event: str, path: object) -> None:
        if isinstance(path, str | bytes | os.PathLike):
            place = os.path.abspath(os.fsdecode(path))
            if not place.startswith((self.folder + os.sep, "/dev/null", "/proc/self/")):
                self.seen.append(f"{event} {place:.200}")


watch: Watch | None = None
"""Of this process, where it is a Worker's."""


@dataclass(frozen=True)
class Ended:
    """How a program ended."""

    status: int
    out: str
    err: str


def run_forked(program: Callable[[], None], arguments: Iterable[object], folder: Path, seconds: int) -> Ended:
    """Run a program's main with `arguments` as its command line, as a process forked from this one, to the end of its
    interpreter: as if it had been started, but for the time that its imports take. Its output goes through files in
    `folder`. Raises AssertionError where it takes more than `seconds`, is killed, or does anything outside."""
    files, seen = [folder / "out", folder / "err"], folder / "seen"
    watch.on = False
    # Of threads, as of a decoder that is left over, only this one is there in the child, which would wait for others.
    faulthandler.cancel_dump_traceback_later()
    gc.collect()
    if (child := os.fork()) == 0:
        _become(program, [program.__module__, *map(str, arguments)], files, seen)
    watch.on = True
    end = os.pidfd_open(child)
    late = not select.select([end], [], [], seconds)[0]
    if late:
        os.kill(child, signal.SIGABRT)  # which has it say where it is
        if not select.select([end], [], [], 5)[0]:
            os.kill(child, signal.SIGKILL)
    os.close(end)
    _, code, usage = os.wait4(child, 0)
    out, err = (file.read_text(errors="replace") for file in files)
    status = os.waitstatus_to_exitcode(code)
    assert not late, f"not over in {seconds} s: {err[:2000]}"
    assert status >= 0, f"killed by signal {-status}: {err[-2000:]}"
    told = json.loads(seen.read_text())
    watch.seen += told["seen"]
    watch.grown = max(watch.grown, usage.ru_maxrss * 1024 - told["rss"])
    for file in (*files, seen):
        file.unlink()
    return Ended(status, out, err)


def pages(column: int) -> int:
    """That this process takes: of its address space, column 0, or of memory, column 1."""
    return int(Path("/proc/self/statm").read_text().split()[column])


def _become(program: Callable[[], None], command: list[str], files: Iterable[Path], seen: Path) -> None:
    """See `run_forked`. Does not return."""
    rss = pages(1) * resource.getpagesize()
    for number, file in enumerate(files, 1):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
    faulthandler.enable(2)
    sys.argv, status = command, 1
    watch.on, watch.seen = True, []
    try:
        run(program)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # as the interpreter does
        traceback.print_exc()
    watch.on = False
    seen.write_text(json.dumps({"seen": watch.seen, "rss": rss}))
    ctypes.pythonapi.Py_Exit(status)  # os._exit would leave out what happens to threads and objects at the end


def serve(prepare: str, seed: str, place: str, seconds: str, requests: str, answers: str) -> None:
    """The process of a Worker."""
    global watch
    folder, told_to = Path(place), int(answers)
    module, _, name = prepare.partition(":")
    faulthandler.enable(sys.__stderr__)
    try_one: Try = getattr(importlib.import_module(module), name)(folder)
    resource.setrlimit(resource.RLIMIT_AS, (pages(0) * resource.getpagesize() + ADDRESS_SPACE,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE,) * 2)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    watch = Watch(folder)
    gc.collect()
    gc.freeze()  # what is there by now stays: a process forked from this one ends faster
    os.write(told_to, b"{}\n")
    for line in open(int(requests), encoding="ascii"):  # noqa: SIM115 - until this process ends
        number, outcomes, finding = int(line), "finding", ""
        watch.on, watch.seen = True, []
        faulthandler.dump_traceback_later(0.9 * float(seconds), file=sys.__stderr__)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                outcomes = try_one(random.Random(f"{seed}:{number}"))
        except BaseException:  # whatever it is, it is what this program looks for
            finding = traceback.format_exc(limit=-4)[-3000:]
        watch.on = False
        faulthandler.cancel_dump_traceback_later()
        if watch.seen:
            finding += f"outside its folder: {watch.seen[:3]}"
        if marks := [path.name for path in folder.glob("marks/*")]:
            finding += f"executed: {marks[:3]}"
            for path in folder.glob("marks/*"):
                path.unlink()
        grown = max(watch.grown, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) * 1024)
        outcomes = [outcomes] if isinstance(outcomes, str) else list(outcomes)
        told = {"outcomes": outcomes, "finding": finding, "grown": grown}
        os.write(told_to, json.dumps(told).encode() + b"\n")
