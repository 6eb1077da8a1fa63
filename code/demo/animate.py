"""A recorded live session as a moving picture: the video as it plays, and the answer as it was written.

    python code/demo/animate.py live_output/RECORD.json film.mp4 --output docs/speaking.gif

Each token appears at the wall-clock time that the record gives it. Runs no model: it needs the record, the video and
the tokenizer of the recorded model.
"""

import argparse
import io
import itertools
from pathlib import Path

import av
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from qwen_vl_streaming.common.errors import InputError, OneLineParser, run
from qwen_vl_streaming.common.files import write_file
from qwen_vl_streaming.model.prompts import load_processor, spoken
from qwen_vl_streaming.sessions.record import Record, read_record

WIDTH, HEIGHT = 760, 340
PICTURE = (24, 44, 224)
"""Left, top and side of the square that holds the video."""
TEXT = (280, 44, 24)
"""Left and top of the answer, and the height of a line."""
LANES = (280, 736)
"""Left and right edge of the time axis."""
LINES = 9
"""Lines of the answer that are shown, the newest ones."""
PAPER, INK, GREY = "#FFFFFF", "#222222", "#8C8C8C"
SEEN, SAID = "#0072B2", "#D55E00"
"""Okabe and Ito's blue and vermilion, as in `explain`: blue is watched, vermilion is spoken."""
SCALE = 2
"""Drawn larger by this, then reduced, which smooths the edges."""
COLOURS = 128
HOLD = 3.0
"""Seconds for which the finished answer stays."""


def font(size: int, weight: str = "normal") -> ImageFont.FreeTypeFont:
    path = font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans", weight=weight))
    return ImageFont.truetype(path, size * SCALE)


def read_frames(path: Path) -> list[tuple[float, Image.Image]]:
    """Each frame of a video with its time in seconds from the first, in the size of the picture."""
    try:
        with av.open(str(path)) as container:
            decoded = (frame for frame in container.decode(video=0) if frame.time is not None)
            frames = [(float(frame.time), frame.to_image()) for frame in decoded]
    except (OSError, av.FFmpegError) as error:
        raise InputError(f"video {path} cannot be read ({error}): give the file that the session watched") from error
    if not frames:
        raise InputError(f"video {path} has no frames: give the file that the session watched")
    side = PICTURE[2] * SCALE
    larger = side / max(frames[0][1].size)
    size = tuple(round(edge * larger) for edge in frames[0][1].size)
    return [(time - frames[0][0], image.resize(size, Image.Resampling.BICUBIC)) for time, image in frames]


