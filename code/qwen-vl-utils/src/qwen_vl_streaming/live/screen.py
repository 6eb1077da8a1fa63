"""Words on a terminal as they are written, by the second of video after which they were. Knows nothing of models."""

import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import TextIO

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a decoder gives for a character of which not all bytes are there."""


class Pieces:
    """Token ids in, text out. A character that several tokens make comes out whole, with the last of them."""

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self.decode = decode
        self.said: list[int] = []
        """The ids of the newest piece: some tokenizers write a word by the one before it."""
        self.held: list[int] = []

    def add(self, token: int) -> str:
        """The text that is certain now that `token` has come; may be empty."""
        self.held.append(token)
        text = self.decode([*self.said, *self.held])
        return "" if text.endswith(UNFINISHED) else self._out(text)

    def rest(self) -> str:
        """What is still held, whole or not."""
        return self._out(self.decode([*self.said, *self.held])) if self.held else ""

    def _out(self, text: str) -> str:
        before = len(self.decode(self.said)) if self.said else 0
        self.said, self.held = self.held, []
        return text[before:]


class Screen:
    """Words go to `out`, a line for each second in which some were written; on a terminal each as it comes, else whole
    lines. Notes go to `notes`, on lines of their own. Where nobody takes the words any more, `gone` is called, and what
    is no words, as the figures, goes to `notes` too."""

    def __init__(self, out: TextIO, notes: TextIO, gone: Callable[[], None] = lambda: None):
        self.out, self.notes, self.gone = out, notes, gone
        self.terminal = out.isatty()
        self.second: float | None = None
        """Of the line that is being written."""
        self.line = ""
        self.lost = False
        """Nobody reads `out` any more."""
        self.lock = threading.RLock()  # notes come from several threads

    def say(self, text: str, second: float) -> None:
        """`text` was written when `second` seconds of video had been seen."""
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
        """Lines that are no words."""
        with self.lock:
            self.end_line()
            if not self.lost:
                self._print(text)
            if self.lost:  # also where this has just been seen
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
            self.note(f"the words cannot be written any more ({error.strerror}): it stops here")
            self.gone()


def _silence(stream: TextIO) -> None:
    """What goes to `stream` from now on is lost, and so is what is still in its buffer at the program's end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class NoteHandler(logging.Handler):
    """Log messages as notes."""

    def __init__(self, screen: Screen):
        super().__init__(logging.WARNING)
        self.screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        self.screen.note(record.getMessage())
