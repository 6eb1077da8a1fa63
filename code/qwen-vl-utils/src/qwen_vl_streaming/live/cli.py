"""Watch a source live, and print what the model says about it.

    python -m qwen_vl_streaming.live --model MODEL --source FILE|/dev/video0|rtsp://...|http://...|synthetic

A clip is two frames, one second of video by default. Each line of the answer starts with the second of video after
which it was written. At the end, live prints statistics of how well it kept up, and writes a record of the session,
which `python -m qwen_vl_streaming.replay` runs again.

Clips are fed as they arrive, before it is known which one is the last; when the source ends, the rest of the answer
follows. Skipped clips leave no gap in the positions.

On Ctrl-C, SIGTERM, a lost source or a closed pipe, it still prints statistics and writes the record. A second Ctrl-C
stops at once. Exit status: 0 at the end of the answer, even if the source was lost; 130 after Ctrl-C, 143 after
SIGTERM, 141 after a closed pipe; 2 for user errors, including out of memory; 1 if the perception process was lost.
"""

import argparse
import contextlib
import datetime
import functools
import logging
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from ..common.errors import InputError
from ..common.progress import quiet_libraries
from ..common.redact import redacted
from ..model.hub import model_folder
from ..model.modeling_qwen2_5_vl import load_config, tokens_per_second
from ..model.prompts import clip_pixels, load_processor, make_template
from ..replay import DTYPES
from ..sessions import GREEDY, PerceptionLost, open_session
from ..sessions.record import read_record, write_record
from ..timeline.positions import check_clips, clips_before_text
from ..timeline.timeline import make_schedule
from ..video.clip_recorder import ClipRecorder
from ..video.frames import FRAMES_PER_CLIP, PixelBudget
from ..video.opening import open_source
from .figures import table
from .intake import Intake
from .options import (
    CLIPS,
    TOKENS_PER_CLIP,
    choose_variant,
    most_clips,
    parse,
    record_place,
)
from .screen import NoteHandler, Pieces, Screen
from .setup import first_clip, load_on, no_clip, start_perception, warm_up
from .watch import Watch


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


def no_memory(error: Exception) -> InputError | None:
    """The user error for an `error` that means out of memory; None for others."""
    reason = next(iter(str(error).splitlines()), "")
    if isinstance(error, torch.OutOfMemoryError):
        what = "GPU memory"
    elif isinstance(error, MemoryError) or "can't allocate memory" in reason:
        what = "memory"
    else:
        return None
    fix = "reduce --max-clips, --max-new-tokens, --window or --max-pixels-per-frame, or free memory"
    return InputError(f"no {what} left ({reason}): {fix}")


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
    """Watch to the end; returns the exit status. Raises InputError, out-of-memory errors (see `no_memory`) and
    PerceptionLost; if a session had begun, its record is written first."""
    device = arguments.device
    dtype = DTYPES[arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    config = load_config(arguments.model)
    variant = choose_variant(arguments, config)
    mode = arguments.way or ("fused" if variant.parallel else "serial")
    schedule = arguments.schedule or f"wait-{getattr(config, 'wait_k', 3)}"
    if schedule != GREEDY:
        make_schedule(schedule, variant, 1)
    path = record_place(arguments, variant)
    most = most_clips(arguments)
    source = open_source(
        arguments.source,
        PixelBudget.trained(config, arguments),
        fps=arguments.fps,
        speed=arguments.speed,
        max_clips=most,
        cut=arguments.behind == "wait",
        reconnect_seconds=arguments.reconnect_seconds,
    )
    processor = load_processor(arguments.model)
    template = make_template(processor, arguments.question)
    decode = functools.partial(processor.tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if arguments.device_line:
        screen.note(arguments.device_line)
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(own_file(path))
        keeper = arguments.keep and ClipRecorder(stack.enter_context(own_file(arguments.keep)))
        options = {
            "mode": mode,
            "schedule": schedule,
            "penalty": arguments.penalty,
            "max_clips": most or CLIPS,
            "max_new_tokens": arguments.max_new_tokens or (TOKENS_PER_CLIP * most if most else sys.maxsize),
            "window": arguments.window and tuple(arguments.window),
            "chunk": arguments.chunk,
        }
        if mode == "pipelined":
            options["perception_client"] = stack.enter_context(
                start_perception(str(model_folder(arguments.model)), device, dtype)
            )
        model = load_on(arguments.model, str(device), dtype)
        skip = arguments.behind == "skip"
        intake = Intake(source.clips, processor, skip, source.pace, source.count)
        stack.callback(intake.stop)
        seconds = source.seconds_per_clip
        if source.size is None:
            intake.start(begun=False)
            clip = first_clip(intake, arguments.source)
            frames, seconds = clip.frames, clip.seconds or seconds
        else:
            frames = torch.zeros(FRAMES_PER_CLIP, 3, *source.size, dtype=torch.uint8)
        pixels, grid = clip_pixels(processor, frames)
        layout = template.layout(grid, tokens_per_second(config) * seconds)
        room = clips_before_text(variant, layout)
        if room is not None and room < min(most or sys.maxsize, source.count or sys.maxsize):
            if source.count is not None:
                check_clips(variant, layout, min(most or source.count, source.count))
            length = datetime.timedelta(seconds=round(room * seconds))
            screen.note(
                f"{variant.name} can watch {room} clips ({length}) before their positions reach those of the text: the "
                "answer is finished there; use group, which has no such limit"
            )
            most = room
        opened = functools.partial(open_session, model, variant, template, layout, **options)
        if device.type == "cuda":
            opened = functools.partial(opened, runner=warm_up(opened(), pixels[0]))
        recorded = ("question", "source", "speed", "behind")
        about = {**{name: getattr(arguments, name) for name in recorded}, **source.about}
        about["source"] = redacted(arguments.source)
        session = stack.enter_context(opened(record=own, about=about))
        if source.size is None:
            intake.begin()
        watch = Watch(
            session,
            intake,
            screen,
            Pieces(decode),
            seconds,
            most,
            skip=skip,
            keep=keeper and keeper.add,
        )
        about["clips"], stop.watched = watch.clips, watch
        fault = None
        try:
            if source.size is not None:
                intake.start()
            watch.run()
            if not (session.done or watch.stopped):
                fault = no_clip(intake, arguments.source)
        except (InputError, RuntimeError, MemoryError) as error:
            if not (isinstance(error, InputError | PerceptionLost) or no_memory(error)):
                raise
            fault = error
        session.close()
        intake.stop()
        written = read_record(own)
        found = watch.figures(written, arguments.deadline)
        about["completed"], about["figures"] = intake.completed, found
        write_record(own, replace(written, about=about))
    ends = {
        "ended": "the answer has ended" + ("" if session.all_fed else ", before the source ended"),
        "max_new_tokens": f"{options['max_new_tokens']} tokens are written, see --max-new-tokens",
        "cancelled": f"stopped by {signal.Signals(stop.number).name}" if stop.number else "no clip arrived",
    }
    numbers = str(dtype).removeprefix("torch.")
    screen.show(f"\n{variant.name}, {mode}, {schedule}, {numbers} on {device}: {ends.get(written.end, written.end)}")
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
    except PerceptionLost as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    except (RuntimeError, MemoryError) as error:
        if (refusal := no_memory(error)) is None:
            raise
        raise refusal from error
    finally:
        logging.getLogger("qwen_vl_streaming").removeHandler(handler)
    sys.exit(status)
