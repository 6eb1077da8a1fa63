"""Checks the types and ranges of numbers in the JSON files of a checkpoint, for training, evaluation and `live`.

The checks run before anything of these sizes is allocated. Independent of the values of weights.
"""

import re
from collections.abc import Iterable, Mapping

from ..common.errors import InputError
from ..timeline.timeline import MAX_PER_SLOT

SIDE_FACTOR, FRAMES_PER_CLIP = 28, 2
"""The height and width of a frame in pixels are multiples of SIDE_FACTOR, and a clip has FRAMES_PER_CLIP frames. Both
are copied from video/frames.py, because models must also load where videos cannot be decoded."""
COUNT = (1, 2**20)
LANGUAGE = {
    "hidden_size": COUNT,
    "intermediate_size": COUNT,
    "num_hidden_layers": (1, 1000),
    "num_attention_heads": (1, 10_000),
    "num_key_value_heads": (1, 10_000),
    "vocab_size": (1, 10**8),
    "max_position_embeddings": (1, 10**9),
}
VISION = {
    "depth": (1, 1000),
    "hidden_size": COUNT,
    "intermediate_size": COUNT,
    "num_heads": (1, 10_000),
    "out_hidden_size": COUNT,
    "patch_size": (1, SIDE_FACTOR),
    "spatial_merge_size": (1, SIDE_FACTOR),
    "temporal_patch_size": (FRAMES_PER_CLIP, FRAMES_PER_CLIP),
    "window_size": COUNT,
}
STEPS_PER_SECOND = (1e-3, 1e3)
WAIT_K = (1, 10**6)
TOKENS_PER_SLOT = (1, MAX_PER_SLOT)
TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
PIXEL_BUDGET = {
    "min_pixels_per_frame": (1, 10**8),
    "max_pixels_per_frame": (1, 10**10),
    "max_pixels_per_video": (1, 10**10),
    "budget": None,
}
"""Ranges of the fields of `PixelBudget`, in pixels. `budget` is a string. `PixelBudget` makes all other checks."""
COPY = "copy it again from the original checkpoint"
LAYERS = re.compile(r"(?:^|\.)(layers|blocks)\.(\d+)\.")


def check_config(config: Mapping, name: str) -> None:
    """Raises InputError if `config`, read from the file `name`, has a size out of range for Qwen2.5-VL, or invalid
    values for the keys that training adds. Missing keys are accepted: transformers uses its defaults for them."""
    # Older files have the fields of the language model at the top level.
    for part, which in ((config, ""), (_part(config, "text_config", name), "text_config.")):
        _check_counts(part, LANGUAGE, name, which)
        for token in TOKENS:
            if part.get(token) is not None:
                _check_count(part[token], (0, 10**8), f"{which}{token}", name)
    vision = _part(config, "vision_config", name)
    _check_counts(vision, VISION, name, "vision_config.")
    if (steps := vision.get("tokens_per_second")) is not None and not _is_number(steps, STEPS_PER_SECOND):
        raise _wrong(name, "vision_config.tokens_per_second", steps, "a number from {:g} to {:g}", STEPS_PER_SECOND)
    _check_trained(config, name)


def check_processor(processor, name: str) -> None:
    """Raises InputError if the processor `name` divides frames into patches of unsupported sizes, or if its parameters
    for normalizing pixels are not numbers in range."""
    video = processor.video_processor
    for key in ("patch_size", "merge_size"):
        _check_count(getattr(video, key, None), (1, SIDE_FACTOR), key, name)
    side = video.patch_size * video.merge_size
    if SIDE_FACTOR % side:
        raise InputError(
            f"{name}: patch_size {video.patch_size} and merge_size {video.merge_size} make tokens of {side} pixels, "
            f"which do not divide {SIDE_FACTOR}, the unit of a frame's sides: {COPY}"
        )
    _check_count(
        getattr(video, "temporal_patch_size", None), (FRAMES_PER_CLIP, FRAMES_PER_CLIP), "temporal_patch_size", name
    )
    for key, bounds in (("image_mean", (-1e3, 1e3)), ("image_std", (1e-3, 1e3))):
        value = getattr(video, key, None)
        if not (isinstance(value, list | tuple) and len(value) == 3 and all(_is_number(one, bounds) for one in value)):
            raise _wrong(name, key, value, "three numbers from {:g} to {:g}", bounds)
    if not _is_number(video.rescale_factor, (1e-6, 1e3)):
        raise _wrong(name, "rescale_factor", video.rescale_factor, "a number from {:g} to {:g}", (1e-6, 1e3))


