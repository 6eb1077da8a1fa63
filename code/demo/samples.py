"""Which videos the demo's data set has: how many of each kind, in which order, and the random seed of each."""

import random
from dataclasses import dataclass
from pathlib import Path

from qwen_vl_streaming.common.errors import InputError
from scenes import OPENING, OTHER_OPENING, Scene, count_words, make_quiet_scene, make_scene

RATE = (3.1, 4.4)
"""Words per second of an ordinary caption; mani_data.py keeps 3 to 5."""


@dataclass(frozen=True)
class Kind:
    """A kind of video: ranges of duration in seconds and of words per second, and whether mani_data.py keeps it."""

    seconds: tuple[float, float] = (5.0, 12.0)
    rate: tuple[float, float] = RATE
    kept: bool = True


KINDS = {
    "ordinary": Kind(),
    "other_opening": Kind(),
    "short": Kind(seconds=(4.0, 4.8), kept=False),
    "long": Kind(seconds=(31.0, 33.0), kept=False),
    "slow": Kind(seconds=(8.0, 12.0), rate=(1.5, 2.8), kept=False),
    "fast": Kind(rate=(3.1, 4.0), kept=False),
    "empty": Kind(kept=False),
    "broken": Kind(kept=False),
}
QUIET_SECONDS = (10.0, 18.0)
DROPPED = tuple(name for name, kind in KINDS.items() if not kind.kept)


@dataclass(frozen=True)
class DataConfig:
    """Settings of `make_dataset`."""

    output: Path
    """Folder of the data set. If it has a data set with the same settings, only missing shards are created."""
    train_videos: int = 1200
    """Ordinary videos in the split `train`."""
    test_videos: int = 120
    """Ordinary videos in the split `test`."""
    dropped: int = 2
    """Additional videos per split of each kind that mani_data.py must drop."""
    other_openings: int = 0
    """Additional videos per split with captions that do not begin "The video shows"."""
    seed: int = 0
    """Random seed."""
    size: int = 168
    """Side of a frame, in pixels."""
    shard_videos: int = 100
    """Videos per shard."""
    segments: bool = False
    """Rows also have `segments`: each sentence with the second in which its event happens."""
    quiet: bool = False
    """Ordinary videos last 10 to 18 seconds, and nothing happens during long stretches. Their captions have about two
    words per second, so mani_data.py needs --min-tokens-per-second 0."""

    def __post_init__(self) -> None:
        for name in ("train_videos", "test_videos", "dropped", "other_openings", "seed"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be 0 or more")
        if self.shard_videos < 1:
            raise InputError(f"--shard-videos is {self.shard_videos}: it must be 1 or more")
        if self.size < 56 or self.size % 2:
            raise InputError(f"--size is {self.size}: it must be even and 56 or more")


@dataclass(frozen=True)
class Sample:
    """One video to create: its id, split and kind, and the random seed of everything else."""

    video_id: str
    split: str
    kind: str
    seed: str
    segments: bool = False
    quiet: bool = False

    def scene(self) -> tuple[Scene, int]:
        """Create the scene. Returns it with its frames per second."""
        kind, rng = KINDS[self.kind], random.Random(self.seed)
        fps = rng.choice((24, 30))
        opening = OTHER_OPENING if self.kind == "other_opening" else OPENING
        if self.quiet and self.kind == "ordinary":
            return make_quiet_scene(rng, round(rng.uniform(*QUIET_SECONDS) * fps) / fps, opening), fps
        frames = round(rng.uniform(*kind.seconds) * fps)
        scene = make_scene(rng, frames / fps, kind.rate, opening)
        if self.kind == "empty":
            scene.caption = ""
        while self.kind == "fast" and count_words(scene.caption) < 5.2 * scene.seconds:
            scene.caption += " The background is plain."
        return scene, fps


def plan(config: DataConfig) -> dict[str, list[Sample]]:
    """The samples of each split in shard order. Ids are numbers as strings, as in PE-Video."""
    samples = {}
    rng = random.Random(f"{config.seed}/plan")
    extra = [kind for kind in DROPPED for _ in range(config.dropped)] + ["other_opening"] * config.other_openings
    kinds = {"train": ["ordinary"] * config.train_videos + extra, "test": ["ordinary"] * config.test_videos + extra}
    ids = iter(rng.sample(range(10**6, 10**9), sum(map(len, kinds.values()))))
    for split, names in kinds.items():
        rng.shuffle(names)
        samples[split] = [
            Sample(str(next(ids)), split, name, f"{config.seed}/{split}/{i}", config.segments, config.quiet)
            for i, name in enumerate(names)
        ]
    return samples
