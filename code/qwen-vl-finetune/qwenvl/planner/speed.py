"""Speed of training: FLOPs by the model's shape over measured efficiencies, the host's time, and communication.

The FLOPs of a sample are those of code/benchmarks/training.py: 2 for each weight and token forward, 4 backward if the
weight trains and 2 if only its input needs a gradient; 4 x pairs x width for attention, times 3.
"""

import math
from dataclasses import dataclass

from . import constants as c
from .gpus import Gpus
from .lengths import Lengths
from .settings import Settings
from .shape import Shape


@dataclass(frozen=True)
class Speed:
    """Predicted times of one optimizer step."""

    step: float
    """Seconds of an optimizer step."""
    forward_backward: float
    """Seconds of one forward and backward pass."""
    tokens: float
    """Tokens per second of all GPUs, without padding."""
    share: float
    """Model FLOP/s, relative to the rate of a large matrix product."""
    sent: float
    """Bytes that each GPU sends in an optimizer step."""


def sample_flops(shape: Shape, tokens: float, visual: float, answer: float, clip: float) -> tuple[float, float, float]:
    """Model FLOPs of a sample of these lengths; those of the products in the layers' forward pass; of its attention."""
    pairs = tokens * (tokens + 1) / 2
    matrices, attention = 2.0 * tokens * shape.layer * shape.layers, 4.0 * pairs * shape.hidden * shape.layers
    trains = shape.tunes_language and not shape.lora
    total = (3 if trains else 2) * matrices + 3 * attention
    total += (6 if trains else 4) * answer * shape.hidden * shape.vocabulary
    total += 6.0 * visual * shape.merger
    patches, per_clip = 4 * visual, 4 * clip
    seen = shape.tower_full * per_clip + (shape.tower_blocks - shape.tower_full) * min(shape.window, per_clip)
    tower = 2.0 * patches * shape.tower + 4.0 * patches * seen * shape.tower_hidden
    return total + (3 if shape.tunes_tower else 1) * tower, matrices, attention


def efficiency(hidden: int, tokens: float) -> float:
    """Share of the matrix rate that compiled layers of this size reach in rows of `tokens` tokens."""
    position = math.log(hidden / c.NARROW_HIDDEN) / math.log(c.WIDE_HIDDEN / c.NARROW_HIDDEN)
    position = min(1.0, position)  # nothing wider was measured
    best = max(0.05, c.NARROW + (c.WIDE - c.NARROW) * position)
    overhead = c.NARROW_OVERHEAD + (c.WIDE_OVERHEAD - c.NARROW_OVERHEAD) * position
    return best * tokens / (tokens + overhead)


def predict(shape: Shape, settings: Settings, lengths: Lengths, gpus: Gpus) -> Speed:
    """The speed of these settings."""
    processes, zero, n = gpus.count, settings.zero, shape.trained
    rate = gpus.rate if settings.bf16 else gpus.rate / 8
    flops, products, attention = sample_flops(shape, lengths.mean, lengths.visual, lengths.answer, lengths.clip)
    real = settings.samples * lengths.mean
    row = settings.pack_tokens or settings.samples * (lengths.mean if settings.samples == 1 else lengths.longest)
    rows = lengths.rows_filled(settings.samples, settings.pack_tokens) if settings.pack_tokens else 1
    three, share = zero.stage == 3, settings.checkpointed / shape.layers
    slower = (c.ATTENTION_TIME - 1) * attention
    # The padding of a row costs like tokens.
    work = settings.samples * (flops + 3 * slower + share * (products + attention + slower)) * rows * row / real
    gpu = work / (rate * efficiency(shape.hidden, row))
    if not settings.compiled:
        gpu *= c.EAGER_TIME
    elif not settings.pack_tokens and not lengths.alike:
        gpu *= c.VARYING_TIME
    gpu *= c.LORA_TIME if shape.lora else 1.0
    eager, saving = (c.HOST_SECONDS[three, settings.compiled, flag] for flag in (False, True))
    host = shape.layers * (eager + (saving - eager) * share) * (c.LORA_HOST_FACTOR if shape.lora else 1)
    gpu, host = gpu + c.PASS_SECONDS, host + c.PASS_SECONDS

    others = (processes - 1) / processes
    link = min(gpus.link, c.NETWORK) if gpus.nodes > 1 else gpus.link
    weights, gradients = 2.0 * shape.total * others, 2.0 * n * others
    if three:
        passes = 2 + share  # layers that are recomputed are gathered once more
        sent = settings.accumulation * (passes * weights + gradients)
        each = max(gpu, host, (passes * weights + gradients) / link)
        each += passes / 2 * shape.layers * c.SHARD_SECONDS
        if zero.offload:  # beside the computation
            each = max(each, (passes * 2.0 * shape.total + 2.0 * n) / processes / gpus.host_link)
        end = 0.0
    elif zero.stage == 2:
        sent = (settings.accumulation + 1) * gradients
        each, end = max(gpu, host) + gradients / link + 6.0 * n / gpus.memory_rate, gradients / link
    else:
        sent = 2 * gradients
        each, end = max(gpu, host), 2 * gradients / link
    update = n / processes * (c.OPTIMIZER_BYTES + 2 * settings.states) / gpus.memory_rate
    if zero.offload:
        update = n / c.HOST_ADAM / gpus.nodes
    step = settings.accumulation * each + end + update
    samples = settings.samples * settings.accumulation
    return Speed(step, each, processes * samples * lengths.mean / step, samples * flops / step / gpus.rate, sent)
