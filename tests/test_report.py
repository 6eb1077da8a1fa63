"""The report on real files: its numbers, and its messages for missing or invalid data."""

import base64
import io
import json
import random
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from make_model import SPECIAL_TOKENS
from media import make_video, read_number
from metrics.lag import slot_texts
from PIL import Image
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.model.checkpoint import of_checkpoint
from qwen_vl_streaming.timeline.variants import VARIANTS, Variant
from refusing import refused
from report.cli import outputs
from report.gallery import show_video
from result_files import METRICS, World
from results import hash_rows
from safetensors.numpy import load_file, save_file


@pytest.fixture
def world(made, tmp_path):
    return World(tmp_path / "results", *made)


def markdown_rows(text: str, title: str = "") -> list[list[str]]:
    """The cells of the first table after `title`, without its header."""
    table = text[text.index(title) :].split("\n\n|", 1)[1].split("\n\n")[0]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.split("\n")[2:]]


def test_every_number_is_in_its_cell(world):
    """Six variants and two schedules: ours next to the paper's, and the difference between the schedules."""
    values = {}
    for variant, rule in VARIANTS.items():
        for schedule in ("wait-3", "random-3")[: 1 + rule.streams]:
            values[variant, schedule] = world.add(variant, schedule)
    _, text = world.report(*world.files, "--videos", "0")

    rows = markdown_rows(text, "## Video description")
    assert [row[2] for row in rows if row[3].startswith("ours")] == [variant for variant, _ in values]
    theirs = [row for row in rows if row[3] == "paper: 3B"]
    assert [row[2] for row in theirs] == list(VARIANTS) and len(rows) == len(values) + 6
    assert theirs[4][4:] == ["*12.52*", "*26.32*", "*7.42*", "*30.03*", "*27.37*", "*51.53*", "*4.56*"]
    for row in rows:
        if row[3].startswith("ours"):
            schedule = "random-3" if "random-3" in row[3] else "wait-3"
            assert row[4:9] == [f"{values[row[2], schedule][metric]:.2f}" for metric in METRICS]
            assert row[9:] == ["-<sup>1</sup>", "-<sup>1</sup>"]
    assert "<sup>1</sup> not requested" in text

    rows = markdown_rows(text, "### Fixed and random")
    assert [row[1] for row in rows if row[0] == "CIDEr"] == ["fixed, K = 3"]
    bleu = rows[3:6]
    streaming = [variant for variant, rule in VARIANTS.items() if rule.streams]
    fixed, mixed = ([values[variant, each]["BLEU-1"] for variant in streaming] for each in ("wait-3", "random-3"))
    assert bleu[0][3:] == [f"{value:.2f}" for value in fixed] and bleu[1][3:] == [f"{value:.2f}" for value in mixed]
    assert bleu[2][3:] == [f"{b - a:+.2f}" for a, b in zip(fixed, mixed, strict=True)]
    assert rows[-2][2:] == ["paper: 3B", "*44.11*", "*50.62*", "*51.53*", "*51.20*"]
    assert rows[-1][2:] == ["paper: 3B", "*40.56*", "*50.71*", "*51.76*", "*51.56*"]


def test_only_scores_over_the_same_videos_are_subtracted(world):
    def difference() -> tuple[str, str]:
        _, text = world.report(*world.files, "--videos", "0")
        return markdown_rows(text, "### Fixed and random")[2][3], text

    values = [world.add("group", schedule)["CIDEr"] for schedule in ("wait-3", "random-3")]
    assert difference()[0] == f"{values[1] - values[0]:+.2f}"
    path = world.folder / "group_random-3_infer.json"
    lines = path.read_text().splitlines(keepends=True)
    for other, says in (
        (lines[:2], "have different videos (3 and 2, 2 in both)"),
        ([*lines[:2], lines[2].replace('"annotation": "', '"annotation": "Else. ')], "reference captions"),
    ):
        world.add("group", "random-3", scores={"count": len(other)})
        path.write_text("".join(other))
        cell, text = difference()
        assert cell.startswith("-<sup>") and says in text.replace("\\", "")
        assert f"{values[1]:.2f}" in text  # each of the two is still shown


