"""When a caption says what happens: delays, the shares of events that are named in time, Timeliness-F1 and PAUC. Knows
nothing about models and files.

Clip i of a video arrives at i seconds (`seconds` per clip, to be exact), and a token of slot i is written between the
arrivals of clips i and i+1. It counts as said when clip i arrives. So an event at second 3 is on screen in clip 4, can
be named at 4 at the earliest, and has a delay of at least one second. What is said at 3 or before was said before a
frame of it had arrived: that is *early*, and no delay is computed. Frames are sampled twice a clip: an event at 2.5 is
in clip 3, and one at 2.6 in clip 4, as one at 3. `naming` says which word names an event.

**Timeliness-F1** follows SPOT-Bench (Chatterjee et al. 2026, "Don't Pause! Every prediction matters in a streaming
video", arXiv 2604.24317), as its public code computes it (github.com/dibschat/SPOT-Bench, evals/metrics.py, scorer.py
and config.py at commit 035eea2, read; the paper was not available). A response at τ to an event at t has the timeliness
T(τ) = 1 for |τ - t| ≤ OFFSET, exp(-(t - OFFSET - τ)² / 2σ²) before that, with σ = SIGMA_EARLY, and exp(-(τ - t -
OFFSET)² / 2σ²) after it, with σ = SIGMA_LATE. The responses, in order, are matched with every event for which T ≥
THRESHOLD and the meaning is right; an event takes at most OCCUPANCY of them. With TP the number of events with a
response, TPw the sum of their best T, FN the events without one, and FP the responses that match no event, all over all
videos: P = TPw / (TP + FP), R = TPw / (TP + FN), F1 = 2PR / (P + R). The constants are those of its detection of action
boundaries (ABD) and of its question answering (SQA). What differs here: its judge, an LLM for most of its tasks, is
replaced by `naming`; a response is a sentence of the caption, and its time is that of the word that names the event, as
sentences are written over several slots. So values can be compared with each other, not with its leaderboard.

**PAUC** follows ProactiveVideoQA (Wang et al. 2025, arXiv 2507.09313, equation 1 and section 3.1; its scripts were not
available). Of the replies at τ_1 < … < τ_P within the reply span (start, end) of an event, the score s_p in [0, S] says
how well those up to p, together, tell what happened. Before the first it is 0.5. Times are moved toward the start by ω:
τ' = start + (1 - ω)(τ - start). Then

    PAUC = [(τ'_1 - start) 0.5 + Σ_{p<P} (τ'_{p+1} - τ'_p) s_p + (end - τ'_P) s_P] / [(end - start) S],

with S = 2 and ω = 0.5 as recommended there; without a reply it is 0.5 / S. It is averaged over the events of a video,
then over the videos. What differs here: the score, by an LLM there, is 2 if `naming` finds the event in one of the
sentences, 1 if one of them has at least half of the key words that are needed, else 0. A span is at least REPLY seconds
long, because many references have no end.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, quantiles

from qwen_vl_streaming.common.numbers import is_number

from metrics import lag
from metrics.naming import SLACK, Event, Spoken, align, first_slot, spoken_words

WITHIN = (1, 2, 3)
"""Seconds after an event within which it is named in time."""
TOLERANCE = 1.0
"""Seconds after the end of a video up to which an event is left out, and not an error."""
QUIET = 3
"""A slot is quiet if nothing began in so many seconds before it."""

OFFSET, SIGMA_EARLY, SIGMA_LATE, THRESHOLD, OCCUPANCY = 1.0, 1.48, 0.74, 0.05, 5
"""SPOT-Bench's for ABD and SQA; times in seconds."""

OMEGA, NOTHING, BEST = 0.5, 0.5, 2.0
"""ProactiveVideoQA's ω, the score without a reply, and the largest score S."""
REPLY = 5.0
"""Seconds of the shortest reply span."""


