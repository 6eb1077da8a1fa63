"""The hashes of clips come after them: only the record of a session needs them."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from qwen_vl_streaming.serve import frames
from qwen_vl_streaming.serve.frames import PreparedClip
from qwen_vl_streaming.serve.process_handle import UNHASHED
from qwen_vl_streaming.sessions.record import read_record
from served import drive, running, settled, trained
from serving_clients import Talk, picture_bytes
from waiting import SECONDS, until


@pytest.fixture
def server(made, tmp_path):
    checkpoint = trained(made[0], tmp_path / "group", "group")
    with running(["--model", str(checkpoint), "--records", str(tmp_path / "records")]) as server:
        yield server


@pytest.fixture
def may_hash(monkeypatch):
    """The server computes hashes once this is set."""
    allowed, clip_hash = threading.Event(), frames.clip_hash

    def wait_and_hash(pixels):
        assert allowed.wait(SECONDS)
        return clip_hash(pixels)

    monkeypatch.setattr(frames, "clip_hash", wait_and_hash)
    yield allowed
    allowed.set()


async def written(viewer: Talk) -> str:
    """Shows two clips, and waits for a token that saw both. Returns the id of the response."""
    await viewer.begin(schedule="greedy")
    key = (await viewer.until("response.created"))["response"]["id"]
    for number in range(4):
        await viewer.frame(number / 2, picture_bytes(seed=number))
    while (await viewer.until("response.output_text.delta"))["slot"] < 2:
        pass
    return key


def test_tokens_and_further_clips_do_not_wait_for_hashes(may_hash, server):
    async def run():
        async with Talk(server.connect()) as viewer:
            key = await written(viewer)
            may_hash.set()
            await viewer.say("input_video.end")
            assert (await viewer.until("response.done"))["response"]["status"] == "completed"
            return key

    record = read_record(server.record(drive(run)))
    assert len(record.hashes) == len(record.arrived) == 2
    settled(server)


def test_few_clips_wait_for_their_hashes(may_hash, server):
    """Further ones wait to be sent: the end of a session waits for the hashes of all that were."""
    count = UNHASHED + 6

    async def run():
        async with Talk(server.connect()) as viewer:
            await viewer.begin(schedule="greedy")
            key = (await viewer.until("response.created"))["response"]["id"]
            for number in range(2 * count):
                await viewer.frame(number / 2, picture_bytes(seed=number))
            handle = server.server.workers[0].newest
            while handle.outbox.qsize() < count - UNHASHED - 2:  # one is being hashed, and one waits for room
                await asyncio.sleep(0.01)
            assert handle.unhashed.full()
            may_hash.set()
            await viewer.say("input_video.end")
            assert (await viewer.until("response.done"))["response"]["status"] == "completed"
            return key

    record = read_record(server.record(drive(run)))
    assert len(record.hashes) == len(record.arrived) == count
    settled(server)


def test_a_model_that_is_lost_before_a_hash_leaves_a_record(may_hash, server):
    async def run():
        async with Talk(server.connect()) as viewer:
            key = await written(viewer)
            (worker,) = server.server.workers
            worker.newest.connection.close()
            done = (await viewer.until("response.done"))["response"]
            assert done["status"] == "failed" and done["record_id"] == key
            return key

    record = read_record(server.record(drive(run)))
    assert len(record.arrived) == 2 and not record.hashes and record.tokens
    may_hash.set()
    until(lambda: not server.server.workers[0].listeners)


def test_clips_are_hashed_side_by_side_and_each_once(monkeypatch):
    """Each model has a thread that hashes, of clips that it may share with others."""
    both, hashed = threading.Barrier(2), []

    def meet(pixels):
        both.wait(SECONDS)
        hashed.append(pixels)
        return str(pixels.item())

    monkeypatch.setattr(frames, "clip_hash", meet)
    clips = [PreparedClip([], lambda number=number: torch.tensor(number)) for number in range(2)]
    with ThreadPoolExecutor(4) as threads:
        assert [*threads.map(lambda clip: clip.hash, clips * 2)] == ["0", "1"] * 2
    assert len(hashed) == 2
