"""The least that a card needs for a session, by the bytes and FLOPs that nothing can avoid.

Serial takes the tower, a pass over the clip and K passes a round. In fused K passes write the words, and tower and clip
may run beside any of them. Pipelined writes K words in K passes, and the clips are taken in meanwhile.

A pass reads the language model's weights once, with the output matrix where it chooses a word, and the keys and values
that its rows see; it multiplies 2 x weights x rows, and 4 x pairs x width in attention. The vision tower reads its
weights once a clip and multiplies 2 x weights x patches, and 4 x pairs x width within its windows. Both rates are
those measured on the card: of a bf16 matrix product, and of reading memory. Passes that must follow each other take the
larger of the two times each; what may run at once, the larger of the two sums.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from qwen_vl_streaming.timeline.timeline import Layout


@dataclass(frozen=True)
class Work:
    """Of a pass, or of several."""

    bytes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def part(self, share: float, once: float) -> "Work":
        """What `share` of its rows add to a pass that reads the weights, `once` bytes, anyway."""
        return Work(share * (self.bytes - once), share * self.flops)

    def __sub__(self, other: "Work") -> "Work":
        return Work(self.bytes - other.bytes, self.flops - other.flops)


class Floors:
    """Of one model on one card, for clips of one grid."""

    def __init__(self, model, layout: Layout, flop_rate: float, byte_rate: float):
        """`flop_rate` FLOPs and `byte_rate` bytes a second."""
        text, vision, self.layout = model.config.text_config, model.config.vision_config, layout
        self.flop_rate, self.byte_rate, size = flop_rate, byte_rate, model.dtype.itemsize
        tower, layers = model.model.visual, model.model.language_model.layers

        def matrices(module) -> int:
            return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)

        self.weights = matrices(layers)
        self.head = text.hidden_size * text.vocab_size
        self.width = text.hidden_size * len(layers)
        self.item = size
        self.each = 2 * size * len(layers) * text.num_key_value_heads * text.hidden_size // text.num_attention_heads
        """Bytes of a token's keys and values."""
        merged = tower.spatial_merge_size**2
        patches = merged * layout.tokens_per_clip
        whole = len(vision.fullatt_block_indexes)
        seen = whole * patches + (vision.depth - whole) * min((vision.window_size // vision.patch_size) ** 2, patches)
        own = matrices(tower.blocks) + tower.patch_embed.proj.weight.numel()
        flops = 2 * patches * own + 4 * patches * seen * vision.hidden_size
        merger = matrices(tower.merger)
        self.tower = Work(size * (own + merger), flops + 2 * patches / merged * merger)
        """Of one clip."""

    def seconds(self, work: Work) -> float:
        return max(work.bytes / self.byte_rate, work.flops / self.flop_rate)

    def clip(self, number: int) -> Work:
        """The language model's pass over clip `number`, from 1."""
        tokens = self.layout.tokens_per_clip
        held = self.layout.prompt + (number - 1) * tokens
        pairs = tokens * held + tokens * (tokens + 1) // 2
        return Work(self.item * self.weights + self.each * held, 2 * self.weights * tokens + 4 * pairs * self.width)

    def word(self, slot: int, before: int) -> Work:
        """The pass that writes a word in `slot` after `before` others."""
        seen = self.layout.prompt + slot * self.layout.tokens_per_clip + self.layout.header + before
        weights = self.weights + self.head
        return Work(self.item * weights + self.each * seen, 2 * weights + 4 * seen * self.width)

    def session(self, way: str, counts: Sequence[int]) -> float:
        """Seconds of a session whose slots write `counts` words, all clips being there; slots 1 and N write some."""
        clips = [self.clip(i) for i in range(1, len(counts) + 1)]
        perceive = [self.seconds(self.tower) + self.seconds(clip) for clip in clips]
        words = [
            [self.word(slot, sum(counts[: slot - 1]) + i) for i in range(count)] for slot, count in enumerate(counts, 1)
        ]
        write = [sum(map(self.seconds, mine)) for mine in words]
        if way == "serial":
            return sum(perceive) + sum(write)
        if way == "pipelined":
            return max(perceive[0] + sum(write), sum(perceive) + write[-1])
        weights = Work(self.item * self.weights)
        # Whichever passes a clip's rows ride in, they read no weights of their own. After the last clip's, none rides.
        *shared, rest = *words[:-1], words[-1][:1], words[-1][1:]
        riding = sum((clip - weights + self.tower for clip in clips), Work())
        return self.seconds(sum((word for mine in shared for word in mine), riding)) + sum(map(self.seconds, rest))

    def parts(self, clips: int) -> dict[str, float]:
        """Seconds of the parts, each alone: what belongs to a clip in the mean over `clips`, a word after half of
        them."""
        clip = sum(self.seconds(self.clip(i)) for i in range(1, clips + 1)) / clips
        tower = self.seconds(self.tower)
        word = self.seconds(self.word(max(clips // 2, 1), 0))
        return {"tower": tower, "clip": clip, "perception": tower + clip, "word": word}


def speed_up(r: float) -> float:
    """S(r) = (1 + r) / max(1, r) of the paper: the most that perception and generation at once can be faster than one
    after the other, where perception takes `r` times as long as generation."""
    return (1 + r) / max(1.0, r)
