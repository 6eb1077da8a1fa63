"""What a plan decides: the DeepSpeed configuration and how the samples of an optimizer step are run."""

import json
from dataclasses import dataclass
from pathlib import Path

from qwen_vl_streaming.common.errors import InputError

from ..training_arguments import FINETUNE
from .optimizers import ADAM

CONFIGURATIONS = ("zero1.json", "zero2.json", "zero3.json", "zero3_offload.json")
"""From the fastest to the one that needs the least memory."""


@dataclass(frozen=True)
class Zero:
    """What matters of a DeepSpeed configuration."""

    file: str
    stage: int
    offloads_optimizer: bool = False
    """Master weights, moments and their gradients are in host memory."""
    offloads_weights: bool = False
    """Parameters are in host memory."""
    bucket: int | None = None
    """Parameters of a reduction bucket; None for the square of the hidden size."""
    overlap: bool = True
    """Reduction runs beside the backward pass, with two buckets."""

    @classmethod
    def read(cls, path: Path, name: str = "") -> "Zero":
        """Reads a configuration. Raises InputError where it is invalid."""
        try:
            return cls.of(json.loads(path.read_text(encoding="utf-8"))["zero_optimization"], name or str(path))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} has no valid zero_optimization: see zero2.json") from error

    @classmethod
    def of(cls, zero: dict, name: str = "") -> "Zero":
        """From the section `zero_optimization`."""
        stage, bucket = int(zero.get("stage", 0)), zero.get("reduce_bucket_size", 500_000_000)
        optimizer, weights = (
            (zero.get(key) or {}).get("device") in ("cpu", "nvme") for key in ("offload_optimizer", "offload_param")
        )
        return cls(
            name,
            stage,
            optimizer,
            weights and stage == 3,
            None if bucket == "auto" else int(bucket),
            bool(zero.get("overlap_comm", stage == 3)),
        )

    @property
    def kind(self) -> tuple[int, bool, bool]:
        """What a run that resumes must keep."""
        return self.stage, self.offloads_optimizer, self.offloads_weights

    @property
    def offload(self) -> bool:
        return self.offloads_optimizer or self.offloads_weights

    @property
    def title(self) -> str:
        return f"ZeRO-{self.stage}{' with offload to the host' if self.offload else ''}"


def configurations() -> list[Zero]:
    """The configurations of this project, from the fastest to the one that needs the least memory."""
    return [Zero.read(FINETUNE / name, name) for name in CONFIGURATIONS]


@dataclass(frozen=True)
class Settings:
    """How each process runs the samples of an optimizer step."""

    zero: Zero
    samples: int
    """Samples of a forward pass."""
    pack_tokens: int
    """Tokens of the row that they are packed into; 0: a row each."""
    accumulation: int
    checkpointed: int
    """Layers of the language model whose activations are recomputed."""
    compiled: bool
    bf16: bool = True
    states: float = ADAM
    """Bytes of the optimizer's states per trained parameter."""

    def flags(self, layers: int) -> dict[str, object]:
        """The flags of train.py that give these settings, for a model with this number of `layers`."""
        flags: dict[str, object] = {
            "deepspeed": self.zero.file,
            "per_device_train_batch_size": self.samples,
            "gradient_accumulation_steps": self.accumulation,
            "pack_tokens": self.pack_tokens,
            "gradient_checkpointing": self.checkpointed > 0,
        }
        if 0 < self.checkpointed < layers:
            flags["checkpoint_layers"] = self.checkpointed
        return {**flags, "compile_layers": self.compiled}
