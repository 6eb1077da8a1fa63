"""ZeRO-3 over whole layers, which can then be compiled: by default DeepSpeed gathers the weights of each linear layer
and norm in a hook of its own."""

import torch
from deepspeed.utils import set_z3_leaf_modules
from torch import nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer, Qwen2_5_VLVisionBlock

LAYERS = [Qwen2_5_VLDecoderLayer, Qwen2_5_VLVisionBlock]


def choose_linear(settings: dict, compiled: bool) -> None:
    """Set which linear layer is used, in the `zero_optimization` section of a DeepSpeed configuration, before the model
    is loaded. DeepSpeed's own does not keep gathered weights until the backward pass. Compiled layers do not keep them
    either, and are not fused across DeepSpeed's.
    """
    settings.setdefault("memory_efficient_linear", not compiled)


def gather_whole_layers(model: nn.Module) -> None:
    """Make ZeRO-3 gather and release the weights of `model` by layer, and reduce their gradients by layer.

    DeepSpeed reduces the gradients of a layer when that of its input has been computed. If the input required none, it
    would use zeros, so the input of each layer that trains is made to require one.
    """
    for layer in set_z3_leaf_modules(model, LAYERS):
        if any(weight.requires_grad for weight in layer.parameters()):
            layer.register_forward_pre_hook(_require_input_gradient)


def _require_input_gradient(_, inputs: tuple) -> tuple:
    hidden, *others = inputs
    if torch.is_grad_enabled() and not hidden.requires_grad:
        hidden = hidden.detach().requires_grad_()
    return hidden, *others
