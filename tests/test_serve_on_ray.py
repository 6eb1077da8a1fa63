"""The server on Ray Serve: two replicas on the loopback. Skipped where ray is not installed."""

import asyncio
import urllib.request

import pytest
from qwen_vl_streaming.sessions.record import read_record
from served import drive, trained
from serving_clients import Talk, picture_bytes
from training import free_port
from websockets.asyncio.client import connect

ray = pytest.importorskip("ray")


@pytest.fixture
def address(made, tmp_path):
    from qwen_vl_streaming.serve.on_ray import build
    from ray import serve

    port = free_port()
    checkpoint = trained(made[0], tmp_path / "group", "group")
    flags = f"--model {checkpoint} --device cpu --records {tmp_path / 'records'} --sessions-per-client 99"
    ray.init(num_cpus=4, include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build({"flags": f"{flags} --max-new-tokens 20", "replicas": "2", "gpus": "0", "sessions": "3"}))
    yield f"127.0.0.1:{port}", tmp_path / "records"
    serve.shutdown()
    ray.shutdown()


def test_sessions_stay_with_their_replica(address):
    host, records = address

    async def one(number: int) -> str:
        async with Talk(connect(f"ws://{host}/v1/realtime", subprotocols=["qwen-vl-streaming"])) as viewer:
            await viewer.begin()
            await viewer.until("session.updated")
            for frame in range(6):
                await viewer.frame(frame / 2, picture_bytes(seed=10 * number + frame))
                await asyncio.sleep(0.05)
            await viewer.say("input_video.end")
            done = (await viewer.until("response.done"))["response"]
            assert (done["status"], done["figures"]["clips"]) == ("completed", 3)
            return done["record_id"]

    async def run() -> list[str]:
        return await asyncio.gather(*map(one, range(6)))

    for key in drive(run):
        (path,) = records.glob(f"*-{key}.json")
        assert read_record(path).complete
    assert urllib.request.urlopen(f"http://{host}/health").read() == b'{"status":"ok"}'
