"""A tiny BLEURT checkpoint with random weights, in the format of lucadiliello/BLEURT-20."""

import json
import random
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import RemBertConfig, RemBertForSequenceClassification

LONGEST = 24
TEXT = "the video shows a red blue green square circle that moves up down then stops été 日本"
WORDS = TEXT.split()


def tiny_bleurt(folder: Path) -> RemBertForSequenceClassification:
    """Write a checkpoint to `folder` and return its model."""
    draw = random.Random(0)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(draw.choices(WORDS, k=8)) for _ in range(200)]),
        model_prefix=str(folder / "spm"),
        vocab_size=46,
        pad_id=0, unk_id=1, bos_id=-1, eos_id=-1, pad_piece="[PAD]", unk_piece="[UNK]",
        control_symbols=["[CLS]", "[SEP]", "[MASK]"],
        minloglevel=2,
    )  # fmt: skip
    torch.manual_seed(0)
    config = RemBertConfig(
        vocab_size=46, input_embedding_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=LONGEST, num_labels=1, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = RemBertForSequenceClassification(config).eval()
    for name, parameter in model.named_parameters():
        if "LayerNorm" not in name:  # at the default scale, the output of a model this small is nearly constant
            parameter.data.normal_(0, 0.5)
    model.save_pretrained(folder)
    renamed = {
        name.replace("rembert.", "bleurt.").replace("embedding_hidden_mapping_in", "embedding_projection"): value
        for name, value in load_file(folder / "model.safetensors").items()
    }
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    fields = json.loads((folder / "config.json").read_text())
    fields["embedding_size"] = fields.pop("input_embedding_size")
    fields |= {"model_type": "bleurt", "architectures": ["BleurtForSequenceClassification"], "classifier_dropout": None}
    (folder / "config.json").write_text(json.dumps(fields))
    return model
