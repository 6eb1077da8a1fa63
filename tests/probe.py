"""What a fuzzer's process tries in the tests: inputs that do each thing that is a finding, by their number."""

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
        return fuzzing.run_forked(program, arguments, folder / "case", 1)

    deeds = [
        lambda: fuzzing.answer_of(lambda: None),
        lambda: fuzzing.answer_of(refuse),
        lambda: (folder / "case/inside").write_text("x") and "inside",
        lambda: (folder.parent / "outside").write_text("x"),
        lambda: subprocess.run(["true"]) and "started",
        lambda: os.mkdir(folder / "marks") or (folder / "marks/mark").touch() or "marked",
        lambda: {}["traceback"],
        lambda: os._exit(1),
        wait,
        swallow,
        lambda: fork(end, "as", "asked") == fuzzing.Ended(2, "as asked\n", "error: a\n") or 1 / 0,
        lambda: fork(leave),
        lambda: fork(wait),
        lambda: fork(lambda: os.kill(os.getpid(), 9)),
        lambda: fork(grow),
    ]

    def try_one(draw: random.Random) -> str:
        return str(deeds[int((folder / "case/deed").read_text())]())

    return try_one
