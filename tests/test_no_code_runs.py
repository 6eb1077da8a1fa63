"""A checkpoint's folder is data: no code in it runs, whatever its files request and whatever is on stdin."""

import ast
import builtins
import json
import shutil
from pathlib import Path

import pytest
import torch
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.model.loading import load_config, load_model
from qwen_vl_streaming.model.prompts import load_processor
from qwenvl.checkpointing import weights_only
from report import gallery

FILES = "config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"
CLASSES = "AutoConfig", "AutoModel", "AutoProcessor", "AutoTokenizer", "AutoImageProcessor", "AutoVideoProcessor"


@pytest.fixture
def copy(made, tmp_path, monkeypatch):
    """A checkpoint with code next to it, which creates a file when it runs; every prompt is answered with yes."""
    folder = Path(shutil.copytree(made[0], tmp_path / "copy"))
    mark = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n" + "class Evil: pass\n")
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "evil.py", folder / "custom_generate/generate.py")
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    yield folder
    assert not mark.exists(), "code from the checkpoint's folder ran"


def load_all(folder: Path) -> None:
    for load in (
        load_config,
        lambda path: load_model(path, "sdpa", torch.float32),
        load_processor,
        gallery.Tokenizers._load,
    ):
        try:
            load(folder)
        except InputError as error:
            assert "\n" not in str(error) and "trust_remote_code" not in str(error), error


@pytest.mark.parametrize("name", [*FILES, "video_preprocessor_config.json"])
@pytest.mark.parametrize("renamed", [False, True])
def test_code_beside_a_checkpoint_does_not_run(copy, name, renamed):
    path = copy / name
    data = json.loads(path.read_text()) if path.exists() else {}
    data["auto_map"] = {each: "evil.Evil" for each in CLASSES} | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    if renamed:
        data |= dict.fromkeys(("tokenizer_class", "processor_class", "image_processor_type"), "Evil")
        data["video_processor_type"] = "Evil"
    path.write_text(json.dumps(data))
    load_all(copy)


@pytest.mark.parametrize(
    "more",
    [
        {"_attn_implementation": "evil/kernels"},
        {"attn_implementation": "evil/kernels"},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": {"quant_method": "torchao", "quant_type": {"default": {"_type": "x", "_data": {}}}}},
    ],
)
def test_packages_that_a_config_requires_are_not_downloaded(copy, more):
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    load_all(copy)


def test_every_loader_disables_trust_remote_code():
    """A call without the argument asks on the terminal, and answering y runs the code."""
    root = Path(__file__).parents[1]
    for path in [*root.glob("code/**/*.py"), root / "mani_data.py"]:
        for call in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(call, ast.Call)
                and isinstance(call.func, ast.Attribute)
                and call.func.attr == "from_pretrained"
            ):
                owner = ast.unparse(call.func.value)
                if owner.startswith("Auto") or ".Auto" in owner or owner.endswith(("Generation", "Classification")):
                    words = {word.arg: ast.unparse(word.value) for word in call.keywords}
                    assert words.get("trust_remote_code") == "False", f"{path}, line {call.lineno}"


class Evil:
    def __reduce__(self):
        return exec, ("open('ran', 'w')",)


def test_states_of_deepspeed_are_loaded_as_data(tmp_path, monkeypatch):
    """DeepSpeed itself loads them with weights_only=False."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    monkeypatch.chdir(tmp_path)
    states = {"scaler": LossScaler(2.0), "stage": ZeroStageEnum.weights, "where": fragment_address(3, 4)}
    torch.save({**states, "shape": torch.Size([3]), "state": torch.ones(3)}, "good.pt")
    torch.save({**states, "state": Evil()}, "evil.pt")
    with weights_only("checkpoint-3"):
        found = torch.load("good.pt", weights_only=False)
    assert found["scaler"].cur_scale == 2.0 and found["where"] == states["where"]
    with pytest.raises(InputError, match="checkpoint-3 contains code, which is not run"), weights_only("checkpoint-3"):
        torch.load("evil.pt", weights_only=False)
    assert not Path("ran").exists()
    torch.load("evil.pt", weights_only=False)  # the block has ended, so code in the file could have run
    assert Path("ran").exists()
