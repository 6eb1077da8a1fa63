"""The record of a session: what was asked, what arrived when, what was written. One JSON file, enough to replay it.

Knows nothing of how a session runs.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.errors import InputError
from ..common.files import write_file
from ..common.redact import redacted
from ..model.prompts import Template
from ..model.quantization import WEIGHTS, weights_of
from ..timeline.timeline import Layout, model_schedule_fault, model_schedule_most
from ..timeline.variants import VARIANTS

FORM = 3
"""Version of the file format; others are refused. Form 1 had different positions after a video, form 2 hashed only
the first numbers of each weight."""
PIECE = 2**20
"""Numbers of a weight that are hashed at once."""
MOST_STEPS = 1e9
"""Position steps between two clips, at most."""
MODES = ("serial", "fused", "pipelined")
"""Execution modes of a session; a variant that is not parallel has only the first."""


@dataclass(frozen=True)
class Record:
    """One session. All times are in seconds of the session's clock."""

    versions: dict[str, str | None]
    model: dict[str, str]
    """See `identity`."""
    variant: str
    way: str
    """The execution mode: one of MODES."""
    chunk: int | None
    template: Template
    layout: Layout
    window: list[int] | None
    """[clips, tokens] that attention is limited to, or None."""
    schedule: str | list[int]
    """As requested: a name, or k_1 … k_{N-1}. With model-M, slots end with the template's `end_of_slot`."""
    penalty: float
    max_new_tokens: int
    opened: float
    end: str
    """"ended" with the end-of-turn token, or with the end-of-slot token in the last slot, "max_new_tokens", "cancelled"
    or "failed: why"."""
    complete: bool
    """The last slot began."""
    bare: bool
    """The last slot had no clip: the source ended after its last clip had started to enter the model."""
    arrived: list[float]
    """When each clip arrived."""
    visible: list[float]
    """When each slot began; slots of the last clips may be missing."""
    hashes: list[str]
    """See `clip_hash`. Empty where one is not known, because a process was killed before it came."""
    counts: list[int]
    """k_1 … of the slots that began: tokens written in each."""
    tokens: list[int]
    slots: list[int]
    times: list[float]
    about: dict
    """Added by the caller: "question", and under "video" the file that the clips come from."""


