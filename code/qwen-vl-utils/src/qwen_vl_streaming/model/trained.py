"""What the config.json of a checkpoint says about its training, beyond what stock Qwen2.5-VL has there.

Knows nothing of weights, nor of how positions are counted.
"""

from ..common.errors import InputError
from ..timeline.positions import RULE
from ..timeline.variants import ENVIRONMENT_VARIABLE, Variant


def training_keys(variant: Variant, wait_k: int, **more) -> dict:
    """The keys of config.json for a checkpoint trained as `variant`, with `more` of them."""
    return {"streaming_variant": variant.name, "wait_k": wait_k, "position_rule": RULE, **more}


def check_trained(config, checkpoint: str, variant: Variant, force: str) -> None:
    """Raises InputError where a checkpoint with this `config` was trained as another variant than `variant`, or under
    another position rule. The message names the flag that allows it all the same: `force`."""
    trained = getattr(config, "streaming_variant", None)
    if trained is None:  # the hub's own
        return
    if trained != variant.name:
        raise InputError(
            f"{checkpoint} was trained as {trained}, not {variant.name}: "
            f"set {ENVIRONMENT_VARIABLE}={trained}, name another checkpoint, or give {force}"
        )
    rule = getattr(config, "position_rule", None)
    if variant.after_video and rule != RULE:
        raise InputError(
            f"{checkpoint} was trained under another rule for the positions after a video (position_rule {rule!r} in "
            f"its config.json, here {RULE!r}): train it again from its base model, or give {force}"
        )