def test_a_variant_with_any_name_in_the_paper_is_reported(world, monkeypatch):
    mine = Variant("mine", "Ours", streams=True, parallel=True, count="own")
    monkeypatch.setitem(VARIANTS, "mine", mine)
    values = [world.add("mine", schedule)["CIDEr"] for schedule in ("wait-3", "random-3")]
    page, text = world.report(*world.files, "--videos", "1")
    assert "Ours <code>mine</code>" in page
    row = next(row for row in markdown_rows(text, "## Video description") if row[2] == "mine")
    assert row[:2] == ["Streaming", "Ours"] or row[:2] == ["", "Ours"]
    assert [row[3] for row in markdown_rows(text, "### Fixed and random")[:2]] == [f"{v:.2f}" for v in values]
    assert [(v.mode, v.method) for v in VARIANTS.values()][0::5] == [("Offline", "Origin"), ("Streaming", "GIPE")]


def test_seeds_and_schedule_files_are_distinguished(world):
    world.add("group")
    for seed in (3, 4):
        world.add("group", "random-3", name=f"seed{seed}", seed=seed)
    world.add("gap", "random-3", name="mine")
    path = world.folder / "mine_infer.args.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schedule": "random-mine.json"}))
    _, text = world.report(*world.files, "--videos", "0")
    heads = [line for line in text.splitlines() if line.startswith("| Metric") and "GDPE" in line and "seed" in line]
    assert len(heads) == 1 and "seed 3" in heads[0] and "seed 4" in heads[0] and "gap" not in heads[0]
    assert "random-mine.json" in text


def test_a_missing_value_is_a_dash_with_its_reason(world):
    world.add("group", scores=False)
    world.add("gap", scores={"METEOR": None, "BLEURT": 0.0, "AL": 2.5, "not_computed": {"METEOR": "Java | failed"}})
    page, text = world.report(*world.files, "--videos", "1", "--size", "7B")
    rows = markdown_rows(text)
    ours = {row[2]: row[4:] for row in rows if row[3].startswith("ours")}
    notes = dict(re.findall(r"<sup>(\d+)</sup> (.+?)  \n", text + "  \n"))
    assert list(ours) == list(VARIANTS)

    def reason(cell: str) -> str:
        return notes[re.fullmatch(r"-<sup>(\d+)</sup>", cell)[1]]

    assert {reason(cell) for cell in ours["origin"]} == {"no result file of this variant was given"}
    assert all("group\\_wait-3\\_scores.json does not exist" in reason(cell) for cell in ours["group"])
    assert reason(ours["gap"][3]) == "METEOR was not computed: Java \\| failed"
    assert ours["gap"][5] == "0.00" and ours["gap"][7] == "2.50"  # a zero that was measured, and a metric of our own
    theirs = {row[2]: row[4:] for row in rows if row[3] == "paper: 7B"}
    assert theirs["gap"][0] == "*25.70*" and reason(theirs["gap"][6].strip("*")) == "not in the paper"
    assert 'title="METEOR was not computed: Java | failed"' in page and "Fixed and random" not in page


def test_scores_of_other_captions_are_not_shown(world):
    """Those of an earlier run with the same name and as many captions."""
    values = world.add("group")
    path = world.folder / "group_wait-3_scores.json"
    rows = [json.loads(line) for line in Path(world.files[0]).read_text().splitlines()]
    for captions, shown in ((rows, True), ([{**row, "result": "old"} for row in rows], False)):
        path.write_text(json.dumps({**values, "count": 3, "skipped": 0, "captions": hash_rows(captions)}))
        _, text = world.report(*world.files, "--videos", "0")
        assert (f"{values['CIDEr']:.2f}" in text) == shown
        reason = "group_wait-3_infer.json is not scored: group_wait-3_scores.json is of other captions: score again"
        assert (reason in text.replace("\\", "")) != shown


