"""Lower bounds for the time of a session on a GPU, from the bytes and FLOPs that it cannot avoid.

A serial round takes the vision tower, a prefill step for the clip, and K decode steps. In fused mode, K steps generate
the tokens, and tower and clip may overlap with any of them. In pipelined mode, K decode steps generate K tokens while
the other GPU encodes and prefills the clips.

A step reads the language model's weights once, the output matrix if it samples a token, and the keys and values that
its rows attend to. It computes 2 x weights x rows FLOPs, and 4 x pairs x width in attention. The vision tower reads its
weights once per clip and computes 2 x weights x patches FLOPs, and 4 x pairs x width in attention, where most layers
attend within windows. Both rates are measured on the GPU: a bf16 matrix product and reading memory. A step that depends
on the one before takes the larger of its two times; work that can overlap takes the larger of the two sums.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from arithmetic import matrices, tower_flops
from qwen_vl_streaming.timeline.timeline import Layout


@dataclass(frozen=True)
class Work:
    """Bytes read and FLOPs of one or more steps."""

    bytes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def part(self, share: float, once: float) -> "Work":
        """The work that a `share` of the rows adds to a step that already reads the weights, which are `once` bytes."""
        return Work(share * (self.bytes - once), share * self.flops)

    def __sub__(self, other: "Work") -> "Work":
        return Work(self.bytes - other.bytes, self.flops - other.flops)


class Floors:
    """Lower bounds for one model on one GPU, for clips of one grid."""

    def __init__(self, model, layout: Layout, flop_rate: float, byte_rate: float):
        """`flop_rate` is in FLOPs per second, `byte_rate` in bytes per second."""
        text, self.layout = model.config.text_config, layout
        self.flop_rate, self.byte_rate, size = flop_rate, byte_rate, model.dtype.itemsize
        tower, layers = model.model.visual, model.model.language_model.layers
        self.weights = matrices(layers)
        self.weight_bytes = sum(weight.nbytes for weight in layers.parameters() if weight.ndim > 1)
        self.head = text.hidden_size * text.vocab_size
        self.head_bytes = size * self.head
        self.width = text.hidden_size * len(layers)
        self.each = 2 * size * len(layers) * text.num_key_value_heads * text.hidden_size // text.num_attention_heads
        """Bytes of the keys and values of one token."""
        tokens, merger = layout.tokens_per_clip, matrices(tower.merger)
        read = size * (matrices(tower.blocks) + tower.patch_embed.proj.weight.numel() + merger)
        self.tower = Work(read, tower_flops(model, tower.spatial_merge_size**2 * tokens) + 2 * tokens * merger)
        """Work of the vision tower for one clip."""

    def seconds(self, work: Work) -> float:
        return max(work.bytes / self.byte_rate, work.flops / self.flop_rate)

    def prefill(self, number: int) -> Work:
        """Work of the language model's prefill of clip `number`, counted from 1."""
        tokens = self.layout.tokens_per_clip
        held = self.layout.prompt + (number - 1) * tokens
        pairs = tokens * held + tokens * (tokens + 1) // 2
        return Work(self.weight_bytes + self.each * held, 2 * self.weights * tokens + 4 * pairs * self.width)

    def decode(self, slot: int, before: int) -> Work:
        """Work of the step that generates a token in `slot`, counted from 1, after `before` others."""
        seen = self.layout.prompt + slot * self.layout.tokens_per_clip + self.layout.header + before
        read = self.weight_bytes + self.head_bytes + self.each * seen
        return Work(read, 2 * (self.weights + self.head) + 4 * seen * self.width)

    def session(self, mode: str, counts: Sequence[int]) -> float:
        """Seconds of a session whose slots generate `counts` tokens, if all clips are available at the start. The first
        and the last slot must generate at least one token."""
        clips = [self.prefill(i) for i in range(1, len(counts) + 1)]
        perceive = [self.seconds(self.tower) + self.seconds(clip) for clip in clips]
        steps = [
            [self.decode(slot, sum(counts[: slot - 1]) + i) for i in range(count)]
            for slot, count in enumerate(counts, 1)
        ]
        generate = [sum(map(self.seconds, mine)) for mine in steps]
        if mode == "serial":
            return sum(perceive) + sum(generate)
        if mode == "pipelined":
            return max(perceive[0] + sum(generate), sum(perceive) + generate[-1])
        weights = Work(self.weight_bytes)
        # The rows of a clip share a step with a token and read no weights of their own. Steps after the first token of
        # the last slot have no clip to share.
        *shared, rest = *steps[:-1], steps[-1][:1], steps[-1][1:]
        overlapped = sum((clip - weights + self.tower for clip in clips), Work())
        return self.seconds(sum((step for mine in shared for step in mine), overlapped)) + sum(map(self.seconds, rest))

    def parts(self, clips: int) -> dict[str, float]:
        """Seconds of each part alone. `clip` is the mean over `clips` clips; `word` is a token after half of them."""
        clip = sum(self.seconds(self.prefill(i)) for i in range(1, clips + 1)) / clips
        tower = self.seconds(self.tower)
        token = self.seconds(self.decode(max(clips // 2, 1), 0))
        return {"tower": tower, "clip": clip, "perception": tower + clip, "word": token}


def speed_up(r: float) -> float:
    """S(r) = (1 + r) / max(1, r) of the paper: the largest speed-up of concurrent over sequential perception and
    generation, if perception takes `r` times as long as generation."""
    return (1 + r) / max(1.0, r)
