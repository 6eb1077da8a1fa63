"""Evaluation by one process, by several and on two nodes, killed at any time: the captions are the same."""

import contextlib
import json
import os
import random
import re
import signal
import socket
import time

import psutil
import pytest
from evaluating import finish, finished, rank_of, rows, start, wait_for_rows
from media import make_video
from training import free_port
from waiting import SECONDS, until

SEED = time.time_ns() % 100_000


@pytest.fixture(scope="module")
def many(made, tmp_path_factory):
    """The tiny checkpoint, and a data file of 12 videos of random lengths and sizes, one of which is broken."""
    print("seed", SEED)
    draw, folder = random.Random(SEED), tmp_path_factory.mktemp("many")
    data = []
    for number in range(12):
        path, seconds = folder / f"{number}.mp4", draw.uniform(1.2, 6)
        make_video(path, seconds=seconds, fps=4, size=(draw.randrange(80, 200, 2), draw.randrange(80, 200, 2)))
        row = {"video_id": str(number), "video_path": str(path), "human_caption": "A red ring."}
        data.append({**row, "video_duration_in_s": seconds})
    (folder / "7.mp4").write_bytes((folder / "7.mp4").read_bytes()[:500])
    file = folder / "test.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in data))
    return made[0], file


@pytest.fixture(scope="module")
def expected(many, tmp_path_factory):
    """The rows written by one process with a batch size of one."""
    folder = tmp_path_factory.mktemp("expected")
    finish(start(many, folder, folder / "log", batch_size=1), folder / "log")
    found = rows(folder)
    assert [row["video_id"] for row in found] == [str(number) for number in range(12) if number != 7]
    assert len({row["clips"] for row in found}) > 1
    return found


@pytest.fixture
def hold(tmp_path):
    """A file. While it exists, the processes that are told so wait."""
    (tmp_path / "hold").touch()
    return tmp_path / "hold"


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=SECONDS)[1]


@pytest.mark.parametrize("variant", ["group", "interleave"])
def test_batch_order_and_processes_change_nothing(many, tmp_path, variant):
    """Wider frames in the batch do not either. The file has the order of the data."""
    data, log = many[1], tmp_path / "log"
    lines = data.read_text().splitlines(keepends=True)
    (tmp_path / "shuffled.jsonl").write_text("".join(random.Random(SEED).sample(lines, len(lines))))
    wide = {"max_pixels_per_frame": 4 * 3136, "variant": variant}
    runs = {
        "alone": {"batch_size": 1},
        "batch": {"batch_size": 8, "workers": 2},
        "large": {"batch_size": 32, "data": tmp_path / "shuffled.jsonl"},
        "two": {"batch_size": 3, "processes": 2},
    }
    for name, changes in runs.items():
        finish(start(many, tmp_path / name, log, **wide, **changes), log)
    alone = rows(tmp_path / "alone", variant)
    assert len(alone) == 11 and rows(tmp_path / "two", variant) == rows(tmp_path / "batch", variant) == alone
    large = rows(tmp_path / "large", variant)
    assert [row["video_id"] for row in large] != [row["video_id"] for row in alone]
    assert sorted(large, key=lambda row: int(row["video_id"])) == alone


def test_one_process_is_killed(many, expected, tmp_path, hold):
    """All processes restart automatically, and no finished row is lost: the run ends with the same file."""
    print("seed", SEED)
    draw = random.Random(SEED)
    out, log, number, count = tmp_path / "out", tmp_path / "log", draw.randrange(2), draw.randint(1, 2)
    run = start(many, out, log, f"hold {number} {count} {hold}", batch_size=1, processes=2)
    wait_for_rows(out, count, run, str(number))
    kept = finished(out)
    hold.unlink()
    rank_of(run, number).send_signal(signal.SIGKILL)
    said = finish(run, log)
    (line,) = (line for line in said.splitlines() if "was killed" in line)
    assert line.startswith(f"process {number} was killed by SIGKILL") and line.endswith(": restarting")
    (line,) = (line for line in said.splitlines() if "already have a caption" in line)
    assert int(re.match(r"resuming: (\d+) of 12", line)[1]) >= len(kept) >= 1
    assert rows(out) == expected
    (skipped,) = map(json.loads, (out / "group_skipped.jsonl").read_text().splitlines())
    assert skipped["video_id"] == "7" and "7.mp4" in skipped["reason"]
    assert not list(out.glob("*.parts")) and not list(out.glob("*.lock"))


def test_killed_again_by_the_same_video(many, tmp_path, hold):
    """A process that is killed every time is not restarted forever; the same command resumes."""
    out, log = tmp_path / "out", tmp_path / "log"
    run = start(many, out, log, f"hold all 1 {hold}", batch_size=1, processes=2)
    for _ in range(2):
        before = finished(out)
        until(lambda before=before: finished(out, "1") - before)
        rank_of(run, 1).send_signal(signal.SIGKILL)
    said = finish(run, log, 1)
    assert said.count("restarting") == 1
    assert said.splitlines()[-1].startswith("error: process 1 was killed by SIGKILL") and "resumes" in said


