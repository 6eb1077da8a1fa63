"""Actions for the tests of sandbox.py, by the number of the input, with one for each kind of finding."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

from qwen_vl_streaming.common.errors import InputError


def refuse():
    raise InputError("a line")


def prepare(folder: Path):
    import fuzzing
    import sandbox

    def wait():
        time.sleep(60)

    def swallow():
        bytearray(1 << 40)

    def end():
        print(*sys.argv[1:])
        raise InputError("a")

    def leave():
        (folder.parent / "outside").write_text("x")

    def grow():
        bytearray(b"x" * (200 << 20))

    def fork(program, *arguments, seconds=60):
        return sandbox.run_forked(program, arguments, folder / "case", seconds)

    actions = [
        lambda: fuzzing.outcome_of(lambda: None),
        lambda: fuzzing.outcome_of(refuse),
        lambda: (folder / "case/inside").write_text("x") and "inside",
        lambda: (folder.parent / "outside").write_text("x"),
        lambda: subprocess.run(["true"]) and "started",
        lambda: os.mkdir(folder / "marks") or (folder / "marks/mark").touch() or "marked",
        lambda: {}["traceback"],
        lambda: os._exit(1),
        swallow,
        lambda: fork(end, "as", "asked") == sandbox.Finished(2, "as asked\n", "error: a\n") or 1 / 0,
        lambda: fork(leave),
        lambda: fork(wait, seconds=1),
        lambda: fork(lambda: os.kill(os.getpid(), 9)),
        lambda: fork(grow),
        wait,
    ]

    numbers = {random.Random(f"0:{number}").random(): number for number in range(len(actions))}

    def try_one(draw: random.Random) -> str:
        return str(actions[numbers[draw.random()]]())

    return try_one
