"""Evaluation on real files with a real, tiny checkpoint: what it writes, how it resumes, what it refuses."""

import json
import os
import shutil
import signal
import tarfile
from pathlib import Path
from types import SimpleNamespace

import captioning
import eval as evaluation
import pytest
import torch
import verify
from make_data import make_dataset
from make_model import tiny_checkpoint
from media import make_video
from qwen_vl_streaming.common.errors import InputError, run
from qwen_vl_streaming.model.prompts import Template
from qwen_vl_streaming.timeline.variants import VARIANTS
from qwen_vl_streaming.video.frames import read_video
from qwen_vl_streaming.video.pixel_budget import PixelBudget
from refusing import refused
from results import FIELDS
from safetensors.torch import load, save
from samples import DataConfig
from settings import Settings


@pytest.fixture(scope="module")
def made(tmp_path_factory):

    folder = tmp_path_factory.mktemp("made")
    make_dataset(DataConfig(folder / "data", train_videos=0, test_videos=5, dropped=0, size=56))
    for shard in (folder / "data/test").glob("*.tar"):
        with tarfile.open(shard) as archive:
            archive.extractall(folder / "videos", filter="data")
    rows = [
        {**json.loads(path.read_text()), "video_path": str(path.with_suffix(".mp4"))}
        for path in sorted((folder / "videos").glob("*.json"))
    ]
    rows.append({**rows[0], "video_id": "gone", "video_path": str(folder / "gone.mp4")})
    data = folder / "test.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tiny_checkpoint(folder / "model"), data, rows


def test_segments_may_overlap():
    """They are not written, so that any order will do; their times are checked."""
    segments = [{"start": 0, "end": 9, "text": "a"}, {"start": 3, "end": 5, "text": "b"}]
    video = SimpleNamespace(clips=11, seconds_per_clip=1.0)
    captioning.check_times({"place": "a, line 1", "segments": segments}, video)
    segments[1]["start"] = 6
    with pytest.raises(InputError, match=r"a, line 1: segment 2 \(6 to 5 s\) ends before it starts"):
        captioning.check_times({"place": "a, line 1", "segments": segments}, video)


@pytest.fixture
def evaluate(made, tmp_path, monkeypatch):
    """Run eval.py's main with flags over the defaults of this test; returns its output folder."""
    monkeypatch.delenv("QWEN2_5_VL_VARIANT", raising=False)

    def call(*flags, out=tmp_path / "out"):
        small = ["--min-pixels-per-frame", "3136", "--max-pixels-per-frame", "3136", "--max-new-tokens", "40"]
        small += ["--device", "cpu", "--workers", "0", "--data", str(made[1]), "--model", str(made[0])]
        monkeypatch.setattr("sys.argv", ["eval.sh", *small, "--output-dir", str(out), *flags])
        run(evaluation.main)
        return out

    return call


def test_rows_scores_and_resumption(made, evaluate, capsys, monkeypatch):
    """The output files. A run that is interrupted and restarted ends with the same bytes."""
    out = evaluate("--variant", "group", "--batch-size", "2")
    whole = (out / "group_infer.json").read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["video_id"] for row in rows] == [row["video_id"] for row in made[2][:-1]]  # the missing one is skipped
    for row in rows:
        assert set(row) == set(FIELDS)
        assert sum(row["schedule"]) == len(row["tokens"]) == len(row["slots"]) and len(row["schedule"]) == row["clips"]
        assert set(row["schedule"][:-1]) <= {0, 1, 2, 3} and row["variant"] == "group"
    scores = json.loads((out / "group_scores.json").read_text())
    assert scores["count"] == 5 and scores["skipped"] == 1
    assert all(scores[name] >= 0 for name in ("CIDEr", "BLEU-1", "BLEU-4", "METEOR", "ROUGE-L"))
    assert "gone.mp4" in json.loads((out / "group_skipped.jsonl").read_text())["reason"]
    assert "CIDEr" in capsys.readouterr().out

    lines = whole.splitlines(keepends=True)
    (out / "group_infer.json").write_text("".join(lines[:3]) + lines[3][:50])
    monkeypatch.setattr(evaluation, "score_rows", lambda *_: None)
    evaluate("--variant", "group", "--batch-size", "2")
    again = (out / "group_infer.json").read_text().splitlines()
    without_time = [{**json.loads(line), "seconds": 0} for line in again]
    assert without_time == [{**row, "seconds": 0} for row in rows]

    assert "started with repetition_penalty" in refused(
        evaluate, capsys, "--variant", "group", "--repetition-penalty", "1.3"
    )
    assert "started with schedule" in refused(evaluate, capsys, "--variant", "group", "--schedule", "wait-2")


