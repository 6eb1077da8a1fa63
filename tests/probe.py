"""Actions for the tests of sandbox.py, selected by number, with one for each kind of finding."""

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

    def fork(program, *arguments):
        return sandbox.run_forked(program, arguments, folder / "case", 1)

    actions = [
        lambda: fuzzing.outcome_of(lambda: None),
        lambda: fuzzing.outcome_of(refuse),
        lambda: (folder / "case/inside").write_text("x") and "inside",
        lambda: (folder.parent / "outside").write_text("x"),
        lambda: subprocess.run(["true"]) and "started",
        lambda: os.mkdir(folder / "marks") or (folder / "marks/mark").touch() or "marked",
        lambda: {}["traceback"],
        lambda: os._exit(1),
        wait,
        swallow,
        lambda: fork(end, "as", "asked") == sandbox.Finished(2, "as asked\n", "error: a\n") or 1 / 0,
        lambda: fork(leave),
        lambda: fork(wait),
        lambda: fork(lambda: os.kill(os.getpid(), 9)),
        lambda: fork(grow),
    ]

    def try_one(draw: random.Random) -> str:
        return str(actions[int((folder / "case/action").read_text())]())

    return try_one
