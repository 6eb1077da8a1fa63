"""Video checks that resume: grouping into tasks, the journal, and unpacked files that are gone."""

from dataclasses import dataclass
from pathlib import Path

from preparation import inspection
from preparation.inspection import Inspection, inspect_videos


@dataclass(frozen=True)
class Video:
    key: str
    container: str = "a"
    one_task: bool = False
    target: Path | None = None
    size: int = 4


def run(tmp_path, videos):
    """Inspect `videos`, of which "bad" is bad. Returns the results and the tasks."""
    tasks = []

    def check(task):
        tasks.append([video.key for video in task])
        for video in task:
            if video.target:
                video.target.write_bytes(bytes(video.size))
        return [(video.key, Inspection(error="broken") if video.key == "bad" else Inspection(2.0)) for video in task]

    return inspect_videos(videos, check, tmp_path / "state/journal.jsonl", 1, "test"), tasks


def test_tasks_have_one_container_and_a_limited_size(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "VIDEOS_PER_TASK", 2)
    videos = [*(Video(str(n), "z", one_task=True) for n in range(3)), *(Video(f"a{n}") for n in range(3)), Video("a0")]
    results, tasks = run(tmp_path, videos)
    assert tasks == [["a0", "a1"], ["a2"], ["0", "1", "2"]]
    assert results == dict.fromkeys(["a0", "a1", "a2", "0", "1", "2"], Inspection(2.0))


def test_a_killed_run_resumes_from_its_journal(tmp_path):
    journal, target = tmp_path / "state/journal.jsonl", tmp_path / "unpacked"
    videos = [Video("bad"), Video("good"), Video("zipped", target=target)]
    first, tasks = run(tmp_path, videos)
    assert len(tasks) == 1
    assert run(tmp_path, videos) == (first, [])
    target.write_bytes(b"half")  # the right size counts as intact
    assert run(tmp_path, videos) == (first, [])
    target.write_bytes(b"x")
    assert run(tmp_path, videos) == (first, [["zipped"]])
    target.unlink()
    journal.write_text(journal.read_text() + '7\n["good", 1')  # a killed run leaves an incomplete line
    assert run(tmp_path, [*videos, Video("new")]) == (first | {"new": Inspection(2.0)}, [["new", "zipped"]])
    assert run(tmp_path, [*videos, Video("new")])[1] == []
