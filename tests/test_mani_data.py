"""PE-Video's preparation: sources, rules, reports, bad input, and runs that are killed."""

import json
import logging
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from media import make_files, make_tar, make_tokenizer, sample_json, sound_bytes, video_bytes
from pe_video import files, run
from pe_video.rules import MAX_JSON_BYTES, Rules
from pe_video.run import Options, prepare_dataset
from qwen_vl_streaming.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
KEPT, SECONDS = 24, 6.0  # words and seconds that give 4 tokens a second


@pytest.fixture(scope="session")
def mp4():
    """A video of 6 s."""
    return video_bytes(seconds=6, fps=5, size=(64, 48))


@pytest.fixture
def make_options(tmp_path):
    """Options for the split train under tmp_path/source, with a tokenizer of words, in this process."""

    def make(**changes) -> Options:
        options = Options(
            splits={"train": tmp_path / "source" / "train"},
            outputs={"train": tmp_path / "dataset" / "train_3_5.jsonl"},
            root=tmp_path,
            videos=tmp_path / "dataset" / "PE-Video" / "videos",
            output_dir=tmp_path / "dataset",
            hub_name="",
            rules=Rules(),
            tokenizer=str(make_tokenizer(tmp_path / "tokenizer")),
            max_samples=None,
            seed=0,
            workers=1,
        )
        return replace(options, **changes)

    return make


def good(**fields):
    return sample_json(KEPT, SECONDS, **fields)


def rows(options):
    return [json.loads(line) for line in options.outputs["train"].read_text().splitlines()]


def skipped(options):
    return [json.loads(line) for line in (options.output_dir / "skipped.jsonl").read_text().splitlines()]


def ids(options):
    return [row["video_id"] for row in rows(options)]


