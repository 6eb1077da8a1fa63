"""`run`, which all programs share: the reader of the output may close the pipe."""

import os
import re
import subprocess
import sys

import pytest
from published import ROOT
from qwen_vl_streaming.common.errors import OneLineParser


@pytest.mark.parametrize(
    ("body", "closed", "status"),
    [
        ("print('text ' * 100_000)", "stdout", 141),
        ("print('text')", "stdout", 141),  # flushed at the end
        ("OneLineParser().parse_args(['--help'])", "stdout", 141),
        ("print('text', file=sys.stderr)", "stderr", 141),
        ("print('text')", None, 0),
        ("sys.exit(3)", None, 3),
        ("raise InputError('a.json: correct it')", None, 2),
        ("raise KeyboardInterrupt", None, 130),
        ("raise BrokenPipeError('of a worker')", None, 1),
    ],
)
def test_a_closed_pipe_ends_a_program_quietly(body, closed, status):
    program = f"import sys\nfrom qwen_vl_streaming.common.errors import *\nrun(lambda: exec({body!r}))"
    left, pipe = os.pipe()
    os.close(left)
    outputs = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | ({closed: pipe} if closed else {})
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", program], text=True, env=environment, **outputs)
    os.close(pipe)
    shown = {0: "", 1: "Traceback", 2: "error: a.json: correct it\n", 3: "", 130: "stopped by SIGINT\n", 141: ""}[
        status
    ]
    assert done.returncode == status
    assert closed == "stderr" or (done.stderr.startswith(shown) and bool(done.stderr) == bool(shown)), done.stderr


def test_characters_that_the_output_cannot_encode_are_escaped():
    program = "from qwen_vl_streaming.common.errors import *\nrun(lambda: print('caf\\xe9 \\u4e2d'))"
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment)
    assert (done.returncode, done.stdout) == (0, b"caf\xe9 \\u4e2d\n"), done.stderr


def test_modules_name_their_command():
    """Else argparse names a package's program __main__.py."""
    for path in (ROOT / "code").glob("qwen-vl-*/**/*.py"):
        for call in re.findall(r"(?<!class )OneLineParser\(([^)]*)", path.read_text(encoding="utf-8")):
            assert call.startswith("*") or "prog=" in call, path


def test_flags_are_not_abbreviated(capsys):
    parser = OneLineParser(prog="x")
    parser.add_argument("--model")
    command = parser.add_subparsers().add_parser("sub")
    command.add_argument("--source")
    for words in (["--mode=pipelined", "sub"], ["sub", "--sour=x"]):
        with pytest.raises(SystemExit) as end:
            parser.parse_args(words)
        assert end.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err
