"""The judge against a real HTTP server on the loopback interface that fails in many ways."""

import base64
import gzip
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from endpoint import CUT, DRIP, FLOOD, GOOD, STALL, Endpoint
from metrics import judge as module
from metrics.judge import Judge
from metrics.scoring import NotComputed
from metrics.verdicts import Verdict, read_verdict
from qwen_vl_streaming.common.errors import InputError
from waiting import SECONDS, until


def impatient(endpoint: Endpoint, **changes) -> Judge:
    options = {"backoff": 0.001, "retries": 3, "workers": 4, "timeout": SECONDS, **changes}
    return Judge(endpoint.url, "grader", **options)


def test_requests_and_responses(endpoint, tmp_path):
    captions = ["A red square\nmoves.", "", "{braces} \ud83d", "A red square\nmoves."]
    judge = Judge(endpoint.url + "/chat/completions/", "grader", key="secret", options={"seed": 3})
    assert judge.judge(captions, tmp_path / "new/cache.jsonl") == dict.fromkeys(captions, Verdict(4, "one slip"))
    assert endpoint.counts() == dict.fromkeys(captions, 1), "the same caption was asked about twice"
    for request in endpoint.asked:
        assert request["path"] == "/v1/chat/completions" and request["key"] == "Bearer secret"
        assert request["model"] == "grader" and request["seed"] == 3 and "temperature" not in request
        assert '{"score":' in request["messages"][0]["content"]
    impatient(endpoint).judge(["x"], tmp_path / "other.jsonl")
    assert endpoint.asked[-1]["key"] is None and endpoint.asked[-1]["temperature"] == 0
    assert b"secret" not in (tmp_path / "new/cache.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("content", "score"),
    [
        (GOOD, 4),
        ('```json\n{"score": 1,\n "why": "bad"}\n```', 1),
        ('<think>a {"score": 2, "why": "x"}?</think> {"score": 5.0, "why": "well {put}"} ', 5),
        ('{"score": 7, "why": "superb"}', None),
        ('{"score": 0, "why": ""}', None),
        ('{"score": 3.5, "why": ""}', None),
        ('{"score": true, "why": ""}', None),
        ('{"score": "4", "why": ""}', 4),
        ('{"score": "4.0", "why": ""}', 4),
        ('{"score": "4 of 5", "why": ""}', None),
        ('{"score": "6", "why": ""}', None),
        ('{"score": 1' + "0" * 5000 + ', "why": ""}', None),
        ('I weigh {grammar, flow} first. {"score": 3, "why": "fine"} So {that} is it.', 3),
        ('{"score": 2, "why": "a draft"}\n\n{"score": 3, "why": "on reflection"}', 3),
        ('{"score": 5, "why": "two\nlines\tand a tab"}', 5),
        ('{"verdict": {"score": 5, "why": "inside"}}', None),
        ("{" * 200_000 + '{"score": 5, "why": ""}', 5),
        ('{"score": 5, "why": ""}' + "[" * 200_000, None),
        ('{"score": [4], "why": ""}', None),
        ('{"score": NaN, "why": ""}', None),
        ('{"score": 4}', None),
        ('{"score": 4, "why": 1}', None),
        ('{"score": 4, "why": "cut o', None),
        ('[{"score": 4, "why": "x"}, {"score": 2, "why": "x"}]', None),
        ("I cannot grade this.", None),
        ("", None),
        (None, None),
        (["parts"], None),
        ('{"score":' + "[" * 200_000 + "}", None),
    ],
)
def test_answers_are_checked(content, score):
    if score:
        assert read_verdict(content).score == score and type(read_verdict(content).score) is int
    else:
        with pytest.raises(ValueError) as error:
            read_verdict(content)
        assert len(str(error.value)) < 150 and "\n" not in str(error.value)


