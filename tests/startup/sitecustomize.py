"""Python imports this file when it starts, if its folder is in PYTHONPATH. If PROGRAM_SERVER is set, that server runs a
program of the project, as tests/program_server.py describes, and this process stands for it: it passes signals on and
ends in the same way. All other programs start as usual."""

import os
import sys


def ask(address: str, words: list[str]) -> None:
    """Does not return."""
    import contextlib
    import json
    import signal
    import socket

    with socket.socket(socket.AF_UNIX) as server:
        server.connect(f"\0{address}")
        files = [number for number in map(int, os.listdir("/proc/self/fd")) if number != server.fileno()]
        files, umask = list(filter(is_open, files)), os.umask(0)
        request = {"words": words, "files": files, "environment": dict(os.environ), "folder": os.getcwd()}
        request["umask"] = umask
        data = json.dumps(request).encode()
        socket.send_fds(server, [len(data).to_bytes(8, "big")], files)
        server.sendall(data)
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)  # only the program may hold the others' ends of pipes open
        for number in {*files} - {1, 2}:
            os.close(number)

        def pass_on(number: int, frame: object) -> None:
            with contextlib.suppress(OSError):  # the program has just ended
                server.send(bytes([number]))

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, pass_on)
        answer = server.recv(8)
    status = int.from_bytes(answer, "big", signed=True) if answer else 70
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:  # the one with which the folder was listed
        return False
    return True


def is_ours(words: list[str]) -> bool:
    """Whether these arguments run a program of the project. Libraries start others, which check their parent."""
    if words[:1] == ["-m"]:
        return words[1].split(".")[0] in ("paper", "qwen_vl_streaming", "qwenvl")
    return bool(words) and words[0].endswith(".py") and "site-packages" not in words[0]


# The address, then the environment of the server's Python: another has other libraries.
address, _, prefix = os.environ.get("PROGRAM_SERVER", "").partition(" ")
if address and os.path.realpath(sys.prefix) == prefix and is_ours(sys.orig_argv[1:]):
    try:
        ask(address, sys.orig_argv[1:])
    except BaseException as error:
        print(f"the server of tests/program_server.py has failed: {error!r}", file=sys.stderr, flush=True)
        os._exit(70)
