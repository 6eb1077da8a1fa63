"""What both runners share: the model's layers over the paged KV cache, and greedy decoding on the device. Knows nothing
about plans, requests and when a clip is due.

The next token never leaves the device on its way into the model, so no step waits for the host. On a GPU the layers are
compiled, or run by `single_row.py`; on the CPU the same code runs as it is.

    S batch slots   T text rows of a slot   n x Q rows of a step   C hidden size   V vocabulary
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..common.compiling import CompileOptions
from ..model.prompts import Template
from ..stream import PENALTY, penalize
from .decoder_layer import Attention, FusedProjections, run_layer
from .dependent_launch import compile_options
from .device_event import to_device
from .kv_cache import PagedKVCache

SINGLE_ROW_OPTIONS: CompileOptions = {"coordinate_descent_tuning": True}
"""torch.compile's options for a product with one row, which it then reads faster than cuBLAS does."""
ARGMAX_PARTS = 64
"""Parts in which the largest logit is searched for."""


class ModelRunner:
    """A model, its KV cache, and what up to S streams have written."""

    use_flex: bool | None = None
    """FlexAttention, or SDPA with a dense mask. None: FlexAttention on a GPU."""
    kernel_options: ClassVar[dict] = {"num_warps": 4, "num_stages": 3}
    """FlexAttention's kernel_options for decode rows, measured on an H200. Its defaults do not pipeline the loads."""

    def __init__(self, model, batch_slots: int, cache: PagedKVCache, text_capacity: int, penalty: float = PENALTY):
        """`text_capacity` is T; `penalty` as in `reference.Streams`."""
        language = model.model.language_model
        self.model, self.language, self.cache, self.penalty = model, language, cache, penalty
        self.device, self.text_capacity = model.device, text_capacity
        self.on_cuda = self.device.type == "cuda"
        self.flex = self.on_cuda if self.use_flex is None else self.use_flex
        self.groups = language.config.num_attention_heads // language.config.num_key_value_heads
        self.layers = [FusedProjections.from_layer(layer) for layer in language.layers]
        self.all_slots = torch.arange(batch_slots, device=self.device)
        self.text_ids = self._slot_tensor(text_capacity + 1)
        """Token ids of the text run: the header's, then those written, (S, T + 1)."""
        self.end_id = self._slot_tensor()
        self.end_of_slot_id = self._slot_tensor()
        """The id that the penalty never weakens; -1 for none."""
        self.ended = self._slot_tensor(dtype=torch.bool)
        self.penalized_ids = self._slot_tensor(language.config.vocab_size, dtype=torch.bool)
        """The ids that the repetition penalty weakens, (S, V)."""
        self._step_layer, self._single_row = run_layer, None
        if self.on_cuda:
            # There are more kinds and shapes of steps than the default limits of 8 and 256. Those beyond would run
            # uncompiled, without a warning.
            torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024
            self._step_layer = self._compile_captured(run_layer)
            if self.flex:
                self._single_row = make_single_row(self.layers, model.dtype, compile_options(self.device))

    def _slot_tensor(self, *shape: int, dtype=torch.long) -> Tensor:
        return torch.zeros(len(self.all_slots), *shape, dtype=dtype, device=self.device)

    def _reset_slot(self, batch_slot: int, template: Template) -> None:
        """Clears what an earlier stream wrote in `batch_slot` and starts with the header of `template`."""
        # fill_ and zero_ do not synchronize with the device. Assigning a number does.
        for of_slot in (self.text_ids, self.penalized_ids, self.ended):
            of_slot[batch_slot].zero_()
        self.text_ids[batch_slot, : len(template.header)] = self._to_device(template.header)
        self.penalized_ids[batch_slot].index_fill_(0, self._to_device(template.penalized), True)
        self.end_id[batch_slot].fill_(template.end)
        self.end_of_slot_id[batch_slot].fill_(-1 if template.end_of_slot is None else template.end_of_slot)

    def _compile_captured(self, function: Callable[..., Any], chooses: bool = False) -> Callable[..., Any]:
        """Compiles a part of a captured step; `chooses`: one that chooses a token in each slot."""
        options = compile_options(self.device)
        if chooses and len(self.all_slots) == 1:
            options = options | SINGLE_ROW_OPTIONS
        return torch.compile(function, dynamic=False, options=options)

    def _to_device(self, values: Tensor | Sequence[int]) -> Tensor:
        return to_device(values, self.device)

    def _choose(self, hidden: Tensor, batch_slots: Tensor, next_row: Tensor, writes: Tensor) -> None:
        """Greedy choice after the repetition penalty for `hidden` (n, C). Writes the ids at `next_row` of the text runs
        where `writes` is set. The end-of-slot token is never penalized: it is written in every slot."""
        logits = self.model.lm_head(hidden).float()
        penalized = self.penalized_ids[batch_slots]
        token = first_argmax(penalize(logits, penalized, self.penalty))
        self.text_ids[batch_slots, next_row] = torch.where(writes, token, self.text_ids[batch_slots, next_row])
        punish = writes & (token != self.end_of_slot_id[batch_slots])
        self.penalized_ids[batch_slots, token] = penalized.gather(1, token[:, None])[:, 0] | punish
        self.ended[batch_slots] = self.ended[batch_slots] | (writes & (token == self.end_id[batch_slots]))

    def forward(self, hidden: Tensor, positions: Tensor, attention: Attention, layer) -> Tensor:
        """Runs the layers and the final norm over `hidden` (n, Q, C) at `positions` (3, n, Q). `layer` is `run_layer`
        or a compiled version of it."""
        rotary = self.language.rotary_emb(hidden, positions)
        return self.language.norm(self._run_layers(hidden, rotary, attention, layer))

    def _run_layers(self, hidden: Tensor, rotary, attention: Attention, layer) -> Tensor:
        """As `forward`, with the cosine and sine of the positions, and without the final norm."""
        if layer is self._step_layer and self._single_row is not None and hidden.shape[:2] == (1, 1):
            return self._single_row.run(hidden, rotary, attention, self.cache.layers)
        for weights, layer_cache in zip(self.layers, self.cache.layers, strict=True):
            hidden = layer(weights, hidden, attention, rotary, layer_cache)
        return hidden


def make_single_row(layers: Sequence[FusedProjections], dtype: torch.dtype, options: CompileOptions):
    """The `SingleRow` of `layers` on a GPU, or None for a model whose dtype or sizes its kernels do not take."""
    if dtype != torch.bfloat16 or not all(weights.takes_single_row() for weights in layers):
        return None
    from .single_row import SingleRow  # Triton is only installed where PyTorch supports a GPU

    return SingleRow(layers, options)


def first_argmax(logits: Tensor) -> Tensor:
    """`logits.argmax(-1)` of (n, V), computed in parts. A plain argmax is one thread block per row on a GPU."""
    parts = nn.functional.pad(logits, (0, -logits.shape[1] % ARGMAX_PARTS), value=-torch.inf)
    parts = parts.unflatten(1, (ARGMAX_PARTS, -1))
    largest, index = parts.max(-1)
    part = largest.argmax(-1, keepdim=True)
    return (part * parts.shape[2] + index.gather(1, part))[:, 0]