def retrained(world) -> Path:
    """The world's checkpoint with a record of its training."""
    folder = shutil.copytree(world.checkpoint, world.folder / "trained")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"streaming_variant": "group"}))
    run = {"arguments": {"learning_rate": 1e-4}, "recipe_differences": {"learning_rate": 2e-5}}
    run |= {"finished": "2026-11-29T06:00:00", "commit": {"hash": "c" * 40, "changed": False}}
    (folder / "run.json").write_text(json.dumps(run | {"data": {"path": "/d/train.jsonl", "sha256": "d" * 64}}))
    return folder


def facts_of(text: str) -> list[str]:
    """Size, day of the training, commit and training data in the report's table of runs."""
    return markdown_rows(text, "## Runs")[0][4:8]


def test_a_checkpoint_that_has_changed_does_not_describe_earlier_captions(world):
    folder = retrained(world)
    wrote = {"model": str(folder), "model_sha256": of_checkpoint(str(folder))}
    world.add("group", **wrote)
    _, text = world.report(*world.files, "--videos", "0")
    assert facts_of(text)[1:] == ["2026-11-29", "cccccccc", "train.jsonl dddddddd"]
    assert "trained with --learning_rate 0.0001" in text.replace("\\", "") and "has changed" not in text

    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, folder / "model.safetensors")
    page, text = world.report(*world.files, "--videos", "1")
    assert facts_of(text) == ["size unknown", "-", "-", "-"] and "learning" not in text
    assert "trained has changed since these captions, so its size and training then are unknown" in text
    assert "The timing of words" not in page  # the tokenizer is the same

    weights_file = folder / "model.safetensors"
    weights_file.rename(folder.parent / "away")
    _, text = world.report(*world.files, "--videos", "0")
    assert facts_of(text)[1] == "2026-11-29" and "has changed" not in text  # it cannot be told
    (folder.parent / "away").rename(weights_file)

    # Captions of the weights before and after: no pair of schedules, and no duplicates.
    world.add("group", "random-3", model=str(folder), model_sha256=of_checkpoint(str(folder)))
    _, text = world.report(*world.files, "--videos", "0")
    assert {row[3] for row in markdown_rows(text, "### Fixed and random") if row[1] == "difference"} == {"-"}
    world.add("group", name="after", model=str(folder), model_sha256=of_checkpoint(str(folder)))
    _, text = world.report(*world.files, "--videos", "0")
    ours = {row[3] for row in markdown_rows(text) if row[3].startswith("ours: wait-3")}
    assert ours == {"ours: wait-3, size unknown", f"ours: wait-3, {facts_of(text)[0]}"}
    save_file(weights, folder / "model.safetensors", {"changed": "again"})
    _, text = world.report(*world.files, "--videos", "0")
    ours = {row[3] for row in markdown_rows(text) if row[3].startswith("ours: wait-3")}
    assert len(ours) == 2 and f"ours: wait-3, size unknown, checkpoint {wrote['model_sha256'][:8]}" in ours


def test_checkpoints_outside_of_the_papers_recipe_are_reported(world):
    def report(folder: Path) -> str:
        world.add("group", model=str(folder), model_sha256=of_checkpoint(str(folder)))
        return world.report(*world.files, "--videos", "0")[1].replace("\\", "")

    text = report(world.checkpoint)
    assert "was not trained by this project: it is a base model, or was trained elsewhere" in text
    folder = retrained(world)
    early = shutil.copytree(folder, folder / "checkpoint-1", ignore=shutil.ignore_patterns("run.json", "checkpoint-1"))
    text = report(early)
    assert "trained with --learning_rate 0.0001" in text and "that of step 1 of its training (all)" in text
    world.add("group", name="base", model=str(world.checkpoint))
    assert "is a base model, or was trained elsewhere (base_infer.json)" in report(early)
    (world.folder / "base_infer.json").unlink()
    assert facts_of(text)[1:] == ["step 1", "cccccccc", "train.jsonl dddddddd"]
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | {"finished": None}))
    assert "that of step 1 of its training, which has not finished" in report(early)
    (folder / "run.json").unlink()
    assert "how the checkpoint was trained is not recorded" in report(folder)


