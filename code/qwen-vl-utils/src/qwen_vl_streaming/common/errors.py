"""User errors, reported in one line. Independent of the programs that raise them."""

import argparse
import io
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from .redact import redacted_command, shown


class InputError(ValueError):
    """An error that the user can fix. The message is one line that names the file or value and the fix.

    Passwords in addresses are hidden, and control characters are escaped.
    """

    def __init__(self, message: object = ""):
        super().__init__(shown(str(message)))


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that reports errors in one line and exits with status 2, like all programs in this project.
    Flags must be written in full: --mode is not --model."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        message = " ".join(redacted_command(message.split(" ")))  # argparse repeats flags and their values
        self.exit(2, f"error: {shown(message)} (see --help)\n")


def run(main: Callable[[], None], stopped: str = "stopped by SIGINT") -> None:
    """Calls `main`. On InputError, prints its message on stderr and exits with status 2, on Ctrl-C
    prints `stopped` and exits with status 130. Where the reader of the output
    has closed the pipe, as `head` does, exits quietly with status 141, as programs that SIGPIPE ends. Characters that
    the output's encoding lacks are escaped."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # as Python does for stderr
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
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        outputs = select.poll()
        for output in (1, 2):
            outputs.register(output, 0)  # errors are always reported
        if not (closed := outputs.poll(0)):  # it was another pipe
            raise
        for output, _ in closed:
            os.dup2(os.open(os.devnull, os.O_WRONLY), output)  # Python flushes the rest at exit
        sys.exit(128 + signal.SIGPIPE)


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not empty, else the name of its type."""
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)


def cannot_list(error: OSError) -> None:
    """For `onerror` of os.walk: raises InputError for an unreadable folder. A missing folder counts as empty."""
    if not isinstance(error, FileNotFoundError):
        raise InputError(
            f"folder {error.filename} cannot be read ({error.strerror}): make it readable or move it"
        ) from error
