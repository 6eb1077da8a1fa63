"""Checkpoints in the hub's format: found without a network, and trained, merged, evaluated and watched. The results
load wherever the base loads."""

import json
import logging
import shutil
import socket
import sys
from pathlib import Path

import evaluating
import load_elsewhere
import numpy as np
import pytest
import torch
from hub_models import COMMIT, NAMES, hub_checkpoint, put_into_cache
from hubs import Hub
from huggingface_hub import constants
from qwen_vl_streaming.common.errors import InputError, run
from qwen_vl_streaming.live import cli
from qwen_vl_streaming.model import hub
from qwen_vl_streaming.model.base_files import BaseFiles
from qwen_vl_streaming.model.checkpoint import of_checkpoint
from qwen_vl_streaming.model.loading import load_config, load_model
from qwen_vl_streaming.model.prompts import load_processor
from qwenvl import merge, run_checks, train
from report.loading import find_model, identify_folder
from safetensors import safe_open
from transformers import Qwen2_5_VLForConditionalGeneration as StockModel

NAME = NAMES["3B"]
OWN = {"config.json", "model.safetensors", "model.safetensors.index.json"}
SHORT = (
    "--variant group --use_cpu True --gradient_checkpointing True --report_to none --disable_tqdm True --max_steps 2 "
    "--dataloader_num_workers 0 --gradient_accumulation_steps 1 --min_pixels_per_frame 3136 --max_pixels_per_frame 3136"
)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    return {size: hub_checkpoint(folder / size, size) for size in NAMES}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a hub that refuses every connection."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    point_at("http://127.0.0.1:9", monkeypatch)
    forget()
    yield tmp_path / "cache"
    forget()


def forget() -> None:
    """Clears the caches, as in a new process."""
    hub.from_hub.cache_clear()
    hub.commit_on_hub.cache_clear()
    hub._warn.cache_clear()


def point_at(endpoint: str, monkeypatch) -> None:
    for name, value in (("ENDPOINT", endpoint), ("HUGGINGFACE_CO_URL_TEMPLATE", endpoint + URL)):
        monkeypatch.setattr(constants, name, value)
    forget()


URL = "/{repo_id}/resolve/{revision}/{filename}"


class FakeHub(Hub):
    """The responses of the hub's API that are needed to download a model, for the files of one folder, or one refusal
    for all requests."""

    def __init__(self, folder: Path, refusal: tuple[int, str] | None = None, commit: str = COMMIT):
        super().__init__(commit)
        self.folder, self.refusal = folder, refusal
        self.asked: list[str] = []

    def answer(self, request, path: str) -> None:
        self.asked.append(path)
        if self.refusal and not (path.startswith("/api/models") and self.refusal[1] == "GatedRepo"):
            return self.send(request, self.refusal[0], {}, self.refusal[1])
        if path == f"/api/models/{NAME}" or path.startswith(f"/api/models/{NAME}/revision/"):
            return self.send(request, 200, {"id": NAME, "sha": self.commit})
        if path.startswith(f"/api/models/{NAME}/tree/"):
            files = [
                {"type": "file", "path": file.name, "size": file.lstat().st_size, "oid": f"{number:040x}"}
                for number, file in enumerate(sorted(self.folder.iterdir()))
            ]
            return self.send(request, 200, files)
        file = self.folder / path.rpartition("/")[2]
        if not file.is_file():  # the hub's client also requests other paths
            return self.send(request, 404, {}, "EntryNotFound")
        return self.send(request, 200, file.read_bytes(), tag=file.name)


def load_all_but_weights() -> None:
    load_config(NAME)
    load_processor(NAME)
    load_config(NAME)


@pytest.mark.parametrize("markers", [True, False])
@pytest.mark.parametrize("network", ["refuses", "is silent", "is off", "is down"])
def test_a_cached_model_is_used_if_the_hub_is_unreachable(checkpoints, cache, monkeypatch, caplog, network, markers):
    """With one query for all files, within the timeout, and one line in the log."""
    folder = put_into_cache(cache, checkpoints["3B"], NAME, markers)
    monkeypatch.setattr(hub, "SECONDS", 0.5)
    questions = []
    ask = hub.ask
    monkeypatch.setattr(hub, "ask", lambda question: questions.append(question) or ask(question))
    with socket.create_server(("127.0.0.1", 0)) as silent, FakeHub(folder, (503, "")) as down:
        if network == "is silent":
            point_at(f"http://127.0.0.1:{silent.getsockname()[1]}", monkeypatch)
        elif network == "is off":
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        elif network == "is down":
            point_at(down.endpoint, monkeypatch)
        with caplog.at_level(logging.WARNING, "qwen_vl_streaming"):
            load_all_but_weights()
            assert hub.model_folder(NAME) == folder
    said = [record.getMessage() for record in caplog.records if record.name.startswith("qwen_vl_streaming")]
    assert len(said) == (network != "is off") and len(questions) == 1
    assert all("cannot be reached: " in line and f"using the cached {folder}" in line for line in said)
    assert of_checkpoint(NAME) == f"{NAME} {COMMIT}"
    assert identify_folder(find_model(NAME), NAME) == of_checkpoint(NAME)  # as a report does


