"""Watch a source live, and print what the model says about it.

    python -m qwen_vl_streaming.live --model MODEL --source FILE|/dev/video0|rtsp://...|http://...|synthetic

A clip is two frames, one second of video by default. Each line of the answer starts with the second of video after
which it was written. At the end, live prints statistics of how well it kept up, and writes a record of the session,
which `python -m qwen_vl_streaming.replay` runs again.

Clips are fed as they arrive, before it is known which one is the last; when the source ends, the rest of the answer
follows. Skipped clips leave no gap in the positions.

On Ctrl-C, SIGTERM, a lost source or a closed pipe, it still prints statistics and writes the record. A second Ctrl-C
stops at once. Exit status: 0 at the end of the answer, even if the source was lost; 130 after Ctrl-C, 143 after
SIGTERM, 141 after a closed pipe; 2 for user errors, including out of memory; 1 if the perception process was lost
or reading the source has failed.
"""

import argparse
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ..common.ending import explain
from ..common.errors import InputError
from ..common.progress import quiet_libraries
from ..common.redact import redacted
from ..model.loading import DTYPES
from ..sessions import PerceptionLost
from ..sessions.record import describe_precision, read_record, write_record
from ..video.clip_recorder import ClipRecorder
from ..video.opening import open_source
from ..video.pixel_budget import PixelBudget
from .figures import table
from .options import parse, record_place
from .screen import NoteHandler, Screen
from .setup import check_schedule, load_on, most_clips, open_watch, read_checkpoint
from .watch import Watch

ADVICE = "reduce --max-clips, --max-new-tokens, --window or --max-pixels-per-frame, or free memory"


class Stop:
    """Handles SIGINT and SIGTERM: they stop `watched` first, if it is set, and end the program otherwise."""

    def __init__(self):
        self.number = 0
        self.watched: Watch | None = None

    def __enter__(self):
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number: int, _) -> None:
        if self.watched is None or self.number:
            sys.exit(128 + number)
        self.number = number
        self.watched.ask_to_stop()

    def gone(self) -> None:
        """The output was closed."""
        if not self.number:
            self.ask(signal.SIGPIPE, None)


class SourceFailed(RuntimeError):
    """An error in the code that reads the source."""


@contextlib.contextmanager
def own_file(path: Path) -> Iterator[Path]:
    """Yields a path of this process alone; what was written there replaces `path` at the end, even after errors."""
    own = path.with_name(f"{path.name}.{os.getpid()}.live")
    try:
        yield own
    finally:
        if own.exists():
            os.replace(own, path)


def live(arguments: argparse.Namespace, screen: Screen, stop: Stop) -> int:
    """Watch to the end; returns the exit status. Raises InputError, PerceptionLost, and out-of-memory errors; if a
    session had begun, its record is written first."""
    device, dtype = arguments.device, arguments.dtype and DTYPES[arguments.dtype]
    checkpoint = read_checkpoint(
        arguments.model, arguments.variant, device, dtype, arguments.force, "--force", arguments.weights
    )
    schedule = check_schedule(arguments.schedule, checkpoint.config, checkpoint.path, checkpoint.variant)
    path = record_place(arguments, checkpoint.variant)
    skip = arguments.behind == "skip"
    source = open_source(
        arguments.source,
        PixelBudget.trained(checkpoint.config, arguments),
        fps=arguments.fps,
        speed=arguments.speed,
        max_clips=most_clips(arguments.max_clips, arguments.window),
        cut=not skip,
        reconnect_seconds=arguments.reconnect_seconds,
    )
    if arguments.device_line:
        screen.note(arguments.device_line)
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(own_file(path))
        keeper = arguments.keep and ClipRecorder(stack.enter_context(own_file(arguments.keep)))
        watch = stack.enter_context(
            open_watch(
                checkpoint,
                lambda: load_on(checkpoint.path, device, checkpoint.dtype, checkpoint.weights),
                source,
                arguments.question,
                mode=arguments.way,
                schedule=schedule,
                penalty=arguments.penalty,
                max_clips=arguments.max_clips,
                max_new_tokens=arguments.max_new_tokens,
                window=arguments.window and tuple(arguments.window),
                chunk=arguments.chunk,
                skip=skip,
                record=own,
                about={"source": redacted(arguments.source), "speed": arguments.speed, "behind": arguments.behind},
                keep=keeper and keeper.add,
                name=f"source {arguments.source}",
            )
        )
        session, stop.watched = watch.session, watch
        fault = None
        try:
            watch.run(screen)
        except Exception as error:
            if error is watch.intake.fault and explain(error, ADVICE, ADVICE) is None:
                error = SourceFailed(f"source {arguments.source} has failed{watch.intake.why}")
            elif not isinstance(error, PerceptionLost) and explain(error, ADVICE, ADVICE) is None:
                raise
            fault = error
        session.close()
        watch.intake.stop()
        written = read_record(own)
        found = watch.figures(written, arguments.deadline)
        about = {**written.about, "completed": watch.intake.completed, "figures": found}
        write_record(own, replace(written, about=about))
    ends = {
        "ended": "the answer has ended" + ("" if session.all_fed else ", before the source ended"),
        "max_new_tokens": f"{written.max_new_tokens} tokens are written, see --max-new-tokens",
        "cancelled": f"stopped by {signal.Signals(stop.number).name}" if stop.number else "no clip arrived",
    }
    precision = describe_precision(written.model)
    how = f"{written.variant}, {written.way}, {written.schedule}, {precision} on {device}"
    screen.show(f"\n{how}: {ends.get(written.end, written.end)}")
    screen.show(f"{table(found)}\n{'record':<26}{path}")
    if keeper and keeper.count:
        screen.show(f"{'saved frames':<26}{arguments.keep}")
    if fault is not None:
        raise fault
    return 128 + stop.number if stop.number else 0


def main() -> None:
    arguments = parse(__doc__)
    quiet_libraries()
    stop = Stop()
    screen = Screen(sys.stdout, sys.stderr, stop.gone)
    handler = NoteHandler(screen)
    logging.getLogger("qwen_vl_streaming").addHandler(handler)
    try:
        with stop:
            status = live(arguments, screen, stop)
    except (PerceptionLost, SourceFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    except (RuntimeError, MemoryError) as error:
        if (reason := explain(error, ADVICE, ADVICE)) is None:
            raise
        raise InputError(reason) from error
    finally:
        logging.getLogger("qwen_vl_streaming").removeHandler(handler)
    sys.exit(status)
