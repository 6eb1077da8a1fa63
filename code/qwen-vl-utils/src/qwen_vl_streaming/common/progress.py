"""Progress of work that takes more than a few seconds, in the same format for all programs: a live bar on a terminal,
or an occasional line in a log and one at the end. Independent of the work."""

import logging
import sys
import time

from tqdm import tqdm

SECONDS = 30.0
"""Minimum time between two lines in a log, in seconds."""


class Progress(tqdm):
    """A tqdm bar that writes plain lines if its output is not a terminal. Takes the arguments of tqdm."""

    def __init__(self, *arguments, **options):
        self.live = (options.get("file") or sys.stderr).isatty()
        if not self.live:
            # `delay` keeps tqdm from writing a line at the start.
            options |= {"mininterval": SECONDS, "delay": SECONDS, "miniters": 1}
        super().__init__(*arguments, **options)
        self.last_line: tuple[float, str] = time.monotonic(), ""

    def __str__(self) -> str:
        return super().__str__() if self.live else self._line()

    def _line(self) -> str:
        seconds = self.format_dict["elapsed"]
        done = self.n if self.total is None else f"{self.n}/{self.total}"
        text = f"{f'{self.desc}: ' if self.desc else ''}{done}{_unit(self.unit)} in {self.format_interval(seconds)}"
        here = self.n - self.initial
        if self.total and here > 0 and self.n < self.total:
            text += f", {self.format_interval(seconds / here * (self.total - self.n))} left"
        return f"{text}, {self.postfix}" if self.postfix else text

    def display(self, msg=None, pos=None):
        if self.live:
            return super().display(msg, pos)
        line = self._line() if msg is None else msg
        if line != self.last_line[1] and (self.n or self.total):  # skip empty work
            self.last_line = time.monotonic(), line
            print(line, file=self.fp, flush=True)
        return True

    def refresh(self, *arguments, **options):
        """Refreshes the display; in a log, at most once every SECONDS."""
        return super().refresh(*arguments, **options) if self.live or self._due() else None

    def _due(self) -> bool:
        return time.monotonic() - self.last_line[0] >= SECONDS

    def clear(self, *arguments, **options):
        if self.live:
            super().clear(*arguments, **options)

    def close(self):
        if not (self.live or self.disable):
            self.display()
            self.last_print_t = self.start_t  # tqdm then assumes that nothing was displayed, and writes no line break
        super().close()


def _unit(unit: str) -> str:
    """Returns the unit as a plural word to follow a number. The default unit of tqdm, `it`, is omitted."""
    return "" if unit == "it" else f" {unit.strip()}{'' if unit.endswith('s') else 's'}"


def quiet_http() -> None:
    """Keeps the requests of HTTP clients out of the log."""
    for name in ("httpx", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_libraries(first: bool = True) -> None:
    """Disables the progress bars of transformers, except on the terminal of the `first` of several processes. Also
    keeps the requests of HTTP clients out of the log."""
    from transformers.utils.logging import disable_progress_bar

    quiet_http()
    if not (first and sys.stderr.isatty()):
        disable_progress_bar()
