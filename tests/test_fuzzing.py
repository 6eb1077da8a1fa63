"""The fuzzers' sandbox reports every kind of finding, and mutations are determined by their seed."""

import contextlib
import os
import pickle
import random
import re
import shutil
from pathlib import Path

import fuzz_films
import fuzz_programs
import fuzzing
import mutators
import pytest
import sandbox
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.numbers import is_number
from qwen_vl_streaming.model.prompts import load_processor

FINDINGS = [
    "",
    "",
    "",
    "outside its folder",
    "outside its folder",
    "executed",
    "KeyError",
    "status 1",
    "MemoryError",
    "",
    "outside its folder",
    "not finished in 1 s",
    "killed by signal 9",
    "memory grew by",
    "no answer",
]


def test_every_kind_of_finding_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(sandbox.CODE.parent / "tests"), prepend=os.pathsep)
    count = fuzzing.fuzz("probe:prepare", len(FINDINGS) - 1, 0, tmp_path, memory_mib=100)
    count += fuzzing.fuzz("probe:prepare", 1, 0, tmp_path, len(FINDINGS) - 1, seconds=3)
    each = r"^prepare (\d+) of seed 0: (.*?)(?=^prepare \d+ of|^\d+ prepare)"
    found = dict(re.findall(each, capsys.readouterr().out, re.MULTILINE | re.DOTALL))
    assert count == len(found) == sum(map(bool, FINDINGS))
    assert all(finding in found.get(str(number), "") for number, finding in enumerate(FINDINGS))


OUTPUT = f"      1 s  a\n\nfigures\ntokens  3\nrecord  {__file__}\n"


@pytest.mark.parametrize(
    "ended, finding",
    [
        (sandbox.Finished(0, OUTPUT, "a note\n"), None),
        (sandbox.Finished(2, "", "a note\nerror: no film\n"), "record"),
        (sandbox.Finished(2, OUTPUT, "error: a line\n"), None),
        (sandbox.Finished(2, OUTPUT, "error: a line\nof two\n"), "status 2"),
        (sandbox.Finished(2, OUTPUT, ""), "status 2"),
        (sandbox.Finished(0, OUTPUT, "error: a line\n"), "status 0"),
        (sandbox.Finished(1, OUTPUT, "error: a line\n"), "status 1"),
        (sandbox.Finished(0, OUTPUT, "Traceback (most recent call last):\n"), "Traceback"),
        (sandbox.Finished(0, f"      1 s  a\n      1 s  b{OUTPUT}", ""), "text at"),
        (sandbox.Finished(0, "", ""), "record"),
    ],
)
def test_how_the_live_command_may_end(ended, finding):
    with pytest.raises(AssertionError, match=finding) if finding else contextlib.nullcontext():
        fuzz_films.check_output(ended, Path(__file__))


def test_mutations_are_determined_by_their_seed():
    data = {"a": [1, 2.5, {"b": "text"}], "c": None}
    trees = [mutators.mutate_json(data, random.Random(seed)) for seed in range(300)]
    assert repr(trees) == repr([mutators.mutate_json(data, random.Random(seed)) for seed in range(300)])
    assert len({repr(tree) for tree in trees}) > 150 and data == {"a": [1, 2.5, {"b": "text"}], "c": None}


def test_the_payload_creates_its_mark_when_unpickled(tmp_path):
    mark = tmp_path / "marks/mark"
    pickle.loads(pickle.dumps(fuzz_programs.Payload(mark)))
    assert mark.exists()


@pytest.mark.parametrize(
    "name, old, new",
    [
        (
            "config.json",
            b'"num_key_value_heads": 2',
            b'"num_key_value_heads": "two"',
        ),  # this and the next were found by fuzzing
        ("chat_template.json", b"", b'{"chat_template": "{{ 1 * 100000000000 * [0] }}"}'),
        ("tokenizer.json", b'"type"', b'"kind"'),
    ],
)
def test_processors_that_do_not_load_are_reported_in_one_line(made, tmp_path, name, old, new):
    folder = tmp_path / "model"
    shutil.copytree(made[0], folder)
    text = (folder / name).read_bytes()
    assert old in text
    (folder / name).write_bytes(text.replace(old, new) if old else new)
    with pytest.raises(InputError, match="no processor could be loaded") as raised:
        load_processor(folder)
    assert "\n" not in str(raised.value)


def test_values_that_are_not_numbers():
    """Found by fuzzing: an integer that does not fit a float."""
    values = [1, 2.5, -3, True, "1", None, float("nan"), float("inf"), 10**400]
    assert [is_number(value) for value in values] == [True] * 3 + [False] * 6