def test_funqa_has_the_papers_other_table(world):
    subtasks = {"H2": {"CIDEr": 10.0, "count": 2}, "M3": {"CIDEr": 20.5, "not_computed": {"METEOR": "why"}, "count": 1}}
    world.add("batch", task="H2", scores={"tasks": subtasks, "missing_tasks": ["C2"]})
    world.add("origin")
    _, text = world.report(*world.files, "--videos", "0")
    rows = markdown_rows(text, "## Video question answering")
    assert [row[4] for row in rows if row[3].startswith("paper")] == [
        f"*{value}*" for value in ("6.98", "7.25", "3.00", "4.22", "3.22", "3.99")
    ]
    rows = markdown_rows(text, "### By sub-task")
    assert [row[1:4] for row in rows] == [["H2", "2", "10.00"], ["M3", "1", "20.50"]]
    assert "C2 have no rows" in text and "have different videos" not in text
    assert text.index("## Video description") < text.index("## Video question")


def test_our_set_up_is_distinguished_from_the_papers(world):
    world.add("group", "wait-5", repetition_penalty=1.0, max_new_tokens=300)
    config = world.checkpoint / "config.json"
    page, text = world.report(*world.files, "--videos", "0")
    for each in (page, text.replace("\\", "")):
        assert "Our setup differs from the paper" in each
        assert "the schedule is wait-5, wait-3 in the paper" in each
        assert "repetition_penalty is 1.0" in each and "max_new_tokens" not in each
        assert re.search(r"the model has 0\.\d+M parameters; the paper", each) and world.data.name in each
        assert str(world.folder) not in each  # a report that is shared shows no local paths

    copy = shutil.copytree(world.checkpoint, world.folder / "copy")  # as large, so that only its path tells it
    values = [world.add("gap", name="one"), world.add("gap", name="two", model=str(copy))]
    _, text = world.report(*(str(world.folder / f"{name}_infer.json") for name in ("one", "two")), "--videos", "0")
    ours = [row[3:5] for row in markdown_rows(text) if row[2] == "gap" and row[3].startswith("ours")]
    assert [row[0].rpartition(", ")[2] for row in ours] == ["model", "copy"]
    assert [row[1] for row in ours] == [f"{each['CIDEr']:.2f}" for each in values]

    real = world.folder / "real"  # a checkpoint is known by its shape, not by its name
    real.mkdir()
    content = json.loads(config.read_text())
    content |= {"hidden_size": 2048, "num_hidden_layers": 36}
    (real / "config.json").write_text(json.dumps(content | {"streaming_variant": "gap"}))
    world.add("group", "wait-3", name="real", model=str(real))
    _, text = world.report(str(world.folder / "real_infer.json"), "--videos", "0")
    assert "ours: wait-3, 3B" in text and "the model" not in text and "was trained as gap, not as" in text


def test_both_sizes_on_one_page(world):
    """Each size has its own sections, beside the paper's values of that size; and a note shows no local path."""
    shapes = {"3B": (2048, 36), "7B": (3584, 28)}
    values = {}
    for size, shape in shapes.items():
        folder = shutil.copytree(world.checkpoint, world.folder / f"model{size}")
        content = json.loads((folder / "config.json").read_text())
        shape = dict(zip(("hidden_size", "num_hidden_layers"), shape, strict=True))
        (folder / "config.json").write_text(json.dumps(content | shape))
        run = {"arguments": {"learning_rate": 1e-4}, "recipe_differences": {"learning_rate": 2e-5}}
        run["recipe_differences"]["step_samples"], run["step_samples"] = 16, 8
        (folder / "run.json").write_text(json.dumps(run if size == "7B" else {}))
        for schedule in ("wait-3", "random-3"):
            values[size, schedule] = world.add("group", schedule, name=f"{size}{schedule}", model=str(folder))
    note = f"7B, funqa is refused: move away {world.folder}/7B/x"
    page, text = world.report(*world.files, "--videos", "0", "--note", note)
    assert re.findall("^## (.*)$", text, re.M) == ["Video description, 3B", "Video description, 7B", "Runs"]
    for size, theirs in (("3B", "*12.52*"), ("7B", "*37.78*")):
        rows = [row for row in markdown_rows(text, f"## Video description, {size}") if row[2] == "group"]
        assert [row[3] for row in rows] == [f"ours: wait-3, {size}", f"ours: random-3, {size}", f"paper: {size}"]
        assert [row[4] for row in rows] == [
            f"{values[size, 'wait-3']['CIDEr']:.2f}", f"{values[size, 'random-3']['CIDEr']:.2f}", theirs
        ]  # fmt: skip
    assert text.count("*51.76*") == 1  # the paper's random schedules are of 3B alone
    assert str(world.folder) not in page + text and "7B, funqa is refused: move away x" in page + text
    assert (
        text.replace("\\", "").count(
            "--learning_rate 0.0001 (2e-05 in the paper's recipe), samples a GPU in an optimizer step: 8 (16 "
        )
        == 1
    )