def everything(folder):
    """All finished files below `folder` with their bytes, the state of the run left out."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".mani_data" not in path.parts
    }


# --- rules and rows -------------------------------------------------------------------------------------------------


def test_rows_keep_all_fields_and_add_four(tmp_path, make_options):
    make_files(tmp_path / "source/train", {"7.json": good(keywords=["a", "ü"], model_caption="m")})
    options = make_options()
    tally = prepare_dataset(options)["train"]
    assert rows(options) == [
        {
            "category": "test",
            "video_duration_in_s": 6.0,
            "human_caption": " ".join(["word"] * KEPT),
            "keywords": ["a", "ü"],
            "model_caption": "m",
            "video_id": "7",
            "video_path": "dataset/PE-Video/videos/train/7.mp4",
        }
    ]
    assert tally.without_video == 1


@pytest.mark.parametrize(
    ("words", "seconds", "outcome"),
    [
        (15, 5.0, "kept"),
        (25, 5.0, "kept"),
        (14, 5.0, "too few tokens per second"),
        (26, 5.0, "too many tokens per second"),
        (20, 4.99, "too short"),
        (100, 30.0, "kept"),
        (100, 30.01, "too long"),
    ],
)
def test_bounds_are_themselves_allowed(tmp_path, make_options, words, seconds, outcome):
    make_files(tmp_path / "source/train", {"7.json": sample_json(words, seconds)})
    assert prepare_dataset(make_options())["train"].outcomes == {outcome: 1}


def test_bounds_and_prefix_are_flags(tmp_path, make_options):
    caption = "The video shows " + " ".join(["word"] * 17)
    make_files(tmp_path / "source/train", {"1.json": good(human_caption=caption), "2.json": good()})
    options = make_options(rules=Rules(caption_prefix="the video shows"))
    assert prepare_dataset(options)["train"].outcomes == {"kept": 1, "caption prefix": 1}
    assert ids(options) == ["1"]
    with pytest.raises(InputError, match="--min-seconds 9 and --max-seconds 3"):
        Rules(min_seconds=9, max_seconds=3)


@pytest.mark.parametrize("field", ["video_duration_in_s", "video_duration", "duration"])
def test_duration_by_any_of_its_names(tmp_path, make_options, field):
    data = json.loads(sample_json(KEPT, None)) | {field: "6"}
    make_files(tmp_path / "source/train", {"7.json": json.dumps(data).encode()})
    options = make_options()
    prepare_dataset(options)
    assert rows(options)[0]["video_duration_in_s"] == 6.0


def test_absent_duration_comes_from_the_video(tmp_path, make_options, mp4):
    make_files(tmp_path / "source/train", {"1.json": sample_json(KEPT, None), "1.mp4": mp4})
    make_tar(tmp_path / "source/train/a.tar", [("2.mp4", mp4), ("2.json", sample_json(KEPT, None))])
    options = make_options()
    prepare_dataset(options)
    assert [(row["video_id"], row["video_duration_in_s"]) for row in rows(options)] == [("1", 6.0), ("2", 6.0)]


BAD_JSON = {
    "broken": (b"{", "JSON is broken"),
    "empty": (b"  ", "JSON is empty"),
    "latin1": (b'{"human_caption": "\xe9"}', "JSON is not UTF-8"),
    "list": (b"[1]", "JSON is not an object"),
    "huge": (b" " * (MAX_JSON_BYTES + 1), "JSON is too large"),
    "deep": (b"[" * 200_000, "JSON is nested too deeply"),
    "negative": (sample_json(KEPT, -3), "video_duration_in_s is not a duration"),
    "nan": (sample_json(KEPT, float("nan")), "video_duration_in_s is not a duration"),
    "infinite": (sample_json(KEPT, float("inf")), "video_duration_in_s is not a duration"),
    "zero": (sample_json(KEPT, 0), "video_duration_in_s is not a duration"),
    "truth": (sample_json(KEPT, True), "video_duration_in_s is not a duration"),
    "absent": (sample_json(KEPT, None), "no duration in the JSON"),
    "nocaption": (b'{"video_duration_in_s": 6}', "no human_caption"),
    "emptycaption": (sample_json(0, 6), "human_caption is empty"),
    "numbercaption": (good(human_caption=7), "human_caption is not text"),
    "surrogate": (good(human_caption="\ud800 word"), "human_caption is not valid Unicode"),
    "nanfield": (good(score=float("nan")), "JSON holds text or a number that cannot be written back"),
}


def test_bad_json_is_counted_with_its_reason(tmp_path, make_options):
    make_files(tmp_path / "source/train", {f"{name}.json": data for name, (data, _) in BAD_JSON.items()})
    make_files(tmp_path / "source/train", {"fine.json": good()})
    options = make_options()
    tally = prepare_dataset(options)["train"]
    assert ids(options) == ["fine"]
    found = {entry["video_id"]: entry["reason"].partition(": ")[0] for entry in skipped(options)}
    assert found == {name: reason for name, (_, reason) in BAD_JSON.items()}
    assert sum(tally.reasons.values()) == len(BAD_JSON)


# --- sources --------------------------------------------------------------------------------------------------------


def test_folder_with_videos_missing_videos_and_orphans(tmp_path, make_options, mp4):
    source = {"1.json": good(), "1.mp4": mp4, "2.json": good(), "3.mp4": mp4, "4.json": good(), "4.mp4": b"no video"}
    make_files(tmp_path / "source/train", source)
    make_files(tmp_path / "dataset/PE-Video/videos/train", {"2.mp4": mp4})
    options = make_options()
    tally = prepare_dataset(options)["train"]
    paths = {row["video_id"]: row["video_path"] for row in rows(options)}
    assert paths == {"1": "source/train/1.mp4", "2": "dataset/PE-Video/videos/train/2.mp4"}
    assert tally.without_video == 0
    reasons = {entry["video_id"]: entry["reason"] for entry in skipped(options)}
    assert reasons["3"] == "video without its JSON"
    assert reasons["4"].startswith("video cannot be used: ")


def test_only_kept_videos_leave_a_shard(tmp_path, make_options, mp4):
    members = [("1.json", good()), ("1.mp4", mp4), ("2.mp4", mp4), ("2.json", sample_json(3, SECONDS))]
    make_tar(tmp_path / "source/train/a.tar", members)
    options = make_options()
    prepare_dataset(options)
    videos = tmp_path / "dataset/PE-Video/videos/train"
    assert [path.name for path in videos.iterdir()] == ["1.mp4"]
    assert (videos / "1.mp4").read_bytes() == mp4
    assert (tmp_path / rows(options)[0]["video_path"]).read_bytes() == mp4


def test_members_in_any_order(tmp_path, make_options, mp4):
    names = [f"{i:02d}" for i in range(8)]
    members = [(f"./{n}.mp4", mp4) for n in names] + [(f"./{n}.json", good()) for n in reversed(names)]
    make_tar(tmp_path / "source/train/a.tar", members)
    options = make_options()
    prepare_dataset(options)
    assert ids(options) == names


def test_long_names_of_both_tar_dialects(tmp_path, make_options, mp4):
    name = "x" * 150
    for dialect in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        path = tmp_path / f"source/train/{dialect}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", format=dialect) as tar:
            for ending, data in ((".json", good()), (".mp4", mp4)):
                part = make_files(tmp_path / "parts", {"x": data}) / "x"
                deep = f"{'d' * 90}/{'e' * 30}/" if dialect == tarfile.USTAR_FORMAT else ""
                tar.add(part, f"{deep}{dialect}{name[:60] if deep else name}{ending}")
    options = make_options()
    prepare_dataset(options)
    assert len(rows(options)) == 3
    assert not skipped(options)


BAD_VIDEOS = {
    "undecodable": b"no video at all",
    "empty": b"",
    "short": video_bytes(seconds=3, fps=5, size=(64, 48)),
    "sound": sound_bytes(),
}


def test_bad_videos_are_counted_and_not_written(tmp_path, make_options):
    members = [(f"{name}{e}", d) for name, data in BAD_VIDEOS.items() for e, d in ((".json", good()), (".mp4", data))]
    make_tar(tmp_path / "source/train/a.tar", members)
    options = make_options()
    prepare_dataset(options)
    assert not rows(options)
    reasons = {entry["video_id"]: entry["reason"].partition(": ")[0] for entry in skipped(options)}
    assert reasons == {
        "undecodable": "video cannot be used",
        "empty": "video is empty",
        "short": "video is shorter than it claims",
        "sound": "video cannot be used",
    }
    assert not list((tmp_path / "dataset").rglob("*.mp4"))


def test_damaged_shards_give_what_they_still_hold(tmp_path, make_options, mp4):
    members = [(f"{i}{e}", d) for i in range(6) for e, d in ((".json", good()), (".mp4", mp4))]
    whole = make_tar(tmp_path / "whole.tar", members).read_bytes()
    pair = len(whole[: whole.index(b"1.json\0")])  # bytes of the first sample
    broken = bytearray(whole)
    broken[2 * pair + 130] ^= 0xFF
    shards = {
        "a-cut.tar": whole[: 3 * pair + 1000],
        "b-header.tar": bytes(broken).replace(b"0.json", b"9.json").replace(b"0.mp4\0", b"9.mp4\0"),
        "c-none.tar": b"",
        "d-noise.tar": os.urandom(5000),
    }
    make_files(tmp_path / "source/train", shards)
    options = make_options()
    tally = prepare_dataset(options)["train"]
    assert ids(options) == ["0", "1", "2"]
    damaged = [entry for entry in skipped(options) if entry["reason"].startswith("shard damaged")]
    assert [entry["where"] for entry in damaged] == [f"train/{name}" for name in shards]
    assert tally.reasons["shard damaged"] == 4


def climbing_members(mp4):
    link = tarfile.TarInfo("link.mp4")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard = tarfile.TarInfo("hard.json")
    hard.type, hard.linkname = tarfile.LNKTYPE, "1.json"
    device = tarfile.TarInfo("device.mp4")
    device.type, device.devmajor, device.devminor = tarfile.CHRTYPE, 1, 3
    names = ["../up", "a/../../up2", "/absolute", "..", "new\nline", "x" * 230]
    climbing = [(f"{name}{e}", d) for name in names for e, d in ((".json", good()), (".mp4", mp4))]
    return [(link, b""), (hard, b""), (device, b""), *climbing, ("1.json", good()), ("1.mp4", mp4)]


def test_nothing_climbs_out(tmp_path, make_options, mp4):
    make_tar(tmp_path / "source/train/a.tar", climbing_members(mp4))
    options = make_options()
    before = {path for path in tmp_path.rglob("*") if "dataset" not in path.parts}
    tally = prepare_dataset(options)["train"]
    assert ids(options) == ["1"]
    assert {path for path in tmp_path.rglob("*") if "dataset" not in path.parts} == before
    assert [path.name for path in (tmp_path / "dataset").rglob("*.mp4")] == ["1.mp4"]
    assert tally.reasons["member refused"] >= 3 + 4 * 2
    assert not Path("/absolute.mp4").exists()


def test_video_place_that_is_a_link_is_replaced_not_followed(tmp_path, make_options, mp4):
    make_tar(tmp_path / "source/train/a.tar", [("1.json", good()), ("1.mp4", mp4)])
    videos = make_files(tmp_path / "dataset/PE-Video/videos/train", {})
    outside = make_files(tmp_path / "outside", {"mine": b"mine"}) / "mine"
    (videos / "1.mp4").symlink_to(outside)
    prepare_dataset(make_options())
    assert outside.read_bytes() == b"mine"
    assert not (videos / "1.mp4").is_symlink()


def test_duplicates_the_first_good_one_counts(tmp_path, make_options, mp4):
    other = video_bytes(seconds=7, fps=5, size=(64, 48))
    make_tar(tmp_path / "source/train/a.tar", [("1.json", b"{"), ("1.mp4", mp4), ("2.json", good()), ("2.mp4", mp4)])
    make_tar(
        tmp_path / "source/train/b.tar", [(n, d) for i in "12" for n, d in ((i + ".json", good()), (i + ".mp4", other))]
    )
    options = make_options()
    prepare_dataset(options)
    assert ids(options) == ["1", "2"]
    videos = tmp_path / "dataset/PE-Video/videos/train"
    assert (videos / "1.mp4").read_bytes() == other and (videos / "2.mp4").read_bytes() == mp4
    assert [entry["reason"] for entry in skipped(options)] == ["JSON is broken", "duplicate id: first in train/a.tar:2"]


# --- draws, reports, workers ----------------------------------------------------------------------------------------


def test_max_samples_draws_by_seed_and_passes_over_bad_videos(tmp_path, make_options, mp4):
    bad = {3, 5, 8}
    members = [(f"{i}{e}", d) for i in range(12) for e, d in ((".json", good()), (".mp4", b"x" if i in bad else mp4))]
    make_tar(tmp_path / "source/train/a.tar", members)
    drawn = {}
    for seed in (0, 0, 1):
        options = make_options(max_samples=6, seed=seed, output_dir=tmp_path / f"out{seed}")
        options = replace(options, outputs={"train": options.output_dir / "rows.jsonl"})
        tally = prepare_dataset(options)["train"]
        assert len(rows(options)) == 6 == tally.rows
        assert ids(options) == sorted(ids(options))
        assert drawn.setdefault(seed, ids(options)) == ids(options)
    assert drawn[0] != drawn[1]


def test_report(tmp_path, make_options):
    make_files(tmp_path / "source/train", {"1.json": good(), "2.json": sample_json(9, 2), "3.json": b"{"})
    options = make_options()
    prepare_dataset(options)
    report = json.loads((options.output_dir / "report.json").read_text())["splits"]["train"]
    assert (report["samples"], report["kept"], report["bad"], report["rows"]) == (3, 1, 1, 1)
    assert report["dropped"]["too short"] == 1
    assert report["bad_reasons"] == {"JSON is broken": 1}
    assert (options.output_dir / "report.png").read_bytes().startswith(b"\x89PNG")


def fill(folder, mp4):
    """Two splits in three shards and 60 JSON files, with a few of every fault."""
    for k in range(3):
        members = [(f"{k}{i}{e}", d) for i in range(8) for e, d in ((".mp4", mp4), (".json", good()))]
        make_tar(folder / f"train/s{k}.tar", [*members, ("dup.json", good(n=k)), ("dup.mp4", mp4), ("bad.json", b"{")])
    make_files(folder / "test", {f"{i}.json": sample_json(10 + i, SECONDS) for i in range(60)})


def command(tmp_path, dataset, *more):
    make_tokenizer(tmp_path / "tokenizer")
    return [
        sys.executable,
        str(ROOT / "mani_data.py"),
        *("--source", str(tmp_path / "source"), "--dataset-root", str(dataset)),
        *("--tokenizer-model-id", str(tmp_path / "tokenizer"), *more),
    ]


def test_same_bytes_however_many_workers(tmp_path, mp4):
    fill(tmp_path / "source", mp4)
    results = []
    for workers in (1, 3):
        dataset = tmp_path / f"dataset{workers}"
        subprocess.run(command(tmp_path, dataset, "--workers", str(workers)), check=True, capture_output=True)
        text = {name: data.replace(str(dataset).encode(), b"") for name, data in everything(dataset).items()}
        results.append({name: data.replace(dataset.name.encode(), b"") for name, data in text.items()})
    assert results[0] == results[1]
    assert {"train_3_5.jsonl", "test_3_5.jsonl", "skipped.jsonl", "report.json", "report.png"} < results[0].keys()


def test_killed_again_and_again_ends_with_the_same_bytes(tmp_path, mp4):
    """Killed at moments spread over the whole run, then left to end: the files are those of an undisturbed run."""
    fill(tmp_path / "source", mp4)
    dataset = tmp_path / "dataset"
    begin = time.monotonic()
    subprocess.run(command(tmp_path, dataset, "--workers", "2"), check=True, capture_output=True)
    whole = time.monotonic() - begin
    expected = everything(dataset)
    dataset.rename(tmp_path / "undisturbed")
    for share in (0.3, 0.5, 0.6, 0.7, 0.8):
        process = subprocess.Popen(command(tmp_path, dataset, "--workers", "2"), stderr=subprocess.DEVNULL)
        time.sleep(share * whole)
        process.send_signal(signal.SIGKILL)
        process.wait()
    time.sleep(0.2)  # the workers notice
    subprocess.run(command(tmp_path, dataset, "--workers", "2"), check=True, capture_output=True)
    assert everything(dataset) == expected


def test_finished_shards_are_not_read_again(tmp_path, make_options, mp4, caplog, monkeypatch):
    fill(tmp_path / "source", mp4)
    options = make_options()
    real, calls = run.read_unit, []

    def third_time_dies(unit):
        calls.append(unit.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(unit)

    monkeypatch.setattr(run, "read_unit", third_time_dies)
    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(options)
    with caplog.at_level(logging.INFO):
        prepare_dataset(options)
    assert calls == ["train/s0.tar", "train/s1.tar", "train/s2.tar", "train/s2.tar"]
    assert "2 of 3 shards" in caplog.text
    finished = everything(tmp_path / "dataset")
    for shard in (tmp_path / "source/train").iterdir():
        shard.chmod(0)  # and the kept videos, once written, are not read from them again either
    monkeypatch.setattr(run, "check_videos", None)
    prepare_dataset(options)
    assert everything(tmp_path / "dataset") == finished


def test_changed_shard_is_read_again(tmp_path, make_options, mp4):
    make_tar(tmp_path / "source/train/a.tar", [("1.json", good())])
    options = make_options()
    prepare_dataset(options)
    assert skipped(options)[0]["reason"] == "JSON without its video"
    make_tar(tmp_path / "source/train/a.tar", [("1.json", good()), ("1.mp4", mp4)])
    prepare_dataset(options)
    assert ids(options) == ["1"]


def test_many_parts_merge_in_bounded_open_files(tmp_path, make_options, monkeypatch):
    monkeypatch.setattr("pe_video.merge.FAN_IN", 3)
    monkeypatch.setattr("pe_video.stages.BYTES_PER_PART", 1000)
    monkeypatch.setattr("pe_video.stages.SAMPLES_PER_BATCH", 4)
    make_files(tmp_path / "source/train", {f"{i:03d}.json": good() for i in range(90)})
    options = make_options()
    prepare_dataset(options)
    assert ids(options) == [f"{i:03d}" for i in range(90)]


# --- mistakes that end in one line ----------------------------------------------------------------------------------


def test_full_disk_ends_in_one_line_and_leaves_finished_files_whole(tmp_path, mp4):
    """A limit on file size stands in for a full disk: the write fails half-way through a video."""
    fill(tmp_path / "source", mp4)
    dataset = tmp_path / "dataset"
    big = mp4 + b"\0\0\x40\x00free" + bytes(0x4000 - 8)
    make_tar(tmp_path / "source/train/s9.tar", [("99.json", good()), ("99.mp4", big)])
    limit = (len(mp4) + 16_000) // 1024
    shell = ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "-"]
    result = subprocess.run([*shell, *command(tmp_path, dataset, "--workers", "1")], capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: cannot write")
    assert "make room" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert not list(dataset.rglob(f"*{files.PART_SUFFIX}"))
    videos = list(dataset.rglob("*.mp4"))
    assert videos and all(path.read_bytes() == mp4 for path in videos)
    subprocess.run(command(tmp_path, dataset), check=True, capture_output=True)
    assert (dataset / "PE-Video/videos/train/99.mp4").read_bytes() == big


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--source", "/nowhere"], "folder /nowhere does not exist"),
        (["--min-seconds", "40"], "--min-seconds 40 and --max-seconds 30 leave nothing"),
        (["--workers", "0"], "--workers 0 must be at least 1"),
        (["--max-samples", "0"], "--max-samples 0 must be at least 1"),
        (["--tokenizer-model-id", "tests"], "tests has no tokenizer.json"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_mistakes_are_one_line(tmp_path, more, message):
    make_files(tmp_path / "source/train", {"1.json": good()})
    result = subprocess.run(command(tmp_path, tmp_path / "dataset", *more), capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if not line.startswith("WARNING")]
    assert len(lines) == 1 and message in lines[0], result.stderr


def test_no_data_and_no_hub(tmp_path):
    """Without a network the mend is one line: what to fetch, how, and where to put it."""
    environ = {**os.environ, "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, str(ROOT / "mani_data.py"), "--dataset-root", str(tmp_path)]
    result = subprocess.run(arguments, capture_output=True, text=True, env=environ)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "hf download facebook/PE-Video" in line and str(tmp_path / "PE-Video") in line


def test_two_runs_at_once(tmp_path, make_options):
    make_files(tmp_path / "source/train", {"1.json": good()})
    options = make_options()
    with (
        files.only_one(options.output_dir / run.STATE_FOLDER),
        pytest.raises(InputError, match=r"another mani_data\.py"),
    ):
        prepare_dataset(options)


def test_half_written_files_of_a_killed_run_are_removed(tmp_path, make_options):
    make_files(tmp_path / "source/train", {"1.json": good()})
    left = make_files(tmp_path / "dataset/PE-Video/videos/train", {f".0.1{files.PART_SUFFIX}": b"half"})
    prepare_dataset(make_options())
    assert not list(left.iterdir())
