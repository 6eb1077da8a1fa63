"""PE-Video's preparation: sampling, reports, workers, killed runs, full disks, and user errors."""

import errno
import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
from mani import MP4, ROOT, command, everything, fill, good, ids, make_options, rows, skipped
from media import make_files, make_tar, sample_json
from pe_video import run
from pe_video.run import prepare_dataset
from preparation import files
from preparation.run import STATE_FOLDER
from qwen_vl_streaming.common import files as common_files
from qwen_vl_streaming.common.errors import InputError
from waiting import SECONDS

# --- sampling, reports, workers ---------------------------------------------------------------------------------------


def test_max_samples_samples_by_seed_and_replaces_bad_videos(tmp_path):
    bad = {3, 5, 8}
    members = [(f"{i}{e}", d) for i in range(12) for e, d in ((".json", good()), (".mp4", b"x" if i in bad else MP4))]
    make_tar(tmp_path / "source/train/a.tar", members)
    drawn = {}
    for seed in (0, 0, 1):
        options = make_options(tmp_path, max_samples=6, seed=seed, output_dir=tmp_path / f"out{seed}")
        options = replace(options, outputs={"train": options.output_dir / "rows.jsonl"})
        tally = prepare_dataset(options)["train"]
        assert len(rows(options)) == 6 == tally.rows
        assert ids(options) == sorted(ids(options))
        assert drawn.setdefault(seed, ids(options)) == ids(options)
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("name, seconds, shared", [(2, 6.0, 1), (3, 6.0, 0), (2, 6.5, 0)])
def test_videos_in_both_splits_are_reported(tmp_path, caplog, name, seconds, shared):
    """By name and duration: both splits may count from 0."""
    make_files(tmp_path / "source/train", {"1.json": good(), "2.json": good()})
    make_files(tmp_path / "source/test", {f"{name}.json": good(video_duration_in_s=seconds)})
    splits, outputs = ({split: tmp_path / kind / split for split in ("train", "test")} for kind in ("source", "out"))
    prepare_dataset(make_options(tmp_path, splits=splits, outputs=outputs))
    assert ("videos in both train and test: 1, such as 2.mp4" in caplog.text) == bool(shared)