@dataclass(frozen=True)
class Named:
    """An event, and when the caption named it."""

    event: Event
    said: float | None
    """When the word was said that names it, in seconds of the video; None if it was never named."""
    seen: float
    """When the first clip with a frame of the event arrives, in seconds of the video."""

    @property
    def early(self) -> bool:
        """Whether it was only named before a frame of it had arrived."""
        return self.said is not None and self.said < self.seen - SLACK

    @property
    def delay(self) -> float | None:
        """Seconds from the event to the word that names it; None if it was named early or never."""
        return None if self.said is None or self.early else self.said - self.event.time


@dataclass(frozen=True)
class Timing:
    """The timeliness of the caption of one video."""

    named: list[Named]
    """The events in order of time; at least one."""
    timeliness: list[float]
    """T of the best response to each event, 0 without one."""
    unmatched: int
    """Responses that match no event."""
    pauc: float
    quiet: int
    """Slots before the last in which nothing has happened for QUIET seconds."""
    quiet_words: int
    """Words that they wrote."""
    seconds: float
    """Per clip."""


class TimesDoNotFit(ValueError):
    """The events are not those of the video; the message is the reason."""


def events_within(row: Mapping, events: Sequence[Event]) -> list[Event]:
    """The `events` that begin before the video of a row has ended, in order of time. One that begins up to TOLERANCE
    later is left out, as published times are rounded. Raises TimesDoNotFit for one that begins later than that, and
    ValueError as `lag.check` and `clip_seconds` do."""
    lag.check(row)
    end = row["clips"] * clip_seconds(row)
    if late := [event.time for event in events if event.time > end + TOLERANCE]:
        raise TimesDoNotFit(f"video {row['video_id']} ends at {end:g} s, but has an event at {late[0]:g} s")
    return sorted((event for event in events if event.time < end), key=lambda event: event.time)


def measure(row: Mapping, events: Sequence[Event], decode: Callable[[list[int]], str]) -> Timing:
    """The timeliness of a row of a result file, for a video with `events` (at least one), in order of time and before
    the end of the video. `decode` is as for `lag.measure`. Raises ValueError, with the reason, for a row without slots
    and another tokenizer."""
    pieces = lag.decode_pieces(row, decode)
    seconds, clips = clip_seconds(row), row["clips"]
    spoken = Spoken(spoken_words(pieces, row["slots"]))
    words = [None if i is None else spoken.words[i].slot * seconds for i in align(events, spoken, seconds, clips)]
    times = [naming_times(spoken, event, seconds) for event in events]
    ends = [spoken.words[span[-1]].slot * seconds for span in spoken.sentences]
    best, unmatched = match_responses([event.time for event in events], times)
    paucs = [pauc_of(spoken, event, found, ends) for event, found in zip(events, times, strict=True)]
    quiet = quiet_slots([event.time for event in events], clips, seconds)
    quiet_words = sum(word.slot in quiet for word in spoken.words)
    seen = [first_slot(event.time, seconds, clips) * seconds for event in events]
    named = [Named(*one) for one in zip(events, words, seen, strict=True)]
    return Timing(named, best, unmatched, fmean(paucs), len(quiet), quiet_words, seconds)


def clip_seconds(row: Mapping) -> float:
    """Seconds per clip of a row, 1 unless it says otherwise. Raises ValueError for other than a positive number."""
    value = row.get("seconds_per_clip", 1.0)
    if not is_number(value) or value <= 0:
        raise ValueError(f"the row of video {row['video_id']} has seconds_per_clip {str(value)[:40]!r}")
    return float(value)


def naming_times(spoken: Spoken, event: Event, seconds: float) -> list[float | None]:
    """When each sentence names the event first, or None."""
    first: dict[int, float] = {}
    for piece in spoken.pieces(event):
        word = spoken.words[piece.last]
        first.setdefault(word.sentence, word.slot * seconds)
    return [first.get(spoken.words[span[0]].sentence) for span in spoken.sentences]


