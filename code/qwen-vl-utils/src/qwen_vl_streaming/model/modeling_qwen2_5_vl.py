"""Qwen2.5-VL with explicit positions and mask. Independent of variants, prompts and the environment.

The model class and its weights have the same names as in transformers, so checkpoints are interchangeable: transformers
loads checkpoints that this class saved, and the other way around. "Stock" means the classes of transformers.

    B samples   L tokens   T rows that are scored   C hidden size   V vocabulary
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import Qwen2_5_VLConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as stock
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from . import flex_attention  # noqa: F401  # registers it
from .vision_tower import (
    HALF,
    Segments,
    VisionAttention,
    VisionMLP,
    VisionPatchEmbed,
    compiled_block,
    has_flash,
    ordered_layout,
    run_block,
    run_tower,
)

GRAPHS = 64
"""Maximum number of graphs of compiled layers: for rows of one size or any, training or evaluation, with recomputed
activations or without. Layers of all kinds share the limit, because transformers gives them one function. By default,
torch compiles 8, and runs what needs another uncompiled."""
LAYOUTS = 64
"""Maximum number of cached vision tower layouts, one for each combination of grids."""
FEW_PATCHES = 4096
"""Patches up to which a layout is cached with their angles, which are 640 bytes for each."""


class Qwen2_5_VLForConditionalGeneration(stock.Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL with the stock weights. Positions and mask are arguments and are not derived from token ids."""

    accepts_loss_kwargs = True  # tells Trainer that `forward` divides the loss by `num_items_in_batch`
    checkpointed_layers: int | None = None
    """How many layers of the language model recompute their activations if checkpointing is enabled; None for all."""

    def __init__(self, config):
        if not all_full(config):
            raise ValueError(
                "sliding-window attention does not support streaming masks: set use_sliding_window to false"
            )
        super().__init__(config)
        # The stock text model works with FlexAttention but does not declare it.
        self.model.language_model._supports_flex_attn = True
        self._tower_layouts: dict[tuple, dict[str, Any]] = {}
        self._tower_is_compiled = False
        self.model.visual.patch_embed.__class__ = VisionPatchEmbed
        for block in self._tower_blocks():
            block.attn.__class__ = VisionAttention
            block.mlp.__class__ = VisionMLP

    if TYPE_CHECKING:  # transformers wraps it without its type

        def to(self, *arguments, **options) -> Self: ...

    def _tower_blocks(self) -> Iterable[Any]:
        # A ModuleList types its items as modules without attributes.
        return self.model.visual.blocks

    @classmethod
    def is_custom_code(cls) -> bool:
        """Makes transformers convert older checkpoints as for its own class, which has the same weight names."""
        return False

    def _set_gradient_checkpointing(self, *arguments, **options) -> None:
        super()._set_gradient_checkpointing(*arguments, **options)
        if self.checkpointed_layers is not None:
            layers: Any = self.model.language_model.layers[self.checkpointed_layers :]
            for layer in layers:
                layer.gradient_checkpointing = False
        if not self._tower_trains():
            for block in self._tower_blocks():
                block.gradient_checkpointing = False

    def enable_input_require_grads(self) -> None:
        """Makes embeddings require a gradient, so that layers that recompute their activations get one, whatever is
        frozen. Unlike the stock method, leaves out a frozen vision tower, which would run backward for nothing."""
        self.model.language_model.enable_input_require_grads()
        if self._tower_trains():
            self.model.visual.enable_input_require_grads()

    def _tower_trains(self) -> bool:
        """Whether a weight of the vision tower trains, apart from the merger."""
        parts = (self.model.visual.patch_embed, *self._tower_blocks())
        return any(weight.requires_grad for part in parts for weight in part.parameters())

    def compile_tower(self) -> None:
        """Compiles the blocks of the vision tower, for `perceive`."""
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
        self._tower_is_compiled = True

    def settle_tower(self) -> None:
        """Prepares the vision tower for inference on a GPU: pads its weights and compiles it."""
        for block in self._tower_blocks():
            block.mlp.widen()
        self.compile_tower()

    def perceive(self, pixel_values: Tensor, grid: tuple[int, int]) -> Tensor:
        """Computes the visual tokens of clips that share one grid.

        `pixel_values` (clips, patches, pixels of a patch) are those that `prompts.clip_pixels` returns. `grid` has rows
        × columns after merging. Returns (clips, rows * columns, C). Clips do not attend to each other in the vision
        tower.
        """
        return self.perceive_all([pixel_values], [grid])[0]

    def perceive_all(self, videos: Sequence[Tensor], grids: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Like `perceive`, for several videos in one pass of the vision tower. The blocks of the tower are run one by
        one, so that hooks of its modules do not run."""
        shapes = [(len(video), rows * columns) for video, (rows, columns) in zip(videos, grids, strict=True)]
        layout = self.tower_layout([(clips, *grid) for (clips, _), grid in zip(shapes, grids, strict=True)])
        pixels = [video.flatten(0, 1).to(self.device, self.dtype, non_blocking=True) for video in videos]
        run = compiled_block() if self._tower_is_compiled else run_block
        tokens = run_tower(self.model.visual, torch.cat(pixels), layout, run)
        parts = tokens.split([clips * per_clip for clips, per_clip in shapes])
        return [part.view(*shape, -1) for part, shape in zip(parts, shapes, strict=True)]

    def tower_layout(self, videos: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
        """Like `_make_tower_layout`, cached; with few patches also what `ordered_layout` adds. `videos` have clips, and
        rows and columns after merging. A CUDA graph of `perceive` needs the layout as long as it is replayed."""
        merge = self.model.visual.spatial_merge_size
        grid_thw = tuple((clips, rows * merge, columns * merge) for clips, rows, columns in videos)
        if (known := self._tower_layouts.get((self.device, self.dtype, grid_thw))) is not None:
            return known
        if len(self._tower_layouts) == LAYOUTS:
            self._tower_layouts.pop(next(iter(self._tower_layouts)))
        layout = self._make_tower_layout(grid_thw)
        if len(layout["position_ids"]) <= FEW_PATCHES:
            layout = ordered_layout(self.model.visual, layout)
            if self.device.type == "cuda":  # other streams may use it
                torch.cuda.current_stream(self.device).synchronize()
        self._tower_layouts[self.device, self.dtype, grid_thw] = layout
        return layout

    def _make_tower_layout(self, grid_thw: Sequence[Sequence[int]], wait: bool = True) -> dict[str, Any]:
        """Returns what the stock tower derives from its grids, computed on the CPU because the stock tower makes the
        host wait for the GPU several times. Without `wait`, the host does not wait for the copies to the GPU, and only
        the current stream may use them."""
        visual, grids = self.model.visual, torch.tensor(grid_thw)
        patch_size: Any = visual.patch_size  # one number, though its class also accepts several
        windows, cu_windows = get_vision_window_index(grids, visual.spatial_merge_size, visual.window_size, patch_size)
        layout = {
            "position_ids": get_vision_position_ids(grids, visual.spatial_merge_size),
            "cu_seqlens": get_vision_cu_seqlens(grids),
            "window_index": windows,
            "cu_window_seqlens": cu_windows,
        }
        if not wait and self.device.type == "cuda":
            layout = {name: tensor.pin_memory() for name, tensor in layout.items()}
        placed: dict[str, Any] = {
            name: tensor.to(self.device, non_blocking=not wait) for name, tensor in layout.items()
        }
        flash = has_flash(self.device) and self.dtype in HALF
        for name, longest in (("cu_seqlens", "max_seqlen"), ("cu_window_seqlens", "max_window_seqlen")):
            if flash:
                placed[longest] = int(layout[name].diff().max())
            else:
                placed[name].segments = Segments(layout[name], self.device)
        return placed

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | BlockMask | None,
        visual_tokens: Tensor | None = None,
        visual_rows: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        past_key_values=None,
        labels: Tensor | None = None,
        score: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutputWithPast:
        """Runs the model once over `input_ids` (B, L).

        `position_ids` has the shape (3, B, L). `attention_mask` is boolean (B, 1, L, keys) with True where attention is
        allowed, or a FlexAttention block mask if the language model runs `flex_attention`, or None for causal
        attention.

        Visual tokens are given in feed order, either as embeddings in `visual_tokens` (number of visual tokens, C) or
        as `pixel_values_videos` and `video_grid_thw` from a stock processor. `visual_rows` (B, L) flags the rows that
        they fill. By default these are the rows where `input_ids` is `config.video_token_id`.

        `labels` (B, L) has the token that each row must predict, or -100. Labels are not shifted, and only rows with a
        label are scored, which `score` must name if it is given too. Without `labels`, `score` (B, L) flags the rows to
        score; by default all rows are scored.

        `visual_rows` and `score` may also be the indices of these rows in (B * L), in order. The host waits for the GPU
        for flags, and for a `video_grid_thw` that is on the GPU.

        Returns `loss`, the sum of the cross-entropy over labels divided by `num_items_in_batch` or by the number of
        labels, and `logits`: (T, V) for selected rows, (B, L, V) for all rows. Raises ValueError if the number of
        visual tokens differs from the number of rows for them, and if flags or labels are not (B, L).
        """
        embeds = self.get_input_embeddings()(input_ids)
        if pixel_values_videos is not None:
            assert video_grid_thw is not None
            grids = video_grid_thw.tolist()
            pixels = pixel_values_videos.to(self.model.visual.dtype)
            layout = self._make_tower_layout(grids, wait=False)
            visual_tokens = self.model.visual(pixels, grid_thw=torch.tensor(grids), **layout).pooler_output
        if visual_tokens is not None:
            flags = input_ids == self.config.video_token_id if visual_rows is None else visual_rows
            rows = indices(flags, input_ids.shape)
            if len(rows) != len(visual_tokens):
                raise ValueError(f"{len(rows)} rows for visual tokens, but {len(visual_tokens)} visual tokens")
            embeds = embeds.flatten(0, 1).index_copy(0, rows, visual_tokens.to(embeds)).view_as(embeds)

        hidden = self.model.language_model(
            inputs_embeds=embeds,
            position_ids=position_ids,
            attention_mask={"full_attention": attention_mask},
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
        ).last_hidden_state

        if labels is not None:
            if labels.shape != input_ids.shape:
                raise ValueError(f"labels of shape {tuple(labels.shape)}, but input_ids of {tuple(input_ids.shape)}")
            score = labels != -100 if score is None else score
        scored = None if score is None else indices(score, input_ids.shape)
        logits = self.lm_head(hidden if scored is None else hidden.flatten(0, 1).index_select(0, scored))
        loss = None
        if labels is not None:
            count = len(logits) if num_items_in_batch is None else num_items_in_batch
            targets = labels.flatten()[scored]
            loss = nn.functional.cross_entropy(logits.float(), targets, reduction="sum") / count
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)


def indices(rows: Tensor, shape: torch.Size) -> Tensor:
    """The indices of flagged rows in (B * L); indices are returned as they are. Raises ValueError if flags do not have
    the `shape` (B, L), since indices of others would be those of other rows, or if indices are not one list of them."""
    if rows.dtype != torch.bool and rows.dim() == 1:
        return rows
    if rows.dtype != torch.bool or rows.shape != shape:
        raise ValueError(
            f"rows must be boolean flags of shape {tuple(shape)} or one list of indices, not {rows.dtype} of shape "
            f"{tuple(rows.shape)}"
        )
    return rows.flatten().nonzero().squeeze(1)


def compile_layers(model: nn.Module) -> None:
    """Compiles each layer of a model for training, whole or wrapped by peft. The layers are alike, so little code is
    compiled, and much of it is fused.

    Only `forward` is compiled, since the hooks of ZeRO-3 gather the weights of a layer before it and release them after
    it. Call it once all layers are in place: peft copies layers, and the copy of a compiled one would compute with the
    weights of the first.
    """
    torch._dynamo.config.recompile_limit = GRAPHS
    kinds = (stock.Qwen2_5_VLDecoderLayer, stock.Qwen2_5_VLVisionBlock)
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, kinds)]
    for layer in layers:
        layer.forward = torch.compile(layer.forward)


def all_full(config: Qwen2_5_VLConfig) -> bool:
    """Returns whether all layers use full attention."""
    text: Any = config.text_config  # optional, or a dict, only while a config is constructed
    return set(text.layer_types) == {"full_attention"}
