"""The choice: of all settings that the user's flags allow and that fit, the fastest by prediction."""

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from qwen_vl_streaming.common.errors import InputError

from ..arguments import check_checkpoint_layers
from ..training_arguments import PAPER_SAMPLES, accumulation_steps
from . import constants as c
from .gpus import Gpus
from .lengths import Lengths
from .memory import Memory, estimate, host_bytes
from .optimizers import ADAM
from .settings import Settings, Zero, configurations
from .shape import Shape
from .speed import Speed, predict

EQUAL = 0.985
"""Predicted speeds this close count as equal; the one with less memory is taken."""
HOST_SHARE = 0.7
"""Offload, whose speed depends on a host that is not known, counts as this much of what is predicted for it."""
ERROR = 0.10
"""A prediction may be off by this much: settings given by the user are refused only beyond it."""
BATCH = ("samples", "accumulation")
"""Fields of Given whose product is the number of samples of a step."""
RECOMPUTED = ("checkpointing", "checkpointed")
"""Fields of Given about the layers that are recomputed."""
OWN_RISK = "; --no_plan trains with your own flags, unchecked"
"""The end of a refusal that rests on a prediction."""


@dataclass(frozen=True)
class Given:
    """What the user decided; None or absent where the planner is free."""

    zero: Zero | None = None
    samples: int | None = None
    pack_tokens: int | None = None
    accumulation: int | None = None
    checkpointing: bool | None = None
    checkpointed: int | None = None
    """Layers, from --checkpoint_layers."""
    compiled: bool | None = None
    flexible: bool = True
    """Whether the attention that was asked for takes packed rows and compiled layers, as all but flash-attn's."""
    bf16: bool = True
    states: float = ADAM
    """Bytes of the optimizer's states per trained parameter."""
    step: int | None = None
    """Samples of an optimizer step to keep, where the flags that gave them are free."""
    flags: dict[str, str] = field(default_factory=dict)
    """How to name each of these fields that was given, such as --pack_tokens 6144."""

    def describe(self) -> str:
        return " ".join(self.flags.values())

    def without(self, names: Sequence[str]) -> "Given":
        """The same with these fields free."""
        flags = {key: text for key, text in self.flags.items() if key not in names}
        return replace(self, **dict.fromkeys(names), flags=flags)


@dataclass(frozen=True)
class Plan:
    """Settings with what is predicted for them."""

    settings: Settings
    memory: Memory
    speed: Speed
    needed: float
    """Bytes of a GPU, with CUDA, NCCL and slack."""
    fits: bool


def step_samples(given: Given) -> int:
    """Samples of each GPU in an optimizer step: the paper's, unless asked.

    Raises InputError where the flags contradict each other.
    """
    if given.step is not None:
        return given.step
    if given.accumulation is not None:
        return given.accumulation * (given.samples or 1)
    if given.samples is not None:
        accumulation_steps(given.samples)
    return PAPER_SAMPLES


def check_given(given: Given, shape: Shape) -> None:
    """Raises InputError for flags that contradict each other."""
    check_checkpoint_layers(given.checkpointed, given.checkpointing is not False, shape.layers)
    if given.pack_tokens and not given.flexible:
        raise InputError(f"--pack_tokens {given.pack_tokens}: the attention does not support packed samples: omit it")


