"""Weights of the language model's linear layers in 8 bits: int8 or float8 (e4m3), with a scale per output channel.

Only weights are quantized. Their 8-bit values are exact in bfloat16, so products are computed in the dtype of the
activations, and results are multiplied by the scale. The vision tower, embeddings, norms and `lm_head` stay as they
are. The modules here are the plain form, which works on any device and within the stock layers; the engine reads the
same tensors with faster kernels.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import InputError

WEIGHTS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""Data types by the name that `--weights` has."""
WEIGHTS_HELP = (
    "quantize the linear layers of the language model when it is loaded, to half their memory (default: as in the "
    "checkpoint)"
)
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
BFLOAT16_CAPABILITY, FP8_CAPABILITY = (8, 0), (8, 9)
"""CUDA compute capabilities from which GPUs compute in bfloat16, and convert float8."""
DTYPES = (torch.float32, torch.bfloat16)
"""Data types of activations in which 8-bit values do not overflow."""


class QuantizedLinear(nn.Module):
    """A linear layer with `weight` (out, in) in 8 bits and `scale` (out,) in float32: (x @ weight.T) * scale + bias."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, {self.weight.dtype}"

    def forward(self, x: Tensor) -> Tensor:
        output = scaled_linear(x, self.weight, self.scale)
        return output if self.bias is None else output + self.bias


def scaled_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """`x` (..., in) times an 8-bit `weight` (out, in) and its `scale` (out,), in the dtype of `x`."""
    return (nn.functional.linear(x, weight.to(x.dtype)) * scale).to(x.dtype)


def quantize(weight: Tensor, kind: str, name: str = "a weight") -> tuple[Tensor, Tensor]:
    """The 8-bit values (out, in) and the float32 scales (out,) of `weight` (out, in), symmetric per output channel.

    `kind` is one of WEIGHTS. The weight is rounded to bfloat16 first, so that its dtype does not matter, and all
    devices give the same values. Raises InputError, which calls it `name`, if it has NaN or infinite values: they would
    be 0 in 8 bits.
    """
    dtype = WEIGHTS[kind]
    values = weight.detach().to(torch.bfloat16).float()
    largest = values.abs().amax(1)
    if not largest.isfinite().all():
        raise InputError(f"{name} has NaN or infinite values: copy the checkpoint again, or use an earlier one")
    scale = torch.where(largest > 0, largest / LARGEST[dtype], 1.0)
    values = values / scale[:, None]
    if dtype == torch.int8:
        values = values.round_()
    return values.clamp_(-LARGEST[dtype], LARGEST[dtype]).to(dtype), scale


def quantize_model(model, kind: str, device: torch.device | str | None = None) -> None:
    """Quantizes the linear layers of a model's language model, as `quantize_layers` does."""
    quantize_layers(model.model.language_model.layers, kind, device)


@torch.no_grad()
def quantize_layers(layers: nn.Module, kind: str, device: torch.device | str | None = None) -> None:
    """Replaces the linear layers within `layers` by quantized ones, in place and on `device` (default: where they are).
    One matrix is moved and quantized at a time, so that a GPU never holds the model in two precisions, or unquantized.
    """
    for parent, name, path, linear in _linear_layers(layers):
        place = linear.weight.device if device is None else device
        values, scale = quantize(linear.weight.to(place), kind, f"the weight of layer {path}")
        bias = None if linear.bias is None else linear.bias.detach().to(place)
        setattr(parent, name, QuantizedLinear(values, scale, bias))


def weights_of(model) -> str | None:
    """The precision to which the linear layers of a model were quantized, one of WEIGHTS, or None."""
    first: Any = model.model.language_model.layers[0].mlp.down_proj
    names = {dtype: name for name, dtype in WEIGHTS.items()}
    return names.get(first.weight.dtype)


def check_precision(kind: str | None, device: torch.device | str, dtype: torch.dtype, flag: str = "--weights") -> None:
    """Raises InputError if `device` does not support activations of `dtype`, or weights of this kind with them, or
    if the kind is unknown. `flag` names the setting in messages. None is a model as it is."""
    device = torch.device(device)
    has = torch.cuda.get_device_capability(device) if device.type == "cuda" else FP8_CAPABILITY
    if dtype == torch.bfloat16 and has < BFLOAT16_CAPABILITY:  # PyTorch would emulate it, slowly
        raise InputError(
            f"{torch.cuda.get_device_name(device)} does not support bfloat16: use "
            f"{flag.replace('weights', 'dtype')} float32, or another GPU"
        )
    if kind is None:
        return
    if kind not in WEIGHTS:
        raise InputError(f"{flag} {kind}: choose {' or '.join(WEIGHTS)}")
    if dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        raise InputError(f"{flag} {kind} does not work in {name}, where its sums overflow: use bfloat16 or float32")
    if kind == "fp8" and has < FP8_CAPABILITY:
        raise InputError(
            f"{flag} fp8 needs a GPU with compute capability {FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]} or more, and "
            f"{torch.cuda.get_device_name(device)} has {has[0]}.{has[1]}: use int8"
        )


def _linear_layers(layers: nn.Module) -> Iterator[tuple[nn.Module, str, str, nn.Linear]]:
    """Parent, name there, name within `layers` and module of each linear layer."""
    for prefix, parent in list(layers.named_modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                yield parent, name, f"{prefix}.{name}".lstrip("."), child
