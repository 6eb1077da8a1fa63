"""Sizes of frames: how many pixels each has, by the length of its video. Does not depend on how frames are read."""

from dataclasses import dataclass, fields
from math import ceil, isqrt, sqrt
from typing import Any

from qwen_vl_utils.vision_process import smart_resize

from ..common.errors import InputError

LONGEST = 60  # frames in the longest PE-Video videos that are kept: 30 s at 2 fps
BUDGETS = ("video", "stream")
SIDE_FACTOR = 28  # a merged visual token covers 28 × 28 pixels
MOST_RATIO = 200  # largest aspect ratio that Qwen2.5-VL accepts
COMMON_RATIO = 4  # largest aspect ratio of a usual source


@dataclass(frozen=True)
class PixelBudget:
    """Limits on the size of frames. The defaults give the sizes of the published code, which are those of
    `qwen_vl_utils.fetch_video`."""

    min_pixels_per_frame: int = 78_400
    """Smaller frames are enlarged to it. The maximum is at least 1.05 times this."""
    max_pixels_per_frame: int = 602_112
    """Maximum for each frame."""
    max_pixels_per_video: int = 4_816_896
    """Divided equally among the sampled frames of a video. The published VIDEO_MAX_PIXELS, 2,408,448, is half of it,
    because it counts the two frames of a clip once."""
    budget: str = "video"
    """Number of frames that share `max_pixels_per_video`. `video`: the frames of the video, as in the paper; the size
    of the first frame then reveals how long the video is. `stream`: always LONGEST frames, so that the size does not
    depend on future frames."""

    def __post_init__(self):
        if not SIDE_FACTOR**2 <= self.min_pixels_per_frame <= self.max_pixels_per_frame:
            raise InputError(
                f"min_pixels_per_frame {self.min_pixels_per_frame} must be between {SIDE_FACTOR**2} and "
                f"max_pixels_per_frame {self.max_pixels_per_frame}"
            )
        if self.budget not in BUDGETS:
            raise InputError(f"--budget {self.budget}: choose {' or '.join(BUDGETS)}")
        if self.max_pixels_per_video < self.min_pixels_per_frame:
            raise InputError(
                f"max_pixels_per_video {self.max_pixels_per_video} must be at least min_pixels_per_frame "
                f"{self.min_pixels_per_frame}"
            )

    @classmethod
    def trained(cls, config, asked=None) -> "PixelBudget":
        """The budget in a checkpoint's `config`, or the published one. Attributes of `asked` that have the name of a
        field and are not None override it. Raises InputError for invalid values."""
        given = {field.name: getattr(asked, field.name, None) for field in fields(cls)}
        given = {name: value for name, value in given.items() if value is not None}
        return cls(**{**getattr(config, "pixel_budget", {}), **given})

    def most(self, frames: int) -> float:
        """The maximum pixels of each of `frames` frames that share the budget."""
        share = self.max_pixels_per_video / frames
        return max(min(self.max_pixels_per_frame, share), int(1.05 * self.min_pixels_per_frame))

    @property
    def largest_grid(self) -> tuple[int, int]:
        """Rows and columns of visual tokens that no frame of a stream exceeds in number, up to COMMON_RATIO."""
        least, most = self.min_pixels_per_frame / SIDE_FACTOR**2, int(self.most(LONGEST)) // SIDE_FACTOR**2
        # Small frames are enlarged to `least` tokens, and then both sides are rounded up, which gives most tokens where
        # a side has just passed a whole number of rows.
        rows = range(max(1, int(sqrt(least / COMMON_RATIO))), ceil(sqrt(least * COMMON_RATIO)) + 1)
        enlarged = [(row + 1, int(least / row) + 1) for row in rows]
        largest = (isqrt(most), ceil(most / isqrt(most)))
        return max([*enlarged, largest], key=lambda grid: (grid[0] * grid[1], -abs(grid[0] - grid[1])))

    def size(self, height: int, width: int, frames: int, name: str = "the source") -> tuple[int, int]:
        """(height, width) to resize each of `frames` frames to; both are divisible by 28. Pass 0 `frames` if the count
        is not known yet.

        Raises InputError, with the `name` of the video, if the aspect ratio exceeds MOST_RATIO.
        """
        if max(height, width) > MOST_RATIO * min(height, width):
            raise InputError(
                f"{name} has frames of {width} x {height} pixels, more than {MOST_RATIO} times as long as wide: crop "
                "or skip it"
            )
        # smart_resize declares an int, but is given fractions by qwen_vl_utils too.
        most: Any = self.most(LONGEST if self.budget == "stream" or not frames else frames)
        height, width = smart_resize(height, width, SIDE_FACTOR, self.min_pixels_per_frame, most)
        if not height * width:
            # When it applies the maximum, smart_resize rounds both sides down, a narrow side even to 0.
            height, width = max(height, SIDE_FACTOR), max(width, SIDE_FACTOR)
            height, width = smart_resize(height, width, SIDE_FACTOR, self.min_pixels_per_frame, 2 * most + 2**20)
        return height, width
