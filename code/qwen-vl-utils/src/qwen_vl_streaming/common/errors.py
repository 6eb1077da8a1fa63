"""User errors, reported in one line. Independent of the programs that raise them."""

import argparse
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import NoReturn, TextIO

from .redact import redacted_command, shown


class InputError(ValueError):
    """An error that the user can fix. The message is one line that names the file or value and the fix.

    Passwords in addresses are hidden, and control characters are escaped.
    """

    def __init__(self, message: object = ""):
        super().__init__(shown(str(message)))


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that reports errors in one line and exits with status 2, like all programs in this project."""

    def error(self, message: str) -> NoReturn:
        message = " ".join(redacted_command(message.split(" ")))  # argparse repeats flags and their values
        self.exit(2, f"error: {shown(message)} (see --help)\n")


def run(main: Callable[[], None]) -> None:
    """Calls `main`. On InputError, prints its message on stderr and exits with status 2. Where the reader of the output
    has closed the pipe, as `head` does, exits quietly with status 141, as programs that SIGPIPE ends."""
    try:
        try:
            main()
        except SystemExit:
            print(end="", flush=True)  # such as after --help
            raise
        print(end="", flush=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        closed = [stream for stream in (sys.stdout, sys.stderr) if stream and _is_closed_pipe(stream)]
        if not closed:  # it was another pipe
            raise
        for stream in closed:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # Python flushes the rest at exit
        sys.exit(128 + signal.SIGPIPE)


def _is_closed_pipe(stream: TextIO) -> bool:
    poll = select.poll()
    poll.register(stream, 0)  # errors are always polled
    return bool(poll.poll(0))


def cannot_list(error: OSError) -> None:
    """For `onerror` of os.walk: raises InputError for an unreadable folder. A missing folder counts as empty."""
    if not isinstance(error, FileNotFoundError):
        raise InputError(
            f"folder {error.filename} cannot be read ({error.strerror}): make it readable or move it"
        ) from error
