"""SODA_c: values worked out by hand, the dynamic programme against all matchings, and METEOR's process."""

import itertools
import random
import sys
import time

import pytest
from metrics.scoring import NotComputed, check_java
from metrics.soda import BEST, MERGED, Caption, best_matching, iou, meteor_matrices, soda_c, story, without_words

SEED = time.time_ns() % 100_000


def captions(*spans, sentence="a red square"):
    return [Caption(sentence, span) for span in spans]


def test_values_worked_out_by_hand():
    said, reference = captions((0, 10), (10, 20)), captions((0, 5), (10, 20))
    meteor = [[0.4, 0.9], [0.2, 0.5]]  # a row for each reference
    # IoU: 5 of 10 s for the first pair, all for the second, nothing across: 0.5 · 0.4 + 1 · 0.5 = 0.7.
    found = story(said, reference, meteor)
    assert (found.precision, found.recall, found.f1) == pytest.approx((0.35, 0.35, 0.35))
    # A third prediction, that matches nothing: 0.7 / 3 and 0.7 / 2, and their harmonic mean is 2 · 0.7 / 5.
    found = story([*said, *captions((30, 40))], reference, [[0.4, 0.9, 1.0], [0.2, 0.5, 1.0]])
    assert (found.precision, found.recall, found.f1) == pytest.approx((0.7 / 3, 0.35, 0.28))
    # Both predictions overlap with both references: the better matching takes one pair only, since two would cross.
    found = story(captions((0, 10), (0, 10)), captions((0, 10), (0, 10)), [[0.1, 0.9], [0.2, 0.1]])
    assert found.f1 == pytest.approx(0.9 / 2)
    assert story([], reference, [[], []]).f1 == story(said, reference, [[0, 0], [0, 0]]).f1 == 0


def test_iou():
    assert iou((0, 10), (5, 15)) == pytest.approx(5 / 15)
    assert iou((0, 10), (2, 4)) == pytest.approx(0.2) and iou((3, 8), (3, 8)) == pytest.approx(1)
    assert iou((0, 1), (1, 2)) == iou((0, 1), (5, 9)) == iou((2, 2), (2, 2)) == iou((5, 2), (0, 9)) == 0


def by_brute_force(scores):
    """The best sum over all ways to choose as many rows as columns, in their order."""
    rows, columns = range(len(scores)), range(len(scores[0]))
    return max(
        sum(scores[row][column] for row, column in zip(some, others, strict=True))
        for count in range(min(len(rows), len(columns)) + 1)
        for some in itertools.combinations(rows, count)
        for others in itertools.combinations(columns, count)
    )


def test_the_best_matching_is_the_best_of_all():
    print("seed", SEED)
    draw = random.Random(SEED)
    for _ in range(300):
        columns = draw.randint(1, 5)
        scores = [[draw.choice([0, draw.random()]) for _ in range(columns)] for _ in range(draw.randint(1, 5))]
        assert best_matching(scores) == pytest.approx(by_brute_force(scores)), scores


def drawn(draw, count):
    starts = [draw.uniform(0, 50) for _ in range(count)]
    return [Caption(str(draw.random()), (start, start + draw.uniform(0.1, 20))) for start in starts]


def fake_meteor(jobs):
    """A number from 0 to 1 for each pair of sentences."""
    for predictions, references in jobs:
        pair = [[random.Random(r.sentence + p.sentence).random() for p in predictions] for r in references]
        yield pair


def test_properties():
    print("seed", SEED)
    draw = random.Random(SEED)
    for _ in range(60):
        said, reference = drawn(draw, draw.randint(1, 6)), drawn(draw, draw.randint(1, 6))

        def score(said=said, reference=reference):
            return soda_c({"v": said}, [{"v": reference}], meteor=fake_meteor)

        found = score()
        low, high = sorted((found["precision"], found["recall"]))
        assert 0 <= low <= found["SODA_c"] + 1e-9 and found["SODA_c"] <= high + 1e-9 <= 101
        assert found["precision"] * len(said) == pytest.approx(found["recall"] * len(reference))
        shuffled = score(draw.sample(said, len(said)), draw.sample(reference, len(reference)))
        assert shuffled["SODA_c"] == pytest.approx(found["SODA_c"])  # only the times order them
        later = [
            [Caption(c.sentence, (2 * c.span[0] + 9, 2 * c.span[1] + 9)) for c in side] for side in (said, reference)
        ]
        assert score(*later)["SODA_c"] == pytest.approx(found["SODA_c"])
        more = score([*said, Caption("elsewhere", (900, 901))])  # says more, matches nothing more
        assert more["recall"] == pytest.approx(found["recall"]) and more["SODA_c"] <= found["SODA_c"]
        several = [{"v": reference}, {"v": drawn(draw, 3)}]
        best = soda_c({"v": said}, several, BEST, fake_meteor)["SODA_c"]
        assert best == pytest.approx(max(soda_c({"v": said}, [one], meteor=fake_meteor)["SODA_c"] for one in several))
        merged = soda_c({"v": said}, several, MERGED, fake_meteor)
        assert merged["SODA_c"] == pytest.approx(score(reference=[*reference, *several[1]["v"]])["SODA_c"])


