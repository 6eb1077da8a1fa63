"""Scenes of the demo: which coloured shape does what at which second, the caption that tells it, and one frame of it.

Knows nothing about files, video codecs, tokenizers or models. A caption's words (punctuation marks included) are
counted as tokens, which is what the demo's tokenizer makes of them.

A scene keeps to wait-3, where slot i (after second i) writes the words 3(i-1) ... 3i-1 and the last slot the rest:
whatever a sentence tells has been on screen for a whole second before the slot that begins the sentence.
"""

import math
import random
import re
from dataclasses import dataclass, field

from PIL import Image, ImageDraw

# Bright on dark: a shape stands out in the same direction whatever its colour, which a small model learns much sooner
# than shapes that are now lighter and now darker than what is behind them.
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

# Parts of the frame's side.
LEFT, RIGHT, TOP, BOTTOM = 0.26, 0.74, 0.26, 0.74
SMALL, BIG = 0.17, 0.22
JITTER = 0.015
# How often each kind of event is drawn where it is possible.
WEIGHTS = {"appears": 4.0, "turns": 3.0, "moves": 2.0, "grows": 1.0, "shrinks": 1.0, "leaves": 1.5}


@dataclass(frozen=True)
class Key:
    """The look of a shape from `time` (seconds) on; place and radius are parts of the frame's side."""

    time: float
    x: float
    y: float
    radius: float
    colour: str


@dataclass
class Actor:
    """One shape with its keys in order of time; between two keys place and radius change evenly."""

    shape: str
    keys: list[Key]
    gone: float = math.inf

    def at(self, time: float) -> Key | None:
        """The look at `time` (seconds), or None where the shape is not on screen."""
        if not self.keys[0].time <= time < self.gone:
            return None
        before = [key for key in self.keys if key.time <= time][-1]
        after = next((key for key in self.keys if key.time > time), before)
        part = 0.0 if after is before else (time - before.time) / (after.time - before.time)
        x, y, radius = (
            (1 - part) * getattr(before, name) + part * getattr(after, name) for name in ("x", "y", "radius")
        )
        return Key(0.0, x, y, radius, before.colour)

    def change(self, start: float, end: float, **new: float | str) -> None:
        """From `start` (seconds) on become `new`, evenly until `end`; with end == start at once."""
        last = self.keys[-1]
        old = {"x": last.x, "y": last.y, "radius": last.radius, "colour": last.colour}
        if end > start:
            self.keys.append(Key(start, **old))
        self.keys.append(Key(end, **{**old, **new}))


@dataclass(frozen=True)
class Event:
    """What happens at `second`, to which shape, of which colour after it, and the index of its first word."""

    second: int
    shape: str
    colour: str
    event: str
    word: int


@dataclass
class Scene:
    """Everything that is drawn and told of one video; `seconds` is its length."""

    seconds: float
    background: tuple[int, int, int]
    caption: str
    actors: list[Actor] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def look(self, time: float) -> tuple[tuple[str, Key], ...]:
        """The shapes on screen at `time` (seconds), first come first; equal looks are equal pictures."""
        looks = ((actor.shape, actor.at(time)) for actor in self.actors)
        return tuple((shape, key) for shape, key in looks if key is not None)