def candidates(shape: Shape, lengths: Lengths, given: Given) -> Iterator[Settings]:
    """All settings that the flags allow, but for the number of recomputed layers, which is 0 or all."""
    total = step_samples(given)
    if given.samples is not None:
        batches = [given.samples]
    elif given.accumulation is not None:
        batches = [1]
    else:
        batches = [size for size in range(1, total + 1) if total % size == 0]
    for zero in [given.zero] if given.zero else configurations():
        for compiled in (True, False) if given.compiled is None else (given.compiled,):
            if compiled and not given.flexible:
                continue
            for samples in batches:
                for pack in _rows(lengths, given, samples, compiled):
                    yield Settings(zero, samples, pack, total // samples, 0, compiled, given.bf16, given.states)


def _rows(lengths: Lengths, given: Given, samples: int, compiled: bool) -> Iterator[int]:
    """Lengths of the packed row to consider; 0: a row for each sample."""
    if given.pack_tokens is not None:
        if (
            samples == 1
            or given.samples is not None
            or not given.pack_tokens
            or lengths.row(samples) <= given.pack_tokens
        ):
            yield given.pack_tokens
        return
    row = lengths.row(samples) if given.flexible else 0
    if row and (samples > 1 or compiled) and (samples == 1 or row <= c.MOST_ROW or given.samples is not None):
        yield row
    if not row or (samples == 1 and not (compiled and lengths.alike)):
        yield 0


def _checkpointed(shape: Shape, given: Given) -> list[int]:
    """Numbers of recomputed layers to choose from, in ascending order."""
    if given.checkpointed is not None:
        return [given.checkpointed]
    if given.checkpointing is None:
        return list(range(shape.layers + 1))
    return [shape.layers if given.checkpointing else 0]


def evaluate(settings: Settings, shape: Shape, lengths: Lengths, gpus: Gpus) -> Plan:
    """What is predicted for `settings`."""
    memory = estimate(shape, settings, lengths, gpus.count)
    outside = (0 if gpus.here else c.CONTEXT) + (c.NCCL if gpus.count > 1 else 0)
    needed = memory.peak * (1 + c.SLACK) + outside
    speed = predict(shape, settings, lengths, gpus)
    return Plan(settings, memory, speed, needed, needed <= gpus.memory)


def plans(shape: Shape, lengths: Lengths, gpus: Gpus, given: Given, host: float = math.inf) -> Iterator[Plan]:
    """A plan for each candidate: the one with the fewest recomputed layers that fits, else the smallest."""
    layers = _checkpointed(shape, given)

    for settings in candidates(shape, lengths, given):
        if settings.zero.offload and host_bytes(shape, given.states) > host and given.zero is None:
            continue

        def predicted(recomputed: int, settings: Settings = settings) -> Plan:
            return evaluate(replace(settings, checkpointed=recomputed), shape, lengths, gpus)

        # Memory falls with each layer that is recomputed.
        first = bisect_left(layers, True, hi=len(layers) - 1, key=lambda count: predicted(count).fits)
        yield predicted(layers[first])


def worth(plan: Plan) -> float:
    """Predicted tokens/s, less where they depend on the host."""
    return plan.speed.tokens * (HOST_SHARE if plan.settings.zero.offload else 1.0)


def fastest(found: list[Plan]) -> Plan | None:
    """The plan that fits and is worth most; of those worth about as much, the one that needs the least memory."""
    fitting = [plan for plan in found if plan.fits]
    if not fitting:
        return None
    best = max(worth(plan) for plan in fitting)
    return min((plan for plan in fitting if worth(plan) >= EQUAL * best), key=lambda plan: plan.needed)


def choose(shape: Shape, lengths: Lengths, gpus: Gpus, given: Given, host: float = math.inf) -> Plan:
    """The plan for `gpus` within what the user has `given`; `host` is the free host memory of a machine in bytes.

    Raises InputError where nothing fits, with the nearest that does.
    """
    check_given(given, shape)
    found = list(plans(shape, lengths, gpus, given, host))
    if best := fastest(found):
        return best
    least = min(found, key=lambda plan: plan.needed)
    if given.flags and least.needed * (1 - ERROR) <= gpus.memory:
        return least  # it may work, and the printed plan says so
    need = f"needs {least.needed / c.GIB:.1f} GiB a GPU, and there are {gpus.memory / c.GIB:.1f}"
    near = [
        (name, plan)
        for name in given.flags
        if (plan := fastest(list(plans(shape, lengths, gpus, _freed(given, name), host))))
    ]
    if near:
        name, plan = max(near, key=lambda pair: worth(pair[1]))
        omit = "" if name in BATCH else f"omit {given.flags[name]}; "  # omitting only one would change the step
        changed = command_line(plan.settings.flags(shape.layers))
        raise InputError(f"{given.describe()} {need}: {omit}the nearest that fits is {changed}{OWN_RISK}")
    free = Given(flexible=given.flexible, bf16=given.bf16, states=given.states, step=step_samples(given))
    if given.flags and (plan := fastest(list(plans(shape, lengths, gpus, free, host)))):
        changed = command_line(plan.settings.flags(shape.layers))
        raise InputError(f"{given.describe()} {need}: the nearest that fits is {changed}{OWN_RISK}")
    adapters = "" if shape.lora else "--lora_enable True, "
    least = min([least, *plans(shape, lengths, gpus, free)], key=lambda plan: plan.needed)
    raise InputError(
        f"{gpus.describe()}: too little to train this model of {shape.billions} parameters, which needs "
        f"{least.needed / c.GIB:.1f} GiB a GPU with {least.settings.zero.title}: use {adapters}more GPUs, "
        f"larger ones, or a smaller --max_pixels_per_video{gpus.occupied}{OWN_RISK}"
    )


def _freed(given: Given, name: str) -> Given:
    """`given` with one field free, and with it what contradicts a new value. A step keeps its samples."""
    if name in BATCH:
        return replace(given.without(BATCH), step=step_samples(given))
    return given.without(RECOMPUTED if name in RECOMPUTED else [name])


def command_line(flags: dict[str, object]) -> str:
    """Flags as one would type them."""
    return " ".join(f"--{name} {value}" for name, value in flags.items())