@pytest.mark.parametrize("seed", range(4))
def test_text_appears_in_the_slot_that_completes_it(world, seed):
    """Random texts split at random tokens, also within characters, compared with a count of bytes."""
    print("seed", seed)
    draw = random.Random(seed)
    letters = ["a red", " ring", " ", "\n", ".", "é", "שלום", "🙂", "👩‍👩‍👧", "視", "\u200d"]
    letters_of_bytes = byte_letters()
    for _ in range(20):
        caption = "".join(draw.choices(letters, k=draw.randint(1, 30))).strip()
        ids = world.tokens(caption + draw.choice(["", " ", " \n"]))
        counts = [0] * draw.randint(1, 12)
        for _ in ids:
            counts[draw.randrange(len(counts))] += 1
        slots = [slot for slot, count in enumerate(counts, 1) for _ in range(count)]
        row = {"video_id": "v", "result": caption, "tokens": ids, "slots": slots, "clips": len(counts)}
        pieces = slot_texts(row, partial(world.tokenizer.decode, skip_special_tokens=True))
        assert "".join(pieces) == caption and len(pieces) == len(counts)
        for slot in range(1, len(counts)):
            one_by_one = [world.tokenizer.convert_ids_to_tokens(token) for token in ids[: sum(counts[:slot])]]
            plain = [token for token in one_by_one if token not in SPECIAL_TOKENS]
            raw = bytes(letters_of_bytes.index(letter) for token in plain for letter in token)
            whole = raw.decode(errors="ignore").lstrip()
            assert "".join(pieces[:slot]) == whole[: len(caption)]


