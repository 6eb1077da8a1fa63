"""Long videos, whose positions would reach those of the text."""

from dataclasses import replace

import pytest
from media import make_video
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.timeline import variants
from qwen_vl_streaming.timeline.positions import check_clips, clips_before_text, timeline_positions
from qwen_vl_streaming.timeline.timeline import Layout, make_timeline
from qwen_vl_streaming.timeline.variants import VARIANTS
from test_live import command, read  # noqa: F401  a fixture


@pytest.mark.parametrize("start", [30, 31, 47, 100])
@pytest.mark.parametrize("steps", [0.5, 1.5, 2.0, 7.3])
@pytest.mark.parametrize("grid", [(1, 1), (2, 9), (40, 3)])
def test_the_limit_is_where_positions_meet(start, steps, grid):
    gap, layout = replace(VARIANTS["gap"], text_start=start), Layout(14, 3, 3, grid, steps)
    most = clips_before_text(gap, layout)

    def meet(clips: int) -> bool:
        timeline = make_timeline(gap, layout, [0] * (clips - 1) + [1])
        positions, text = timeline_positions(timeline), timeline.rows.text
        return int(positions[:, ~text].max()) >= int(positions[:, text].min())

    assert meet(most + 1)
    assert most == 0 or not meet(most)
    with pytest.raises(InputError, match="too many for gap"):
        check_clips(gap, layout, most + 1)
    check_clips(gap, layout, most)


def test_of_the_paper():
    layout = Layout(14, 3, 3, (10, 18))
    assert clips_before_text(VARIANTS["gap"], layout) == 4992  # 83 minutes
    assert all(clips_before_text(variant, layout) is None for name, variant in VARIANTS.items() if name != "gap")


def test_live_ends_at_the_limit(command, tmp_path, monkeypatch):  # noqa: F811
    """An endless stream: the limit is reported at the start, and the answer is finished there."""
    near = replace(VARIANTS["gap"], text_start=60)
    monkeypatch.setitem(variants.VARIANTS, "gap", near)
    flags = ("--source", "synthetic", "--speed", 50, "--variant", "gap", "--max-new-tokens", 60)
    code, _, err = command(*flags, "--window", 4, 20)
    record, found = read(tmp_path)
    room = clips_before_text(near, record.layout)
    assert code == 0 and f"gap can watch {room} clips (0:00:{room:02})" in err, err
    assert found["clips"] == room < 20 and record.complete
    code, _, err = command(*flags, "--max-clips", room)
    assert code == 0 and "can watch" not in err
    code, _, err = command(*flags, "--max-clips", room + 1)
    assert code == 0 and f"gap can watch {room} clips" in err and read(tmp_path)[1]["clips"] == room


def test_a_file_ends_at_the_limit_too(command, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(variants.VARIANTS, "gap", replace(VARIANTS["gap"], text_start=60))
    film = make_video(tmp_path / "film.mp4", seconds=20, size=(112, 112))
    code, _, err = command("--source", film, "--speed", 50, "--variant", "gap", "--max-new-tokens", 60)
    record, found = read(tmp_path)
    room = clips_before_text(variants.VARIANTS["gap"], record.layout)
    assert code == 0 and f"gap can watch {room} clips" in err, err
    assert found["clips"] == room < 20 and record.complete and len(record.tokens) == 60
