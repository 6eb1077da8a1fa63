"""Watch a source as it happens, and say on the terminal what is seen.

    python -m qwen_vl_streaming.live --model MODEL --source FILE|/dev/video0|rtsp://...|http://...|synthetic

Words come line by line, each with the second of video after which it was written. At the end there are figures of how
well it kept up, and a record of the session, which `python -m qwen_vl_streaming.replay` runs again.

No clip is held back until it is known whether it is the last: a stream that ends says so by itself, and the words that
are left then follow. Clips that were skipped leave no gap in the positions: what was fed counts as if it had come one
clip after the other.

Exit status: 0 at the end of the answer, also where the source was lost before; 130 and 143 after Ctrl-C and SIGTERM,
141 where nobody takes the words any more, with figures and record as far as it came (a second Ctrl-C ends it at once);
2 for what the user can mend, no memory among it; 1 where the process that perceives was lost.
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
from ..engine.step_runner import StepRunner
from ..model.hub import model_folder
from ..model.modeling_qwen2_5_vl import load_config, load_model
from ..model.prompts import clip_pixels, load_processor, make_template
from ..replay import DTYPES
from ..sessions import GREEDY, PerceptionClient, PerceptionLost, Session, open_session
from ..sessions.record import read_record, write_record
from ..timeline.positions import check_clips, clips_before_text
from ..timeline.timeline import make_schedule
from ..video.clip_recorder import ClipRecorder
from ..video.frames import FRAMES_PER_CLIP, PixelBudget
from ..video.sources import Clip
from .figures import table
from .intake import Intake
from .options import (
    CLIPS,
    TOKENS_PER_CLIP,
    choose_variant,
    most_clips,
    open_source,
    parse,
    record_place,
)
from .screen import NoteHandler, Pieces, Screen
from .watch import Watch

REHEARSED = 12
"""Steps of a rehearsal."""


class Stop:
    """SIGINT and SIGTERM end the program; once something is `watched`, they have that come to an end first."""

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
        """Nobody takes the words any more."""
        if not self.number:
            self.ask(signal.SIGPIPE, None)


def load_on(path: str, device: str, dtype: torch.dtype):
    """A model to watch with. The process that perceives calls it too."""
    return load_model(path, "sdpa", dtype).to(device).eval()


def start_perception(path: str, device: torch.device, dtype: torch.dtype) -> PerceptionClient:
    """A second process, on a GPU of its own. Raises InputError where there is none."""
    where = "cpu"
    if device.type == "cuda":
        if torch.cuda.device_count() < 2:
            raise InputError("--way pipelined needs two GPUs: give --way fused, which needs one")
        where = f"cuda:{((device.index or 0) + 1) % torch.cuda.device_count()}"
    return PerceptionClient(functools.partial(load_on, path, where, dtype))


def first_clip(intake: Intake, name: str) -> Clip:
    """A clip of a source, which stays where it is. Raises InputError where none comes."""
    while (clip := intake.peek()) is None and not intake.over:
        intake.wait()
    if clip is None and (clip := intake.peek()) is None:
        raise no_clip(intake, name)
    return clip


def no_clip(intake: Intake, name: str) -> InputError:
    if isinstance(intake.fault, InputError):
        return intake.fault
    why = f" ({intake.fault})" if intake.fault else ""
    return InputError(f"source {name} gave no clip{why}: check it, or name another one")


def rehearse(session: Session, pixels: torch.Tensor) -> StepRunner:
    """Have what takes long only the first time over before the source begins. Returns the passes, to go on with."""
    with session:
        session.feed(pixels)
        session.feed(pixels, last=True)
        for _ in range(REHEARSED):
            if not session.idle:
                session.step()
    return session.runner


def no_memory(error: Exception) -> InputError | None:
    """What to tell of an `error` that says that there is no memory left."""
    reason = next(iter(str(error).splitlines()), "")
    if isinstance(error, torch.OutOfMemoryError):
        what = "GPU memory"
    elif isinstance(error, MemoryError) or "can't allocate memory" in reason:
        what = "memory"
    else:
        return None
    mend = "give a smaller --max-clips, --max-new-tokens, --window or --max-pixels-per-frame, or free some"
    return InputError(f"no {what} left ({reason}): {mend}")


@contextlib.contextmanager
def own_file(path: Path) -> Iterator[Path]:
    """Another path, of this process alone; what is there at the end takes the place of `path`, whatever happens."""
    own = path.with_name(f"{path.name}.{os.getpid()}.live")
    try:
        yield own
    finally:
        if own.exists():
            os.replace(own, path)


def live(arguments: argparse.Namespace, screen: Screen, stop: Stop) -> int:
    """Watch to the end; returns the exit status. Raises InputError, what `no_memory` knows, and PerceptionLost, the
    latter two with the record written where a session had begun."""
    device = arguments.device
    dtype = DTYPES[arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    config = load_config(arguments.model)
    variant = choose_variant(arguments, config)
    mode = arguments.way or ("fused" if variant.parallel else "serial")
    schedule = arguments.schedule or f"wait-{getattr(config, 'wait_k', 3)}"
    if schedule != GREEDY:
        make_schedule(schedule, variant, 1)
    path = record_place(arguments, variant)
    source, most = open_source(arguments, PixelBudget.trained(config, arguments)), most_clips(arguments)
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
            options["perception_client"] = stack.enter_context(start_perception(str(model_folder(arguments.model)), device, dtype))
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
        layout = template.layout(grid, config.vision_config.tokens_per_second * seconds)
        room = clips_before_text(variant, layout)
        if room is not None and room < min(most or sys.maxsize, source.count or sys.maxsize):
            if source.count is not None:
                check_clips(variant, layout, min(most or source.count, source.count))
            length = datetime.timedelta(seconds=round(room * seconds))
            screen.note(
                f"{variant.name} can watch {room} clips ({length}), then their positions would reach those of its "
                "text: the answer is written to its end there; group has no such limit"
            )
            most = room
        opened = functools.partial(open_session, model, variant, template, layout, **options)
        if device.type == "cuda":
            opened = functools.partial(opened, runner=rehearse(opened(), pixels[0]))
        told = ("question", "source", "speed", "behind")
        about = {**{name: getattr(arguments, name) for name in told}, **source.about}
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
        "ended": "the answer has ended" + ("" if session.all_fed else ", before the source has"),
        "max_new_tokens": f"{options['max_new_tokens']} tokens are written, see --max-new-tokens",
        "cancelled": f"stopped by {signal.Signals(stop.number).name}" if stop.number else "no clip came",
    }
    numbers = str(dtype).removeprefix("torch.")
    screen.show(f"\n{variant.name}, {mode}, {schedule}, {numbers} on {device}: {ends.get(written.end, written.end)}")
    screen.show(f"{table(found)}\n{'record':<26}{path}")
    if keeper and keeper.count:
        screen.show(f"{'frames kept':<26}{arguments.keep}")
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
