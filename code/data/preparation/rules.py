"""From the JSON of one sample to a row or the reason why there is none. Knows nothing about where samples come from."""

import codecs
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from qwen_vl_streaming.common.errors import InputError

MAX_JSON_BYTES = 1 << 20
DURATION_FIELDS = ("video_duration_in_s", "video_duration", "duration_in_s", "duration")
"""PE-Video says "video_duration_in_s"; copies of it on the hub use the others. The first that is there counts."""
CAPTION_FIELD = "human_caption"

KEPT, BAD = "kept", "bad"
DROPPED = ("too short", "too long", "caption prefix", "too few tokens per second", "too many tokens per second")


class BadSample(Exception):
    """A sample that cannot be used; the message says why."""


@dataclass(frozen=True)
class Rules:
    """Which samples are kept: every bound is itself allowed, and infinity is none."""

    min_seconds: float = 5.0
    max_seconds: float = 30.0
    min_tokens_per_second: float = 3.0
    max_tokens_per_second: float = 5.0
    caption_prefix: str = ""
    """How a caption must begin, in any case of letters; empty for no such rule."""

    def __post_init__(self):
        for name, low, high in (
            ("seconds", self.min_seconds, self.max_seconds),
            ("tokens-per-second", self.min_tokens_per_second, self.max_tokens_per_second),
        ):
            if not 0 <= low <= high or low == math.inf:
                raise InputError(f"--min-{name} {low:g} and --max-{name} {high:g} leave nothing between them")

    @property
    def counts_tokens(self) -> bool:
        """Whether a bound needs the tokens of a caption."""
        return self.min_tokens_per_second > 0 or self.max_tokens_per_second < math.inf

    def numbers(self) -> dict[str, float | str | None]:
        """For the report: each rule by name, None for a bound that is none."""
        return {name: None if value == math.inf else value for name, value in asdict(self).items()}


@dataclass
class Sample:
    """What a source knows of one sample."""

    video_id: str
    where: str
    """The file or member, for messages."""
    text: bytes = b""
    """Its JSON."""
    video: str = ""
    """Where its video is, as the source itself reads it; empty where there is none."""
    video_path: str = ""
    """Where its video is or belongs, relative to the project's root."""
    fault: str = ""
    """Why it cannot be used, where the source knows already."""
    measure: Callable[[], float] | None = None
    """The video's real duration in seconds; raises InputError."""


@dataclass
class Verdict:
    """What became of a sample."""

    outcome: str
    """KEPT, BAD or one of DROPPED."""
    reason: str = ""
    """Why it is BAD: what is wrong, and after a colon what is special to this sample."""
    seconds: float | None = None
    tokens: int | None = None
    """Counted only where the cheaper rules let the sample through."""
    row: str = ""
    """The finished JSON line of a kept sample."""


def judge(
    samples: Iterable[Sample], rules: Rules, count_tokens: Callable[[list[str]], list[int]]
) -> list[tuple[Sample, Verdict]]:
    """A verdict for each of `samples`, the cheap rules first and all captions left over in one batch."""
    verdicts: list[tuple[Sample, Verdict]] = []
    still_open: list[tuple[Sample, Verdict, dict[str, Any], str, float]] = []
    for sample in samples:  # a sample can be measured only until the next one is read
        try:
            data = read_object(sample)
            caption = read_text(data, CAPTION_FIELD)
            seconds = read_seconds(data, sample)
        except BadSample as error:
            verdicts.append((sample, Verdict(BAD, str(error))))
            continue
        dropped = cheap_rules(caption, seconds, rules)
        verdicts.append((sample, Verdict(dropped or KEPT, seconds=seconds)))
        if not dropped:
            still_open.append((*verdicts[-1], data, caption, seconds))
    counts = count_tokens([caption for *_, caption, _ in still_open]) if still_open else []
    for (sample, verdict, data, _, seconds), tokens in zip(still_open, counts, strict=True):
        verdict.tokens = tokens
        if tokens < rules.min_tokens_per_second * seconds:
            verdict.outcome = "too few tokens per second"
        elif tokens > rules.max_tokens_per_second * seconds:
            verdict.outcome = "too many tokens per second"
        else:
            try:
                verdict.row = write_row(data, sample, seconds)
            except BadSample as error:
                verdict.outcome, verdict.reason = BAD, str(error)
    return verdicts


def cheap_rules(caption: str, seconds: float, rules: Rules) -> str:
    """The rule that drops a sample without its tokens being counted, or an empty string."""
    if seconds < rules.min_seconds:
        return "too short"
    if seconds > rules.max_seconds:
        return "too long"
    if rules.caption_prefix and not caption.lower().startswith(rules.caption_prefix.lower()):
        return "caption prefix"
    return ""


def read_object(sample: Sample) -> dict[str, Any]:
    """The JSON object of `sample`. Raises BadSample."""
    if sample.fault:
        raise BadSample(sample.fault)
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
    """The text in `field` without blanks around it. Raises BadSample."""
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
    """The duration that the JSON states, else the video's own. Raises BadSample."""
    field = next((name for name in DURATION_FIELDS if data.get(name) is not None), None)
    if field is None:
        if sample.measure is None:
            raise BadSample("no duration in the JSON: there is no video to measure either")
        try:
            return sample.measure()
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


def write_row(data: dict[str, Any], sample: Sample, seconds: float) -> str:
    """The finished JSON line: all of PE-Video's fields and the project's own four. Where the source has no video, the
    JSON's own `video_path` stays, if it has one. Raises BadSample."""
    named = data.get("video_path")
    if not sample.video and isinstance(named, str) and named.strip():
        sample.video_path = named
    own = {"video_id": sample.video_id, "video_path": sample.video_path, "video_duration_in_s": seconds}
    try:
        line = json.dumps({**data, **own}, ensure_ascii=False, allow_nan=False)
        line.encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise BadSample("JSON holds text or a number that cannot be written back") from error
    return line