def test_report(tmp_path):
    make_files(tmp_path / "source/train", {"1.json": good(), "2.json": sample_json(9, 2), "3.json": b"{"})
    options = make_options(tmp_path)
    prepare_dataset(options)
    report = json.loads((options.output_dir / "report.json").read_text())["splits"]["train"]
    assert (report["samples"], report["kept"], report["bad"], report["rows"]) == (3, 1, 1, 1)
    assert report["dropped"]["too short"] == 1
    assert report["bad_reasons"] == {"JSON is broken": 1}
    assert (options.output_dir / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_number_of_workers_does_not_change_the_files(tmp_path):
    fill(tmp_path / "source")
    results = []
    for workers in (1, 3):
        dataset = tmp_path / f"dataset{workers}"
        subprocess.run(command(tmp_path, dataset, "--workers", str(workers)), check=True, capture_output=True)
        text = {name: data.replace(str(dataset).encode(), b"") for name, data in everything(dataset).items()}
        results.append({name: data.replace(dataset.name.encode(), b"") for name, data in text.items()})
    assert results[0] == results[1]
    assert {"train_3_5.jsonl", "test_3_5.jsonl", "skipped.jsonl", "report.json", "report.png"} < results[0].keys()


def test_a_run_killed_three_times_writes_the_same_files(tmp_path):
    """Kills a run at several points, then lets it finish. The files equal those of an uninterrupted run."""
    fill(tmp_path / "source")
    dataset = tmp_path / "dataset"
    subprocess.run(command(tmp_path, dataset, "--workers", "2"), check=True, capture_output=True)
    expected = everything(dataset)
    dataset.rename(tmp_path / "uninterrupted")
    for share in (0.2, 0.5, 0.8):  # of the files
        process = subprocess.Popen(command(tmp_path, dataset, "--workers", "2"), stderr=subprocess.DEVNULL)
        while process.poll() is None and len(everything(dataset)) < share * len(expected):
            time.sleep(0.01)
        workers = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        process.wait()
        assert not psutil.wait_procs(workers, SECONDS)[1]  # they exit with their parent
    subprocess.run(command(tmp_path, dataset, "--workers", "2"), check=True, capture_output=True)
    assert everything(dataset) == expected


def test_finished_shards_are_not_read_again(tmp_path, caplog, monkeypatch):
    fill(tmp_path / "source")
    options = make_options(tmp_path)
    real, calls = run.read_unit, []

    def fail_third_call(unit):
        calls.append(unit.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(unit)

    monkeypatch.setattr(run, "read_unit", fail_third_call)
    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(options)
    with caplog.at_level(logging.INFO):
        prepare_dataset(options)
    assert calls == ["train/s0.tar", "train/s1.tar", "train/s2.tar", "train/s2.tar"]
    assert "resuming: 2 of 3 shards" in caplog.text
    finished = everything(tmp_path / "dataset")
    for shard in (tmp_path / "source/train").iterdir():
        shard.chmod(0)  # unpacked videos are not read from them again either
    monkeypatch.setattr(run, "check_videos", None)
    prepare_dataset(options)
    assert everything(tmp_path / "dataset") == finished


def test_changed_shard_is_read_again(tmp_path):
    make_tar(tmp_path / "source/train/a.tar", [("1.json", good())])
    options = make_options(tmp_path)
    prepare_dataset(options)
    assert skipped(options)[0]["reason"] == "JSON without its video"
    make_tar(tmp_path / "source/train/a.tar", [("1.json", good()), ("1.mp4", MP4)])
    prepare_dataset(options)
    assert ids(options) == ["1"]


def test_many_parts_are_merged_with_few_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr("pe_video.merge.FAN_IN", 3)
    monkeypatch.setattr("pe_video.stages.BYTES_PER_PART", 1000)
    monkeypatch.setattr("pe_video.stages.SAMPLES_PER_BATCH", 4)
    make_files(tmp_path / "source/train", {f"{i:03d}.json": good() for i in range(90)})
    options = make_options(tmp_path)
    prepare_dataset(options)
    assert ids(options) == [f"{i:03d}" for i in range(90)]


# --- user errors ----------------------------------------------------------------------------------


def test_full_disk_is_a_user_error_and_finished_files_are_intact(tmp_path):
    """Simulates a full disk by a limit on file size: writing a video fails half-way."""
    fill(tmp_path / "source")
    dataset = tmp_path / "dataset"
    big = MP4 + b"\0\0\x40\x00free" + bytes(0x4000 - 8)
    make_tar(tmp_path / "source/train/s9.tar", [("99.json", good()), ("99.mp4", big)])
    limit = (len(MP4) + 16_000) // 1024
    shell = ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "-"]
    result = subprocess.run([*shell, *command(tmp_path, dataset, "--workers", "1")], capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "cannot be written (File too large): free some space" in last
    assert "Traceback" not in result.stderr
    assert not list(dataset.rglob(f"*{files.PARTIAL_SUFFIX}"))
    videos = list(dataset.rglob("*.mp4"))
    assert videos and all(path.read_bytes() == MP4 for path in videos)
    subprocess.run(command(tmp_path, dataset), check=True, capture_output=True)
    assert (dataset / "PE-Video/videos/train/99.mp4").read_bytes() == big


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--source", "/nowhere"], "folder /nowhere does not exist"),
        (["--min-seconds", "40"], "--min-seconds 40 and --max-seconds 30 are not a range"),
        (["--workers", "0"], "--workers is 0: it must be at least 1"),
        (["--max-samples", "0"], "--max-samples is 0: it must be at least 1"),
        (["--tokenizer-model-id", "tests"], "tests has no tokenizer.json"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_user_errors_are_one_line(mani_refusal, tmp_path, more, message):
    make_files(tmp_path / "source/train", {"1.json": good()})
    assert message in mani_refusal(*command(tmp_path, tmp_path / "dataset", *more)[2:])


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"1.json": b"{", "2.json": b"{"}, ": 2 bad. The first of skipped.jsonl, train/1.json: JSON is broken"),
        (
            {"1.json": b"{", "2.json": sample_json(1, 6.0)},
            ": 1 too few tokens per second, 1 bad. The first of skipped.jsonl, train/1.json: JSON is broken",
        ),
        ({"1.json": sample_json(1, 6.0), "2.json": good(video_duration_in_s=1)}, ": 1 too short, 1 too few tokens"),
    ],
)
def test_a_split_without_rows_is_refused(tmp_path, files, reason):
    """Its earlier output stays; the other split is written."""
    make_files(tmp_path / "source/train", files)
    make_files(tmp_path / "source/test", {"3.json": good()})
    make_files(tmp_path / "dataset", {"train_3_5.jsonl": b"a row\n"})
    result = subprocess.run(command(tmp_path, tmp_path / "dataset"), capture_output=True, text=True)
    assert result.returncode == 2 and "test: 1 samples, 1 rows in " in result.stdout
    none = f"none of the 2 samples of train is kept, so {tmp_path / 'dataset/train_3_5.jsonl'} is not written"
    none += " and still has the rows of an earlier run"
    assert f"error: {none}{reason}" in result.stderr.splitlines()[-1]
    assert (tmp_path / "dataset/train_3_5.jsonl").read_text() == "a row\n"
    assert json.loads((tmp_path / "dataset/test_3_5.jsonl").read_text())["video_id"] == "3"