def test_a_file_missing_in_the_cache_is_named(checkpoints, cache, monkeypatch):
    with pytest.raises(InputError, match=rf"neither a folder nor in the cache .*: check .* `hf download {NAME}`"):
        load_config(NAME)
    folder = put_into_cache(cache, checkpoints["7B"], NAME)
    for name in ("model-00002-of-00003.safetensors", "preprocessor_config.json"):
        there = (folder / name).readlink()
        (folder / name).unlink()
        with pytest.raises(InputError, match=rf"lacks {name}\): check the path, or run `hf download {NAME}`") as error:
            load_config(NAME)
        assert "\n" not in str(error.value)
        (folder / name).symlink_to(there)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_config(NAME)
    with pytest.raises(InputError, match=r"HF_HUB_OFFLINE is set, and it is neither a folder nor"):
        load_processor("nobody/Qwen2.5-VL-3B-Instruct")
    for path in ("/no/such/folder", "no/such/folder", "../folder"):
        with pytest.raises(InputError, match="the path does not exist: check it"):
            load_config(path)


def test_a_model_is_downloaded_once_and_then_queried_once(checkpoints, cache, monkeypatch):
    with FakeHub(checkpoints["3B"]) as there:
        point_at(there.endpoint, monkeypatch)
        load_all_but_weights()
        folder = hub.model_folder(NAME)
        assert {path.name for path in folder.iterdir()} == {path.name for path in checkpoints["3B"].iterdir()}
        assert StockModel.from_pretrained(folder).config.text_config.vocab_size == 151936
        there.asked.clear()
        forget()
        load_all_but_weights()
        assert [path for path in there.asked if NAME in path] == [f"/api/models/{NAME}"]
    with FakeHub(checkpoints["3B"], commit="f" * 40) as newer:
        point_at(newer.endpoint, monkeypatch)
        assert hub.model_folder(NAME).name == "f" * 40 and of_checkpoint(NAME).endswith("f" * 40)


def test_weights_are_downloaded_when_they_are_needed(checkpoints, cache, monkeypatch):
    """Errors in config and processor are found before gigabytes are downloaded."""
    with FakeHub(checkpoints["3B"]) as there:
        point_at(there.endpoint, monkeypatch)
        load_all_but_weights()
        assert of_checkpoint(NAME) == f"{NAME} {COMMIT}"
        assert not [path for path in there.asked if path.endswith(".safetensors")]
        hub.model_folder(NAME)
        assert [path for path in there.asked if path.endswith(".safetensors")]


def test_a_failed_download_leaves_the_previous_commit(checkpoints, cache, monkeypatch, tmp_path):
    """A newer commit has a file that cannot be downloaded: one line is reported, and the cached model stays
    complete."""
    before = put_into_cache(cache, checkpoints["3B"], NAME)
    newer = tmp_path / "newer"
    shutil.copytree(checkpoints["3B"], newer)
    shards = sorted(newer.glob("*.safetensors"))
    shards[-1].unlink()
    shards[-1].symlink_to("nowhere")  # listed, and cannot be sent
    with FakeHub(newer, commit="f" * 40) as broken:
        point_at(broken.endpoint, monkeypatch)
        with pytest.raises(
            InputError, match=f"cannot be downloaded.*HF_HUB_OFFLINE=1 to use the cached commit {COMMIT}"
        ):
            hub.model_folder(NAME)
    point_at("http://127.0.0.1:9", monkeypatch)
    assert hub.model_folder(NAME) == before


@pytest.mark.parametrize(
    ("refusal", "says"),
    [
        ((403, "GatedRepo"), "the model is gated.*hf auth login"),
        ((401, "RepoNotFound"), "has no such model, or you cannot access it.*neither a folder"),
    ],
)
def test_denied_access_to_the_hub_is_reported(checkpoints, cache, monkeypatch, refusal, says):
    with FakeHub(checkpoints["3B"], refusal) as closed:
        point_at(closed.endpoint, monkeypatch)
        with pytest.raises(InputError, match=says) as error:
            load_config(NAME)
        assert "\n" not in str(error.value)
        put_into_cache(cache, checkpoints["3B"], NAME)
        assert load_config(NAME)