def test_a_result_file_of_another_run_is_not_resumed(made, evaluate, tmp_path, capsys, monkeypatch):
    """Data, weights and schedule are identified by their contents, not by their paths."""
    monkeypatch.setattr(evaluation, "score_rows", lambda *_: None)
    model, data, counts = tmp_path / "model", tmp_path / "data.jsonl", tmp_path / "counts.json"
    shutil.copytree(made[0], model)
    data.write_bytes(made[1].read_bytes())
    counts.write_text(json.dumps({row["video_id"]: [2] * 30 for row in made[2]}))
    changed = {"--model": model, "--data": data, "--schedule": counts}
    flags = [str(text) for pair in changed.items() for text in pair]
    out = evaluate(*flags)  # nothing fits the counts, so there are no rows, and its arguments may change
    lines = [json.loads(line) for line in (out / "group_skipped.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and sum("counts.json has 30 counts" in line["reason"] for line in lines) == 5
    assert not (out / "group_infer.json").exists()

    clips = {row["video_id"]: read_video(row["video_path"]).clips for row in made[2][:-1]}
    counts.write_text(
        "".join(json.dumps({name: [2] * (n - i % 2)}) + "\n" for i, (name, n) in enumerate(clips.items()))
    )
    assert "no counts for video gone" in refused(evaluate, capsys, *flags)
    with counts.open("a") as file:
        file.write('{"gone": []}\n')
    before = (evaluate(*flags) / "group_infer.json").read_text()
    for line in before.splitlines():
        assert set(json.loads(line)["schedule"][:-1]) <= {0, 1, 2}
    kept = json.loads((out / "group_infer.args.json").read_text())
    assert kept["schedule"] == "counts.json" and len(kept["schedule_sha256"]) == 64

    moved = [path.rename(path.with_name(f"moved-{path.name}")) for path in (model, data)]
    here = ["--model", str(moved[0]), "--data", str(moved[1]), "--schedule", str(counts)]
    evaluate(*here)
    assert (out / "group_infer.json").read_text() == before

    weights = moved[0] / "model.safetensors"
    for path, reason, change in (
        (moved[1], "other contents of the data", lambda text: text.replace(b"The", b"A")),
        (counts, "other contents of the schedule", lambda text: text + b"\n"),
        (weights, "other contents of the model", one_tensor_changed),
        (out / "group_infer.args.json", "cannot be read", lambda text: b""),
        (out / "group_infer.json", "has rows of gap, not group", lambda text: text.replace(b'"group"', b'"gap"')),
    ):
        whole = path.read_bytes()
        path.write_bytes(change(whole))
        assert reason in refused(evaluate, capsys, *here), path
        path.write_bytes(whole)
    assert (out / "group_infer.json").read_text() == before


def test_a_file_that_kills_its_decoder_is_named(made, evaluate, capsys, monkeypatch):
    """Decoders are C code: a broken file may kill the process. The run then names the files that may be the cause."""
    fatal, read = made[2][3]["video_path"], captioning.read_video

    def read_or_die(path, **options):
        if str(path) == fatal:
            os.kill(os.getpid(), signal.SIGSEGV)
        return read(path, **options)

    monkeypatch.setattr(captioning, "read_video", read_or_die)
    monkeypatch.setattr(evaluation, "score_rows", lambda *_: None)
    error = refused(evaluate, capsys, "--workers", "1", "--batch-size", "1")
    assert "decoding one of the videos" in error and made[2][3]["video_id"] in error and "remove that one" in error


def one_tensor_changed(data: bytes) -> bytes:
    """A file of the checkpoint in which the last weight differs slightly."""
    tensors = {name: tensor + 1e-3 * (name == max(load(data))) for name, tensor in load(data).items()}
    return save(tensors, {"format": "pt"})


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "group"])
def test_every_variant_runs(evaluate, monkeypatch, variant):
    monkeypatch.setattr(evaluation, "score_rows", lambda *_: None)
    out = evaluate("--variant", variant, "--limit", "2", "--schedule", "random-3")
    for line in (out / f"{variant}_infer.json").read_text().splitlines():
        row = json.loads(line)
        if not VARIANTS[variant].streams:
            assert set(row["slots"]) == {row["clips"]}