def test_temporary_errors_are_retried(endpoint, tmp_path):
    """Each caption first meets a different error, and is still judged."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    draw = random.Random(seed)
    troubles = [
        (429, {"error": {"message": "slow down"}}, {"Retry-After": "0"}),
        (500, b"<html>oops</html>"),
        (503, b""),
        (408, b""),
        (0, b""),
        (CUT, GOOD),
        (200, '{"score": 7, "why": "superb"}'),
        (200, "no JSON"),
        (200, {"choices": []}),
        (200, b"{"),
    ]
    captions = [f"caption {number}" for number in range(20)]
    for number, caption in enumerate(captions):
        endpoint.plan[caption] = [*draw.sample(troubles[number % 10 :], 1), (200, GOOD)]
    verdicts = impatient(endpoint).judge(captions, tmp_path / "cache.jsonl")
    assert verdicts == dict.fromkeys(captions, Verdict(4, "one slip"))
    assert set(endpoint.counts().values()) == {2}


@pytest.mark.parametrize("silence", [(-1, b""), (STALL, GOOD)])
def test_a_silent_endpoint_is_asked_again(endpoint, tmp_path, silence):
    endpoint.plan["a"] = [silence, (200, GOOD)]
    assert impatient(endpoint, timeout=0.3, retries=9).judge(["a"], tmp_path / "cache.jsonl")["a"].score == 4
    assert endpoint.counts()["a"] > 1


def test_parallel_requests_are_limited(endpoint, tmp_path):
    """Each answer waits for four other requests."""
    endpoint.before_answer = threading.Barrier(5, timeout=SECONDS).wait
    impatient(endpoint, workers=5).judge([f"caption {number}" for number in range(30)], tmp_path / "cache.jsonl")
    assert endpoint.most_at_once == 5


def test_a_caption_that_cannot_be_judged_has_no_score(endpoint, tmp_path):
    captions = [f"caption {number}" for number in range(7)]
    endpoint.plan["caption 2"] = [(400, {"error": {"message": "filtered\nfor content"}})]
    endpoint.plan["caption 5"] = [(200, '{"score": 7, "why": "superb"}')]
    endpoint.plan["caption 6"] = [(500, {"error": "broken"})]
    cache = tmp_path / "cache.jsonl"
    verdicts = impatient(endpoint).judge(captions, cache)
    assert {text for text in captions if verdicts[text].score is None} == {f"caption {i}" for i in (2, 5, 6)}
    for number, says in (
        (2, "400 (filtered for content)"),
        (5, "answers, but with a score of '7'"),
        (6, "500 (broken)"),
    ):
        assert says in verdicts[f"caption {number}"].why
    counts = endpoint.counts()
    assert [counts[f"caption {number}"] for number in (0, 2, 5, 6)] == [1, 1, module.TRIES, 4]

    endpoint.plan.clear()
    endpoint.asked.clear()
    assert all(verdict.score == 4 for verdict in impatient(endpoint).judge(captions, cache).values())
    assert set(endpoint.counts()) == {f"caption {number}" for number in (2, 5, 6)}, "answers were asked for again"
    endpoint.asked.clear()
    impatient(endpoint, options={}).judge(["caption 0"], cache)
    Judge(endpoint.url, "another grader").judge(["caption 0"], cache)
    assert len(endpoint.asked) == 2, "another model's answers were taken"


def test_a_caption_that_is_never_answered_has_no_score(endpoint, tmp_path):
    endpoint.plan = {"a": [(-1, b"")]}
    verdict = impatient(endpoint, timeout=0.3).judge(["a"], tmp_path / "cache.jsonl")["a"]
    assert verdict.score is None and "timed out" in verdict.why and endpoint.counts()["a"] == 3


def test_a_lost_endpoint_is_not_retried_forever(endpoint, tmp_path, monkeypatch):
    """Nor asked far ahead of answers that a slow disk still has to take."""
    monkeypatch.setattr(os, "fsync", lambda number: time.sleep(0.02))
    captions = [f"caption {number}" for number in range(100)]
    endpoint.plan = {"": [*[(200, GOOD)] * 30, (401, {"error": {"message": "key revoked"}})]}
    with pytest.raises(NotComputed, match=r"stopped answering .*401 \(key revoked\)\) after 30 of 100") as error:
        impatient(endpoint).judge(captions, tmp_path / "cache.jsonl")
    time.sleep(0.3)
    assert "\n" not in str(error.value) and len(endpoint.asked) < 60
    endpoint.plan = {}
    assert len(impatient(endpoint, key="again").judge(captions, tmp_path / "cache.jsonl")) == 100
    assert sum(request["key"] == "Bearer again" for request in endpoint.asked) == 70


def test_answers_that_cannot_be_opened_are_one_line(endpoint, tmp_path):
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\): check the path"):
        impatient(endpoint).judge(["a caption"], tmp_path)


def test_a_full_disk_is_one_line(endpoint, tmp_path, monkeypatch):
    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"cache.jsonl cannot be written \(No space left on device\)"):
        impatient(endpoint).judge(["a caption"], tmp_path / "cache.jsonl")


def test_a_killed_run_resumes(endpoint, tmp_path):
    """Killed in the middle, with an incomplete last line: only answers that were not on disk are requested again."""
    answers, cache = threading.Semaphore(0), tmp_path / "cache.jsonl"
    endpoint.before_answer = lambda: answers.acquire(timeout=SECONDS)
    code = "import sys; from pathlib import Path; from metrics.judge import Judge\n"
    code += "Judge(sys.argv[1], 'grader', workers=2).judge([f'caption {i}' for i in range(60)], Path(sys.argv[2]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(module.__file__).parents[1]), *sys.path])}
    run = subprocess.Popen([sys.executable, "-c", code, endpoint.url, str(cache)], env=environment, stderr=-3)
    for more, given in ((3, 3), (9, 12)):
        answers.release(more)
        until(lambda given=given: len(endpoint.asked) == given + 2)  # which both wait for an answer
        until(lambda given=given: cache.read_bytes().count(b"\n") == given)  # answers reach the disk as they come
    run.send_signal(signal.SIGKILL)
    run.wait()
    answers.release(2)
    kept = cache.read_bytes()
    done = kept.count(b"\n")
    assert done == 12
    cache.write_bytes(kept[:-9])
    endpoint.before_answer = lambda: None
    endpoint.asked.clear()
    captions = [f"caption {number}" for number in range(60)]
    assert impatient(endpoint).judge(captions, cache) == dict.fromkeys(captions, Verdict(4, "one slip"))
    assert len(endpoint.asked) == 60 - done + 1
    lines = [json.loads(line) for line in cache.read_text().splitlines()]
    assert {line["caption"] for line in lines} == set(captions) and len(lines) == 60
    good = json.loads(kept.splitlines()[0])
    for change in ({"score": 40}, {"score": "great"}, {"score": None}, {"score": True}, {"why": 3}, {"key": 4}):
        cache.write_bytes(json.dumps({**good, **change}).encode() + b"\n" + kept)
        with pytest.raises(InputError, match="line 1: not an answer"):
            impatient(endpoint).judge(captions, cache)
    for line, says in ((b"{}", "an answer"), (b"[" * 100_000, "JSON"), (b"7", "an answer")):
        cache.write_bytes(line + b"\n" + kept)
        with pytest.raises(InputError, match=f"line 1: not {says}"):
            impatient(endpoint).judge(captions, cache)


def test_permanent_errors_are_one_line_at_once(endpoint):
    impatient(endpoint).check()
    for plan, says in (
        ((401, {"error": {"message": "no key"}}), r"401 \(no key\): set OPENAI_API_KEY"),
        ((404, {"object": "error", "message": "The model `grader` does not exist."}), r"not exist.*--judge-model"),
        ((404, b"<html>\n<b>Not Found</b></html>"), r"404 .*--judge-url, which usually ends in /v1"),
        ((400, {"error": {"message": "temperature must be 1"}}), r"temperature must be 1.*--judge-options"),
        ((429, {"error": {"message": "no credit"}}), "429 .*no credit"),
        ((200, b"<html>welcome</html>"), "answers, but with no chat completion but '<html>welcome"),
        ((200, "Very fluent, 5 of 5."), "answers, but not with the requested JSON: 'Very fluent"),
        ((-1, b""), "timed out"),
    ):
        endpoint.plan = {"": [plan]}
        with pytest.raises(InputError, match=says) as error:
            impatient(endpoint, timeout=0.3 if says == "timed out" else SECONDS).check()
        assert "\n" not in str(error.value) and endpoint.url in str(error.value)
    for url, says in (
        ("http://127.0.0.1:1/v1", "refused"),
        ("http://judge.invalid/v1", "judge.invalid"),
        ("localhost", "--judge-url"),
        ("ftp://localhost/", "--judge-url"),
    ):
        with pytest.raises(InputError, match=says) as error:
            Judge(url, "grader", backoff=0.001).check()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", [DRIP, FLOOD])
@pytest.mark.parametrize("status", [0, 200, 307, 400, 503])
def test_an_endless_answer_is_abandoned(endpoint, how, status):
    """In bounded time and memory, whichever part of it does not end."""
    endpoint.plan = {"": [(how, status)]}
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(InputError, match="does not answer") as error:
        impatient(endpoint, retries=0, timeout=0.1).check()
    assert "\n" not in str(error.value)
    assert time.monotonic() - began < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 64  # MiB


def test_compressed_answers_are_not_decompressed(endpoint):
    bomb = gzip.compress(json.dumps({"choices": [{"message": {"content": " " * 2**26 + GOOD}}]}).encode())
    endpoint.plan = {"": [(200, bomb, {"Content-Encoding": "gzip"})]}
    with pytest.raises(InputError, match="compressed"):
        impatient(endpoint, retries=0).check()


def test_an_endpoint_that_echoes_requests(endpoint, tmp_path):
    """Neither the key nor the password in the address is shown or saved, and control characters are escaped."""
    url = endpoint.url.replace("//", "//joe:s3cret@") + "?api_key=tok123"
    judge = Judge(url, "grader", key="", options={"api_key": "opt123"}, retries=1, backoff=0.001)
    basic = base64.b64encode(b"joe:s3cret").decode()
    secrets = (basic, "s3cret", "tok123", "opt123")
    said = f"\x1b]0;pwned\x07\x1b[2J no: Basic {basic} for {url} with opt123"
    for plan in ((401, {"error": {"message": said}}), (400, said.encode()), (200, said), (200, said.encode())):
        endpoint.plan = {"": [plan]}
        with pytest.raises(InputError) as error:
            judge.check()
        assert not any(secret in str(error.value) for secret in secrets), error.value
        assert str(error.value).isprintable()
    endpoint.plan = {"": [(200, json.dumps({"score": 4, "why": said}))]}
    verdicts = judge.judge(["a"], tmp_path / "cache.jsonl")
    assert verdicts["a"].score == 4
    for text in (verdicts["a"].why, (tmp_path / "cache.jsonl").read_text()):
        assert "***" in text and not any(secret in text for secret in secrets), text
