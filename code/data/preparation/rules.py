"""Turns the JSON of one sample into a row, or into the reason why it has none. Does not depend on the source."""

import codecs
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from qwen_vl_streaming.common.data_rows import TOKENS_PER_SECOND
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.video_part import part_seconds, video_part

MAX_JSON_BYTES = 1 << 20
DURATION_FIELDS = ("video_duration_in_s", "video_duration", "duration_in_s", "duration")
"""PE-Video has "video_duration_in_s", the first; copies of it on the hub use the others. The first present is used."""
CAPTION_FIELD = "human_caption"

KEPT, BAD = "kept", "bad"
DROPPED = ("too short", "too long", "caption prefix", "too few tokens per second", "too many tokens per second")


class BadSample(Exception):
    """A sample cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Rules:
    """Which samples are kept. Bounds are inclusive; infinity means no bound."""

    min_seconds: float = 5.0
    max_seconds: float = 30.0
    min_tokens_per_second: float = TOKENS_PER_SECOND[0]
    max_tokens_per_second: float = TOKENS_PER_SECOND[1]
    caption_prefix: str = ""
    """Required beginning of a caption, case-insensitive; empty for any caption."""

    def __post_init__(self):
        for name, low, high in (
            ("seconds", self.min_seconds, self.max_seconds),
            ("tokens-per-second", self.min_tokens_per_second, self.max_tokens_per_second),
        ):
            if not 0 <= low <= high or low == math.inf:
                raise InputError(
                    f"--min-{name} {low:g} and --max-{name} {high:g} are not a range: give 0 <= minimum <= maximum"
                )

    @property
    def counts_tokens(self) -> bool:
        """Whether a rule needs the number of tokens of a caption."""
        return self.min_tokens_per_second > 0 or self.max_tokens_per_second < math.inf

    def as_json(self) -> dict[str, float | str | None]:
        """The rules by name for report.json; None for no bound."""
        return {name: None if value == math.inf else value for name, value in asdict(self).items()}


@dataclass
class Sample:
    """One sample as its source provides it."""

    video_id: str
    where: str
    """The file or tar member, for messages."""
    text: bytes = b""
    """Its JSON."""
    video: str = ""
    """Where the source reads its video; empty if it has none."""
    video_path: str = ""
    """Where its video is or will be, relative to the project's root."""
    error: str = ""
    """Why it cannot be used, if the source has found a reason."""
    caption: str = ""
    """Its caption, if the source has it elsewhere than in the field human_caption."""
    measure_duration: Callable[[], float] | None = None
    """Returns the video's duration in seconds; raises InputError."""
    duration_fields: tuple[str, ...] = DURATION_FIELDS
    """Fields of its JSON that may have the video's duration in seconds."""


@dataclass
class Decision:
    """The outcome of one sample."""

    outcome: str
    """KEPT, BAD or one of DROPPED."""
    reason: str = ""
    """Why it is BAD: the problem, and after a colon the details of this sample."""
    seconds: float | None = None
    """Of the video, or of the part of it that the row names."""
    tokens: int | None = None
    """None if another rule has dropped the sample before its tokens were counted."""
    row: str = ""
    """The JSON line of a kept sample."""
    video_seconds: float | None = None
    """Of the whole video."""


def apply_rules(
    samples: Iterable[Sample], rules: Rules, count_tokens: Callable[[list[str]], list[int]]
) -> list[tuple[Sample, Decision]]:
    """Return a decision for each of `samples`. Captions that pass the other rules are tokenized in one batch."""
    decisions: list[tuple[Sample, Decision]] = []
    remaining: list[tuple[Sample, Decision, dict[str, Any], str, float]] = []
    for sample in samples:  # measure_duration works only until the next sample is read
        try:
            data = read_object(sample)
            caption = sample.caption or read_text(data, CAPTION_FIELD)
            video_seconds = read_seconds(data, sample)
            seconds = read_part_seconds(data, sample, video_seconds)
        except BadSample as error:
            decisions.append((sample, Decision(BAD, str(error))))
            continue
        dropped = duration_and_prefix_rules(caption, seconds, rules)
        decisions.append((sample, Decision(dropped or KEPT, seconds=seconds, video_seconds=video_seconds)))
        if not dropped:
            remaining.append((*decisions[-1], data, caption, seconds))
    counts = count_tokens([caption for *_, caption, _ in remaining]) if remaining else []
    for (sample, decision, data, _, seconds), tokens in zip(remaining, counts, strict=True):
        decision.tokens = tokens
        decision.outcome = speaking_rate_rule(tokens, seconds, rules) or KEPT
        if decision.outcome == KEPT:
            try:
                decision.row = write_row(data, sample, decision.video_seconds)
            except BadSample as error:
                decision.outcome, decision.reason = BAD, str(error)
    return decisions