def timeliness(said: float, time: float) -> float:
    """T of a response at `said` to an event at `time`: see above."""
    if said < time - OFFSET:
        return math.exp(-((time - OFFSET - said) ** 2) / (2 * SIGMA_EARLY**2))
    if said > time + OFFSET:
        return math.exp(-((said - time - OFFSET) ** 2) / (2 * SIGMA_LATE**2))
    return 1.0


def match_responses(events: Sequence[float], times: Sequence[Sequence[float | None]]) -> tuple[list[float], int]:
    """The best T of each event, 0 without a response, and the number of responses that match none.

    `events` are times in order; `times[e][r]` is when response r names event e, or None.
    """
    best, taken = [0.0] * len(events), [0] * len(events)
    unmatched = 0
    for response in range(len(times[0])):
        matched = False
        for number, time in enumerate(events):
            said = times[number][response]
            if said is None or taken[number] == OCCUPANCY or (value := timeliness(said, time)) < THRESHOLD:
                continue
            taken[number] += 1
            best[number] = max(best[number], value)
            matched = True
        unmatched += not matched
    return best, unmatched


def pauc_of(spoken: Spoken, event: Event, times: Sequence[float | None], ends: Sequence[float]) -> float:
    """PAUC of one event. Of each sentence, `times` says when it names the event, or None, and `ends` when it ends."""
    end = max(event.time + REPLY, event.end or 0)
    replies, score = [], 0.0
    for span, said, last in zip(spoken.sentences, times, ends, strict=True):
        if event.time < (time := last if said is None else said) < end:
            partly = 2 * spoken.keys_in(span, event) >= event.needed
            score = max(score, BEST if said is not None else BEST / 2 if partly else 0.0)
            replies.append((time, score))
    return area(replies, event.time, end)


def area(replies: Sequence[tuple[float, float]], start: float, end: float, omega: float = OMEGA) -> float:
    """PAUC: the share of the largest area that is below the scores of `replies`, (time, score) in order of time."""
    total, since, score = 0.0, start, NOTHING
    for time, after in replies:
        moved = start + (1 - omega) * (time - start)
        total += (moved - since) * score
        since, score = moved, after
    return (total + (end - since) * score) / ((end - start) * BEST)


def quiet_slots(events: Sequence[float], clips: int, seconds: float) -> set[int]:
    """The slots before the last at whose begin nothing has begun for QUIET seconds."""
    return {i for i in range(1, clips) if not any(0 <= i * seconds - time <= QUIET for time in events)}


def summarize(videos: Sequence[Timing]) -> dict[str, float | int]:
    """The timeliness of all videos (at least one), over all of their events. Shares, TF1 and PAUC are times 100, delays
    in seconds of events that were named after they began; `words_per_quiet_second` is absent without quiet slots."""
    every = [one for video in videos for one in video.named]
    delays = [one.delay for one in every if one.delay is not None]
    best = [value for video in videos for value in video.timeliness]
    found: dict[str, float | int] = {"videos": len(videos), "events": len(every)}
    if delays:
        high = quantiles(delays, n=100, method="inclusive")[94] if len(delays) > 1 else delays[0]
        found |= {"delay_median": median(delays), "delay_95": high}
    for limit in WITHIN:
        found[f"within_{limit}"] = 100 * sum(delay <= limit for delay in delays) / len(every)
    found["never"] = 100 * sum(one.said is None for one in every) / len(every)
    found["early"] = 100 * sum(one.early for one in every) / len(every)
    found["TF1"] = 100 * f1(best, sum(video.unmatched for video in videos))
    found["PAUC"] = 100 * fmean(video.pauc for video in videos)
    if quiet := sum(video.quiet * video.seconds for video in videos):
        found["words_per_quiet_second"] = sum(video.quiet_words for video in videos) / quiet
    return found


def f1(best: Sequence[float], unmatched: int) -> float:
    """Timeliness-F1 from the best T of each event, 0 without a response, and the responses that match no event."""
    weight, matched = sum(best), sum(value > 0 for value in best)
    precision = weight / (matched + unmatched) if matched + unmatched else 0.0
    recall = weight / len(best)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
