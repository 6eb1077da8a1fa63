"""The server as its clients see it: the protocol, the same tokens as eval.sh, many viewers, ends."""

import pytest
import torch
from media import make_video
from qwen_vl_streaming.engine.batch import Job, caption_all
from qwen_vl_streaming.model.modeling_qwen2_5_vl import load_config, load_model
from qwen_vl_streaming.model.prompts import QUESTIONS, clip_pixels, load_processor, make_template
from qwen_vl_streaming.replay import replay
from qwen_vl_streaming.sessions.record import read_record
from qwen_vl_streaming.timeline.timeline import make_schedule
from qwen_vl_streaming.timeline.variants import VARIANTS
from qwen_vl_streaming.video.frames import PixelBudget, read_video
from serving import play, running, token_ids, trained

NAMES = ("group", "interleave", "origin")


@pytest.fixture(scope="module")
def checkpoints(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: trained(made[0], folder / name, name) for name in NAMES}


@pytest.fixture(scope="module")
def server(checkpoints, tmp_path_factory):
    models = [flag for name in NAMES for flag in ("--model", f"{name}={checkpoints[name]}")]
    film = make_video(tmp_path_factory.mktemp("own") / "own.mp4", seconds=3, size=(84, 56))
    records = tmp_path_factory.mktemp("records")
    flags = [*models, "--records", str(records), "--source", f"film={film}", "--max-new-tokens", "30"]
    with running([*flags, "--sessions", "3", "--sessions-per-client", "50"]) as server:
        yield server


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return make_video(tmp_path_factory.mktemp("film") / "film.mp4", seconds=4.5, size=(168, 112))


def evaluated(checkpoint, film, name: str, schedule: str) -> list[int]:
    """The tokens of the evaluation, in float32."""
    config, processor = load_config(str(checkpoint)), load_processor(checkpoint)
    video = read_video(film, budget=PixelBudget.trained(config))
    pixels, grid = clip_pixels(processor, video.frames)
    template = make_template(processor, QUESTIONS[-1])
    layout = template.layout(grid, config.vision_config.tokens_per_second * video.seconds_per_clip)
    job = Job("film", pixels, layout, template, make_schedule(schedule, VARIANTS[name], video.clips))
    model = load_model(str(checkpoint), "sdpa", torch.float32).eval()
    ((_, caption),) = caption_all(model, VARIANTS[name], iter([job]), batch_size=1, max_new_tokens=30)
    return caption.tokens


def test_png_frames_give_the_tokens_of_the_evaluation_for_three_models_side_by_side(server, checkpoints, film):
    events = play(server.address, film, models=[*NAMES], pace=4)
    (created,) = events["session.created"]
    assert [model["mode"] for model in created["session"]["models"]] == ["fused", "serial", "offline"]
    assert created["session"]["questions"] == [*QUESTIONS] and created["session"]["sources"] == ["film"]
    for name in NAMES:
        assert token_ids(events, name) == evaluated(checkpoints[name], film, name, "wait-3"), name
    done = {event["response"]["model"]: event["response"] for event in events["response.done"]}
    assert {response["status"] for response in done.values()} == {"completed"}
    slots = [event["slot"] for event in events["response.output_text.delta"] if event["model"] == "origin"]
    assert {*slots} == {5}
    for name in NAMES:
        record = read_record(server.record(done[name]["record_id"]))
        assert record.tokens == token_ids(events, name) and record.variant == name
        assert done[name]["figures"]["tokens"] == len(record.tokens) and done[name]["figures"]["clips"] == 5
        text = "".join(e["delta"] for e in events["response.output_text.delta"] if e["model"] == name)
        assert done[name]["text"] == text
        processor = load_processor(checkpoints[name])
        video = read_video(film, budget=PixelBudget.trained(load_config(str(checkpoints[name]))))
        model = load_model(str(checkpoints[name]), "sdpa", torch.float32).eval()
        assert all(each.tie for each in replay(record, model, list(clip_pixels(processor, video.frames)[0])))