def call(main, arguments: list[str], monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["program", *map(str, arguments)])
    run(main)


def sft(model, made, out: Path, monkeypatch, more: str = "") -> None:
    paths = ["--model_name_or_path", model, "--train_data", made[1], "--output_dir", out]
    call(train.main, [*SHORT.split(), *paths, *more.split()], monkeypatch)


def assert_own_files(folder: Path, base: Path, dtype: str) -> None:
    """Every file next to the weights equals that of the base; config.json also has our keys. All are readable."""
    for path in base.iterdir():
        if path.name not in OWN and not path.name.startswith("model-"):
            assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
    ours, theirs = (json.loads((where / "config.json").read_text()) for where in (folder, base))
    added = {key: ours.pop(key) for key in ("streaming_variant", "wait_k", "position_rule", "pixel_budget")}
    assert added["streaming_variant"] == "group" and added["wait_k"] == 3 and added["position_rule"]
    ours.pop("base_sha256", None)
    assert ours == {**theirs, "torch_dtype": dtype} and list(ours) == list(theirs)
    strangers = {"processor_config.json", "video_preprocessor_config.json", "chat_template.jinja"}
    assert not strangers & {path.name for path in folder.iterdir()}
    mode = (folder / "config.json").stat().st_mode
    assert all(path.stat().st_mode == mode for path in folder.glob("*.safetensors"))


def names(folder: Path) -> set[str]:
    found = set()
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= set(file.keys())
    return found


