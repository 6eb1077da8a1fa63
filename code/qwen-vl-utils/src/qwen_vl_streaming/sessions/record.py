"""What a session was asked, what arrived when and what it wrote: one JSON file, enough to run it again.

Knows nothing of how a session runs.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..common.errors import InputError
from ..common.redact import redacted
from ..model.prompts import Template
from ..timeline.timeline import Layout
from ..timeline.variants import VARIANTS

FORM = 3
"""Of the file; another form is refused. Records of form 1 are of other positions after a video, those of form 2 know a
model by the first numbers of its weights only."""
PIECE = 2**20
"""Numbers of a weight that are summed up at once."""
WAYS = ("serial", "fused", "pipelined")
"""How a session may run; of a variant that is not parallel only the first."""


@dataclass(frozen=True)
class Record:
    """All times are those of the session's clock, in seconds."""

    versions: dict[str, str | None]
    model: dict[str, str]
    """See `identity`."""
    variant: str
    way: str
    chunk: int | None
    template: Template
    layout: Layout
    window: list[int] | None
    """Clips and words that stay in sight, where not all do."""
    schedule: str | list[int]
    """As it was asked for: a name, or k_1 … k_{N-1}."""
    penalty: float
    max_new_tokens: int
    opened: float
    end: str
    """"ended" by its end-of-turn token, "max_new_tokens", "cancelled" or "failed: why"."""
    complete: bool
    """The last clip has become visible."""
    bare: bool
    """That clip was empty: the source said that it was over after its last one had been taken in."""
    arrived: list[float]
    """When each clip arrived."""
    visible: list[float]
    """When each slot began; may be shorter."""
    hashes: list[str]
    """See `clip_hash`."""
    counts: list[int]
    """k_1 … of the slots that began."""
    tokens: list[int]
    slots: list[int]
    times: list[float]
    about: dict
    """What the caller adds: "question", and under "video" the file that the clips are of."""