def count_words(text: str) -> int:
    """The number of words and punctuation marks in `text`."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def make_scene(rng: random.Random, seconds: float, rate: tuple[float, float], opening: str = OPENING) -> Scene:
    """A scene of `seconds` whose caption has between rate[0] and rate[1] words a second.

    Raises RuntimeError where no such scene is found, which does not happen for 1.5 to 4.6 words a second.
    """
    fewest, most = math.ceil(rate[0] * seconds), math.floor(rate[1] * seconds)
    for _ in range(20000):
        scene = _Story(rng, seconds, opening).tell(fewest)
        if scene and fewest <= count_words(scene.caption) <= most:
            return scene
    raise RuntimeError(f"no scene of {seconds} s with {fewest} to {most} words")


class _Story:
    """One attempt at a scene: draws the seconds at which something happens, then an event for each."""

    def __init__(self, rng: random.Random, seconds: float, opening: str):
        self.rng, self.clips = rng, int(seconds)
        grey = rng.randint(18, 42)
        background = tuple(grey + rng.randint(-8, 8) for _ in range(3))
        self.scene = Scene(seconds, background, opening)
        self.visible: list[Actor] = []
        self.told: Actor | None = None
        self._enter(0, rng.choice((LEFT, RIGHT)))

    def tell(self, fewest: int) -> Scene | None:
        """The scene with at least `fewest` words, or None where an event would be told before it is seen."""
        # The first shape stays as it is until its opening sentence is written, so nothing happens before second 3.
        free = range(WAIT_K, self.clips)
        mean_words = 5.0
        wanted = round((fewest - count_words(self.scene.caption)) / mean_words + self.rng.random())
        if wanted > len(free):
            return None
        for second in sorted(self.rng.sample(free, max(0, wanted))):
            if not self._happen(second):
                return None
        return self.scene

    def _happen(self, second: int) -> bool:
        """Draw one event and tell it; False where it would be told before it is seen whole."""
        kind, actor = self._draw()
        first_word = count_words(self.scene.caption)
        slot = min(first_word // WAIT_K + 1, self.clips)
        whole = second + (1 if kind in ("appears", "turns") else 2)
        if whole > slot:
            return False
        if kind == "appears":
            side = self.rng.choice((LEFT, RIGHT))
            if self.visible:
                side = LEFT if self.visible[0].keys[-1].x > 0.5 else RIGHT
            self._enter(second, side)
        else:
            self._act(second, kind, actor)
        return True

    def _draw(self) -> tuple[str, Actor | None]:
        """An event that is possible now, as (kind, which shape; None for a new one)."""
        options = [("appears", None)] if len(self.visible) < 2 else []
        for actor in self.visible:
            size = "grows" if actor.keys[-1].radius < (SMALL + BIG) / 2 else "shrinks"
            options += [(kind, actor) for kind in ("turns", "moves", "leaves", size)]
        return self.rng.choices(options, [WEIGHTS[kind] for kind, _ in options])[0]

    def _enter(self, second: int, side: float) -> None:
        """A new shape, unlike those on screen in shape and colour, on one side."""
        rng = self.rng
        shape = rng.choice([s for s in SHAPES if all(s != a.shape for a in self.visible)])
        colour = rng.choice([c for c in COLOURS if all(c != a.keys[-1].colour for a in self.visible)])
        key = Key(
            float(second), self._near(side), self._near(rng.choice((TOP, BOTTOM))), rng.choice((SMALL, BIG)), colour
        )
        actor = Actor(shape, [key])
        self.scene.actors.append(actor)
        self.visible.append(actor)
        where = "on the left" if side == LEFT else "on the right"
        words = f" a {colour} {shape} {where}." if second == 0 else f" A {colour} {shape} appears {where}."
        self._tell(second, actor, "appears", words)

    def _act(self, second: int, kind: str, actor: Actor) -> None:
        """Let a shape that is on screen turn, move, grow, shrink or leave."""
        last = actor.keys[-1]
        who = " It" if actor is self.told else f" The {last.colour} {actor.shape}"
        if kind == "turns":
            taken = {a.keys[-1].colour for a in self.visible}
            colour = self.rng.choice([c for c in COLOURS if c not in taken])
            actor.change(second, second, colour=colour)
            kind = f"turns {colour}"
        elif kind == "moves":
            up_or_down = "up" if last.y > 0.5 else "down"
            # A shape that shares the frame keeps to its side, so that the two never meet.
            sideways = ["left" if last.x > 0.5 else "right"] if len(self.visible) == 1 else []
            way = self.rng.choice([up_or_down, *sideways])
            goal = {"up": ("y", TOP), "down": ("y", BOTTOM), "left": ("x", LEFT), "right": ("x", RIGHT)}[way]
            actor.change(second, second + 1, **{goal[0]: self._near(goal[1])})
            kind = f"moves {way}"
        elif kind == "leaves":
            actor.change(second, second + 0.5, x=-0.3 if last.x < 0.5 else 1.3)
            actor.gone = second + 0.5
            self.visible.remove(actor)
        else:
            actor.change(second, second + 1, radius=BIG if kind == "grows" else SMALL)
        self._tell(second, actor, kind, f"{who} {kind}.")

    def _tell(self, second: int, actor: Actor, event: str, words: str) -> None:
        scene = self.scene
        colour = actor.keys[-1].colour
        scene.events.append(Event(second, actor.shape, colour, event, count_words(scene.caption)))
        scene.caption += words
        self.told = actor

    def _near(self, place: float) -> float:
        return place + self.rng.uniform(-JITTER, JITTER)


def draw(scene: Scene, time: float, size: int) -> Image.Image:
    """The RGB picture of size × size pixels that the scene shows at `time` (seconds)."""
    image = Image.new("RGB", (size, size), scene.background)
    pen = ImageDraw.Draw(image)
    for shape, key in scene.look(time):
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
