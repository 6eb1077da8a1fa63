"""The JSON files of a checkpoint: each invalid value is reported in one line that names it, before anything is
loaded."""

import json
import shutil
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.model import checks
from qwen_vl_streaming.model.loading import load_config, load_model
from qwen_vl_streaming.model.prompts import load_processor
from qwen_vl_streaming.video import frames, pixel_budget
from waiting import SECONDS

NAN = float("nan")
HUGE = 10**9
CONFIG = {
    "num_hidden_layers": [HUGE, 0, -1, True, "2", 2.5, [2], 10**400],
    "num_attention_heads": [0, HUGE, "4"],
    "num_key_value_heads": [0, -1],
    "hidden_size": [0, HUGE, NAN],
    "intermediate_size": [-1, HUGE],
    "vocab_size": [0, 10**12],
    "max_position_embeddings": [0, "x", 10**10],
    "video_token_id": ["x", -1, NAN, [1]],
    "vision_config.depth": [0, HUGE, "2"],
    "vision_config.hidden_size": [HUGE, 0],
    "vision_config.num_heads": [0, HUGE],
    "vision_config.patch_size": [0, HUGE],
    "vision_config.spatial_merge_size": [0, HUGE],
    "vision_config.temporal_patch_size": [0, 1, 3, HUGE],
    "vision_config.window_size": [0, HUGE],
    "vision_config.tokens_per_second": [0, -1, NAN, 1e30, "2", True],
    "vision_config": [[], "x", 3],
    "text_config": [[], "x"],
    "streaming_variant": [["group"], 3, {}],
    "position_rule": [["x"], 3],
    "wait_k": [0, -1, 10**30, "3\n4", NAN, None, True],
    "pixel_budget": ["x", [], 3, None, {"evil": 1}],
    "pixel_budget.max_pixels_per_video": [NAN, "x", 10**17, True, 2.5, None],
    "pixel_budget.max_pixels_per_frame": [-5, 10**15],
    "pixel_budget.min_pixels_per_frame": [0, 10**9],
    "pixel_budget.budget": [3, None, ["video"]],
}
PREPROCESSOR = {
    "patch_size": [0, -14, HUGE, "14", 5, NAN, None],
    "merge_size": [0, HUGE, 3, True],
    "temporal_patch_size": [0, 1, 4, HUGE],
    "image_mean": ["x", [0.5], [1, 2, NAN], [1, 2, "3"], {}, [1, 2, 10**400]],
    "image_std": [0, [0, 0, 0], [1, 1, 0], [1, 1, -1], [1, 1, float("inf")], "x"],
    "rescale_factor": [0, NAN, "x", 1e30],
}


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    return Path(shutil.copytree(made[0], tmp_path_factory.mktemp("checks") / "model"))


def spoil(path: Path, key: str, value: object) -> bytes:
    """Write `value` at `key`, with dots, into a JSON file; returns the old value."""
    before = path.read_bytes()
    data = json.loads(before)
    *parts, last = key.split(".")
    place = data
    for part in parts:
        place = place.setdefault(part, {})
    place[last] = value
    path.write_text(json.dumps(data))
    return before


def refused(load, key: str) -> None:
    began = time.monotonic()
    with pytest.raises(InputError) as error:
        load()
    said = str(error.value)
    assert "\n" not in said and len(said) < 700, said
    assert key.rpartition(".")[2] in said, said
    assert time.monotonic() - began < SECONDS


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in CONFIG.items() for value in values])
def test_config(folder, key, value):
    before = spoil(folder / "config.json", key, value)
    try:
        refused(lambda: load_config(folder), key)
    finally:
        (folder / "config.json").write_bytes(before)
    load_config(folder)


def test_a_newer_config(folder):
    """The fields of the language model are in their own part."""
    before = spoil(folder / "config.json", "text_config.num_hidden_layers", HUGE)
    try:
        refused(lambda: load_config(folder), "text_config.num_hidden_layers")
    finally:
        (folder / "config.json").write_bytes(before)


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in PREPROCESSOR.items() for value in values])
def test_preprocessor(folder, key, value):
    path = folder / "preprocessor_config.json"
    before = spoil(path, key, value)
    try:
        with pytest.raises(InputError) as error:
            load_processor(folder)
        assert "\n" not in str(error.value) and len(str(error.value)) < 700, error
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("key", ["num_hidden_layers", "vision_config.depth"])
@pytest.mark.parametrize("layers", [1, 3, 999])
def test_layers_that_are_missing_in_the_weights(folder, key, layers):
    before = spoil(folder / "config.json", key, layers)
    try:
        refused(lambda: load_model(folder, "sdpa", torch.float32), key)
    finally:
        (folder / "config.json").write_bytes(before)


def test_names_are_those_of_the_video_room():
    assert set(checks.PIXEL_BUDGET) == {field.name for field in fields(pixel_budget.PixelBudget)}
    assert (checks.SIDE_FACTOR, checks.FRAMES_PER_CLIP) == (pixel_budget.SIDE_FACTOR, frames.FRAMES_PER_CLIP)
