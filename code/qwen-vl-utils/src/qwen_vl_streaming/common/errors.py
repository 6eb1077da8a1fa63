"""What a user can get wrong, and how a program answers it. Knows nothing about any of the programs."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from .redact import redacted_command, shown


class InputError(ValueError):
    """A mistake that the user can mend: the message is one plain line naming the file or value and the mend.
    Passwords in addresses are not shown, nor is a character that a terminal obeys."""

    def __init__(self, message: object = ""):
        super().__init__(shown(str(message)))


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with exit status 2 as everywhere in this project."""

    def error(self, message: str) -> NoReturn:
        message = " ".join(redacted_command(message.split(" ")))  # it may repeat flags and their values
        self.exit(2, f"error: {shown(message)} (see --help)\n")


def run(main: Callable[[], None], speak: bool = True) -> None:
    """Call `main`; an InputError ends the program with exit status 2 and its one line on stderr, which one of
    several processes that meet the same mistake should `speak`."""
    try:
        main()
    except InputError as error:
        if speak:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def cannot_list(error: OSError) -> None:
    """As os.walk's `onerror`: raises InputError for a folder that cannot be read. One that is not there is empty."""
    if not isinstance(error, FileNotFoundError):
        raise InputError(
            f"folder {error.filename} cannot be read ({error.strerror}): make it readable, or move it away"
        ) from error
