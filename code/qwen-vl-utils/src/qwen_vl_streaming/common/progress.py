"""How far a program is, where it takes more than a few seconds, by one rule for all programs: a live bar on a terminal;
in a log, a line now and then and one at the end. Knows nothing about what is done."""

import logging
import sys
import time

from tqdm import tqdm

SECONDS = 30.0
"""Between two lines of a log."""


class Progress(tqdm):
    """tqdm, with its arguments, that writes plain lines where its file is not a terminal."""

    def __init__(self, *arguments, **options):
        self.live = (options.get("file") or sys.stderr).isatty()
        if not self.live:
            # With `delay` tqdm writes no line at the very start.
            options |= {"mininterval": SECONDS, "delay": SECONDS, "miniters": 1}
        super().__init__(*arguments, **options)
        self.last_line: tuple[float, str] = time.monotonic(), ""

    def __str__(self) -> str:
        return super().__str__() if self.live else self._line()

    def _line(self) -> str:
        told = self.format_dict
        seconds = told["elapsed"]
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
        if line != self.last_line[1] and (self.n or self.total):  # there was something to do
            self.last_line = time.monotonic(), line
            print(line, file=self.fp, flush=True)
        return True

    def refresh(self, *arguments, **options):
        """In a log not more often than the rule says, whatever asks for it."""
        return super().refresh(*arguments, **options) if self.live or self._due() else None

    def _due(self) -> bool:
        return time.monotonic() - self.last_line[0] >= SECONDS

    def clear(self, *arguments, **options):
        if self.live:
            super().clear(*arguments, **options)

    def close(self):
        if not (self.live or self.disable):
            self.display()
            self.last_print_t = self.start_t  # to tqdm nothing was displayed, which it would have to end
        super().close()


def _unit(unit: str) -> str:
    """As a word after a number; tqdm's own default says nothing."""
    return "" if unit == "it" else f" {unit.strip()}{'' if unit.endswith('s') else 's'}"


def quiet_http() -> None:
    """Keep each request of the HTTP clients out of the log."""
    for name in ("httpx", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_libraries(first: bool = True) -> None:
    """Keep transformers' own bars, as of loading weights, out of a log, and to the `first` of several processes; and
    the HTTP clients' requests."""
    from transformers.utils.logging import disable_progress_bar

    quiet_http()
    if not (first and sys.stderr.isatty()):
        disable_progress_bar()