def duration_and_prefix_rules(caption: str, seconds: float, rules: Rules) -> str:
    """The rule that drops a sample before its tokens are counted, or an empty string."""
    if seconds < rules.min_seconds:
        return "too short"
    if seconds > rules.max_seconds:
        return "too long"
    if rules.caption_prefix and not caption.lower().startswith(rules.caption_prefix.lower()):
        return "caption prefix"
    return ""


def speaking_rate_rule(tokens: int, seconds: float, rules: Rules) -> str:
    """The rule by which the tokens per second drop a sample, or an empty string."""
    if tokens < rules.min_tokens_per_second * seconds:
        return "too few tokens per second"
    return "too many tokens per second" if tokens > rules.max_tokens_per_second * seconds else ""


def read_object(sample: Sample) -> dict[str, Any]:
    """Parse the JSON object of `sample`. Raises BadSample."""
    if sample.error:
        raise BadSample(sample.error)
    if len(sample.text) > MAX_JSON_BYTES:
        raise BadSample("JSON is too large")
    try:
        data = json.loads(sample.text.removeprefix(codecs.BOM_UTF8).decode())
    except UnicodeDecodeError as error:
        raise BadSample("JSON is not UTF-8") from error
    except RecursionError as error:
        raise BadSample("JSON is nested too deeply") from error
    except ValueError as error:
        raise BadSample("JSON is empty" if not sample.text.strip() else "JSON is broken") from error
    if not isinstance(data, dict):
        raise BadSample("JSON is not an object")
    return data


def read_text(data: dict[str, Any], field: str) -> str:
    """The text in `field`, stripped. Raises BadSample."""
    text = data.get(field)
    if text is None:
        raise BadSample(f"no {field}")
    if not isinstance(text, str):
        raise BadSample(f"{field} is not text")
    if not text.strip():
        raise BadSample(f"{field} is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadSample(f"{field} is not valid Unicode") from error
    return text.strip()


def read_seconds(data: dict[str, Any], sample: Sample) -> float:
    """The duration in the JSON, else that of the video. Raises BadSample."""
    field = next((name for name in sample.duration_fields if data.get(name) is not None), None)
    if field is None:
        if sample.measure_duration is None:
            raise BadSample("no duration in the JSON: the sample has no video to read it from")
        try:
            return sample.measure_duration()
        except InputError as error:
            raise BadSample(f"no duration in the JSON: {error}") from error
    value = data[field]
    try:
        seconds = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise BadSample(f"{field} is not a duration: {str(value)[:40]!r}")
    return seconds


def read_part_seconds(data: dict[str, Any], sample: Sample, seconds: float) -> float:
    """The length of the part of the video that the JSON names: its `seconds` if it names none. Raises BadSample."""
    try:
        part = video_part(data)
    except InputError as error:
        raise BadSample(f"part of the video is not valid: {error}") from error
    try:
        return part_seconds(sample.video_path or sample.video_id, part, seconds)
    except InputError as error:
        raise BadSample(f"part of the video is missing: {error}") from error


def write_row(data: dict[str, Any], sample: Sample, seconds: float | None) -> str:
    """Return the JSON line of a kept sample: all fields of its JSON, with `video_id`, `video_path` and
    `video_duration_in_s` set. If the source has no video, a `video_path` in the JSON is kept. Raises BadSample."""
    named = data.get("video_path")
    if not sample.video and isinstance(named, str) and named.strip():
        sample.video_path = named
    own = {"video_id": sample.video_id, "video_path": sample.video_path, "video_duration_in_s": seconds}
    try:
        line = json.dumps({**data, **own}, ensure_ascii=False, allow_nan=False)
        line.encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise BadSample("JSON contains text or a number that cannot be written back") from error
    return line