def test_invalid_input_is_refused_in_one_line(made, evaluate, tmp_path, capsys):
    checkpoint, _, rows = made
    gap = tmp_path / "gap"
    shutil.copytree(checkpoint, gap)
    config = json.loads((gap / "config.json").read_text())
    (gap / "config.json").write_text(json.dumps({**config, "streaming_variant": "gap", "wait_k": 3}))
    bare = tmp_path / "bare"
    bare.mkdir()
    (tmp_path / "empty").mkdir()
    (bare / "config.json").write_text(json.dumps(config))
    (tmp_path / "wordless.jsonl").write_text(json.dumps({**rows[0], "human_caption": " ."}) + "\n")
    (tmp_path / "twice.jsonl").write_text(2 * (json.dumps(rows[0]) + "\n"))
    (tmp_path / "none.jsonl").write_text(json.dumps({**rows[0], "human_caption": None}) + "\n")
    (tmp_path / "nameless.jsonl").write_text(json.dumps({**rows[0], "video_id": ""}) + "\n")
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(rows[0], ensure_ascii=False).encode() + b"\xe9\n")
    for flags, reason in (
        (["--variant", "grup"], "unknown variant 'grup'"),
        (["--schedule", "wait-x"], "unknown schedule 'wait-x'"),
        (["--model", str(gap)], "trained as gap, not group"),
        (["--model", str(gap), "--variant", "gap"], "with another rule for the positions after a video"),
        (["--model", str(bare)], "no processor"),
        (["--model", str(tmp_path / "nowhere")], "nowhere"),
        (["--data", str(tmp_path / "nowhere.jsonl")], "nowhere.jsonl"),
        (["--data", str(tmp_path / "wordless.jsonl")], "caption without a word"),
        (["--data", str(tmp_path / "twice.jsonl")], "both have the video_id"),
        (["--data", str(tmp_path / "none.jsonl")], "has the human_caption null, which is not a string"),
        (["--data", str(tmp_path / "nameless.jsonl")], 'the video_id "", which is not'),
        (["--data", str(tmp_path / "latin.jsonl")], "cannot be read"),
        (["--data", str(tmp_path)], "a folder that was not written by `Dataset.save_to_disk`"),
        (["--batch-size", "0"], "--batch-size 0: give a number from 1 to 1000000"),
        (["--repetition-penalty", "nan"], "--repetition-penalty nan"),
        (["--memory", "1e308"], "--memory 1e+308"),
        (["--output-file", "exp.v1"], "exp.v1: give a name that ends in .json"),
        (["--data", str(tmp_path / ("x" * 300))], "is missing: check the path"),
        (["--model", str(tmp_path / "empty")], "empty has no config.json"),
        (["--limit", "0"], "--limit 0: give a number from 1"),
        (["--limit", "-1"], "--limit -1"),
        (["--dtype", "int8"], "float32"),
        (["--schedule", "random-0"], "give wait-K, random, random-K"),
        (["--memory", "0"], "GiB above 0"),
        (["--processes", "2"], "start it with eval.sh"),
        (["--device", "cuda:7"], "no GPU found"),
        (["--output-dir", str(tmp_path / "twice.jsonl")], "cannot be written"),
    ):
        assert reason in refused(evaluate, capsys, *flags), flags
        assert not (tmp_path / "out/group_infer.json").exists()


def test_frames_are_resized_as_in_training_by_default():
    trained = SimpleNamespace(pixel_budget={"min_pixels_per_frame": 3136, "max_pixels_per_frame": 7056})
    assert PixelBudget.trained(trained, Settings()) == PixelBudget(3136, 7056)
    assert PixelBudget.trained(trained, Settings(max_pixels_per_frame=6272)) == PixelBudget(3136, 6272)
    assert PixelBudget.trained(SimpleNamespace(), Settings()) == PixelBudget()
    stream = SimpleNamespace(pixel_budget={"budget": "stream"})
    assert PixelBudget.trained(stream, Settings()) == PixelBudget(budget="stream")
    assert PixelBudget.trained(stream, Settings(budget="video")) == PixelBudget()
    with pytest.raises(InputError, match="max_pixels_per_frame 100"):
        PixelBudget.trained(trained, Settings(max_pixels_per_frame=100))


