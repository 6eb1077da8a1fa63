"""No password of an address in what is shown or kept."""

import logging

import pytest
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.redact import redacted, redacted_command
from qwen_vl_streaming.video.streams import stream_clips


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("rtsp://admin:hunter2@10.0.0.9:554/h264", "rtsp://admin:***@10.0.0.9:554/h264"),
        ("rtsp://admin:p@ss:w/rd?#1@cam/h264: no", "rtsp://admin:***@cam/h264: no"),
        ("a rtsp://a:b@c/d b rtsp://e:f@g/h", "a rtsp://a:***@c/d b rtsp://e:***@g/h"),
        ("http://:secret@cam/", "http://:***@cam/"),
        ("http://sk-12345@host/v1", "http://***@host/v1"),
        ("http://cam/v.cgi?user=admin&pwd=1234&size=2", "http://cam/v.cgi?user=admin&pwd=***&size=2"),
        ("http://cam/v?access_token=abc", "http://cam/v?access_token=***"),
        ("http://cam:8080/v?size=2", "http://cam:8080/v?size=2"),
        ("films/a@b.mp4", "films/a@b.mp4"),
    ],
)
def test_addresses(given, shown):
    assert redacted(given) == shown
    assert str(InputError(given)) == shown


def test_commands():
    words = [
        "train.py",
        "--hub_token",
        "hf_x",
        "--hub_token=hf_y",
        "--lr",
        "1",
        "--source",
        "rtsp://a:b@c/d",
        "--push_to_hub_token",
    ]
    shown = ["train.py", "--hub_token", "***", "--hub_token=***", "--lr", "1", "--source", "rtsp://a:***@c/d"]
    assert redacted_command(words) == [*shown, "--push_to_hub_token"]


def test_a_stream_that_cannot_be_opened(caplog):
    caplog.set_level(logging.DEBUG)
    with pytest.raises(InputError) as error:
        list(stream_clips("http://admin:hunter2@127.0.0.1:1/x", reconnect_seconds=0))
    assert "admin:***@127.0.0.1" in str(error.value)
    assert "hunter2" not in caplog.text + str(error.value)
