"""Programs that the server runs end, and receive signals, descriptors and settings, as those that start as usual."""

import os
import signal
import subprocess
import sys
import time

import pytest
from program_server import with_server

PROGRAM = """
import os, signal, sys, time
with open(int(sys.argv[1]), "w", errors="surrogateescape") as file:
    print(os.getcwd(), oct(os.umask(0)), os.environ["SAID"], os.getsid(0) == os.getpid(), sys.stdin.read(), file=file)
print("out")
print("error", file=sys.stderr, end="")
if sys.argv[2] == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
    print(os.getpid(), flush=True)
    time.sleep(60)
if sys.argv[2].startswith("-"):
    os.kill(os.getpid(), int(sys.argv[2][1:]))
sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def start(tmp_path):
    """Starts the program, which is to end as `how` says. Returns it, and what it wrote to a descriptor of its own."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)

    def run(how: str, served: bool):
        environment = {**os.environ, "SAID": "\u00fc \udcff"}
        reading, writing = os.pipe()
        process = subprocess.Popen(
            [sys.executable, program, str(writing), how], env=with_server(environment) if served else environment,
            cwd=tmp_path, umask=0o27, pass_fds=[writing], stdin=subprocess.PIPE, stdout=-1, stderr=-1, text=True,
            start_new_session=True,
        )  # fmt: skip
        os.close(writing)
        process.stdin.write("in")
        process.stdin.close()
        process.stdin = None
        with open(reading, errors="surrogateescape") as file:
            return process, file.read()

    return run


@pytest.mark.parametrize("how", ["0", "3", f"-{signal.SIGTERM:d}", f"-{signal.SIGKILL:d}"])
def test_a_program_ends_as_usual(start, how):
    ended = []
    for served in (False, True):
        process, said = start(how, served)
        ended.append((*process.communicate(timeout=60), process.returncode, said))
    assert ended[0] == ended[1] and ended[0][:3] == ("out\n", "error", int(how))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 5), (signal.SIGINT, -signal.SIGINT)])
def test_signals_are_passed_on(start, number, status):
    process, _ = start("wait", True)
    assert process.stdout.readline() == "out\n"
    served = int(process.stdout.readline()) != process.pid
    assert served == ("PROGRAM_SERVER" in with_server({}))
    process.send_signal(number)
    assert process.wait(60) == status


def test_a_program_whose_stand_in_is_killed_ends(start):
    process, _ = start("wait", True)
    process.stdout.readline()
    process.stdout.readline()
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    began = time.monotonic()
    assert process.stdout.read() == "" and time.monotonic() - began < 50  # once the program, which sleeps, has ended
