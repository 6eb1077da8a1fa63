"""Peak memory of a training process by first principles, in named terms.

Two moments can be the peak: the backward pass, with its activations, and the optimizer's step, with float32 gradients.
DeepSpeed's part follows its stage_1_and_2.py and stage3.py (0.19.8).

    M all parameters   N trained parameters   P processes   T tokens of a forward pass
"""

from dataclasses import dataclass

from . import constants as c
from .lengths import Lengths
from .settings import Settings
from .shape import Shape


@dataclass(frozen=True)
class Memory:
    """Bytes by name at both moments."""

    backward: dict[str, float]
    step: dict[str, float]

    @property
    def terms(self) -> dict[str, float]:
        """Those of the moment that needs more."""
        return max(self.backward, self.step, key=lambda terms: sum(terms.values()))

    @property
    def peak(self) -> float:
        """Bytes that PyTorch allocates at most."""
        return sum(self.terms.values())


def pass_tokens(settings: Settings, lengths: Lengths) -> int:
    """Tokens of the largest forward pass, padding included."""
    if settings.pack_tokens:
        return settings.pack_tokens * lengths.rows_filled(settings.samples, settings.pack_tokens)
    return settings.samples * lengths.longest


def visual_tokens(settings: Settings, lengths: Lengths) -> float:
    """Visual tokens of the largest forward pass."""
    return settings.samples * lengths.visual * lengths.heaviest(settings.samples)


def saved_per_token(shape: Shape, compiled: bool) -> float:
    """Bytes that one layer saves for the backward pass per token, in 2-byte numbers."""
    hidden, mlp = (c.COMPILED_HIDDEN, c.COMPILED_MLP) if compiled else (c.EAGER_HIDDEN, c.EAGER_MLP)
    return 2 * (hidden * shape.hidden + mlp * shape.mlp + 2 * shape.kv) + c.DROPOUT_BYTES * shape.dropped


def estimate(shape: Shape, settings: Settings, lengths: Lengths, processes: int) -> Memory:
    """The peak memory of each of `processes` processes."""
    zero, wide = settings.zero, 1 if settings.bf16 else 2  # float32 numbers are twice as wide
    n, shards = shape.trained, processes if zero.stage else 1
    weights, gradients, states = 2.0 * wide * shape.total, 2.0 * wide * n, (4.0 + settings.states) * n / shards
    common: dict[str, float] = {
        "weights": weights,
        "master weights and optimizer states": 0.0 if zero.offloads_optimizer else states,
        "pixels": 4 * visual_tokens(settings, lengths) * shape.patch_values * c.PIXEL_BYTES,
    }
    if zero.stage == 3:
        common["weights"] = 0.0 if zero.offloads_weights else weights / shards
        gathered = c.GATHERED if settings.compiled else c.LIVE_PARAMETERS
        common["gathered weights"] = 2.0 * wide * min(shape.total, gathered)

    bucket = shape.hidden**2 if zero.bucket is None else zero.bucket
    reduced = gradients / shards
    backward = {**common, "buckets": 2.0 * wide * bucket * (1 + zero.overlap)}
    if zero.stage < 2:
        start = end = gradients
    elif zero.stage == 2:
        accumulated = reduced if settings.accumulation > 1 else 0.0
        pending = min(2.0 * wide * bucket, gradients) if shards > 1 else 0.0
        start, end = accumulated + pending, accumulated + reduced + pending
    else:
        start = end = 0.0 if zero.offloads_optimizer else reduced
    largest = 2.0 * wide * shape.largest

    activations, working = _activations(shape, settings, lengths, wide)
    before = _before(shape, settings, lengths, wide)
    at_start = sum(activations.values()) + working + start + largest
    at_end = working + end + 2 * largest
    if max(at_start, at_end) < before + start:
        backward |= {"gradients": start, "vision tower or mask": before}
    elif at_start >= at_end:
        backward |= {"gradients": start + largest, **activations, "backward of a layer": working}
    else:
        backward |= {"gradients": end + 2 * largest, "backward of a layer": working}

    step = dict(common)
    if zero.stage < 3:
        # bf16 gradients of this process twice, since DeepSpeed flattens them, and once in float32
        step["gradients"] = (gradients if zero.stage < 2 else reduced) + reduced
        step["float32 gradients"] = 4.0 * n / shards
    else:
        step["gradients"] = reduced
        step["float32 gradients"] = 4.0 * min(n / shards, c.LIVE_PARAMETERS)
    if zero.offloads_optimizer:
        step["gradients"] = step["float32 gradients"] = 0.0
    return Memory(backward, step)


def _activations(shape: Shape, settings: Settings, lengths: Lengths, wide: int) -> tuple[dict[str, float], float]:
    """Bytes that remain after the forward pass, by name, and the working memory of the backward pass of one layer."""
    tokens, k = pass_tokens(settings, lengths), settings.checkpointed
    heads = shape.hidden // c.HEAD
    copies = 0.0 if heads & (heads - 1) else 2 * c.COPIES_HIDDEN * shape.hidden
    saved = wide * (saved_per_token(shape, settings.compiled) + copies) * tokens
    row = 2.0 * wide * shape.hidden * tokens
    targets = settings.samples * lengths.answer * lengths.heaviest(settings.samples)
    terms = {
        "activations": saved * (shape.layers - k),
        "inputs of recomputed layers": row * k,
        "embeddings and last norm": c.EMBEDDING_ROWS * row,
        "logits": targets * shape.vocabulary * c.LOGITS_BYTES,
    }
    if shape.tunes_tower:
        patches = 4 * visual_tokens(settings, lengths)
        block = 2 * wide * patches * (c.TOWER_SAVED_HIDDEN * shape.tower_hidden + c.TOWER_SAVED_MLP * shape.tower_mlp)
        if k:
            terms["vision tower"] = 2 * wide * patches * shape.tower_hidden * shape.tower_blocks + block
        else:
            terms["vision tower"] = block * shape.tower_blocks
    working = c.BACKWARD_MLP * 2 * wide * shape.mlp * tokens + (saved if k else 0)
    return terms, working


def _before(shape: Shape, settings: Settings, lengths: Lengths, wide: int) -> float:
    """Bytes of the vision tower, or of creating the block mask, before the language model runs."""
    tower = wide * 4 * visual_tokens(settings, lengths) * c.TOWER_ROW_BYTES
    return max(tower, c.MASK_BYTES * pass_tokens(settings, lengths) ** 2)


def host_bytes(shape: Shape, states: float) -> float:
    """Host memory of a machine that holds weights, optimizer states and gradients under offload."""
    return 2.0 * shape.total + (8.0 + states) * shape.trained
