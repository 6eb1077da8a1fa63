"""`explain` against cases worked out by hand, against the rule itself, and with user errors."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from qwen_vl_streaming.common.errors import run
from qwen_vl_streaming.explain.cli import main
from qwen_vl_streaming.explain.summary import find_spans, find_steps
from qwen_vl_streaming.timeline.attention import dense_mask
from qwen_vl_streaming.timeline.positions import timeline_positions
from qwen_vl_streaming.timeline.timeline import NOTHING, PARTS, Layout, make_schedule, make_timeline
from qwen_vl_streaming.timeline.variants import ENVIRONMENT_VARIABLE, VARIANTS

SMALL = "--prompt 2 --clips 2 --grid 1x2 --answer 4 --wait-k 2"


@pytest.fixture
def explain(monkeypatch, capsysbinary):
    """Calls the command with a line of arguments; returns its standard output as bytes."""
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)

    def call(line: str) -> bytes:
        monkeypatch.setattr(sys, "argv", ["explain", *line.split()])
        run(main)
        return capsysbinary.readouterr().out

    return call


def token(part, clip, index, slot, *position):
    return {"part": part, "clip": clip, "index": index, "slot": slot, "position": list(position * (3 // len(position)))}


def small_by_hand(header, answer, clip_2, tail):
    """Two slots of two tokens: a1, written in slot 1, is fed after clip 2 and the tail."""
    return [
        token("prompt", 0, 0, 0, 0),
        token("prompt", 0, 1, 0, 1),
        token("clip", 1, 0, 0, 2, 2, 2),
        token("clip", 1, 1, 0, 2, 2, 3),
        *(token("header", 0, i, 1, position) for i, position in enumerate(header)),
        token("answer", 0, 0, 1, answer[0]),
        *(token("clip", 2, i, 0, *position) for i, position in enumerate(clip_2)),
        *(token("tail", 2, i, 0, position) for i, position in enumerate(tail)),
        token("answer", 0, 1, 1, answer[1]),
        token("answer", 0, 2, 2, answer[2]),
        token("answer", 0, 3, 2, answer[3]),
    ]


@pytest.mark.parametrize(
    ("variant", "tokens"),
    [
        ("group", small_by_hand((0, 1, 2), (3, 4, 5, 6), ((4, 2, 2), (4, 2, 3)), (5, 6, 7))),
        ("gap", small_by_hand((10000, 10001, 10002), range(10003, 10007), ((4, 2, 2), (4, 2, 3)), (5, 6, 7))),
        # Round 1 ends at 3. Text runs to 8, clip 2 and its tail too: round 2 ends at 8.
        ("overlap", small_by_hand((4, 5, 6), (7, 8, 9, 10), ((4, 4, 4), (4, 4, 5)), (6, 7, 8))),
    ],
)
def test_json_by_hand(explain, variant, tokens):
    seen = json.loads(explain(f"--variant {variant} {SMALL} --format json"))
    assert list(seen) == ["variant", "tokens", "attends", "produces"]
    assert seen["variant"] == variant
    assert seen["tokens"] == tokens
    n = None
    assert seen["produces"] == [n, n, n, n, n, n, 0, 1, n, n, n, n, n, 2, 3, n]
    without_text = [0, 1, 2, 3]
    assert seen["attends"] == [
        *([*range(q + 1)] for q in range(8)),
        *([*without_text, *range(8, q + 1)] for q in range(8, 13)),
        *([*range(q + 1)] for q in range(13, 16)),
    ]


def test_json_of_all_follows_the_rules(explain):
    """One object per variant, in order, equal to timeline, positions and the dense mask."""
    objects = json.loads(explain("--prompt 14 --clips 4 --grid 2x3 --answer 14 --wait-k 3 --format json --variant all"))
    assert [each["variant"] for each in objects] == list(VARIANTS)
    for each, variant in zip(objects, VARIANTS.values(), strict=True):
        counts = make_schedule("wait-3", variant, 4).counts(14)
        timeline = make_timeline(variant, Layout(14, 3, 3, (2, 3), 2.0), counts)
        rows = timeline.rows
        for field in ("clip", "index", "slot"):
            assert [t[field] for t in each["tokens"]] == getattr(rows, field).tolist()
        assert [PARTS.index(t["part"]) for t in each["tokens"]] == rows.part.tolist()
        assert [t["position"] for t in each["tokens"]] == timeline_positions(timeline).T.tolist()
        assert [NOTHING if a is None else a for a in each["produces"]] == timeline.produces.tolist()
        mask = dense_mask(rows.visual[None], rows.text[None], variant.parallel)[0, 0]
        assert each["attends"] == [row.nonzero().squeeze(1).tolist() for row in mask]


@pytest.mark.parametrize("variant", VARIANTS)
def test_spans_and_steps_are_complete(variant):
    """For answers that end early and late: each token is in one span, each clip and answer token in one step."""
    for answer in (1, 5, 14):
        counts = make_schedule("wait-3", VARIANTS[variant], 4).counts(answer)
        timeline = make_timeline(VARIANTS[variant], Layout(5, 3, 3, (2, 3), 2.0), counts)
        for by_slot in (False, True):
            spans = find_spans(timeline, by_slot)
            assert [i for each in spans for i in range(each.start, each.stop)] == list(range(len(timeline.rows)))
        steps = find_steps(timeline)
        assert [step.clip for step in steps if step.clip] == [1, 2, 3, 4]
        assert [a for step in steps for a in range(step.start, step.stop)] == list(range(answer))
        together = any(step.clip and step.stop > step.start for step in steps)
        assert together == VARIANTS[variant].parallel


def test_text(explain):
    lines = explain("--variant overlap").decode().splitlines()
    table = [" ".join(line.split()) for line in lines]
    assert max(map(len, lines)) <= 100
    assert "watching │ clip 1 │ clip 2 │ clip 3 │ clip 4 │" in table
    assert "speaking │ │ a0–2 │ a3–5 │ a6–8 │ a9–13" in table
    assert "0–4 prompt 5 0–4" in table
    assert "11–13 header 3 8–10 all before it 13 → a0" in table
    assert "2 16–21 clip 2 6 t 8 h 8–9 w 8–10 prompt, clip 1; no text" in table
    assert "22 a2 1 13 all before it 22 → a3" in table
    assert "40–42 tail 3 20–22 prompt, clips 1–4; no text" in table
    assert "clip 2 6 t 14 h 14–15 w 14–16 all before it 22 → a3" in " ".join(
        explain("--variant interleave").decode().split()
    )


def test_text_of_all(explain):
    text = explain("").decode()
    assert max(map(len, text.splitlines())) <= 100
    for name, variant in VARIANTS.items():
        assert f"{name}   in the paper: {variant.paper}" in text
    for part in PARTS[:-1]:
        assert text.count(f"  {part} ") >= 6


def test_text_of_a_long_video(explain):
    lines = explain("--variant group --prompt 40 --clips 30 --grid 10x10 --answer 200").decode().splitlines()
    assert max(map(len, lines)) <= 110
    assert any("…" in line and "clip 30" in line for line in lines)


@pytest.mark.parametrize("variant", ["gap", "all"])
def test_png(explain, variant, tmp_path):
    """The same image in a file and through a pipe. It has the colour of each part, and is mostly white."""
    path = tmp_path / "picture.png"
    assert explain(f"--variant {variant} --format png --output {path}") == b""
    image = np.array(Image.open(path).convert("RGB"))
    assert image.shape[1] > (1000 if variant == "all" else 400)
    colours = {tuple(colour) for colour in image.reshape(-1, 3)[::7]}
    for colour in ("8C8C8C", "0072B2", "56B4E9", "F0B400", "D55E00"):
        assert tuple(bytes.fromhex(colour)) in colours
    assert 0.4 < (image == 255).all(-1).mean() < 0.95
    assert [each.name for each in tmp_path.iterdir()] == ["picture.png"]
    if variant == "gap":
        piped = Image.open(io.BytesIO(explain(f"--variant {variant} --format png")))
        assert (np.array(piped.convert("RGB")) == image).all()


@pytest.mark.parametrize(
    "sizes", ["--prompt 1 --clips 1 --grid 1x1 --answer 1", "--clips 5 --answer 2", "--schedule 5", SMALL]
)
def test_png_of_odd_sizes(explain, sizes):
    assert Image.open(io.BytesIO(explain(f"--variant group --format png {sizes}"))).size[0] > 400


def test_variant_from_the_environment(explain, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "gap")
    assert json.loads(explain(f"{SMALL} --format json"))["variant"] == "gap"
    assert json.loads(explain(f"{SMALL} --format json --variant group"))["variant"] == "group"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "all")
    assert len(json.loads(explain(f"{SMALL} --format json"))) == 6


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--variant grup", "origin, batch, interleave, overlap, group, gap"),
        ("--grid 2by3", "2by3"),
        ("--grid 0x3", "0x3"),
        ("--clips 0", "--clips"),
        ("--answer 0", "--answer"),
        ("--prompt -1", "--prompt"),
        ("--wait-k 1.5", "1.5"),
        ("--clips 100000", "5000"),
        ("--format jpg", "jpg"),
        ("--output /no/such/folder/a.txt", "/no/such/folder/a.txt"),
        ("--output /", "'/'"),
    ],
)
def test_invalid_input_is_one_line(explain, capsysbinary, arguments, named):
    with pytest.raises(SystemExit) as end:
        explain(arguments)
    written = capsysbinary.readouterr()
    error = written.err.decode()
    assert end.value.code == 2
    assert written.out == b""
    assert error.startswith("error: ")
    assert error.endswith("\n")
    assert error.count("\n") == 1
    assert named in error


def test_a_failed_write_leaves_nothing_behind(explain, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(SystemExit):
        explain(f"{SMALL} --output {folder}")
    assert list(tmp_path.iterdir()) == [folder]


def test_a_picture_is_not_written_to_a_terminal(explain, monkeypatch, capsysbinary):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with pytest.raises(SystemExit) as end:
        explain("--format png")
    assert end.value.code == 2
    assert b"--output" in capsysbinary.readouterr().err


def test_as_a_command():
    command = [sys.executable, "-m", "qwen_vl_streaming.explain", "--variant", "group"]
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stdout.startswith(b"group")
    assert done.stderr == b""


def test_a_schedule_of_its_own(explain, capsysbinary):
    """Counts per slot, some of them 0; offline variants write all of them after the video."""
    shown = json.loads(explain("--variant all --prompt 2 --grid 1x2 --schedule 3,0,1,4 --format json"))
    for each in shown:
        slots = [token["slot"] for token in each["tokens"] if token["part"] == "answer"]
        offline = not VARIANTS[each["variant"]].streams
        assert sorted(slots) == ([4] * 8 if offline else [1, 1, 1, 3, 4, 4, 4, 4])
        assert max(token["clip"] for token in each["tokens"]) == 4
    for line, fault in (
        ("--schedule 3,1 --clips 4", b"replaces --clips, --answer and --wait-k"),
        ("--schedule 3,1 --wait-k 2", b"replaces --clips, --answer and --wait-k"),
        ("--schedule 0,0", b"has no token"),
        ("--schedule 3,x", b"not a list of tokens per slot"),
        ("--schedule -1", b"--schedule"),
    ):
        with pytest.raises(SystemExit) as status:
            explain(line)
        found = capsysbinary.readouterr().err
        assert status.value.code == 2 and found.count(b"\n") == 1 and fault in found