def write_record(path: str | Path, record: Record) -> None:
    """Write `record` to `path`, whole or not at all. Raises InputError if that fails."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        data = {"form": FORM, **asdict(record), "end": redacted(record.end)}
        if record.template.end_of_slot is None:  # left out, so that versions that do not know it read the record
            del data["template"]["end_of_slot"]
        text = json.dumps(data, indent=1)
        write_file(path, text, report=False)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error}): free some space, or give another path") from error


def read_record(path: str | Path) -> Record:
    """Read a record. Raises InputError, which names the file, if it is not one or contradicts itself."""
    try:
        data = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"record {path} cannot be read ({error}): give the record of a session") from error
    if not isinstance(data, dict) or data.pop("form", None) != FORM:
        raise InputError(f"record {path} is not a session's record of form {FORM}: record the session again")
    names = {field.name for field in fields(Record)}
    if data.keys() != names:
        raise InputError(f"record {path} has missing or unknown fields: {', '.join(sorted(data.keys() ^ names))}")
    try:
        ids: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.pop("template").items()}
        template = Template(**ids)
        layout = data.pop("layout")
        layout = Layout(**{**layout, "grid": tuple(layout["grid"])})
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise InputError(f"record {path} has no valid template and layout ({error})") from error
    record = Record(template=template, layout=layout, **data)
    try:
        fault = _fault(record)
    except (TypeError, ValueError, AttributeError, OverflowError, IndexError) as error:
        fault = f"values of unexpected types ({error})"
    if fault:
        raise InputError(f"record {path} contradicts itself: {fault}")
    return record


def _fault(record: Record) -> str | None:
    """How a record contradicts itself, or None. Raises TypeError, ValueError, AttributeError, OverflowError or
    IndexError for values of unexpected types."""
    tokens, counts, times, template = record.tokens, record.counts, record.times, record.template
    lists = (tokens, counts, times, record.slots, record.arrived, record.visible, record.hashes)
    if not all(isinstance(each, list) for each in lists):
        return "values of unexpected types: its tokens, slots, times, counts, arrived, visible and hashes must be lists"
    variant = VARIANTS.get(record.variant)
    if variant is None or record.way not in (MODES if variant.parallel else MODES[:1]):
        return f"variant {record.variant!r} cannot run in mode {record.way!r}"
    parts = template.prompt, template.tail, template.header
    if any(type(number) is not int or number < 0 for part in parts for number in (*part, template.video)):
        return "the template has values that are not token ids"
    if template.end_of_slot is not None and (type(template.end_of_slot) is not int or template.end_of_slot < 0):
        return f"its end-of-slot token is {template.end_of_slot!r}"
    if (record.layout.prompt, record.layout.tail, record.layout.header) != tuple(map(len, parts)):
        return f"the template's parts have {', '.join(str(len(part)) for part in parts)} tokens, but the layout differs"
    grid, steps = record.layout.grid, record.layout.steps_per_clip
    if len(grid) != 2 or any(type(side) is not int or side < 1 for side in grid):
        return f"its grid is {list(grid)}, not two integers of at least 1"
    if type(steps) not in (int, float) or not 0 < steps <= MOST_STEPS:
        return f"its steps_per_clip are {steps}, not a number above 0 and at most {MOST_STEPS:g}"
    if any(type(number) is not int or number < 0 for number in (*tokens, *counts, *record.slots)):
        return "tokens, slots or counts that are not integers of at least 0"
    if sum(counts) != len(tokens):  # before a list of as many slots is made
        return f"its counts {counts} are not those of its {len(tokens)} tokens"
    if record.slots != [slot for slot, count in enumerate(counts, 1) for _ in range(count)]:
        return f"the slots of its {len(tokens)} tokens do not match its counts {counts}"
    if not len(tokens) == len(record.slots) == len(times):
        return f"it has {len(tokens)} tokens, but counts {counts} and {len(times)} times"
    if not len(record.visible) == len(counts) <= len(record.arrived) + record.bare:
        return f"it has {len(counts)} slots, but {len(record.visible)} start times and {len(record.arrived)} clips"
    if record.bare and not (record.complete and len(counts) == len(record.arrived) + 1):
        return f"it has {len(counts)} slots for {len(record.arrived)} clips and an empty one"
    asked = record.schedule
    if not isinstance(asked, str) and (len(asked) + 1 < len(counts) or any(type(k) is not int or k < 0 for k in asked)):
        return f"its schedule {asked} does not fit its {len(counts)} slots"
    most = model_schedule_most(asked) if isinstance(asked, str) else None
    if most and (fault := model_schedule_fault(tokens, counts, most, template.end_of_slot, record.complete)):
        return f"its schedule is {asked}, but {fault}"
    if record.hashes and len(record.hashes) != len(record.arrived):
        return f"it has {len(record.hashes)} hashes for {len(record.arrived)} clips"
    for name, order in (("clips", record.arrived), ("slots", record.visible), ("tokens", times)):
        if order != sorted(order) or (order and order[0] < record.opened):
            return f"the times of its {name} run backwards"
    ends = template.ends(tokens, record.slots, len(counts) if record.complete else None)
    if (ends and ends[0] < len(tokens) - 1) or (record.end == "ended" and not ends):
        return f"its end is {record.end!r}, but its tokens end differently"
    if len(tokens) > record.max_new_tokens or (record.end == "max_new_tokens" and len(tokens) < record.max_new_tokens):
        return f"it has {len(tokens)} tokens of at most {record.max_new_tokens}, but its end is {record.end!r}"
    window = record.window
    if window is not None and (len(window) != 2 or any(type(n) is not int or not 0 < n < 2**31 for n in window)):
        return f"its window is {window}, not two integers from 1 to {2**31 - 1}"
    if not (isinstance(record.about, dict) and isinstance(record.end, str) and 0 < float(record.penalty) < 1e18):
        return "its end, penalty or about is missing"
    if any(not isinstance(record.model.get(name), str) for name in ("path", "dtype", "fingerprint")):
        return f"its model is {record.model}"
    if record.model.get("weights") not in (None, *WEIGHTS):
        return f"its weights are {record.model['weights']}, not one of {', '.join(WEIGHTS)}"
    return None


@torch.no_grad()
def identity(model) -> dict[str, str]:
    """Identifies a model: its path, its dtype, "weights" if they are quantized, and a hash of the names, shapes and
    values of all weights, rounded to bfloat16 so that float32 and bfloat16 give the same hash.

    Weights are summed on their device in integers, so that all devices give the same hash. For 7B this takes less than
    a second on a GPU, some seconds on a CPU.
    """
    sums, factors = [], {}
    for weight in model.parameters():
        if weight.device not in factors:  # of a linear congruential generator, so that neighbours are unrelated
            count = torch.arange(PIECE // 4, device=weight.device)
            factors[weight.device] = (count * 6364136223846793005 + 1442695040888963407) | 1
        pieces = [checksum(piece, factors[weight.device]) for piece in weight.flatten().split(PIECE)]
        sums.append(torch.stack(pieces) if pieces else torch.zeros(0, dtype=torch.int64))
    digest = hashlib.sha256()
    for (name, weight), found in zip(model.named_parameters(), sums, strict=True):  # read once all sums are launched
        digest.update(f"{name} {tuple(weight.shape)} {found.tolist()}".encode())
    return {
        "path": model.config._name_or_path,
        "dtype": str(model.dtype).removeprefix("torch."),
        **({} if (weights := weights_of(model)) is None else {"weights": weights}),
        "fingerprint": digest.hexdigest(),
    }


def describe_precision(model: dict[str, str]) -> str:
    """The dtype of a recorded model, and that of its weights if they are quantized."""
    return f"{model['dtype']} with {model['weights']} weights" if "weights" in model else model["dtype"]


def checksum(numbers: Tensor, factors: Tensor) -> Tensor:
    """() int64 checksum of `numbers` (n,) in bfloat16: a sum modulo 2^64 with an odd factor for each four of them. It
    changes if any of them changes, and if some are exchanged."""
    bits = numbers.to(torch.bfloat16)
    if bits.data_ptr() % 8 or len(bits) % 4:
        bits = torch.nn.functional.pad(bits, (0, -len(bits) % 4)).clone()
    fours = bits.view(torch.int64)
    return fours.mul(factors[: len(fours)]).sum()


def clip_hash(clip: Tensor) -> str:
    """SHA-256 of a clip as it was fed, with its shape and dtype."""
    raw = clip.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(raw.shape)} {raw.dtype}".encode())
    digest.update(raw.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
