"""BLEURT-20 (Sellam et al. 2020, Pu et al. 2021) in PyTorch. Knows nothing about videos, files of captions and other
metrics.

The official implementation needs TensorFlow, and its PyTorch port, bleurt-pytorch, does not import with the
transformers version of this project. BLEURT-20 is a RemBERT with one output, so the checkpoints of that port
(lucadiliello/BLEURT-20 and the smaller -D12, -D6, -D3) load as the RemBERT of transformers once their weights are
renamed. Pairs are encoded with sentencepiece as in the official implementation: [CLS] reference [SEP] candidate [SEP].
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError

import sentencepiece
import torch
from huggingface_hub.errors import HFValidationError
from qwen_vl_streaming.common.errors import InputError, first_line
from qwen_vl_streaming.common.paths import places
from qwen_vl_streaming.common.progress import Progress
from qwen_vl_streaming.model.hub import WEIGHTS, from_hub
from safetensors import SafetensorError
from settings import ROOT
from torch.nn.utils.rnn import pad_sequence
from transformers import RemBertConfig, RemBertForSequenceClassification

from metrics.scoring import NotComputed

logger = logging.getLogger(__name__)

VOCABULARY = "spm.model"
SAME_FIELDS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
    *("max_position_embeddings", "type_vocab_size", "layer_norm_eps", "pad_token_id"),
)
RENAMED_WEIGHTS = {r"^bleurt\.": "rembert.", r"\.embedding_projection\.": ".embedding_hidden_mapping_in."}


def find_checkpoint(name: str) -> Path:
    """The folder of a checkpoint; a hub id is downloaded. Call it before anything that takes long.

    Raises InputError if the checkpoint is missing or is not a BLEURT-20.
    """
    folder = next((folder for folder in places(name, ROOT) if folder.exists()), None)
    if folder is None:
        try:
            folder = from_hub(name, ("config.json", VOCABULARY), missing_file)
        except (InputError, HFValidationError) as error:
            first = first_line(error)
            raise InputError(
                f"--bleurt {name}: no such folder, and it cannot be downloaded from the hub ({first}): "
                "give a folder, or a hub id such as lucadiliello/BLEURT-20"
            ) from error
    read_config(folder)
    if lacks := missing_file(folder):
        raise InputError(f"--bleurt {name}: {folder} lacks {lacks}: download the complete checkpoint")
    return folder


def missing_file(folder: Path) -> str | None:
    """A file that a checkpoint has and `folder` lacks, or None."""
    if not (folder / VOCABULARY).is_file():
        return VOCABULARY
    return None if any(next(folder.glob(weights), None) for weights in WEIGHTS) else "the weights"


def read_config(folder: Path) -> RemBertConfig:
    """The checkpoint's configuration as a RemBertConfig. Raises InputError if it is not that of a BLEURT-20."""
    try:
        fields = json.loads((folder / "config.json").read_text())
        known = fields["model_type"] == "bleurt" and fields["embedding_size"] and fields.keys() >= set(SAME_FIELDS)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        known = False
    if not known:
        raise InputError(
            f"--bleurt {folder}: its config.json is not that of a BLEURT-20 for PyTorch: "
            "give a checkpoint in the format of lucadiliello/BLEURT-20"
        )
    return RemBertConfig(
        **{name: fields[name] for name in SAME_FIELDS},
        input_embedding_size=fields["embedding_size"],
        num_labels=1,
        bos_token_id=None,
        eos_token_id=None,
    )


def load(folder: Path, device: str = "cpu") -> RemBertForSequenceClassification:
    """The model in float32. Raises InputError if weights are missing or cannot be read."""
    try:
        model, found = RemBertForSequenceClassification.from_pretrained(
            folder, config=read_config(folder), key_mapping=RENAMED_WEIGHTS, dtype=torch.float32,
            output_loading_info=True, trust_remote_code=False, weights_only=True,
        )  # fmt: skip
    except (OSError, RuntimeError, ValueError, UnpicklingError, SafetensorError) as error:
        first = first_line(error)
        raise InputError(f"--bleurt {folder}: its weights cannot be read ({first}): download them again") from error
    if wrong := [*found["missing_keys"], *found["mismatched_keys"], *found["unexpected_keys"]]:
        raise InputError(
            f"--bleurt {folder}: {len(wrong)} weights do not match its config.json (first: {wrong[0]}): "
            "give a checkpoint in the format of lucadiliello/BLEURT-20"
        )
    return model.to(device).eval()


def encode(pieces: sentencepiece.SentencePieceProcessor, pair: tuple[str, str], longest: int):
    """Token ids (L,) of (reference, candidate) and their segments (L,), 0 or 1, with L at most `longest`.

    A pair that is too long is truncated as in the official implementation: one token at a time from the end of the
    longer text, or of the candidate if both have the same length.
    """
    reference, candidate = map(pieces.encode, pair)
    while len(reference) + len(candidate) > longest - 3:
        (reference if len(reference) > len(candidate) else candidate).pop()
    begin, between = pieces.piece_to_id("[CLS]"), pieces.piece_to_id("[SEP]")
    ids = [begin, *reference, between, *candidate, between]
    return ids, [0] * (len(reference) + 2) + [1] * (len(candidate) + 1)


def bleurt(
    folder: Path, references: Sequence[list[str]], candidates: Sequence[str], device: str = "cpu", batch_size: int = 32
) -> list[float]:
    """BLEURT (times 100) of each candidate; with several references, the highest.

    Padding is masked, so a score does not depend on the batch. Raises InputError if the checkpoint does not load, and
    NotComputed if the device runs out of memory.
    """
    model = load(folder, device)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / VOCABULARY))
    pairs = [(text, candidate) for texts, candidate in zip(references, candidates, strict=True) for text in texts]
    longest = model.config.max_position_embeddings
    encoded = [encode(pieces, pair, longest) for pair in pairs]
    if full := sum(len(ids) == longest for ids, _ in encoded):
        logger.warning(
            "BLEURT truncates caption and reference to %d tokens together: this affects %d pairs", longest, full
        )
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index][0]), reverse=True)
    values = [0.0] * len(encoded)
    with torch.no_grad(), Progress(total=len(order), unit="caption", desc=f"BLEURT on {device}") as bar:
        for begin in range(0, len(order), batch_size):
            batch = order[begin : begin + batch_size]
            ids, segments = (
                pad_sequence([torch.tensor(encoded[index][side]) for index in batch], batch_first=True).to(device)
                for side in (0, 1)
            )
            lengths = torch.tensor([len(encoded[index][0]) for index in batch], device=device)
            mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
            try:
                logits = model(ids, attention_mask=mask.long(), token_type_ids=segments).logits
            except torch.OutOfMemoryError as error:
                raise NotComputed(f"{device} does not have enough memory for {folder}: give --device cpu") from error
            for index, value in zip(batch, logits[:, 0].tolist(), strict=True):
                values[index] = 100 * value
            bar.update(len(batch))
    each = iter(values)
    return [max(next(each) for _ in texts) for texts in references]
