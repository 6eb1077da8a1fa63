"""A checkpoint is used as it was trained, or refused."""

from types import SimpleNamespace

import pytest
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.model.trained import check_trained, training_keys
from qwen_vl_streaming.timeline.positions import RULE
from qwen_vl_streaming.timeline.variants import VARIANTS


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_checkpoint_is_for_its_variant_and_its_rule(variant):
    """A checkpoint of the hub works for all variants. One without a recorded rule is refused if the rule matters."""
    keys = training_keys(variant, 5, pixel_budget={})
    assert keys == {"streaming_variant": variant.name, "wait_k": 5, "position_rule": RULE, "pixel_budget": {}}
    for other in VARIANTS.values():
        check_trained(SimpleNamespace(), "hub", other, "--force")
        if other is variant:
            check_trained(SimpleNamespace(**keys), "mine", other, "--force")
            continue
        with pytest.raises(InputError, match=f"mine was trained as {variant.name}, not {other.name}.*--force"):
            check_trained(SimpleNamespace(**keys), "mine", other, "--force")
    earlier = SimpleNamespace(**{key: value for key, value in keys.items() if key != "position_rule"})
    if variant.name in ("interleave", "overlap"):
        check_trained(earlier, "mine", variant, "--force")
    else:
        with pytest.raises(InputError, match=r"another rule for the positions after a video.*train it again"):
            check_trained(earlier, "mine", variant, "--force")
