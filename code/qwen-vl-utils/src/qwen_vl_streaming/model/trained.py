"""Keys about training that this project adds to the config.json of a checkpoint.

Independent of weights and of how positions are computed.
"""

from ..common.errors import InputError
from ..timeline.positions import RULE
from ..timeline.variants import ENVIRONMENT_VARIABLE, Variant


def training_keys(variant: Variant, wait_k: int, **more) -> dict:
    """Returns the keys to add to config.json for a checkpoint trained as `variant`, including the keys `more`."""
    return {"streaming_variant": variant.name, "wait_k": wait_k, "position_rule": RULE, **more}


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
            f"{checkpoint} was trained as {trained}, not {variant.name}: "
            f"set {ENVIRONMENT_VARIABLE}={trained}, choose another checkpoint, or add {force}"
        )
    rule = getattr(config, "position_rule", None)
    if variant.after_video and rule != RULE:
        raise InputError(
            f"{checkpoint} was trained with another rule for the positions after a video (position_rule {rule!r} in "
            f"its config.json, here {RULE!r}): train it again from its base model, or add {force}"
        )