def test_killed_again_and_again(many, expected, tmp_path):
    """Random processes are killed at random times: no process and no finished row is lost, and the result is the
    same."""
    print("seed", SEED)
    draw, out, log, kept = random.Random(SEED), tmp_path / "out", tmp_path / "log", set()
    for processes in (2, 1, 3):
        changes = {"processes": processes, "batch_size": draw.randint(1, 3), "workers": draw.randint(0, 1)}
        run = start(many, out, log, **changes)
        wait_for_rows(out, len(kept) + draw.randint(0, 3), run)
        if run.exitcode is not None:
            break
        everyone = psutil.Process(run.pid).children(recursive=True)
        for process in [psutil.Process(run.pid), *(everyone if draw.random() < 0.5 else [])]:
            process.kill()
        run.join()
        assert gone(everyone)
        before, kept = kept, finished(out)
        assert before <= kept
    finish(start(many, out, log, processes=draw.randint(1, 2)), log)
    assert rows(out) == expected


@pytest.mark.parametrize("number, processes", [(signal.SIGTERM, 2), (signal.SIGINT, 2), (signal.SIGTERM, 1)])
def test_stopped_by_a_signal(many, expected, tmp_path, hold, number, processes):
    out, log = tmp_path / "out", tmp_path / "log"
    run = start(many, out, log, f"hold all 1 {hold}", batch_size=1, processes=processes, workers=1)
    wait_for_rows(out, processes, run)
    everyone = psutil.Process(run.pid).children(recursive=True)
    assert len(everyone) >= 2 * processes - 1
    os.killpg(run.pid, number)  # as a terminal and SLURM do
    said = finish(run, log, 128 + number)
    assert said.count(f"stopped by {number.name}") == 1 and "Traceback" not in said
    assert gone(everyone)
    finish(start(many, out, log), log)
    assert rows(out) == expected


def test_two_nodes(many, expected, tmp_path, hold):
    """They share the videos. If one is lost, the other ends within seconds, and the same commands resume."""
    out, logs = tmp_path / "out", [tmp_path / "first", tmp_path / "second"]

    def start_both():
        common = {"act": f"hold all 1 {hold}", "nodes": 2, "batch_size": 1, "port": free_port()}
        return [start(many, out, log, node_rank=rank, **common) for rank, log in enumerate(logs)]

    first, second = start_both()
    wait_for_rows(out, 1, first, "1")
    child = rank_of(second, 1)
    child.kill()
    said = finish(first, logs[0], 1)
    assert "error: node 1, process 1 was killed by SIGKILL" in said and "restarting" not in said
    assert gone([child]) and "error: process 1 was killed by SIGKILL" in finish(second, logs[1], 1)

    hold.unlink()
    first, second = start_both()
    finish(first, logs[0])
    assert "node 1 has finished its part" in finish(second, logs[1])
    assert rows(out) == expected


def test_node_0_is_lost_or_busy(many, tmp_path, hold):
    with socket.create_server(("", 0)) as busy:
        run = start(many, tmp_path / "other", tmp_path / "log", nodes=2, port=busy.getsockname()[1])
        assert "MASTER_PORT" in finish(run, tmp_path / "log", 2).splitlines()[-1]
    out, logs, port = tmp_path / "out", [tmp_path / "first", tmp_path / "second"], free_port()
    common = {"act": f"hold all 1 {hold}", "nodes": 2, "batch_size": 1, "port": port}
    first, second = (start(many, out, log, node_rank=rank, **common) for rank, log in enumerate(logs))
    wait_for_rows(out, 1, first)
    psutil.Process(first.pid).kill()
    said = finish(second, logs[1], 1)
    assert "error: node 0 has ended" in said and "Traceback" not in said


def test_two_runs_do_not_write_one_file(many, tmp_path, hold):
    out, log = tmp_path / "out", tmp_path / "log"
    first = start(many, out, log, f"hold 0 1 {hold}", batch_size=1)
    wait_for_rows(out, 1, first)
    said = finish(start(many, out, tmp_path / "second"), tmp_path / "second", 2)
    hold.unlink()
    assert said.startswith("error: another run is writing") and said.count("\n") == 1
    finish(first, log)
    assert len(rows(out)) == 11


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("act, status, line", [
    ("kill worker", 2, "error: a decoding process was killed by SIGKILL: "),
    ("bug", 1, "ZeroDivisionError: division by zero"),
    ("memory", 1, "out of GPU memory (CUDA out of memory. Tried to allocate 2.00 GiB): lower --batch-size"),
])  # fmt: skip
def test_every_failure_ends_the_run_with_one_line(many, tmp_path, act, status, line, processes):
    """The data workers of all processes end too; the same command resumes."""
    log = tmp_path / "log"
    run = start(many, tmp_path / "out", log, act=act, workers=4, processes=processes)
    everyone = set()
    while run.exitcode is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            everyone |= set(psutil.Process(run.pid).children(recursive=True))
        time.sleep(0.02)
    said = finish(run, log, status)
    assert len(everyone) >= 4 and gone(list(everyone))
    last = said.splitlines()[-1]
    assert said.count("error: ") == 1 and last.startswith("error: ") and line in last
    assert said.count("Traceback") == (act == "bug") and "no Qwen2.5-VL" not in said
    assert last.endswith("the same command resumes from what was saved") or act != "bug"


def test_an_error_of_all_processes_is_reported_once(many, tmp_path):
    """A missing shard of the checkpoint is found when it is loaded."""
    checkpoint, _ = many
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in checkpoint.iterdir():
        if path.suffix != ".safetensors":
            (broken / path.name).write_bytes(path.read_bytes())
    said = finish(start(many, tmp_path / "out", tmp_path / "log", model=broken, processes=2), tmp_path / "log", 2)
    assert said.count("error:") == 1 and str(broken) in said and "Traceback" not in said