@pytest.mark.parametrize(("size", "numbers"), [("3B", "float32"), ("7B", "bfloat16")])
def test_trained_evaluated_and_watched(checkpoints, made, tmp_path, cache, monkeypatch, size, numbers):
    """From an id that is only in the cache, through checkpoint-1, to a checkpoint that stock transformers loads."""
    base, out, name = checkpoints[size], tmp_path / "out", NAMES[size]
    put_into_cache(cache, base, name)
    sft(name, made, out, monkeypatch, f"--bf16 {numbers == 'bfloat16'} --save_steps 1")
    for folder in (out, out / "checkpoint-1"):
        assert_own_files(folder, base, numbers)
        assert names(folder) == names(base) and ("lm_head.weight" in names(folder)) is (size == "7B")
    record = json.loads((out / "run.json").read_text())
    assert record["arguments"]["model_name_or_path"] == name and record["model_sha256"] == f"{name} {COMMIT}"
    answers, arrays = load_elsewhere.answers(str(out))
    before = load_elsewhere.answers(str(base))
    assert answers["dtype"] == f"torch.{numbers}" and not answers["equal"]["missing weights"]
    assert {**answers["equal"], "streaming_variant": None} == before[0]["equal"]
    assert (arrays["image logits"] != before[1]["image logits"]).any()
    ours = load_model(out, "sdpa", torch.float32).state_dict()
    stock = StockModel.from_pretrained(out, dtype=torch.float32).state_dict()
    assert ours.keys() == stock.keys() and all(torch.equal(ours[name], stock[name]) for name in ours)

    if size == "7B":
        # The first step again, from its checkpoint.
        halted = tmp_path / "halted"
        shutil.copytree(out / "checkpoint-1", halted / "checkpoint-1")
        (halted / "run.json").write_text(json.dumps({**record, "finished": None}))
        sft(name, made, halted, monkeypatch, f"--bf16 {numbers == 'bfloat16'} --save_steps 1")
        again = load_model(halted, "sdpa", torch.float32).state_dict()
        assert all(torch.equal(ours[name], again[name]) for name in ours)
        return

    log = tmp_path / "log"
    evaluating.finish(evaluating.start((out, made[1]), tmp_path / "captions", log, limit=2, max_new_tokens=5), log)
    assert len(evaluating.rows(tmp_path / "captions")) == 2
    video = json.loads(made[1].read_text().splitlines()[0])["video_path"]
    session = tmp_path / "session.json"
    flags = f"--model {out} --device cpu --speed 50 --max-new-tokens 5 --record {session} --source {video}"
    monkeypatch.setattr("sys.argv", ["live", *flags.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code and json.loads(session.read_text())["tokens"]


def test_adapters_record_the_id_and_merge_with_its_files(checkpoints, made, tmp_path, cache, monkeypatch):
    base, out = checkpoints["7B"], tmp_path / "out"
    put_into_cache(cache, base, NAMES["7B"])
    sft(NAMES["7B"], made, out, monkeypatch, "--bf16 False --lora_enable True --lora_r 4 --learning_rate 1e-2")
    assert_own_files(out, base, "bfloat16")
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == NAMES["7B"]
    merge.merge(out, tmp_path / "merged")
    assert_own_files(tmp_path / "merged", base, "bfloat16")
    assert names(tmp_path / "merged") == names(base)
    assert StockModel.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


def test_the_files_of_a_base_are_kept_without_additions(checkpoints, tmp_path):
    """No generation config is added, sub-configs get the data type of the weights, and later changes of the base have
    no effect."""
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(checkpoints["3B"], base)
    (base / "generation_config.json").unlink()
    config = {"dtype": "float32", "text_config": {"dtype": "float32"}, "vision_config": {"torch_dtype": "float32"}}
    (base / "config.json").write_text(json.dumps(config))
    files = BaseFiles.of(base)
    (base / "config.json").write_text("{}")
    shutil.copytree(checkpoints["3B"], out)
    files.write(out, {"wait_k": 3})
    assert not (out / "generation_config.json").exists()
    assert json.loads((out / "config.json").read_text()) == {
        "dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16"},
        "vision_config": {"torch_dtype": "bfloat16"},
        "wait_k": 3,
    }
    for broken in ("", "[1]"):
        (base / "config.json").write_text(broken)
        with pytest.raises(InputError, match=r"config.json"):
            BaseFiles.of(base)


def test_a_base_that_transformers_5_has_saved_keeps_its_files(made, tmp_path):
    base = tmp_path / "base"
    StockModel.from_pretrained(made[0]).save_pretrained(base)
    load_processor(made[0]).save_pretrained(base)
    names = {path.name for path in base.iterdir() if path.suffix != ".safetensors"}
    assert {"processor_config.json", "chat_template.jinja", "tokenizer.json"} < names
    assert BaseFiles.of(base).files.keys() == names


def test_other_environments_are_compared(made, checkpoints, capsys, monkeypatch):
    arguments = ["load_elsewhere.py", str(made[0]), "--python", sys.executable, "/no/such/python"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as end:
        load_elsewhere.main()
    assert end.value.code == 1
    _, same, fails = capsys.readouterr().out.splitlines()
    assert "same results, logits differ by at most 0" in same
    assert fails == "/no/such/python: FAILED: cannot be run (No such file or directory)"
    tied, untied = (load_elsewhere.answers(str(checkpoints[size])) for size in ("3B", "7B"))
    found = load_elsewhere.differences(tied, untied, 1e-3)
    assert "tied: False, here True" in found and any(line.startswith("image logits: shape") for line in found)
    close = {**tied[1], "pixels": tied[1]["pixels"] + 0.01}
    assert load_elsewhere.differences(tied, (tied[0], close), 1e-3) == ["pixels: differ by 0.01"]


def test_logits_of_another_shape_are_a_difference(made, capsys, monkeypatch):
    """As those of a tokenizer that splits the question otherwise."""

    def found(tokens):
        logits = np.zeros((1, tokens, 2))
        arrays = {"pixels": np.zeros(1), "image logits": logits, "video logits": logits}
        return {"transformers": "5", "equal": {}}, arrays

    monkeypatch.setattr(load_elsewhere, "answers", lambda checkpoint: found(3))
    monkeypatch.setattr(load_elsewhere, "elsewhere", lambda checkpoint, python: found(4))
    monkeypatch.setattr("sys.argv", ["load_elsewhere.py", str(made[0]), "--python", "other"])
    with pytest.raises(SystemExit) as end:
        load_elsewhere.main()
    assert end.value.code == 1
    assert "transformers 5: DIFFERS: image logits: shape (1, 4, 2), here (1, 3, 2)" in capsys.readouterr().out


def test_nodes_with_different_models_are_refused(monkeypatch):
    run_checks.check_same_model("m", "a", torch.device("cpu"))
    monkeypatch.setattr(run_checks, "broadcast_object_list", lambda _: ["b"])
    with pytest.raises(InputError, match="m is not the same on every node: "):
        run_checks.check_same_model("m", "a", torch.device("cpu"))


def test_a_sliding_window_is_refused_with_the_field_to_change(checkpoints, tmp_path):
    shutil.copytree(checkpoints["3B"], tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config |= {"use_sliding_window": True, "max_window_layers": 1}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    for load in (load_config, lambda path: load_model(path, "sdpa", torch.float32)):
        with pytest.raises(InputError, match=r"set use_sliding_window to false in its config\.json$"):
            load(tmp_path / "model")