def test_early_tokens_do_not_depend_on_the_length_of_the_video(made, evaluate, tmp_path, monkeypatch):
    """With --budget stream, the tokens before the last slot of a video equal those of a longer video that begins with
    it."""
    monkeypatch.setattr(evaluation, "score_rows", lambda *_: None)
    sizes = {"size": (320, 240), "options": {"bf": "0", "x264-params": "rc-lookahead=0:log-level=none", "qp": "20"}}
    films = [make_video(tmp_path / f"{n}.mp4", seconds=n, **sizes) for n in (3, 6)]
    rows = [{**json.loads(made[1].read_text().splitlines()[0]), "video_path": str(film)} for film in films]
    data = tmp_path / "films.jsonl"
    data.write_text("".join(json.dumps({**row, "video_id": str(i)}) + "\n" for i, row in enumerate(rows)))
    flags = ["--data", str(data), "--max-pixels-per-frame", str(784 * 90), "--max-pixels-per-video", str(784 * 200)]
    out = evaluate(*flags, "--budget", "stream")
    assert json.loads((out / "group_infer.args.json").read_text())["budget"] == "stream"
    lines = map(json.loads, (out / "group_infer.json").read_text().splitlines())
    short, long = sorted(lines, key=lambda row: row["clips"])
    early = [token for token, slot in zip(short["tokens"], short["slots"], strict=True) if slot < 3]
    assert early and early == long["tokens"][: len(early)]


def test_a_forced_variant_is_evaluated(made, evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "score_rows", lambda *_: None)
    gap = tmp_path / "gap"
    shutil.copytree(made[0], gap)
    config = json.loads((gap / "config.json").read_text())
    (gap / "config.json").write_text(json.dumps({**config, "streaming_variant": "gap", "wait_k": 2}))
    out = evaluate("--model", str(gap), "--variant", "group", "--force", "--limit", "1")
    assert json.loads((out / "group_infer.args.json").read_text())["schedule"] == "wait-2"


def test_captions_made_elsewhere_are_scored(evaluate, tmp_path, capsys):
    captions = tmp_path / "mine.json"
    pairs = [("a", "a red square moves", "a red square moves"), ("b", "a blue ring", "a green ring leaves")]
    rows = [{"video_id": i, "annotation": a, "result": r} for i, a, r in pairs]
    captions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate("--score-only", str(captions))
    scores = json.loads((tmp_path / "mine.scores.json").read_text())
    assert scores["count"] == 2 and scores["skipped"] == 0 and 0 < scores["BLEU-1"] < 100
    assert "METEOR" in capsys.readouterr().out
    captions.write_text(captions.read_text()[:-10])
    with pytest.raises(SystemExit):
        evaluate("--score-only", str(captions))
    assert "line 2: not JSON" in capsys.readouterr().err


def test_the_report_reads_new_scores(evaluate, tmp_path, monkeypatch):
    """Also the number of skipped videos."""
    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "score_rows", lambda *_: None)
        out = evaluate("--limit", "2")
    (out / "group_skipped.jsonl").write_text('{"video_id": "x", "reason": "gone"}\n')
    evaluate("--score-only", str(out / "group_infer.json"))
    scores = json.loads((out / "group_scores.json").read_text())
    assert scores["count"] == 2 and scores["skipped"] == 1 and not (out / "group_infer.scores.json").exists()


