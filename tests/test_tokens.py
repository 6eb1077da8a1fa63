"""Token counts: the cached counter equals the tokenizer for every caption."""

import json
import random
import string
from types import SimpleNamespace

import pytest
from media import make_tokenizer
from preparation.tokens import QWEN_SPLIT, WordCounter, load_counter
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.model.prompts import answer_ids
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoTokenizer

TEXT = "The video shows a man who's walking 12 dogs, and they've 3.5 km to go; it isn't far! (about 40%) état"


@pytest.fixture(scope="module")
def qwen_like(tmp_path_factory):
    """The tokenizer.json of a byte-level BPE with the pre-tokenizer, normalizer and kind of added tokens of Qwen2.5."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [" ".join([TEXT] * 3)], trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet)
    )
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False)])
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(file))
    return file


def random_captions(count):
    draw = random.Random(0)
    for number in range(count):
        if number % 3 == 0:
            yield " ".join(draw.choices(TEXT.split(), k=draw.randint(1, 30)))
        elif number % 3 == 1:
            signs = string.ascii_letters + string.digits + string.punctuation
            yield " ".join("".join(draw.choices(signs, k=draw.randint(1, 6))) for _ in range(draw.randint(1, 12)))
        else:
            yield "".join(draw.choices("ab 's1,.\n \t<|im_end|>éé\u3000\u180e\x1c", k=draw.randint(1, 40)))


def test_counting_by_word_is_exact(qwen_like):
    count = load_counter(qwen_like)
    assert isinstance(count, WordCounter)
    captions = [
        *random_captions(6000),
        "end <|im_end|> of",
        "a<tool_call>b",
        "<",
        " a",
        "a ",
        "a  b",
        "caf\u0065\u0301 x",
    ]
    tokenizer = Tokenizer.from_file(str(qwen_like))
    tokenizer.encode_special_tokens = True
    expected = [len(tokenizer.encode(caption, add_special_tokens=False).ids) for caption in captions]
    assert count(captions) == expected
    assert count(captions[::-1]) == expected[::-1]
    assert len(count.later) > 1000  # the cache was used


def test_counts_equal_those_of_training(made):
    """Both mani_data.py and training encode text that looks like a special token as plain text."""
    count = load_counter(made[0] / "tokenizer.json")
    tokenizer = AutoTokenizer.from_pretrained(made[0])
    names = ["<|im_end|>", "<|vision_start|>", "<|video_pad|>", "<|endoftext|>", "<|im_start|>", "<tool_call>"]
    captions = ["a red square", *names, *(f"a red{name}square {name} <|" for name in names), "<|im_end", "é <|im_end|>"]
    template = SimpleNamespace(end=0, end_of_slot=None)
    trained = [len(answer_ids(SimpleNamespace(tokenizer=tokenizer), template, caption)) - 1 for caption in captions]
    assert count(captions) == trained and count(["<|im_end|>"])[0] > 1


def test_other_tokenizers_encode_whole_captions(tmp_path, qwen_like):
    assert not isinstance(load_counter(make_tokenizer(tmp_path) / "tokenizer.json"), WordCounter)
    changed = json.loads(qwen_like.read_text())
    changed["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\w+"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    assert not isinstance(load_counter(tmp_path / "tokenizer.json"), WordCounter)


def test_padding_and_truncation_are_ignored(tmp_path, qwen_like):
    tokenizer = Tokenizer.from_file(str(qwen_like))
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    captions = ["état " * 20, "a"]
    assert load_counter(tmp_path / "tokenizer.json")(captions) == load_counter(qwen_like)(captions)


def test_broken_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json cannot be loaded"):
        load_counter(tmp_path / "tokenizer.json")