class Animation:
    """Draws a session at any time, in wall-clock seconds from the video's first frame."""

    def __init__(self, record: Record, frames: list[tuple[float, Image.Image]], tokenizer):
        about = record.about
        if "video" not in about:
            raise InputError("the record is not of a file: record a session that watches one")
        self.frames, self.speed = frames, about["speed"]
        self.between = 1 / about["video"]["fps"] / self.speed
        """Seconds between the two frames of a clip."""
        start = about["completed"][0] - self.between  # the second frame completes the first clip
        self.arrived = [time - start for time in about["completed"]]
        self.tokens = [(time - start, slot) for time, slot in zip(record.times, record.slots, strict=True)]
        said = [
            tokenizer.decode(spoken(record.tokens[:count], record.template.end_of_slot), skip_special_tokens=True)
            for count in range(len(record.tokens) + 1)
        ]
        self.pieces = [after[len(before) :] for before, after in itertools.pairwise(said)]
        self.end = max(frames[-1][0] / self.speed + self.between, self.tokens[-1][0])
        self.title = f"{record.variant}, {record.schedule}"
        self.small, self.plain, self.bold = font(11), font(15), font(15, weight="bold")

    def draw(self, now: float) -> Image.Image:
        image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), PAPER)
        draw = ImageDraw.Draw(image)
        self._draw_video(image, draw, now)
        self._draw_answer(draw, now)
        self._draw_lanes(draw, now)
        return image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)

    def _text(self, draw, x: float, y: float, text: str, colour: str = INK, face=None, anchor: str = "lm") -> None:
        draw.text((x * SCALE, y * SCALE), text, fill=colour, font=face or self.plain, anchor=anchor)

    def _box(self, draw, left: float, top: float, right: float, bottom: float, colour: str) -> None:
        draw.rectangle([each * SCALE for each in (left, top, right, bottom)], fill=colour)

    def _draw_video(self, image: Image.Image, draw: ImageDraw.ImageDraw, now: float) -> None:
        left, top, side = PICTURE
        self._text(draw, left, top - 20, "the video, as it arrives", SEEN, self.bold)
        frame = [each for time, each in self.frames if time <= max(now, 0) * self.speed][-1]
        across, down = (round((edge + side / 2) * SCALE) for edge in (left, top))
        image.paste(frame, (across - frame.width // 2, down - frame.height // 2))
        self._text(draw, left, top + side + 20, f"{max(now, 0):.1f} s")
        self._text(draw, left, top + side + 40, self.title, GREY, self.small)

    def _draw_answer(self, draw: ImageDraw.ImageDraw, now: float) -> None:
        left, top, high = TEXT
        self._text(draw, left, top - 20, "what the model writes, clip by clip", SAID, self.bold)
        lines: dict[int, str] = {}
        for (time, slot), piece in zip(self.tokens, self.pieces, strict=True):
            if time <= now:
                lines[slot] = lines.get(slot, "") + piece
        for row, (slot, text) in enumerate(list(lines.items())[-LINES:]):
            y = top + high * (row + 0.5)
            self._text(draw, left, y, f"after clip {slot}", GREY, self.small)
            self._text(draw, left + 84, y, text.strip())

    def _draw_lanes(self, draw: ImageDraw.ImageDraw, now: float) -> None:
        left, right = LANES
        across = (right - left) / self.end
        top = TEXT[1] + LINES * TEXT[2] + 12
        for lane, name, colour in ((0, "clips", SEEN), (1, "tokens", SAID)):
            y = top + 22 * lane
            self._text(draw, left - 8, y + 8, name, colour, self.small, "rm")
            self._box(draw, left, y, right, y + 16, "#F6F6F6")
        for arrived in self.arrived:
            if arrived <= now:
                begin = left + across * (arrived - self.between)
                self._box(draw, begin, top, left + across * arrived, top + 16, SEEN)
        for time, _ in self.tokens:
            if time <= now:
                x = left + across * time
                self._box(draw, x, top + 22, x + 2, top + 38, SAID)
        x = left + across * min(max(now, 0), self.end)
        self._box(draw, x - 0.5, top - 4, x + 0.5, top + 42, INK)
        for second in range(int(self.end) + 1):
            self._text(draw, left + across * second, top + 50, f"{second} s", GREY, self.small, "mm")


def animate(animation: Animation, path: Path, fps: int) -> None:
    """Write a GIF that plays in real time and repeats."""
    times = [step / fps for step in range(round(animation.end * fps) + 1)]
    pictures = [animation.draw(time) for time in times]
    # One palette for all pictures, from a few of them: colours that change from picture to picture would flicker.
    some = pictures[:: max(1, len(pictures) // 8)] + pictures[-1:]
    sheet = Image.new("RGB", (WIDTH, HEIGHT * len(some)))
    for row, picture in enumerate(some):
        sheet.paste(picture, (0, HEIGHT * row))
    palette = sheet.quantize(COLOURS, Image.Quantize.MAXCOVERAGE)
    indexed = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    durations = [round(1000 / fps)] * (len(times) - 1) + [round(1000 * HOLD)]
    file = io.BytesIO()
    indexed[0].save(file, "GIF", save_all=True, append_images=indexed[1:], duration=durations, loop=0)
    write_file(path, file.getvalue())


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="a record that `live` wrote of a file")
    parser.add_argument("video", type=Path, help="the file that it watched")
    parser.add_argument("--output", type=Path, required=True, metavar="GIF")
    parser.add_argument("--model", help="folder with the tokenizer (default: the record's model)")
    parser.add_argument("--fps", type=int, default=10, help="pictures a second (default: 10)")
    arguments = parser.parse_args()
    if not 1 <= arguments.fps <= 50:
        parser.error(f"--fps {arguments.fps} must be from 1 to 50")
    record = read_record(arguments.record)
    if not record.tokens:
        raise InputError(f"record {arguments.record} has no tokens: record a session that writes some")
    processor = load_processor(arguments.model or record.model["path"])
    animate(Animation(record, read_frames(arguments.video), processor.tokenizer), arguments.output, arguments.fps)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    run(main)
