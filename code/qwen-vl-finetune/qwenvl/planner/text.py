"""The lines that show a plan."""

import math

from . import constants as c
from .gpus import Gpus
from .lengths import Lengths
from .plan import Plan
from .shape import Shape


def describe(plan: Plan, shape: Shape, lengths: Lengths, gpus: Gpus, steps: int, given: str) -> str:
    """The plan, what it follows from and what is predicted for it, in a few lines."""
    settings, speed, memory = plan.settings, plan.speed, plan.memory
    trained = f"{'LoRA, ' if shape.lora else ''}{shape.trained / 1e9:.2f}B of them train"
    held_out = f" ({lengths.held_out:,} held out)" if lengths.held_out else ""
    lines = [
        f"plan for {gpus.describe()}; {shape.billions} parameters, {trained}; {lengths.rows:,} "
        f"samples{held_out} of {lengths.mean:,.0f} tokens ({lengths.note})",
        f"  {settings.zero.title} ({settings.zero.file}): {why_zero(plan, shape, gpus)}",
        f"  {rows(plan, lengths)}; {settings.samples * settings.accumulation * gpus.count} samples a step: "
        f"{counted(settings.accumulation, 'pass', 'es')} on {counted(gpus.count, 'GPU')}",
        f"  {recomputed(plan, shape)}; layers {'compiled' if settings.compiled else 'not compiled'}",
        f"  predicted: {memory.peak / c.GIB:.1f} GiB a GPU ({largest_terms(plan)}), {speed.tokens:,.0f} tokens/s, "
        f"{speed.share:.0%} of the rate of a large matrix product",
        f"  {counted(steps, 'step')} of {duration(speed.step)}: {duration(steps * speed.step)}, and about "
        f"{'2 minutes' if settings.compiled else 'a minute'} to start",
    ]
    if gpus.nodes > 1:
        # Sending takes 10% of a step at this rate.
        needed = speed.sent / (0.1 * speed.step)
        lines.append(
            f"  network: each GPU sends {speed.sent / 1e9:.1f} GB a step; below {8 * needed / 1e9:.0f} Gbit/s a GPU "
            "that costs more than 10%"
        )
    if given:
        lines.append(f"  as given: {given}")
    if not plan.fits:
        lines.append(
            f"  warning: with fragmentation this needs {plan.needed / c.GIB:.1f} GiB a GPU of "
            f"{gpus.memory / c.GIB:.1f}, and may not fit"
        )
    return "\n".join(lines)


def why_zero(plan: Plan, shape: Shape, gpus: Gpus) -> str:
    """What this stage does here."""
    zero = plan.settings.zero
    if gpus.count == 1 and not zero.offload:
        return "one GPU holds everything"
    if not zero.stage:
        return "every GPU holds everything"
    parts = {1: "optimizer states", 2: "optimizer states and gradients", 3: "everything, weights included"}[zero.stage]
    if zero.offload:
        return f"{parts}, in host memory, since the GPUs are too small"
    then = {1: ", gradients reduced once a step", 2: ", gradients reduced after each pass", 3: ""}[zero.stage]
    return f"{parts} divided among {gpus.count} GPUs{then}"


def rows(plan: Plan, lengths: Lengths) -> str:
    """How the samples lie in rows."""
    settings = plan.settings
    samples = counted(settings.samples, "sample")
    if not settings.pack_tokens:
        return f"{samples} a pass, a row each"
    full = min(1.0, settings.samples * lengths.mean / settings.pack_tokens)
    return f"{samples} in a row of {settings.pack_tokens:,} tokens, {full:.0%} full"


def recomputed(plan: Plan, shape: Shape) -> str:
    """Which activations are recomputed."""
    if not plan.settings.checkpointed:
        return "no activations recomputed"
    if plan.settings.checkpointed == shape.layers:
        return f"activations of all {shape.layers} layers recomputed"
    return f"activations of {plan.settings.checkpointed} of {shape.layers} layers recomputed"


def largest_terms(plan: Plan) -> str:
    """The four largest terms of the peak memory."""
    terms = sorted(plan.memory.terms.items(), key=lambda term: -term[1])
    return ", ".join(f"{name} {size / c.GIB:.1f}" for name, size in terms[:4])


def counted(number: int, what: str, more: str = "s") -> str:
    """Such as 1 GPU or 4 GPUs."""
    return f"{number:,} {what}{more * (number != 1)}"


def duration(seconds: float) -> str:
    """Such as 2.8 s, 12 min or 3.4 h."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6_000 else f"{seconds / 3600:.1f} h"


def count_steps(rows: int, samples_a_step: int, epochs: float, most: int) -> int:
    """Optimizer steps of a run; `most` is --max_steps, or not above 0 for all epochs."""
    return most if most > 0 else max(1, math.ceil(epochs * math.ceil(rows / samples_a_step)))