@pytest.mark.parametrize("variant", ["group", "overlap", "interleave"])
def test_every_token_is_recomputed_by_the_stock_model(evaluate, tmp_path, monkeypatch, capsys, variant):
    """A token that was changed by hand is found."""
    monkeypatch.setattr(evaluation, "score_rows", lambda *_: None)
    path = evaluate("--variant", variant, "--limit", "2", "--schedule", "random-2") / f"{variant}_infer.json"
    monkeypatch.setattr("sys.argv", ["verify.py", str(path), "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        verify.main()
    assert ended.value.code == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    count = sum(len(row["tokens"]) for row in rows)
    assert f"{count} of {count} tokens of 2 videos" in capsys.readouterr().out
    tokens, slots, schedule = (rows[1][name] for name in ("tokens", "slots", "schedule"))
    moved = [schedule[0] + 1, *schedule[1:-1], schedule[-1] - 1]
    other = {"schedule": moved, "slots": [slot for slot, count in enumerate(moved, 1) for _ in range(count)]}
    cut = {"tokens": tokens[:-1], "slots": slots[:-1], "schedule": [*schedule[:-1], schedule[-1] - 1]}
    for change, status, says in (
        ({"tokens": [*tokens[:-1], tokens[-1] + 1]}, 1, f"{count - 1} of {count} tokens"),
        ({"result": "quite something else"}, 1, "the caption is not the text of its tokens"),
        (cut, 1, "the tokens stop before the end of the answer"),
        ({"slots": [1] * len(slots)}, 2, "the slots do not match the schedule"),
        (other, 1, "random-2 gives"),
        ({"tokens": tokens[:-1]}, 2, "the number of slots differs"),
        ({"tokens": [*tokens[:-1], 10**6]}, 2, "does not have one of its tokens"),
    ):
        path.write_text("".join(json.dumps(row) + "\n" for row in [rows[0], {**rows[1], **change}]))
        with pytest.raises(SystemExit) as ended:
            run(verify.main)
        assert ended.value.code == status and says in "".join(capsys.readouterr()), change
    arguments = path.with_suffix(".args.json")
    saved_arguments, broken = json.loads(arguments.read_text()), tmp_path / "broken.jsonl"
    broken.write_text(Path(saved_arguments["data"]).read_text() + "{broken\n")
    for file, text, says in (
        (arguments, json.dumps({**saved_arguments, "data": str(broken)}), f"{broken}, line "),
        (
            arguments,
            json.dumps({**saved_arguments, "repetition_penalty": -0.0}),
            "a repetition penalty that is not above 0",
        ),
        (
            arguments,
            json.dumps({**saved_arguments, "model_sha256": "0" * 64}),
            f"{saved_arguments['model']} has changed since {path} was written",
        ),
        (path, "", "has no rows"),
    ):
        file.write_text(text)
        with pytest.raises(SystemExit) as ended:
            run(verify.main)
        assert ended.value.code == 2 and says in capsys.readouterr().err


def test_bfloat16_results_are_recomputed_in_bfloat16(evaluate, monkeypatch, capsys):
    """In float32 many tokens differ. A token that was changed by hand is found here too."""
    monkeypatch.setattr(evaluation, "score_rows", lambda *_: None)
    path = evaluate("--variant", "group", "--limit", "2", "--dtype", "bfloat16") / "group_infer.json"
    monkeypatch.setattr("sys.argv", ["verify.py", str(path), "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        verify.main()
    assert ended.value.code == 0 and "the arg-max of the stock model in bfloat16, group" in capsys.readouterr().out
    first, row = (json.loads(line) for line in path.read_text().splitlines())
    row["tokens"][-1] += 1
    path.write_text("".join(json.dumps(one) + "\n" for one in (first, row)))
    with pytest.raises(SystemExit) as ended:
        verify.main()
    assert ended.value.code == 1 and "\n1 are wrong\n" in capsys.readouterr().out
    saved_arguments = json.loads(path.with_suffix(".args.json").read_text())
    path.with_suffix(".args.json").write_text(json.dumps({**saved_arguments, "dtype": "int8"}))
    with pytest.raises(SystemExit) as ended:
        run(verify.main)
    assert ended.value.code == 2 and "was made in 'int8', not one of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dtype", "tied"), [(torch.float32, 5e-5), (torch.bfloat16, 0.5), (torch.float16, 0.0625)], ids=str
)
def test_a_tie_is_a_rounding_error_of_the_data_type(dtype, tied):
    """Four rounding steps of the type at the largest score, 16; in float32 the margin of streaming."""
    logits = torch.zeros(3, 20)
    logits[:, 7] = 16
    logits[:, 8] = torch.tensor([16 - tied, 16 - 3 * tied, 17])
    found = verify.find_mismatches(logits, Template((0,), (1, 2), (3,), 4, 5), [8, 8, 8], 1.0, dtype)
    assert [(other.index, other.tie) for other in found] == [(0, True), (1, False)]
    assert [other.margin for other in found] == pytest.approx([tied, 3 * tied], rel=0.05)