def check_layers(config, tensors: Iterable[str] | None, name: str) -> None:
    """Raises InputError if the number of layers in the loaded `config` differs from that in the tensor names `tensors`
    of the weights. transformers would allocate and initialize missing layers. Does nothing if `tensors` is None."""
    if tensors is None:
        return
    found = {"layers": 0, "blocks": 0}
    for tensor in tensors:
        if (layer := LAYERS.search(tensor)) and len(layer[2]) < 9:
            found[layer[1]] = max(found[layer[1]], int(layer[2]) + 1)
    for key, kind, asked in (
        ("num_hidden_layers", "layers", config.text_config.num_hidden_layers),
        ("vision_config.depth", "blocks", config.vision_config.depth),
    ):
        if asked != found[kind]:
            raise InputError(
                f"{name}: {key} is {asked} in config.json, but the weights have {found[kind]}: copy both again from "
                "one checkpoint"
            )


def _check_trained(config: Mapping, name: str) -> None:
    """Checks the keys that training adds: see trained.py."""
    for key in ("streaming_variant", "position_rule", "end_of_slot"):
        if not isinstance(config.get(key), str | None):
            raise _wrong(name, key, config[key], "a string")
    if "wait_k" in config:
        _check_count(config["wait_k"], WAIT_K, "wait_k", name)
    if config.get("end_of_slot") is not None:
        _check_count(config.get("max_tokens_per_slot"), TOKENS_PER_SLOT, "max_tokens_per_slot", name)
    if "pixel_budget" not in config:
        return
    budget = config["pixel_budget"]
    if not isinstance(budget, Mapping) or not set(budget) <= set(PIXEL_BUDGET):
        raise _wrong(name, "pixel_budget", budget, f"an object with {', '.join(PIXEL_BUDGET)}")
    for key, value in budget.items():
        if bounds := PIXEL_BUDGET[key]:
            _check_count(value, bounds, f"pixel_budget.{key}", name)
        elif not isinstance(value, str):
            raise _wrong(name, f"pixel_budget.{key}", value, "a string")


def _part(config: Mapping, key: str, name: str) -> Mapping:
    part = config.get(key)
    if part is not None and not isinstance(part, Mapping):
        raise _wrong(name, key, part, "an object")
    return part or {}


def _check_counts(part: Mapping, known: Mapping[str, tuple[int, int]], name: str, which: str) -> None:
    for key, bounds in known.items():
        if part.get(key) is not None:
            _check_count(part[key], bounds, f"{which}{key}", name)


def _check_count(value: object, bounds: tuple[int, int], key: str, name: str) -> None:
    least, most = bounds
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        what = f"{least}" if least == most else f"a whole number from {least} to {most}"
        raise _wrong(name, key, value, what)


def _is_number(value: object, bounds: tuple[float, float]) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bounds[0] <= value <= bounds[1]


def _wrong(name: str, key: str, value: object, what: str, bounds: tuple = ()) -> InputError:
    try:
        shown = f"{value!r:.60}"
    except ValueError:  # an integer with more digits than Python converts to a string
        shown = "a number with thousands of digits"
    return InputError(f"{name}: {key} is {shown}, but must be {what.format(*bounds)}: {COPY}")
