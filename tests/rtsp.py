"""A local RTSP camera that sends an H.264 file, as RTP inside the RTSP connection, in time of its readers."""

import contextlib
import random
import re
import socketserver
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import av
from serving import Clock

CLOCK = 90_000
PROBED, HELD = 9, 1
"""Pictures that FFmpeg needs before it opens the stream, and those that it holds back until another one comes."""
LARGEST = 1200
"""Largest H.264 unit in bytes that is sent in one RTP payload; larger ones are sent in fragments."""
SDP = (
    "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=camera\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\nm=video 0 RTP/AVP 96\r\n"
    f"a=rtpmap:96 H264/{CLOCK}\r\na=fmtp:96 packetization-mode=1\r\na=control:track\r\n"
)


def payloads(picture: bytes) -> Iterator[bytes]:
    """RTP payloads of an H.264 picture in Annex B format: one per unit, or several fragments of a large unit."""
    for unit in filter(None, re.split(b"\0?\0\0\1", picture)):
        if len(unit) <= LARGEST:
            yield unit
            continue
        kind, rest = unit[0], unit[1:]
        for start in range(0, len(rest), LARGEST):
            part = rest[start : start + LARGEST]
            first, last = start == 0, start + LARGEST >= len(rest)
            yield bytes([kind & 0x60 | 28, first << 7 | last << 6 | kind & 0x1F]) + part


class Camera(socketserver.ThreadingTCPServer):
    """Plays `path` (MPEG-TS) from the start to each of the first `plays` connections; then it answers 404. It sends
    each picture at its time of `wall`. Each connection is closed after `seconds` of video. `clock` maps a time of the
    video to the time of the camera's clock, which sets the RTP timestamp, both in seconds."""

    daemon_threads = allow_reuse_address = True

    def __init__(self, path: Path, wall: Clock, plays: int = 1, seconds: float = float("inf"), clock=float):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.wall, self.plays, self.seconds, self.clock, self.asked = wall, plays, seconds, clock, []
        with av.open(str(path)) as container:
            packets = [packet for packet in container.demux(video=0) if packet.size]
            self.pictures = [(float(packet.pts * packet.time_base), bytes(packet)) for packet in packets]

    @property
    def url(self) -> str:
        return f"rtsp://127.0.0.1:{self.server_address[1]}/camera"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class _Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        while lines := self._request():
            method, _, _ = lines[0].split(" ")
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines[1:])}
            self.server.asked.append((method, headers))
            if self.server.plays == 0:
                self.wfile.write(f"RTSP/1.0 404 Not Found\r\nCSeq: {headers['cseq']}\r\n\r\n".encode())
                return
            more, body = {
                "OPTIONS": ("Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN\r\n", ""),
                "DESCRIBE": (f"Content-Type: application/sdp\r\nContent-Length: {len(SDP)}\r\n", SDP),
                "SETUP": (f"Transport: {headers.get('transport', '')}\r\n", ""),
            }.get(method, ("", ""))
            reply = f"RTSP/1.0 200 OK\r\nCSeq: {headers['cseq']}\r\nSession: 1\r\n{more}\r\n{body}"
            self.wfile.write(reply.encode())
            if method == "PLAY":
                self.server.plays -= 1
                with contextlib.suppress(ConnectionError):  # the client may disconnect
                    self._play()
                return

    def _request(self) -> list[str]:
        lines = []
        while line := self.rfile.readline().decode().strip():
            lines.append(line)
        return lines

    def _play(self) -> None:
        number, source, before = random.randrange(2**16), random.randrange(2**32), self.server.wall.packets
        start = shown = self.server.pictures[0][0]
        for sent, (moment, picture) in enumerate(self.server.pictures):
            if moment - start >= self.server.seconds:
                return
            self.server.wall.move(moment - shown, before + sent - HELD if sent > PROBED else 0)
            shown = moment
            parts = list(payloads(picture))
            for part in parts:
                marker = 0x80 if part is parts[-1] else 0
                head = struct.pack(
                    ">BBHII",
                    0x80,
                    marker | 96,
                    number % 2**16,
                    round(self.server.clock(moment) * CLOCK) % 2**32,
                    source,
                )
                self.wfile.write(struct.pack(">cBH", b"$", 0, len(head) + len(part)) + head + part)
                number += 1
