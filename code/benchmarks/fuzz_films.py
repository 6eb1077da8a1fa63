"""Fuzzes `read_video` with mutated videos of twelve formats, by both readers, and `live` with such videos over HTTP.

    python code/benchmarks/fuzz_films.py                # 3,000 videos and 1,000 streams, half an hour on one core

Every frame of the videos shows its own number. A finding is an exception other than a one-line InputError, no answer
within 60 seconds, a process that dies or grows by more than 1 GiB, files or processes outside the sandbox, timestamps
that decrease or are outside the video, more clips than its duration allows, or different timestamps from the two
readers. If a mutation changed the frames but not their timestamps, frames that show the wrong number are counted
separately: decoders do not report every damaged frame.

For each stream, `live` runs from its command line to the exit of its process, which is forked from one with everything
imported, and so does `replay` with the record. Further findings are an exit status other than 0, or 2 with one line,
text whose seconds decrease, a record that `replay` rejects, a temporary file left behind, and a frame shown before its
time. Each input is determined by --seed and its number; the timing of servers and clocks is not.
"""

import contextlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import patch

import numpy as np
from fuzzing import main, outcome_of
from numbered_films import FPS, SECONDS, decoded_numbers, mutate_film, read_number, valid_films
from qwen_vl_streaming.common.errors import InputError, run
from qwen_vl_streaming.timeline.variants import VARIANTS
from sandbox import Finished, Try, run_forked

LIVE_SECONDS = 15  # for live, and the same for replay
REOPENED_SECONDS = 5  # by which a stream that is reopened after its end may exceed the video
MAX_CLIPS = 600


def check_times(times: np.ndarray, duration: float) -> None:
    """Raise AssertionError for times that decrease or are outside 0 … `duration` seconds."""
    assert np.isfinite(times).all() and (np.diff(times) >= 0).all(), f"times decrease: {times}"
    assert len(times) == 0 or (times[0] >= 0 and times[-1] <= duration + 1e-6), f"times outside 0 … {duration}: {times}"


def films(folder: Path) -> Try:
    """Mutated videos, read by both readers."""
    from qwen_vl_streaming.video.frames import index_video, read_video
    from qwen_vl_streaming.video.pixel_budget import PixelBudget

    valid, path, budget = valid_films(), folder / "case/film", PixelBudget(28 * 28, 28 * 28 * 12)
    times = {}
    for name, data in valid.items():
        path.write_bytes(data)
        times[name] = index_video(path).times
        numbers = [read_number(frame) for frame in read_video(path, budget=budget, reader="pyav").frames.numpy()]
        if name != "gif" and numbers[:4] != [0, 2, 5, 7]:
            raise AssertionError(f"{name}: frames {numbers[:6]}")

    def try_one(draw: random.Random) -> str:
        name = draw.choice([*valid])
        path.write_bytes(mutate_film(valid[name], draw))
        outcome, read = [], {}
        for reader in ("pyav", "decord"):
            try:
                index = index_video(path)
                video = read[reader] = read_video(path, budget=budget, reader=reader, max_clips=600)
            except InputError as error:
                assert "\n" not in str(error) and len(str(error)) < 2000, f"not one short line: {error!s:.500}"
                outcome.append(f"{reader} refuses")
                continue
            check_times(video.timestamps, index.duration)
            assert video.clips <= index.duration / video.seconds_per_clip + 2, (video.clips, index.duration)
            same = len(index.times) == len(times[name]) and np.allclose(index.times, times[name])
            shown = [read_number(frame) for frame in video.frames.numpy()] if same else []
            wrong = [
                n for n, t in zip(shown, video.timestamps, strict=False) if n is not None and abs(n / FPS - t) > 0.1
            ]
            outcome.append(f"{reader} reads" + (" with frames at a wrong time" if wrong else ""))
        if len(read) == 2:
            one, two = read.values()
            assert np.array_equal(one.timestamps, two.timestamps), "the readers' times differ"
        return ", ".join(outcome)

    return try_one


