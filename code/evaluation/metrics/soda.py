"""SODA_c, the score of a dense captioning as one story. Knows nothing about files and about how captions are made.

Source: Fujita et al., "SODA: Story Oriented Dense Video Captioning Evaluation Framework", ECCV 2020, and its code,
github.com/fujiso/SODA. For a video with predictions p_1 … p_P and references g_1 … g_G, both in the order of their
starts:

    s(i, j) = IoU(g_i, p_j) · METEOR(g_i, p_j)                 without a threshold on the IoU
    S       = max over monotone one-to-one matchings of Σ s(i, j)   by dynamic programming:
              S[i, j] = max(S[i-1, j], S[i, j-1], S[i-1, j-1] + s(i, j))
    precision = S / P,  recall = S / G,  F = 2 · precision · recall / (precision + recall)

A matching is monotone if later predictions are matched with later references. SODA_c is the mean of F over videos.
Taken from the code, where the formulas leave them open:

- IoU = intersection / (union + 1e-8), where the union is at most the sum of both lengths.
- METEOR of a pair is pycocoevalcap's segment score after its PTB tokenizer, with characters outside of ASCII replaced
  by spaces. The code passes the pair to METEOR with the *prediction* as reference and the *reference* as hypothesis,
  and METEOR is not symmetric. So does this file: published values were made that way.
- The references of several annotators are merged into one list (MERGED, the code's default), or F is computed for each
  annotator and the best one counts (BEST, its --multi_reference).
- A video without a prediction counts 0 if the predictions have it with an empty list. One that they do not have at all
  is not counted.

The first public version of that code (commit 356ec65) divides the sum of S over all videos by the numbers of all
predictions and references. The mean over videos is that of the later version, which the evaluation code of PDVC and
those derived from it contain. Whether the current version of fujiso/SODA differs from it is not known here.
"""

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from qwen_vl_streaming.common.progress import Progress

from metrics.scoring import NotComputed, one_line, run_apart, running_meteor, tokenize

MERGED, BEST = "merged", "best"
EPSILON = 1e-8

Span = tuple[float, float]
Matrix = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Caption:
    """A sentence and its start and end in seconds."""

    sentence: str
    span: Span


@dataclass(frozen=True)
class Story:
    """The score of one video."""

    precision: float
    recall: float
    f1: float


def iou(one: Span, other: Span) -> float:
    """Intersection over union of two intervals; 0 for one that ends before it starts."""
    intersection = max(0.0, min(one[1], other[1]) - max(one[0], other[0]))
    union = min(max(one[1], other[1]) - min(one[0], other[0]), one[1] - one[0] + other[1] - other[0])
    return intersection / (union + EPSILON) if intersection else 0.0


def best_matching(scores: Matrix) -> float:
    """The largest sum of `scores`, which are not negative, over monotone one-to-one matchings of rows and columns."""
    above = [0.0] * (len(scores[0]) + 1)
    for row in scores:
        best = [0.0]
        for column, score in enumerate(row):
            best.append(max(best[column], above[column + 1], above[column] + score))
        above = best
    return above[-1]


def story(predictions: Sequence[Caption], references: Sequence[Caption], meteor: Matrix) -> Story:
    """SODA_c of one video and one list of references. `meteor` has a row for each reference and a column for each
    prediction; all are in the order of their starts."""
    if not predictions:
        return Story(0.0, 0.0, 0.0)
    scores = [
        [iou(prediction.span, reference.span) * value for prediction, value in zip(predictions, row, strict=True)]
        for reference, row in zip(references, meteor, strict=True)
    ]
    total = best_matching(scores)
    precision, recall = total / len(predictions), total / len(references)
    return Story(precision, recall, 2 * precision * recall / (precision + recall) if total else 0.0)


