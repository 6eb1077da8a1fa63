"""A checkpoint is used as it was trained, or refused."""

import json
from types import SimpleNamespace

import pytest
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.model.trained import check_trained, training_keys, training_record
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


def test_an_intermediate_checkpoint_has_the_record_of_its_run(tmp_path):
    for name in ("run/checkpoint-20", "run/best", "other/checkpoint-20"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "run/run.json").write_text(json.dumps({"variant": "gap"}))
    (tmp_path / "newest").symlink_to(tmp_path / "run/checkpoint-20")
    assert training_record(tmp_path / "run") == {"variant": "gap"}
    for name in ("run/checkpoint-20", "newest"):
        assert training_record(tmp_path / name) == {"variant": "gap", "step": 20}
    for name in ("run/best", "other/checkpoint-20", "gone"):
        assert training_record(tmp_path / name) == {}
    for text, message in (
        ("[]", r"run\.json cannot be read"),
        ('{"data": null}', r"run\.json is not a record of training"),
    ):
        (tmp_path / "run/run.json").write_text(text)
        with pytest.raises(InputError, match=message):
            training_record(tmp_path / "run")
        assert training_record(tmp_path / "run/checkpoint-20") == {}  # that of another program
