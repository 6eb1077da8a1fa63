"""Scenes of the demo: what coloured shapes do at which second, the caption that describes it, and the frames.

Does not depend on files, video codecs, tokenizers or models. Words and punctuation marks of captions are counted as
tokens, because each is one token to the demo's tokenizer.

Captions respect wait-3, by which slot i (after second i) writes the words 3(i-1) ... 3i-1 and the last slot the rest:
an event has been on screen for a full second before the slot in which its sentence begins. Those of quiet scenes do
not: they are for captions with times, see `Scene.segments`.
"""

import math
import random
import re
from dataclasses import dataclass, field

from PIL import Image, ImageDraw

# All colours are brighter than the background. A small model learns this much sooner than shapes that are sometimes
# brighter and sometimes darker.
COLOURS = {
    "red": (240, 40, 40),
    "green": (20, 190, 50),
    "blue": (60, 90, 255),
    "yellow": (250, 225, 20),
    "pink": (255, 110, 215),
    "cyan": (20, 225, 235),
    "white": (255, 255, 255),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
OPENING = "The video shows"
OTHER_OPENING = "We can see"
WAIT_K = 3
QUIET = 5
"""Seconds of the shortest quiet stretch of a quiet scene."""

# In units of the frame's side.
LEFT, RIGHT, TOP, BOTTOM = 0.26, 0.74, 0.26, 0.74
SMALL, BIG = 0.17, 0.22
JITTER = 0.015
# Relative frequency of each kind of event, if it is possible.
WEIGHTS = {"appears": 4.0, "turns": 3.0, "moves": 2.0, "grows": 1.0, "shrinks": 1.0, "leaves": 1.5}


@dataclass(frozen=True)
class Keyframe:
    """A keyframe of a shape at `time` (seconds); position and radius are in units of the frame's side."""

    time: float
    x: float
    y: float
    radius: float
    colour: str


@dataclass
class Actor:
    """One shape with its keyframes in order of time; position and radius are interpolated linearly."""

    shape: str
    keys: list[Keyframe]
    gone: float = math.inf

    def at(self, time: float) -> Keyframe | None:
        """The state at `time` (seconds), or None if the shape is not on screen."""
        if not self.keys[0].time <= time < self.gone:
            return None
        before = [key for key in self.keys if key.time <= time][-1]
        after = next((key for key in self.keys if key.time > time), before)
        part = 0.0 if after is before else (time - before.time) / (after.time - before.time)
        x, y, radius = (
            (1 - part) * getattr(before, name) + part * getattr(after, name) for name in ("x", "y", "radius")
        )
        return Keyframe(0.0, x, y, radius, before.colour)

    def change(self, start: float, end: float, **new: float | str) -> None:
        """Change to the values `new` linearly from `start` to `end` (seconds); at once if they are equal."""
        last = self.keys[-1]
        old = {"x": last.x, "y": last.y, "radius": last.radius, "colour": last.colour}
        if end > start:
            self.keys.append(Keyframe(start, **old))
        self.keys.append(Keyframe(end, **{**old, **new}))


@dataclass(frozen=True)
class Event:
    """What happens at `second` to which shape, its colour afterwards, and the index of the first word about it."""

    second: int
    shape: str
    colour: str
    event: str
    word: int


@dataclass
class Scene:
    """Shapes, events and caption of one video; `seconds` is its duration."""

    seconds: float
    background: tuple[int, int, int]
    caption: str
    actors: list[Actor] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    """The sentence about each event."""

    def segments(self) -> list[dict]:
        """The sentences with times, as a row's `segments`: each lasts for the second in which its event happens."""
        pairs = zip(self.events, self.sentences, strict=True)
        return [
            {"start": float(event.second), "end": event.second + 1.0, "text": sentence} for event, sentence in pairs
        ]

    def visible(self, time: float) -> tuple[tuple[str, Keyframe], ...]:
        """The shapes on screen at `time` (seconds) in order of appearance; equal results draw equal frames."""
        states = ((actor.shape, actor.at(time)) for actor in self.actors)
        return tuple((shape, key) for shape, key in states if key is not None)


def count_words(text: str) -> int:
    """The number of words and punctuation marks in `text`."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def make_scene(rng: random.Random, seconds: float, rate: tuple[float, float], opening: str = OPENING) -> Scene:
    """Create a scene of `seconds` whose caption has between rate[0] and rate[1] words per second.

    Raises RuntimeError if none is found, which does not happen for 1.5 to 4.6 words per second.
    """
    min_words, max_words = math.ceil(rate[0] * seconds), math.floor(rate[1] * seconds)
    for _ in range(20000):
        scene = _Story(rng, seconds, opening).tell(min_words)
        if scene and min_words <= count_words(scene.caption) <= max_words:
            return scene
    raise RuntimeError(f"no scene of {seconds} s with {min_words} to {max_words} words")


def make_quiet_scene(rng: random.Random, seconds: float, opening: str = OPENING) -> Scene:
    """Create a scene of `seconds`, at least 10, with at least QUIET seconds in a row in which nothing happens. Its
    caption has at least as many words as the video has clips, so that training by wait-3 does not skip it."""
    clips = int(seconds)
    length = rng.randint(QUIET, max(QUIET, clips // 2))
    begin = rng.randint(WAIT_K, clips - length)
    free = [second for second in range(WAIT_K, clips) if not begin <= second < begin + length]
    fewest = max(1, math.ceil((math.ceil(seconds) - 10) / 3))  # the first sentence has 10 words, others at least 3
    count = min(len(free), rng.randint(fewest, fewest + 2))
    return _Story(rng, seconds, opening).tell_at(sorted(rng.sample(free, count)))


class _Story:
    """One attempt at a scene: samples the seconds of the events, then the events."""

    def __init__(self, rng: random.Random, seconds: float, opening: str):
        self.rng, self.clips = rng, int(seconds)
        grey = rng.randint(18, 42)
        background = tuple(grey + rng.randint(-8, 8) for _ in range(3))
        self.scene = Scene(seconds, background, opening)
        self.visible: list[Actor] = []
        self.last_described: Actor | None = None
        self._add_shape(0, rng.choice((LEFT, RIGHT)))

    def tell(self, min_words: int) -> Scene | None:
        """The scene with at least `min_words` words, or None if an event would be described before it is seen."""
        # Nothing happens before second 3, when the sentence about the first shape is complete.
        free = range(WAIT_K, self.clips)
        mean_words = 5.0
        wanted = round((min_words - count_words(self.scene.caption)) / mean_words + self.rng.random())
        if wanted > len(free):
            return None
        for second in sorted(self.rng.sample(free, max(0, wanted))):
            kind, actor = self._sample_event()
            if self._is_early(second, kind):
                return None
            self._add_event(second, kind, actor)
        return self.scene

    def tell_at(self, seconds: list[int]) -> Scene:
        """The scene with random events at these `seconds`, whenever wait-3 would describe them."""
        for second in seconds:
            self._add_event(second, *self._sample_event())
        return self.scene

    def _is_early(self, second: int, kind: str) -> bool:
        """Whether wait-3 would describe an event before it is fully seen."""
        first_word = count_words(self.scene.caption)
        slot = min(first_word // WAIT_K + 1, self.clips)
        whole = second + (1 if kind in ("appears", "turns") else 2)
        return whole > slot

    def _add_event(self, second: int, kind: str, actor: Actor | None) -> None:
        """Add an event and its sentence."""
        if actor is None:
            side = self.rng.choice((LEFT, RIGHT))
            if self.visible:
                side = LEFT if self.visible[0].keys[-1].x > 0.5 else RIGHT
            self._add_shape(second, side)
        else:
            self._change_shape(second, kind, actor)

    def _sample_event(self) -> tuple[str, Actor | None]:
        """A random possible event as (kind, shape); the shape is None for a new one."""
        options = [("appears", None)] if len(self.visible) < 2 else []
        for actor in self.visible:
            size = "grows" if actor.keys[-1].radius < (SMALL + BIG) / 2 else "shrinks"
            options += [(kind, actor) for kind in ("turns", "moves", "leaves", size)]
        return self.rng.choices(options, [WEIGHTS[kind] for kind, _ in options])[0]

    def _add_shape(self, second: int, side: float) -> None:
        """Add a shape on one side that differs in kind and colour from those on screen."""
        rng = self.rng
        shape = rng.choice([s for s in SHAPES if all(s != a.shape for a in self.visible)])
        colour = rng.choice([c for c in COLOURS if all(c != a.keys[-1].colour for a in self.visible)])
        key = Keyframe(
            float(second), self._near(side), self._near(rng.choice((TOP, BOTTOM))), rng.choice((SMALL, BIG)), colour
        )
        actor = Actor(shape, [key])
        self.scene.actors.append(actor)
        self.visible.append(actor)
        where = "on the left" if side == LEFT else "on the right"
        words = f" a {colour} {shape} {where}." if second == 0 else f" A {colour} {shape} appears {where}."
        self._describe(second, actor, "appears", words)

    def _change_shape(self, second: int, kind: str, actor: Actor) -> None:
        """Let a visible shape change colour, move, grow, shrink or leave."""
        last = actor.keys[-1]
        subject = " It" if actor is self.last_described else f" The {last.colour} {actor.shape}"
        if kind == "turns":
            taken = {a.keys[-1].colour for a in self.visible}
            colour = self.rng.choice([c for c in COLOURS if c not in taken])
            actor.change(second, second, colour=colour)
            kind = f"turns {colour}"
        elif kind == "moves":
            up_or_down = "up" if last.y > 0.5 else "down"
            # With two shapes on screen, each stays on its side, so that they never overlap.
            sideways = ["left" if last.x > 0.5 else "right"] if len(self.visible) == 1 else []
            direction = self.rng.choice([up_or_down, *sideways])
            goal = {"up": ("y", TOP), "down": ("y", BOTTOM), "left": ("x", LEFT), "right": ("x", RIGHT)}[direction]
            actor.change(second, second + 1, **{goal[0]: self._near(goal[1])})
            kind = f"moves {direction}"
        elif kind == "leaves":
            actor.change(second, second + 0.5, x=-0.3 if last.x < 0.5 else 1.3)
            actor.gone = second + 0.5
            self.visible.remove(actor)
        else:
            actor.change(second, second + 1, radius=BIG if kind == "grows" else SMALL)
        self._describe(second, actor, kind, f"{subject} {kind}.")

    def _describe(self, second: int, actor: Actor, event: str, words: str) -> None:
        """Record an event and append its sentence to the caption."""
        scene = self.scene
        colour = actor.keys[-1].colour
        scene.events.append(Event(second, actor.shape, colour, event, count_words(scene.caption)))
        scene.sentences.append(words.strip() if scene.sentences else scene.caption + words)
        scene.caption += words
        self.last_described = actor

    def _near(self, coordinate: float) -> float:
        return coordinate + self.rng.uniform(-JITTER, JITTER)


def draw(scene: Scene, time: float, size: int) -> Image.Image:
    """Draw the scene at `time` (seconds) as an RGB image of size × size pixels."""
    image = Image.new("RGB", (size, size), scene.background)
    pen = ImageDraw.Draw(image)
    for shape, key in scene.visible(time):
        x, y, r, colour = key.x * size, key.y * size, key.radius * size, COLOURS[key.colour]
        box = (x - r, y - r, x + r, y + r)
        if shape == "circle":
            pen.ellipse(box, fill=colour)
        elif shape == "ring":
            pen.ellipse(box, outline=colour, width=round(0.42 * r))
        elif shape == "square":
            pen.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill=colour)
        elif shape == "triangle":
            pen.polygon([(x, y - r), (x + 1.1 * r, y + r), (x - 1.1 * r, y + r)], fill=colour)
        else:
            pen.rectangle((x - r, y - 0.3 * r, x + r, y + 0.3 * r), fill=colour)
            pen.rectangle((x - 0.3 * r, y - r, x + 0.3 * r, y + r), fill=colour)
    return image
