"""Maps timestamps to one timeline, packet by packet."""

from fractions import Fraction

import pytest
from qwen_vl_streaming.video.timestamps import FilmClock

MILLISECOND = Fraction(1, 1000)


def times(stamps, came=None, **options):
    """The times of packets with these presentation and decoding timestamps."""
    clock = FilmClock(MILLISECOND, "film", **{"leaps": False, **options})
    came = came or [0.0] * len(stamps)
    return [clock.add(stamp, stamp, then)[0] for stamp, then in zip(stamps, came, strict=True)]


def test_a_timestamp_that_jumps_back_continues_one_frame_later(caplog):
    assert times([0, 100, 200, 0, 100, 200]) == [0, 100, 200, 300, 400, 500]
    assert len(caplog.records) == 1


def test_a_keyframe_that_overlaps_earlier_frames_continues_one_frame_later(caplog):
    """By less than reordering allows: no frame is shown before a keyframe that follows it."""
    clock = FilmClock(MILLISECOND, "overlapping", leaps=True)
    stamps = [(-900, True), (-860, False), (-820, False), (-840, True), (-800, False)]
    shown = [clock.add(stamp, stamp, key=key) for stamp, key in stamps]
    assert shown == [(-900, False), (-860, False), (-820, False), (-780, True), (-740, False)]
    assert "jump back by 0.0 s" in caplog.text


def test_a_warning_appears_once_for_a_file_and_each_time_for_a_live_source(caplog):
    for _ in range(2):
        clock = FilmClock(MILLISECOND, "read twice", leaps=False)
        assert [clock.add(stamp, stamp)[0] for stamp in (0, 100, 200, 0)] == [0, 100, 200, 300]
    assert caplog.text.count("read twice") == 1
    for _ in range(2):
        clock = FilmClock(MILLISECOND, "camera", leaps=True, live=True)
        assert [clock.add(stamp, stamp, came)[0] for stamp, came in ((0, 0), (900, 0.9), (0, 1.0))] == [0, 900, 1800]
    assert caplog.text.count("camera") == 2


def test_reordered_frames_do_not_jump_back(caplog):
    clock = FilmClock(MILLISECOND, "film", leaps=False, reorder=2)
    decoded, shown = [0, 100, 200, 500, 300, 400], [0, 200, 100, 500, 300, 400]
    assert [clock.add(s, d)[0] for s, d in zip(shown, decoded, strict=True)] == shown
    assert not caplog.records


@pytest.mark.parametrize(("leaps", "last"), [(True, 200), (False, 60_000)])
def test_jumps_are_accepted_unless_timestamps_may_restart(leaps, last):
    assert times([0, 100, 60_000], leaps=leaps) == [0, 100, last]


def test_a_jump_beyond_the_stated_length():
    assert times([0, 100, 9_000_000, 300], length=0.4) == [0, 100, 200, 300]
    assert times([0, 100, 60_000], length=61) == [0, 100, 60_000]


def test_a_jump_of_up_to_ten_seconds_is_a_gap():
    assert times([0, 100, 10_000], leaps=True) == [0, 100, 10_000]


def test_two_recordings_with_different_delays_do_not_overlap():
    """The first was decoded two frames before it was shown, the second without delay."""
    clock = FilmClock(MILLISECOND, "film", leaps=True)
    first = [clock.add(stamp + 200, stamp)[0] for stamp in (0, 100, 200)]
    second = [clock.add(stamp, stamp)[0] for stamp in (0, 100)]
    assert first + second == [200, 300, 400, 500, 600]


def test_live_arrival_times_give_the_length_of_a_gap():
    came = [0, 0.1, 0.2, 3.2, 3.3]
    assert times([0, 100, 200, 0, 100], came, live=True) == [0, 100, 200, 3200, 3300]
    assert times([0, 100, 200, 90_000, 90_100], came, live=True) == [0, 100, 200, 3200, 3300]
    assert times([0, 100, 200, 200, 200], came, live=True) == [0, 100, 200, 3200, 3200]


def test_live_a_still_picture_is_not_a_jump():
    assert times([0, 100, 60_100], [0, 0.1, 60.1], live=True, leaps=True) == [0, 100, 60_100]


def test_live_a_burst_is_not_a_jump():
    """The segments of a playlist arrive at once, long before they are due."""
    stamps = [100 * i for i in range(600)]
    assert times(stamps, live=True, leaps=True) == stamps


def test_packets_without_timestamps_have_no_time():
    clock = FilmClock(MILLISECOND, "film", leaps=True)
    assert clock.add(None, None) == (None, False)
    assert clock.add(None, 0) == (None, False)
    assert clock.add(100, None) == (100, False)


@pytest.mark.parametrize("options", [{"live": True}, {"leaps": True}])
@pytest.mark.parametrize("broken", [(80_000, 300), (300, 80_000), (-80_000, 300)])
def test_one_broken_timestamp_does_not_move_others(options, broken):
    clock = FilmClock(MILLISECOND, "film", **{"leaps": False, **options})
    stamps = [(0, 0), (100, 100), (200, 200), broken, (400, 400), (500, 500)]
    came = [i / 10 for i in range(6)]
    shown = [clock.add(pts, dts, then)[0] for (pts, dts), then in zip(stamps, came, strict=True)]
    assert shown == [0, 100, 200, 300, 400, 500]
