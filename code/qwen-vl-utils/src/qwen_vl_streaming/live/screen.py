"""Prints the text on a terminal as it is written, with the second of video that it follows. Knows nothing of models."""

import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import TextIO

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""A decoder returns this for a character whose bytes are incomplete."""


class Pieces:
    """Token ids in, text out. A character made of several tokens is returned whole, with the last of them. The token
    `end_of_slot` is not text."""

    def __init__(self, decode: Callable[[Sequence[int]], str], end_of_slot: int | None = None):
        self.decode, self.end_of_slot = decode, end_of_slot
        self.said: list[int] = []
        """The ids of the newest piece: some tokenizers decode a token depending on the one before."""
        self.held: list[int] = []
        """Ids whose text is not complete."""

    def add(self, token: int) -> str:
        """The text that `token` completes; may be empty."""
        if token == self.end_of_slot:
            return ""
        self.held.append(token)
        text = self.decode([*self.said, *self.held])
        return "" if text.endswith(UNFINISHED) else self._out(text)

    def rest(self) -> str:
        """The text of the ids still held, complete or not."""
        return self._out(self.decode([*self.said, *self.held])) if self.held else ""

    def _out(self, text: str) -> str:
        before = len(self.decode(self.said)) if self.said else 0
        self.said, self.held = self.held, []
        return text[before:]


class Screen:
    """Prints text to `out`, one line per second of video; to a terminal piece by piece, otherwise in whole lines. Notes
    are printed to `notes`, on lines of their own. When `out` is closed, `gone` is called, and statistics are printed to
    `notes` instead."""

    def __init__(self, out: TextIO, notes: TextIO, gone: Callable[[], None] = lambda: None):
        self.out, self.notes, self.gone = out, notes, gone
        self.terminal = out.isatty()
        self.second: float | None = None
        """The second of the line that is being written."""
        self.line = ""
        self.lost = False
        """`out` is closed."""
        self.lock = threading.RLock()  # several threads print notes

    def say(self, text: str, second: float) -> None:
        """Print `text`, which was written after `second` seconds of video."""
        text = "".join(letter if letter.isprintable() else " " for letter in text)
        with self.lock:
            if self.second != second:
                if not text.strip():
                    return
                self.end_line()
                self.second, text = second, f"{second:>7g} s  {text.lstrip()}"
            self.line += text
            if self.terminal:
                self._print(text, end="")

    def end_line(self) -> None:
        with self.lock:
            if self.second is not None:
                line, self.second, self.line = "" if self.terminal else self.line, None, ""
                self._print(line)

    def show(self, text: str) -> None:
        """Print lines that are not part of the answer."""
        with self.lock:
            self.end_line()
            if not self.lost:
                self._print(text)
            if self.lost:  # may have been noticed just now
                self.note(text)

    def note(self, text: str) -> None:
        with self.lock:
            if self.terminal:
                self.end_line()
            try:
                print(text, file=self.notes, flush=True)
            except OSError:
                _silence(self.notes)

    def _print(self, text: str, end: str = "\n") -> None:
        try:
            print(text, end=end, file=self.out, flush=True)
        except OSError as error:
            _silence(self.out)
            self.lost = True
            self.note(f"the output is closed ({error.strerror}): stopping")
            self.gone()


def _silence(stream: TextIO) -> None:
    """Discard what is written to `stream` from now on, and what is left in its buffer."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class NoteHandler(logging.Handler):
    """Prints log messages as notes."""

    def __init__(self, screen: Screen):
        super().__init__(logging.WARNING)
        self.screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        self.screen.note(record.getMessage())