class Server(BaseHTTPRequestHandler):
    """Serves the file `sent` of its folder as the JSON file `how` there says: whether ranges are supported, and whether
    Content-Length is sent and by how much it is wrong."""

    folder: Path

    def do_GET(self):
        data, how = (self.folder / "sent").read_bytes(), json.loads((self.folder / "how").read_text())
        first, asked = 0, self.headers.get("Range", "")
        if how["ranges"] and (found := re.fullmatch(r"bytes=(\d+)-(\d*)", asked)) and int(found[1]) < len(data):
            first = int(found[1])
            end = min(int(found[2] or len(data)), len(data) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{end}/{len(data) + how['more']}")
            data = data[first : end + 1]
        else:
            self.send_response(200)
        if how["length"]:
            self.send_header("Content-Length", str(len(data) + how["more"]))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(data)

    def log_message(self, *_):
        pass


def serve_forever(folder: Path) -> str:
    """Start a Server in a new process of this process group. Returns its address."""
    Server.folder = folder
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    if os.fork() == 0:
        os.closerange(3, server.fileno())  # the pipes: a copy held open here would hide that the other process died
        os.closerange(server.fileno() + 1, 1 << 10)
        server.serve_forever()
    server.server_close()
    return f"http://127.0.0.1:{server.server_port}/film"


def streams(folder: Path) -> Try:
    """Mutated videos over local HTTP through the live command, and a replay of its record. Servers send the right
    Content-Length, a wrong one, or none."""
    from make_model import tiny_checkpoint
    from qwen_vl_streaming.live import cli
    from qwen_vl_streaming.replay import cli as replay
    from qwen_vl_streaming.sessions.record import read_record
    from qwen_vl_streaming.video.clip_recorder import read_clips
    from qwen_vl_streaming.video.frames import index_video, read_video
    from qwen_vl_streaming.video.pixel_budget import PixelBudget

    case, model, valid = folder / "case", folder / "model", valid_films()
    address = serve_forever(case)
    tiny_checkpoint(model)
    film, record, kept = case / "sent", case / "record", case / "kept"
    size = ["--min-pixels-per-frame", 28 * 28, "--max-pixels-per-frame", 28 * 28 * 12]
    budget = PixelBudget(28 * 28, 28 * 28 * 12)
    own = ["--model", model, "--record", record, "--keep", kept, "--reconnect-seconds", 0.2, *size]
    again = [record, "--model", model, "--clips", kept]
    times = {}
    for name, data in valid.items():
        film.write_bytes(data)
        times[name] = index_video(film).times
    # A run on a valid video imports the modules that are imported on demand.
    for program, flags in ((cli.main, ["--source", film, "--max-new-tokens", 4, *own]), (replay.main, again)):
        with patch("sys.argv", ["program", *map(str, flags)]):
            if outcome_of(program) != "status 0":
                raise AssertionError(f"{program.__module__} refuses a valid video")

    def try_one(draw: random.Random) -> Iterable[str]:
        shutil.rmtree(case)
        case.mkdir()
        name, variant = draw.choice([*valid]), draw.choice([*VARIANTS])
        film.write_bytes(valid[name] if draw.random() < 0.05 else mutate_film(valid[name], draw))
        how = {"length": draw.random() < 0.8, "ranges": draw.random() < 0.6, "more": draw.choice([0, 0, 0, 0, 1, 4096])}
        (case / "how").write_text(json.dumps(how))
        flags = ["--variant", variant, "--force", "--max-new-tokens", draw.choice([1, 8, 24])]
        flags += draw.choice([[], [], ["--max-clips", 3], ["--window", 2, 5], ["--behind", "skip"], ["--fps", 4]])
        flags += draw.choice([[], ["--way", "serial"], ["--schedule", "greedy"]])
        fps = 4 if "--fps" in flags else 2
        ended = run_forked(cli.main, ["--source", address, *own, *flags], case, LIVE_SECONDS)
        check_output(ended, record)
        left = {path.name for path in case.iterdir()} - {"sent", "how"}
        assert left in (set(), {"record"}, {"record", "kept"}), f"left behind: {left}"
        outcomes = [f"status {ended.status}", "a record" if left else "no record"]
        if "kept" not in left:
            return outcomes
        written, frames = read_record(record), read_clips(kept).numpy()
        fed, figures = written.about["clips"], written.about["figures"]
        assert (np.diff(fed) > 0).all() and 2 * len(fed) == len(frames) and fed[-1] < figures["source_clips"], fed
        assert figures["source_clips"] <= MAX_CLIPS, "more clips than the video's duration allows"
        replayed = run_forked(replay.main, again, case, LIVE_SECONDS)
        assert replayed.status == 0, f"status {replayed.status} of replay: {replayed.out[-500:]}{replayed.err[-2000:]}"
        shown = [read_number(frame) for frame in frames]
        due = [(2 * clip + second) / fps for clip in fed for second in range(2)]
        outcomes += check_shown(film, shown, due, times[name])
        if how["length"] and not how["more"] and "--behind" not in flags:
            with contextlib.suppress(InputError):
                same = read_video(film, fps=fps, budget=budget, max_clips=MAX_CLIPS).frames.numpy()
                outcomes.append(
                    "same as the file" if np.array_equal(frames, same[: len(frames)]) else "different from the file"
                )
        return outcomes

    return try_one


def check_output(ended: Finished, record: Path) -> None:
    """Raise AssertionError if the live command did not end as documented."""
    lines = ended.err.splitlines()
    assert "Traceback" not in ended.err + ended.out, ended.err[-3000:]
    assert ended.status in (0, 2), f"status {ended.status}: {ended.err[-2000:]}"
    assert all(len(line) < 2000 for line in lines), f"not short lines: {ended.err:.500}"
    errors = [number for number, line in enumerate(lines, 1) if line.startswith("error: ")]
    assert errors == ([max(len(lines), 1)] if ended.status else []), f"status {ended.status}: {ended.err[-2000:]}"
    assert (str(record) in ended.out) == record.exists(), f"{record.exists()} record: {ended.out[-500:]}"
    seconds = [float(found) for found in re.findall(r"^ *([\d.e+]+) s  ", ended.out, re.MULTILINE)]
    assert seconds == sorted(set(seconds)), f"text at {seconds}"
    assert ended.status or (record.exists() and "\nrecord " in ended.out), ended.out[-500:]


def check_shown(film: Path, shown: list[int | None], due: list[float], times: np.ndarray) -> Iterator[str]:
    """Yield outcomes for frames that show the numbers `shown` and were due at `due` seconds.

    Raises AssertionError if the video still has its original `times`, but a frame is shown before its time or long
    after the end.
    """
    from qwen_vl_streaming.video.frames import index_video

    try:
        index = index_video(film)
    except InputError:
        return
    if len(index.times) != len(times) or not np.allclose(index.times, times):
        return
    yield "times checked"
    assert due[-1] < SECONDS + REOPENED_SECONDS, f"frames at {due[-1]} s of a video of {SECONDS} s"
    if early := [(n, t) for n, t in zip(shown, due, strict=True) if n is not None and n / FPS > t + 0.1]:
        decoded = decoded_numbers(film)
        for n, t in early:
            assert any(n == number and time < t + 0.1 for time, number in decoded), f"frame {n} is shown at {t} s"
        yield "starts with a later frame, or a damaged frame decodes as another"


if __name__ == "__main__":
    run(lambda: main(__doc__, "fuzz_films", {"films": 3_000, "streams": 1_000}))