@contextlib.contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Another path to write to, which takes the place of `path` at the end; nothing is left of it after an error.
    Raises InputError where it cannot be written, for want of space for instance."""
    path = Path(path)
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be written ({error}): make room, or give another place") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def write_record(path: str | Path, record: Record) -> None:
    """Whole or not at all."""
    with whole(path) as beside:
        beside.write_text(json.dumps({"form": FORM, **asdict(record), "end": redacted(record.end)}, indent=1))


def read_record(path: str | Path) -> Record:
    """Raises InputError, naming the file, for what is no record."""
    try:
        data = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"record {path} cannot be read ({error}): give a file that a session wrote") from error
    if not isinstance(data, dict) or data.pop("form", None) != FORM:
        raise InputError(f"record {path} is not a session's record of form {FORM}: record the session again")
    names = {field.name for field in fields(Record)}
    if data.keys() != names:
        raise InputError(f"record {path} lacks or has too much: {', '.join(sorted(data.keys() ^ names))}")
    try:
        template = Template(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.pop("template").items()})
        layout = data.pop("layout")
        layout = Layout(**{**layout, "grid": tuple(layout["grid"])})
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise InputError(f"record {path} has no template and layout of a session ({error})") from error
    record = Record(template=template, layout=layout, **data)
    try:
        fault = _fault(record)
    except (TypeError, ValueError, AttributeError, OverflowError, IndexError) as error:
        fault = f"values of other types than a session's ({error})"
    if fault:
        raise InputError(f"record {path} contradicts itself: {fault}")
    return record


def _fault(record: Record) -> str | None:
    """How a record contradicts itself. Raises TypeError, ValueError or AttributeError where its values are of other
    types."""
    tokens, counts, times, template = record.tokens, record.counts, record.times, record.template
    variant = VARIANTS.get(record.variant)
    if variant is None or record.way not in (WAYS if variant.parallel else WAYS[:1]):
        return f"a session of variant {record.variant!r} in the way {record.way!r}"
    parts = template.prompt, template.tail, template.header
    if any(type(number) is not int or number < 0 for part in parts for number in (*part, template.video)):
        return "a template of other things than token ids"
    if (record.layout.prompt, record.layout.tail, record.layout.header) != tuple(map(len, parts)):
        return f"a template of {', '.join(str(len(part)) for part in parts)} tokens, and another layout of them"
    if any(type(number) is not int or number < 0 for number in (*tokens, *counts, *record.slots)):
        return "tokens, slots or counts that are no numbers from 0 on"
    if record.slots != [slot for slot, count in enumerate(counts, 1) for _ in range(count)]:
        return f"{len(tokens)} tokens in slots of {counts}, but other slots for them"
    if not len(tokens) == len(record.slots) == len(times):
        return f"{len(tokens)} tokens in slots of {counts}, at {len(times)} times"
    if not len(record.visible) == len(counts) <= len(record.arrived) + record.bare:
        return f"{len(counts)} slots, of which {len(record.visible)} began, for {len(record.arrived)} clips"
    if record.bare and not (record.complete and len(counts) == len(record.arrived) + 1):
        return f"{len(counts)} slots for {len(record.arrived)} clips and an empty one"
    asked = record.schedule
    if not isinstance(asked, str) and (len(asked) + 1 < len(counts) or any(type(k) is not int or k < 0 for k in asked)):
        return f"a schedule of {asked} for {len(counts)} slots"
    if record.hashes and len(record.hashes) != len(record.arrived):
        return f"{len(record.hashes)} of {len(record.arrived)} clips"
    for name, order in (("clips", record.arrived), ("slots", record.visible), ("tokens", times)):
        if order != sorted(order) or (order and order[0] < record.opened):
            return f"{name} whose times run backwards"
    if template.end in tokens[:-1] or (record.end == "ended" and tokens[-1:] != [template.end]):
        return f"its end is {record.end!r}, and its tokens end otherwise"
    if len(tokens) > record.max_new_tokens or (record.end == "max_new_tokens" and len(tokens) < record.max_new_tokens):
        return f"{len(tokens)} tokens of at most {record.max_new_tokens}, and its end is {record.end!r}"
    window = record.window
    if window is not None and (len(window) != 2 or any(type(size) is not int or size < 1 for size in window)):
        return f"a window of {window}"
    if not (isinstance(record.about, dict) and isinstance(record.end, str) and float(record.penalty) > 0):
        return "no end, penalty or source"
    if any(not isinstance(record.model.get(name), str) for name in ("path", "dtype", "fingerprint")):
        return f"a model of {record.model}"
    return None


@torch.no_grad()
def identity(model) -> dict[str, str]:
    """What tells a model from others: where it came from, its type, and a hash over the names, shapes and all numbers
    of its weights, rounded to bfloat16 so that it is the same in float32 and in bfloat16.

    Each weight is summed up on its own device, in whole numbers, so that the hash is the same on all devices; a GPU
    takes less than a second for 7B, a CPU some seconds.
    """
    sums, factors = [], {}
    for weight in model.parameters():
        if weight.device not in factors:  # a linear congruential generator's: neighbours have little in common
            count = torch.arange(PIECE // 4, device=weight.device)
            factors[weight.device] = (count * 6364136223846793005 + 1442695040888963407) | 1
        pieces = [checksum(piece, factors[weight.device]) for piece in weight.flatten().split(PIECE)]
        sums.append(torch.stack(pieces) if pieces else torch.zeros(0, dtype=torch.int64))
    digest = hashlib.sha256()
    for (name, weight), found in zip(model.named_parameters(), sums, strict=True):  # asked for together: no waits
        digest.update(f"{name} {tuple(weight.shape)} {found.tolist()}".encode())
    return {
        "path": model.config._name_or_path,
        "dtype": str(model.dtype).removeprefix("torch."),
        "fingerprint": digest.hexdigest(),
    }


def checksum(numbers: Tensor, factors: Tensor) -> Tensor:
    """() int64 of `numbers` (n,) in bfloat16: a sum modulo 2^64 with an odd factor for each four of them, so that it
    changes where any one of them does, and where some change places."""
    bits = numbers.to(torch.bfloat16)
    if bits.data_ptr() % 8 or len(bits) % 4:
        bits = torch.nn.functional.pad(bits, (0, -len(bits) % 4)).clone()
    fours = bits.view(torch.int64)
    return fours.mul(factors[: len(fours)]).sum()


def clip_hash(clip: Tensor) -> str:
    """Of a clip as it was fed, with its shape and type."""
    raw = clip.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(raw.shape)} {raw.dtype}".encode())
    digest.update(raw.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
