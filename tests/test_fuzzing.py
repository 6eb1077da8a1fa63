"""The fuzzers' watched process finds what it is there to find, and the mutations follow from their seed."""

import contextlib
import os
import pickle
import random
import shutil
from pathlib import Path

import fuzz_films
import fuzz_programs
import fuzzing
import pytest
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.model.prompts import load_processor
from report import loading

DEEDS = [
    "",
    "",
    "",
    "outside its folder",
    "outside its folder",
    "executed",
    "KeyError",
    "status 1",
    "no answer",
    "MemoryError",
    "",
    "outside its folder",
    "not over in 1 s",
    "killed by signal 9",
    "memory grew by",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def test_every_kind_of_finding_is_found(folder, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(fuzzing.CODE.parent / "tests"), prepend=os.pathsep)
    (folder / "work/case").mkdir(parents=True)
    for number, finding in enumerate(DEEDS):
        (folder / "work/case/deed").write_text(str(number))
        count = fuzzing.fuzz("probe:prepare", 1, 0, folder, number, seconds=3, memory_mib=100)
        told = capsys.readouterr().out
        assert count == (finding != "") and finding in told, told


SAID = f"      1 s  a\n\nfigures\nmissed deadlines  0\nrecord  {__file__}\n"


@pytest.mark.parametrize(
    "ended, finding",
    [
        (fuzzing.Ended(0, SAID, "a note\n"), None),
        (fuzzing.Ended(2, "", "a note\nerror: no film\n"), "record"),
        (fuzzing.Ended(2, SAID, "error: a line\n"), None),
        (fuzzing.Ended(2, SAID, "error: a line\nof two\n"), "status 2"),
        (fuzzing.Ended(2, SAID, ""), "status 2"),
        (fuzzing.Ended(0, SAID, "error: a line\n"), "status 0"),
        (fuzzing.Ended(1, SAID, "error: a line\n"), "status 1"),
        (fuzzing.Ended(0, SAID, "Traceback (most recent call last):\n"), "Traceback"),
        (fuzzing.Ended(0, f"      1 s  a\n      1 s  b{SAID}", ""), "words at"),
        (fuzzing.Ended(0, "", ""), "record"),
    ],
)
def test_how_the_live_command_may_end(ended, finding):
    with pytest.raises(AssertionError, match=finding) if finding else contextlib.nullcontext():
        fuzz_films.check_output(ended, Path(__file__))


def test_mutations_follow_from_their_seed():
    data = {"a": [1, 2.5, {"b": "text"}], "c": None}
    trees = [fuzzing.mutate_tree(data, random.Random(seed)) for seed in range(300)]
    assert repr(trees) == repr([fuzzing.mutate_tree(data, random.Random(seed)) for seed in range(300)])
    assert len({repr(tree) for tree in trees}) > 150 and data == {"a": [1, 2.5, {"b": "text"}], "c": None}


def test_the_payload_leaves_a_mark_where_it_is_unpickled(tmp_path):
    mark = tmp_path / "marks/mark"
    pickle.loads(pickle.dumps(fuzz_programs.Payload(mark)))
    assert mark.exists()


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("config.json", b'"num_key_value_heads": 2', b'"num_key_value_heads": "two"'),  # found by fuzzing, as the next
        ("chat_template.json", b"", b'{"chat_template": "{{ 1 * 100000000000 * [0] }}"}'),
        ("tokenizer.json", b'"type"', b'"kind"'),
    ],
)
def test_processors_that_do_not_load_are_told_of_in_one_line(made, tmp_path, name, old, new):
    folder = tmp_path / "model"
    shutil.copytree(made[0], folder)
    text = (folder / name).read_bytes()
    assert old in text
    (folder / name).write_bytes(text.replace(old, new) if old else new)
    with pytest.raises(InputError, match="no processor could be loaded") as raised:
        load_processor(folder)
    assert "\n" not in str(raised.value)


def test_numbers_that_are_none():
    """Found by fuzzing: more digits than a float holds."""
    values = [1, 2.5, -3, True, "1", None, float("nan"), float("inf"), 10**400]
    assert [loading.is_number(value) for value in values] == [True] * 3 + [False] * 6
