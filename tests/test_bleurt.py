"""BLEURT with a tiny checkpoint of random weights in the real format: scores equal those of RemBERT called directly."""

import json
import random
import shutil

import huggingface_hub
import pytest
import sentencepiece
import torch
from metrics.bleurt import bleurt, encode, find_checkpoint
from qwen_vl_streaming.common.errors import InputError
from safetensors.torch import load_file, save_file
from tiny_bleurt import LONGEST, WORDS, tiny_bleurt


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder in the format of lucadiliello/BLEURT-20, and the model that it was saved from."""
    folder = tmp_path_factory.mktemp("bleurt")
    return folder, tiny_bleurt(folder)


def by_hand(checkpoint, reference: str, candidate: str) -> float:
    """One pair alone, without padding."""
    folder, model = checkpoint
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    sides = [pieces.encode(reference, out_type=str), pieces.encode(candidate, out_type=str)]
    while sum(map(len, sides)) > LONGEST - 3:
        sides[0 if len(sides[0]) > len(sides[1]) else 1].pop()
    tokens = ["[CLS]", *sides[0], "[SEP]", *sides[1], "[SEP]"]
    segments = [0] * (len(sides[0]) + 2) + [1] * (len(sides[1]) + 1)
    ids = torch.tensor([[pieces.piece_to_id(token) for token in tokens]])
    with torch.no_grad():
        return 100 * float(model(ids, token_type_ids=torch.tensor([segments])).logits)


def test_equals_rembert_called_directly(checkpoint, tmp_path, caplog):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    draw = random.Random(seed)

    def caption(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(0, most)))

    references = [[caption(6) for _ in range(draw.randint(1, 3))] for _ in range(12)]
    candidates = [caption(6) for _ in references]
    references[3], candidates[3] = [caption(30) + " a" * 30], ""
    references[4], candidates[4] = ["a red square"], "a" * 40
    folder = find_checkpoint(str(checkpoint[0]))
    values = bleurt(folder, references, candidates, batch_size=5)
    expected = [
        max(by_hand(checkpoint, text, candidate) for text in texts)
        for texts, candidate in zip(references, candidates, strict=True)
    ]
    assert values == pytest.approx(expected, abs=1e-3) and len(set(map(round, values))) > 5
    assert "this affects" in caplog.text
    best = bleurt(folder, [texts[::-1] for texts in references], candidates, batch_size=1)
    assert best == pytest.approx(values, abs=1e-3)

    # The same weights as older versions of transformers wrote them.
    weights = load_file(folder / "model.safetensors")
    weights["bleurt.embeddings.position_ids"] = torch.arange(LONGEST)[None]
    for name in ("config.json", "spm.model"):
        shutil.copy(folder / name, tmp_path)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert bleurt(find_checkpoint(str(tmp_path)), references, candidates) == pytest.approx(values, abs=1e-3)


def test_published_values():
    """The values in the model card of lucadiliello/BLEURT-20, if it is in the cache; nothing is downloaded."""
    if not isinstance(huggingface_hub.try_to_load_from_cache("lucadiliello/BLEURT-20", "spm.model"), str):
        pytest.skip("lucadiliello/BLEURT-20 is not in the hub's cache")
    references = [["a bird chirps by the window"], ["this is a random sentence"]]
    candidates = ["a bird chirps by the window", "this looks like a random sentence"]
    values = bleurt(find_checkpoint("lucadiliello/BLEURT-20"), references, candidates)
    assert values == pytest.approx([99.90496635437012, 79.30182218551636], abs=0.05)


def test_special_tokens_in_a_caption_are_text(checkpoint):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(checkpoint[0] / "spm.model"))
    ids, segments = encode(pieces, ("a [SEP] b", "[CLS]"), 100)
    assert ids.count(pieces.piece_to_id("[SEP]")) == 2 and ids.count(pieces.piece_to_id("[CLS]")) == 1
    assert len(ids) == len(segments) and segments == sorted(segments)


def test_a_pair_that_is_too_long_is_truncated_at_the_longer_text_then_at_the_candidate(checkpoint):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(checkpoint[0] / "spm.model"))
    for lengths, longest, left in (((6, 2), 9, (4, 2)), ((2, 6), 9, (2, 4)), ((4, 4), 10, (4, 3)), ((4, 4), 9, (3, 3))):
        reference, candidate = (" ".join(["red"] * length) for length in lengths)
        ids, segments = encode(pieces, (reference, candidate), longest)
        assert (segments.count(0) - 2, segments.count(1) - 1) == left and len(ids) <= longest


def test_an_invalid_checkpoint_is_refused_in_one_line(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = checkpoint[0]

    def copy(name: str, leave: str = "", **fields) -> str:
        shutil.copytree(folder, tmp_path / name, ignore=shutil.ignore_patterns(leave))
        config = json.loads((folder / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps({**config, **fields}))
        return str(tmp_path / name)

    for name, says in (
        ("nobody/BLEURT-20", "cannot be downloaded from the hub"),
        (str(tmp_path / "nowhere"), "no such folder"),
        (copy("bert", model_type="bert"), "config.json is not that of a BLEURT-20"),
        (copy("base", embedding_size=None), "config.json is not that of a BLEURT-20"),
        (copy("no words", leave="spm.model"), "lacks spm.model"),
        (copy("no weights", leave="*.safetensors"), "lacks the weights"),
    ):
        with pytest.raises(InputError, match=says) as error:
            find_checkpoint(name)
        assert "\n" not in str(error.value) and name in str(error.value)

    short = copy("short")
    weights = load_file(folder / "model.safetensors")
    save_file({name: value for name, value in weights.items() if "pooler" not in name}, short + "/model.safetensors")
    cut = copy("cut")
    (tmp_path / "cut/model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    for name, says in (
        (short, "2 weights do not match"),
        (copy("deep", num_hidden_layers=3), "16 weights do not match"),
        (copy("wide", hidden_size=32), "weights"),
        (cut, "cannot be read"),
    ):
        with pytest.raises(InputError, match=says) as error:
            bleurt(find_checkpoint(name), [["a"]], ["a"])
        assert "\n" not in str(error.value)