@pytest.mark.parametrize("dataset", ["pe-video", "funqa"])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["rows.jsonl", "x/../rows.jsonl"], "--test-output-name x/../rows.jsonl conflicts with --train-output-name"),
        (["a", "a/b"], "--test-output-name a/b conflicts with --train-output-name"),
        (["skipped.jsonl", "b"], "--train-output-name skipped.jsonl conflicts with the program's skipped.jsonl"),
        (["a", "../dataset/report.json"], "../dataset/report.json conflicts with the program's report.json"),
        (["a", "funqa_report.png"], "funqa_report.png conflicts with the program's"),
        ([".mani_data/lock", "b"], "--train-output-name .mani_data/lock conflicts with the program's .mani_data"),
        (["a", "."], "--test-output-name . is a folder"),
        (["../dataset", "b"], "--train-output-name ../dataset conflicts with the program's skipped.jsonl"),
        (["", "b"], "--train-output-name is empty"),
    ],
)
def test_output_names_that_conflict_are_refused(mani_refusal, tmp_path, dataset, names, message):
    flags = ["--dataset", dataset, "--dataset-root", str(tmp_path / "dataset")]
    assert message in mani_refusal(*flags, "--train-output-name", names[0], "--test-output-name", names[1])
    assert not list(tmp_path.iterdir())


def test_broken_tokenizer_is_reported_once_with_several_workers(tmp_path):
    fill(tmp_path / "source")
    make_files(tmp_path / "broken", {"tokenizer.json": b"{}"})
    more = ["--tokenizer-model-id", str(tmp_path / "broken"), "--workers", "2"]
    result = subprocess.run(command(tmp_path, tmp_path / "dataset", *more), capture_output=True, text=True)
    assert result.returncode == 2
    assert (
        result.stderr == f"error: tokenizer {tmp_path / 'broken/tokenizer.json'} cannot be loaded: download it again\n"
    )


def test_no_data_and_no_hub(tmp_path):
    """Without a network, one line says what to download, how, and to which folder."""
    environ = {**os.environ, "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, str(ROOT / "mani_data.py"), "--dataset-root", str(tmp_path)]
    result = subprocess.run(arguments, capture_output=True, text=True, env=environ)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "hf download facebook/PE-Video" in line and str(tmp_path / "PE-Video") in line


def test_two_runs_in_one_folder(tmp_path):
    make_files(tmp_path / "source/train", {"1.json": good()})
    options = make_options(tmp_path)
    with (
        files.exclusive_lock(options.output_dir / STATE_FOLDER),
        pytest.raises(InputError, match=r"another mani_data\.py"),
    ):
        prepare_dataset(options)


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def flock(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(common_files.fcntl, "flock", flock)
    with files.exclusive_lock(tmp_path / "state"):
        pass
    assert caplog.messages == [
        f"{tmp_path}/state cannot be locked (Function not implemented): do not run another one there"
    ]


def test_two_nodes_may_write_a_file_at_once(tmp_path, monkeypatch):
    """Processes of two nodes, or containers, may have the same id."""
    monkeypatch.setattr(os, "getpid", lambda: 20)
    with common_files.atomic_write(tmp_path / "page") as first, common_files.atomic_write(tmp_path / "page") as second:
        first.write("first")
        second.write("second")
    assert (tmp_path / "page").read_text() == "first" and len(list(tmp_path.iterdir())) == 1


def test_partial_files_of_a_killed_run_are_removed(tmp_path):
    make_files(tmp_path / "source/train", {"1.json": good()})
    left = make_files(tmp_path / "dataset/PE-Video/videos/train", {f".0.1{files.PARTIAL_SUFFIX}": b"half"})
    prepare_dataset(make_options(tmp_path))
    assert not list(left.iterdir())