def test_videos_annotators_and_counts():
    def always(jobs):
        return ([[1.0] * len(said) for _ in reference] for said, reference in jobs)

    said = {"a": captions((0, 10)), "b": [], "c": captions((0, 1)), "mine": captions((0, 1))}
    first = {"a": captions((0, 10)), "b": captions((0, 10)), "theirs": captions((0, 10))}
    second = {"a": captions((0, 10), (20, 30)), "c": captions((0, 2))}
    found = soda_c(said, [first, second], BEST, always)
    # a: 1 with the first annotator; b: nothing was said, 0; c: half of the second's.
    assert found["SODA_c"] == pytest.approx(100 * (1 + 0 + 0.5) / 3)
    assert (found["videos"], found["missing"], found["extra"], found["predictions"]) == (3, 1, 1, 2)
    # Merged, a has three references of which one is matched: precision 1, recall 1/3, F 1/2.
    merged = soda_c(said, [first, second], MERGED, always)
    assert merged["SODA_c"] == pytest.approx(100 * (0.5 + 0 + 0.5) / 3) and merged["references"] == 5
    with pytest.raises(NotComputed, match="no video has both"):
        soda_c({"x": captions((0, 1))}, [first], meteor=always)


STAND_IN = """\
import sys
for line in sys.stdin:
    kind, *fields = line.rstrip("\\n").split(" ||| ")
    if kind == "SCORE":
        reference, hypothesis = fields
        assert reference.strip() and hypothesis.strip(), line
        print(len(reference.split()) + 10 * len(hypothesis.split()), flush=True)
    else:
        for value in fields + [0]:
            print(int(value) / 100, flush=True)
"""


def test_sentences_without_a_word_for_meteor():
    assert without_words([Caption(text, (0, 1)) for text in ("红色圆出现。", "...", "a 圆", "été", "")]) == 3


def test_meteor_gets_the_prediction_as_reference(tmp_path, monkeypatch):
    """As SODA's own code calls it. In place of METEOR, a program with its protocol that counts words."""
    (tmp_path / "meteor.py").write_text(STAND_IN)
    java = tmp_path / "java"
    real, stand_in = check_java(), f"{sys.executable} {tmp_path}/meteor.py"
    java.write_text(f'#!/bin/sh\nif [ "$1" = -jar ]; then exec {stand_in}; fi\nexec {real} "$@"\n')
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    said = [Caption(text, (0, 1)) for text in ("A ||| red square.", "", "été?", "Two\nlines")]
    reference = [Caption(text, (0, 1)) for text in ("It moves up and on", "...")]
    empty = ([], reference)
    (whole, nothing), empty_matrix = meteor_matrices([(said, reference), empty])
    # The reference has 5 words; the predictions have 6, since each bar is one, none, 1 of "été", and 2.
    assert whole == [0.56, 0.0, 0.51, 0.52] and nothing == [0.0] * 4 and empty_matrix == [[], []]
    java.write_text(f'#!/bin/sh\nif [ "$1" = -jar ]; then echo "no memory" >&2; exit 1; fi\nexec {real} "$@"\n')
    with pytest.raises(NotComputed, match="METEOR, a Java program, failed: no memory"):
        list(meteor_matrices([(said, reference)]))
    java.write_text('#!/bin/sh\n[ "$1" = -version ]\n')
    with pytest.raises(NotComputed, match="PTB tokenizer"):
        list(meteor_matrices([(said, reference)]))
