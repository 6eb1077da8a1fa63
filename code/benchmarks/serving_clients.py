"""Clients of the server for tests and benchmarks: driven message by message, or at random, well-behaved and not."""

import asyncio
import contextlib
import io
import json
import random

import numpy as np
from PIL import Image
from websockets.exceptions import ConnectionClosed

SECONDS = 60
"""Long enough for a busy machine."""


class Talk:
    """A connection that tests drive message by message."""

    def __init__(self, connecting):
        self.connecting, self.events = connecting, []

    async def __aenter__(self):
        self.socket = await self.connecting
        return self

    async def __aexit__(self, *_):
        await self.socket.close()

    async def say(self, kind: str, **fields) -> None:
        await self.socket.send(json.dumps({"type": kind, **fields}))

    async def begin(self, width=84, height=56, source=None, **asked) -> None:
        source = source or {"kind": "client", "width": width, "height": height}
        await self.say("session.update", session={"source": source, **asked})

    async def frame(self, moment: float, data: bytes | None = None, form: str = "jpeg", **fields) -> None:
        data = picture_bytes(form=form) if data is None else data
        event = {"time": moment, "format": form, "bytes": len(data), **fields}
        await self.say("input_video_frame.append", **event)
        await self.socket.send(data)

    async def until(self, kind: str, count: int = 1) -> dict:
        """The `count`-th event of `kind` from now on."""
        async with asyncio.timeout(SECONDS):
            while True:
                message = await self.socket.recv()
                if isinstance(message, bytes):
                    continue
                self.events.append(event := json.loads(message))
                count -= event["type"] == kind
                if not count:
                    return event

    async def closed(self) -> int:
        """The code with which the server closes."""
        with contextlib.suppress(ConnectionClosed):
            await self.until("never")
        return self.socket.close_code


def picture_bytes(size=(84, 56), form="jpeg", seed=0, white=False) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise | 255 if white else noise // 2).save(file, form)
    return file.getvalue()


async def random_client(connecting, draw: random.Random) -> str:
    """A client that does something random for a while. `connecting` is an unopened connection. Returns the
    status of its response, or how it left."""
    await asyncio.sleep(draw.random())
    rubbish = ("no JSON", b"unasked", "{}", json.dumps({"type": "response.cancel"}))
    async with Talk(connecting) as viewer:
        with contextlib.suppress(ConnectionClosed):
            await viewer.begin(schedule=draw.choice(["wait-1", "wait-3", "greedy"]))
            if draw.random() < 0.1:
                return "impatient"
            await viewer.until("session.updated")
            for number in range(draw.randint(0, 10)):
                what = draw.random()
                if what < 0.05:
                    await viewer.socket.send(draw.choice(rubbish))
                elif what < 0.1:
                    await viewer.frame(draw.choice([number, 1e9, -5, 0]), draw.randbytes(draw.randint(1, 900)))
                elif what < 0.13:
                    viewer.socket.transport.abort()
                    return "vanished"
                else:
                    await viewer.frame(number / 2, picture_bytes(seed=number))
                await asyncio.sleep(draw.choice([0, 0.01, 0.1]))
            await viewer.say(draw.choice(["input_video.end", "input_video.end", "response.cancel"]))
            return (await viewer.until("response.done"))["response"]["status"]
    return "closed"
