"""What training writes down in a checkpoint: keys of its config.json, and the record of the run, run.json.

Independent of weights and of how positions are computed.
"""

import contextlib
import re
from pathlib import Path

from ..common.errors import InputError
from ..common.files import read_object
from ..timeline.positions import RULE
from ..timeline.timeline import model_schedule_most
from ..timeline.variants import ENVIRONMENT_VARIABLE, Variant

MODEL = "model"
"""A schedule: the model decides when a slot ends. With the checkpoint's own M it is model-M."""
DEFAULT_WAIT_K = 3
"""K of checkpoints that do not say it."""
TRAIN = "train one with sft.sh --schedule model"


def training_record(checkpoint: Path) -> dict:
    """Returns what sft.sh recorded of the training of the checkpoint in a folder: its run.json, and for an intermediate
    checkpoint-N that of its run, with N as `step`. Empty where there is none.

    Raises InputError if the file is invalid.
    """
    if (path := checkpoint / "run.json").exists():
        return _read_record(path)
    folder = checkpoint.resolve()
    step, path = re.fullmatch(r"checkpoint-(\d+)", folder.name), folder.parent / "run.json"
    if step and path.exists():
        with contextlib.suppress(InputError):  # of another program
            return {**_read_record(path), "step": int(step[1])}
    return {}


def _read_record(path: Path) -> dict:
    record = read_object(path, "remove it")
    for name in ("arguments", "data", "recipe_differences"):
        if not isinstance(record.get(name, {}), dict):
            raise InputError(f"{path} is not a record of training ({name} is not an object): remove it")
    return record


def training_keys(variant: Variant, wait_k: int, **more) -> dict:
    """Returns the keys to add to config.json for a checkpoint trained as `variant`, including the keys `more`."""
    return {"streaming_variant": variant.name, "wait_k": wait_k, "position_rule": RULE, **more}


def end_of_slot(config) -> str | None:
    """The end-of-slot token of a checkpoint with this `config`; None if it was trained without."""
    return getattr(config, "end_of_slot", None)


def choose_schedule(text: str | None, config, checkpoint: str, variant: Variant) -> str:
    """The name of a schedule: `text`, or by default the one that a checkpoint with this `config` was trained with. The
    model's own schedule is resolved to model-M; other texts are not checked.

    Raises InputError if the model is to decide, but the checkpoint was not trained for it or `variant` is offline.
    """
    own = MODEL if end_of_slot(config) and variant.streams else f"wait-{wait_k(config)}"
    asked = own if text is None else text
    if asked != MODEL and model_schedule_most(asked) is None:
        return asked
    if not variant.streams:
        raise InputError(
            f"schedule {asked}: {variant.name} writes only after the whole video: give no schedule, or use one of "
            "interleave, overlap, group and gap"
        )
    if end_of_slot(config) is None:
        raise InputError(
            f"schedule {asked}: {checkpoint} was trained without an end-of-slot token, so that it cannot decide when "
            f"a slot ends: {TRAIN}, or give a schedule such as wait-{wait_k(config)}"
        )
    return f"model-{config.max_tokens_per_slot}" if asked == MODEL else asked


def wait_k(config) -> int:
    """The K with which a checkpoint was trained."""
    return getattr(config, "wait_k", DEFAULT_WAIT_K)


def check_trained(config, checkpoint: str, variant: Variant, force: str) -> None:
    """Raises InputError if a checkpoint with this `config` was trained as a different variant than `variant`, or with a
    different position rule that matters for `variant`.

    The message names `force`, the flag that allows the mismatch. A checkpoint without training keys passes.
    """
    trained = getattr(config, "streaming_variant", None)
    if trained is None:  # not trained by this project
        return
    if trained != variant.name:
        raise InputError(
            f"{checkpoint} was trained as {trained}, not {variant.name}: give the variant {trained} "
            f"({ENVIRONMENT_VARIABLE}={trained} and no other), choose another checkpoint, or add {force}"
        )
    rule = getattr(config, "position_rule", None)
    if variant.after_video and rule != RULE:
        raise InputError(
            f"{checkpoint} was trained with another rule for the positions after a video (position_rule {rule!r} in "
            f"its config.json, here {RULE!r}): train it again from its base model, or add {force}"
        )
