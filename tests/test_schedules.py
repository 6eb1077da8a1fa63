"""Schedules that a user selects: by name, random, or from a file, with every error in one line."""

import json

import pytest
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.timeline.variants import VARIANTS
from schedules import choose_schedules

GROUP = VARIANTS["group"]


def choose(text, tmp_path, variant=GROUP, seed=0, ids=("a", "b")):
    return choose_schedules(str(text), variant, 4, seed, ids, tmp_path)


def test_by_name(tmp_path):
    for text, name in (("", "wait-4"), ("random", "random-4"), ("wait-7", "wait-7"), ("random-2", "random-2")):
        assert choose(text, tmp_path).name == name
    assert choose("", tmp_path).of("a", 4).quotas == (4, 4, 4)
    assert choose("random", tmp_path, VARIANTS["batch"]).of("a", 4).quotas == (0, 0, 0)


def test_a_random_schedule_depends_on_seed_and_video(tmp_path):
    """Not on order or process. Its mean is K."""
    drawn = [choose("random", tmp_path, seed=seed).of(video, 300).quotas for seed in (0, 1) for video in "ab"]
    assert len(set(drawn)) == 4 and choose("random-4", tmp_path).of("a", 300).quotas == drawn[0]
    assert all(set(quotas) == set(range(1, 8)) and 3.5 < sum(quotas) / 299 < 4.5 for quotas in drawn)


@pytest.mark.parametrize("form", ["object", "lines", "rows", "schedule as an id"])
def test_from_a_file(tmp_path, form):
    """Counts with or without those of the last slot; the rows of a result file work too."""
    counts = {"a": [0, 5, 2], "b": [3, 1], "not in the data": [1]}
    lines = {
        "object": [json.dumps(counts, indent=1)],
        "lines": [json.dumps({name: each}) for name, each in counts.items()],
        "rows": [json.dumps({"video_id": name, "schedule": each, "result": "x"}) for name, each in counts.items()],
        "schedule as an id": [json.dumps({**counts, "schedule": [2]})],
    }[form]
    (tmp_path / "counts.json").write_text("\n".join(lines) + "\n")
    found = choose("counts.json", tmp_path)  # looked up in the project's root
    assert found.name == "counts.json" and len(found.sha256) == 64 and found.variant is GROUP
    assert found.of("a", 3).quotas == (0, 5) and found.of("b", 3).quotas == (3, 1)
    with pytest.raises(InputError, match="3 counts for video a, which has 5 clips: give 5, or 4"):
        found.of("a", 5)


@pytest.mark.parametrize(
    "text, says",
    [
        ('{"a": [1, -1], "b": []}', "video a: [1, -1] is not a list of counts from 0"),
        ('{"a": [1, true], "b": []}', "is not a list of counts"),
        ('{"a": [1.5], "b": []}', "is not a list of counts"),
        ('{"a": 3, "b": []}', "video a: 3 is not a list"),
        ('{"a": [1]}', "has no counts for video b"),
        ('{"a": [1]}\n{"b": [1]}\n{"a": [2]}', "video a: it occurs twice"),
        ("[[1, 2]]", "object 1: not an object"),
        ("wait 3", "is not JSON or JSON Lines"),
        ("", "has no counts for video a"),
    ],
)
def test_an_invalid_file_is_refused(tmp_path, text, says):
    path = tmp_path / "counts.json"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        choose(path, tmp_path)
    assert says in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_invalid_schedules(tmp_path):
    (tmp_path / "counts.json").write_text('{"a": [1], "b": [1]}')
    with pytest.raises(InputError, match="batch writes only after the whole video"):
        choose("counts.json", tmp_path, VARIANTS["batch"])
    for text in ("wait", "wait-0", "random-x", "wait-3 ", "nowhere.json", "."):
        with pytest.raises(InputError, match="give wait-K, random, random-K"):
            choose(text, tmp_path)