def byte_letters() -> list[str]:
    """GPT-2's letter for each byte: printable bytes map to themselves, the others from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = map(chr, range(256, 512))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


def test_a_frame_is_the_newest_of_its_clip(tmp_path):
    make_video(tmp_path / "a.mp4", seconds=3, fps=10)  # frames carry their numbers; 2 fps takes 0, 5, 10, …
    result = SimpleNamespace(args={"video_root": str(tmp_path)})
    seconds, frames = show_video(result, {"video_path": "a.mp4"}, clips=3)
    pictures = [Image.open(io.BytesIO(base64.b64decode(frame.partition(",")[2]))) for frame in frames]
    assert seconds == 1 and [read_number(picture) for picture in pictures] == [5, 15, 25]
    with pytest.raises(InputError, match="has 3 clips, but had 4"):
        show_video(result, {"video_path": "a.mp4"}, clips=4)


def test_missing_files_are_reported(world, tmp_path, capsys):
    world.add("group", model=str(tmp_path / "gone"))
    world.add("gap", captions=[""])
    page, _ = world.report(*world.files)
    assert "gone is not on this machine; give a substitute with --tokenizer" in page and "<i>3 tokens</i>" in page
    assert page.count("The timing of words is unknown") == 3  # of group, whose captions are shown whole
    page, _ = world.report(*world.files, "--tokenizer", str(world.checkpoint), "--videos", "1")
    assert "The timing of words" not in page and f"Decoded with the tokenizer in {world.checkpoint.name}" in page

    other = tmp_path / "other"
    shutil.copytree(world.checkpoint, other)
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["Ġred"], vocabulary["Ġblue"] = vocabulary["Ġblue"], vocabulary["Ġred"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    world.add("group", model=str(tmp_path / "gone"), captions=["A red ring."])
    page, _ = world.report(*world.files, "--tokenizer", str(other), "--videos", "1")
    assert "do not decode to its text: another tokenizer wrote them" in page
    (other / "tokenizer.json").write_text("{}")
    assert "no tokenizer could be loaded" in refused(world.report, capsys, *world.files, "--tokenizer", str(other))

    world.add("group", data=str(tmp_path / "gone.jsonl"))
    page, _ = world.report(str(world.folder / "group_wait-3_infer.json"), "--video-ids", world.videos[1]["video_id"])
    assert "No frames: the evaluation data" in page and page.count('class="story"') == 1
    assert "data:image" not in page


def test_names_that_cannot_be_written_are_refused_at_once(tmp_path):
    for name, reason in (("a" * 300, "cannot be written (File name too long)"), ("", "is a folder"), (".", "a folder")):
        with pytest.raises(InputError, match=re.escape(reason)):
            outputs(str(tmp_path / name) if name else name)


def test_invalid_input_is_refused_in_one_line(world, capsys, tmp_path):
    world.add("group")
    world.add("group", name="again")
    world.add("gap")
    good, again, gap = (str(world.folder / f"{name}_infer.json") for name in ("group_wait-3", "again", "gap_wait-3"))
    args = json.loads(Path(gap).with_suffix(".args.json").read_text())
    rows = [json.loads(line) for line in Path(gap).read_text().splitlines()]

    def broken(name: str, row: dict | None = None, scores: str = "{}", **changes) -> str:
        path = tmp_path / f"{name}_infer.json"
        path.write_text("".join(json.dumps(each | (row or {})) + "\n" for each in rows[:1]))
        path.with_suffix(".args.json").write_text(json.dumps({**args, **changes}))
        path.with_name(f"{name}_scores.json").write_text(scores)
        return str(path)

    bare = tmp_path / "bare_infer.json"
    bare.write_text(Path(good).read_text())
    (tmp_path / "empty.json").touch()
    for arguments, reason in (
        ([str(tmp_path / "*_infer.json")], "*_infer.json"),
        ([str(tmp_path)], "cannot be read (Is a directory)"),
        ([str(tmp_path / "empty.json")], "has no rows"),
        ([str(world.folder / "gap_wait-3_scores.json")], "the row has no 'video_id'"),
        ([str(bare)], "bare_infer.args.json, the arguments of bare_infer.json, is missing"),
        ([good, again], "are both group, wait-3"),
        ([good, good], "are both group, wait-3"),
        ([broken("a", variant="grup")], "unknown variant 'grup'"),
        ([broken("b", variant="group")], "the variant is gap, but group in the arguments"),
        ([broken("c", model=None)], "has no valid 'model'"),
        ([broken("d", {"tokens": [1]})], "the number of slots differs from the number of tokens"),
        ([broken("e", {"slots": [9999] * len(rows[0]["tokens"])})], "the slots do not match the schedule"),
        ([broken("f", scores="{")], "f_scores.json cannot be read"),
        ([broken("g", scores="[]")], "g_scores.json cannot be read (it is not a JSON object)"),
        ([broken("h", scores='{"count": 1, "not_computed": []}')], "not_computed is not an object"),
        ([broken("i", {"clips": 0, "tokens": [], "slots": []})], "for each of the 0 clips"),
        ([gap, "--video-ids", "nowhere"], "--video-ids nowhere"),
        ([gap, "--videos", "-1"], "--videos -1"),
        ([gap, "--tokenizer", str(tmp_path / "gone")], "gone is not on this machine"),
        ([gap, "--size", "5B"], "5B"),
    ):
        assert reason in refused(world.report, capsys, *arguments), arguments
        assert not world.page.parent.exists()
    world.page.parent.touch()
    assert "cannot be written" in refused(world.report, capsys, gap, "--videos", "0")