def soda_c(
    predictions: dict[str, list[Caption]],
    annotations: Sequence[dict[str, list[Caption]]],
    how: str = MERGED,
    meteor: Callable[[list], Iterator[Matrix]] | None = None,
) -> dict[str, Any]:
    """SODA_c, precision and recall (times 100) over the videos that both have.

    `predictions` and each annotator's references are captions by video id. A video of an annotator has at least one.
    `how` is MERGED or BEST. `meteor` returns the METEOR matrix of each of a list of (predictions, references), by
    default pycocoevalcap's. The result also has the numbers of `videos` that are scored, of `missing` ones, which have
    references and no predictions, and of `extra` ones; and of the `predictions` and `references` of those scored.

    Raises NotComputed if Java fails or no video is scored, and InputError if Java is missing.
    """
    if how == MERGED:
        merged: dict[str, list[Caption]] = {}
        for one in annotations:
            for video, captions in one.items():
                merged.setdefault(video, []).extend(captions)
        annotations = [merged]
    known = list(dict.fromkeys(video for one in annotations for video in one))
    videos = [video for video in known if video in predictions]
    if not videos:
        raise NotComputed("no video has both predictions and references: their ids must be equal")
    jobs = [
        (video, _by_start(predictions[video]), _by_start(one[video]))
        for video in videos
        for one in annotations
        if video in one
    ]
    matrices = (meteor or meteor_matrices)([(said, reference) for _, said, reference in jobs])
    found: dict[str, Story] = {}
    for (video, said, reference), matrix in zip(jobs, matrices, strict=True):
        score = story(said, reference, matrix)
        if video not in found or score.f1 > found[video].f1:
            found[video] = score
    return {
        "SODA_c": 100 * fmean(score.f1 for score in found.values()),
        "precision": 100 * fmean(score.precision for score in found.values()),
        "recall": 100 * fmean(score.recall for score in found.values()),
        "annotators": how,
        "videos": len(videos),
        "missing": len(known) - len(videos),
        "extra": len(predictions) - len(videos),
        "predictions": sum(len(predictions[video]) for video in videos),
        "references": sum(len(reference) for _, _, reference in jobs),
    }


def _by_start(captions: list[Caption]) -> list[Caption]:
    return sorted(captions, key=lambda caption: caption.span[0])


def meteor_matrices(jobs: list[tuple[list[Caption], list[Caption]]]) -> Iterator[Matrix]:
    """METEOR of all pairs of each of `jobs`, which are predictions and references, by pycocoevalcap in a process of its
    own. A sentence without a word has 0. Raises NotComputed, with the reason, if Java fails."""
    job = [[[ascii_only(caption.sentence) for caption in side] for side in sides] for sides in jobs]
    for answer in Progress(run_apart("metrics.soda", job), "METEOR", len(jobs), unit="video"):
        if isinstance(answer, str):
            raise NotComputed(answer)
        yield answer


def without_words(captions: Iterable[Caption]) -> int:
    """How many of the captions have no word that METEOR sees, and so match nothing: Chinese ones, for instance."""
    return sum(not any(map(str.isalnum, ascii_only(caption.sentence))) for caption in captions)


def ascii_only(text: str) -> str:
    return "".join(char if char.isascii() else " " for char in one_line(text))


# The rest runs in the child process only.


def _compute(jobs: list[list[list[str]]]) -> Iterator[Matrix]:
    """Raises RuntimeError if a Java program fails."""
    texts = list(dict.fromkeys(text for sides in jobs for side in sides for text in side))
    tokenized = tokenize([[text] for text in texts])
    words = {text: tokenized[index][0].replace("|||", "") for index, text in enumerate(texts)}
    with running_meteor() as meteor:
        for predictions, references in jobs:
            matrix = [[0.0] * len(predictions) for _ in references]
            # A pair without words on one side would be an incomplete line of METEOR's protocol.
            pairs = [
                (row, column)
                for row, reference in enumerate(references)
                for column, prediction in enumerate(predictions)
                if words[reference].strip() and words[prediction].strip()
            ]
            if pairs:
                as_reference = {pair: [words[predictions[pair[1]]]] for pair in pairs}
                as_hypothesis = {pair: [words[references[pair[0]]]] for pair in pairs}
                values = meteor.compute_score(as_reference, as_hypothesis)[1]
                for (row, column), value in zip(pairs, values, strict=True):
                    matrix[row][column] = 0.0 if math.isnan(value) else value
            yield matrix


def _main() -> None:
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        try:
            for matrix in _compute(json.load(sys.stdin.buffer)):
                print(json.dumps(matrix), file=out, flush=True)
        except RuntimeError as error:
            print(json.dumps(str(error)), file=out, flush=True)


if __name__ == "__main__":
    _main()
