"""Qwen2.5-VL with explicit positions and mask. Knows nothing of variants, prompts or the environment.

The classes bear the names of the stock ones, so that a checkpoint saved here is a stock checkpoint in every
byte that matters: stock transformers loads what this saves, and this loads what stock transformers saved.

    B samples   L tokens   T rows that are scored   C hidden size   V vocabulary
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.attention.varlen import varlen_attn
from transformers import Qwen2_5_VLConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as stock
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from ..common.ending import lost_worker
from ..common.errors import InputError
from .checkpoint import tensor_names
from .checks import check_config, check_layers
from .hub import model_folder

LAYOUTS = 256  # combinations of grids whose layout in the vision tower is kept


class VisionPatchEmbed(stock.Qwen2_5_VisionPatchEmbed):
    """The stock embedding as the matrix product that it is: its convolution's stride is its kernel, and kernels for
    three-dimensional convolution are several times slower."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(patches, pixels of a patch) to (patches, channels)."""
        weight = self.proj.weight
        return nn.functional.linear(hidden_states.to(weight.dtype), weight.flatten(1))


ALIGNED = 8
"""Numbers of two bytes in the 16 that a GPU loads at once."""


class VisionMLP(stock.Qwen2_5_VLMLP):
    """Stock, over a multiple of 8 channels: products with rows that do not begin at a multiple of 16 bytes, as the
    tower's 3420 channels make them, take GPUs several times as long. What is added is zero, and adds zero."""

    wide: tuple[Tensor, Tensor, Tensor] | None = None
    """What `_widened` returns, kept."""

    def forward(self, hidden_state: Tensor) -> Tensor:
        """(…, C) to (…, C)."""
        if not self._plain or self.intermediate_size % ALIGNED == 0:
            return super().forward(hidden_state)
        wide = None if torch.is_grad_enabled() else self.wide  # through what was kept no gradient would flow
        gate_up, bias, down = self._widened() if wide is None else wide
        gate, up = nn.functional.linear(hidden_state, gate_up, bias).chunk(2, -1)
        return nn.functional.linear(self.act_fn(gate) * up, down, self.down_proj.bias)

    @property
    def _plain(self) -> bool:
        """No layer has been wrapped, by an adapter say."""
        return all(type(layer) is nn.Linear for layer in (self.gate_proj, self.up_proj, self.down_proj))

    def _widened(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weight and bias of gate and up, one below the other, and the weight of down."""
        more, pad = -self.intermediate_size % ALIGNED, nn.functional.pad
        parts = self.gate_proj, self.up_proj
        gate_up = torch.cat([pad(part.weight, (0, 0, 0, more)) for part in parts])
        return gate_up, torch.cat([pad(part.bias, (0, more)) for part in parts]), pad(self.down_proj.weight, (0, more))

    @torch.no_grad()
    def widen(self) -> None:
        """Once and for all, for a model that does not train. The weights become views, so that nothing is held twice;
        until they move to another device or type."""
        if self.wide is not None or not self._plain or self.intermediate_size % ALIGNED == 0:
            return
        gate_up, bias, down = self.wide = self._widened()
        size = self.intermediate_size
        for part, weight, offset in zip((self.gate_proj, self.up_proj), gate_up.chunk(2), bias.chunk(2), strict=True):
            part.weight.data, part.bias.data = weight[:size], offset[:size]
        self.down_proj.weight.data = down[:, :size]

    def _apply(self, *arguments, **options):
        self.wide = None
        return super()._apply(*arguments, **options)


class Segments:
    """Where the segments lie that attend within themselves: windows, or whole clips."""

    def __init__(self, cu_seqlens: Tensor, device: torch.device):
        bounds = cu_seqlens.cpu()
        starts, lengths = bounds[:-1], bounds.diff()
        self.longest = int(lengths.max())
        self.by_length = [
            (starts[lengths == length, None] + torch.arange(length)).to(device) for length in lengths.unique().tolist()
        ]
        """For each length that occurs, the patches of its segments: (segments, length)."""

    @staticmethod
    @torch.compiler.disable
    def of(cu_seqlens: Tensor) -> "Segments":
        # All layers get the same tensor, and reading it makes the host wait for the GPU: once is enough.
        if not hasattr(cu_seqlens, "segments"):
            cu_seqlens.segments = Segments(cu_seqlens, cu_seqlens.device)
        return cu_seqlens.segments


class VisionAttention(stock.Qwen2_5_VLVisionAttention):
    """Stock vision attention without its loop.

    Under SDPA the stock tower calls attention once for every window of every clip. Here a GPU in half precision
    takes all segments in one call of variable length; elsewhere segments of one length are gathered into one call,
    and there are only a handful of lengths. The numbers are the same.
    """

    def forward(self, hidden_states, cu_seqlens, position_embeddings=None, max_seqlen=None, **kwargs):
        """`hidden_states` (patches, channels), cut into segments at `cu_seqlens`; returns the same shape."""
        patches = hidden_states.shape[0]
        query, key, value = self.qkv(hidden_states).reshape(patches, 3, self.num_heads, -1).unbind(1)
        query, key = stock.apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        segments = Segments.of(cu_seqlens)
        if value.is_cuda and value.dtype in (torch.bfloat16, torch.float16):
            longest = segments.longest
            bounds = (cu_seqlens, cu_seqlens, longest, longest)
            mixed = varlen_attn(query, key, value.contiguous(), *bounds, scale=self.scaling)
        else:
            mixed = torch.empty_like(value)
            for index in segments.by_length:
                # (segments, length, heads, head size) -> heads before length, as SDPA wants them
                parts = (tensor[index].transpose(1, 2) for tensor in (query, key, value))
                mixed[index] = nn.functional.scaled_dot_product_attention(*parts, scale=self.scaling).transpose(1, 2)
        return self.proj(mixed.reshape(patches, -1))


class Qwen2_5_VLForConditionalGeneration(stock.Qwen2_5_VLForConditionalGeneration):
    """Stock weights and layers; nothing is guessed from token ids: positions and mask are arguments."""

    accepts_loss_kwargs = True  # tells transformers' Trainer that the loss is divided by `num_items_in_batch` here

    def __init__(self, config):
        if not all_full(config):
            raise ValueError("sliding-window attention cannot hold a streaming mask: set use_sliding_window to false")
        super().__init__(config)
        # It runs there; stock classes only do not declare it.
        self.model.language_model._supports_flex_attn = True
        self._tower_layouts: dict[tuple, dict[str, Tensor]] = {}
        self.model.visual.patch_embed.__class__ = VisionPatchEmbed
        for block in self.model.visual.blocks:
            block.attn.__class__ = VisionAttention
            block.mlp.__class__ = VisionMLP

    @classmethod
    def is_custom_code(cls) -> bool:
        """Stock weights under stock names: transformers converts older checkpoints as it does for its own class."""
        return False

    def compile_layers(self) -> None:
        """Compile each layer by itself: all are alike, so that little code is compiled, and much is fused."""
        for layer in self.model.language_model.layers:
            layer.compile()
        self.compile_tower()

    def compile_tower(self) -> None:
        """The same for the vision tower alone."""
        for block in self.model.visual.blocks:
            block.compile()

    def settle_tower(self) -> None:
        """Lay the vision tower out for a GPU that only runs it, and compile it."""
        for block in self.model.visual.blocks:
            block.mlp.widen()
        self.compile_tower()

    def perceive(self, pixel_values: Tensor, grid: tuple[int, int]) -> Tensor:
        """Visual tokens of clips that share one grid.

        `pixel_values` (clips, patches, pixels of a patch) as `prompts.clip_pixels` gives them, `grid` merged
        rows × columns. Returns (clips, rows * columns, C). Clips do not see each other in the vision tower.
        """
        return self.perceive_all([pixel_values], [grid])[0]

    def perceive_all(self, videos: Sequence[Tensor], grids: Sequence[tuple[int, int]]) -> list[Tensor]:
        """As `perceive`, for several videos in one pass of the vision tower."""
        merge = self.model.visual.spatial_merge_size
        shapes = [(len(video), rows * columns) for video, (rows, columns) in zip(videos, grids, strict=True)]
        grid_thw = tuple(
            (clips, rows * merge, columns * merge) for (clips, _), (rows, columns) in zip(shapes, grids, strict=True)
        )
        pixels = [video.flatten(0, 1).to(self.device, self.dtype, non_blocking=True) for video in videos]
        tokens = self.model.visual(
            torch.cat(pixels), grid_thw=torch.tensor(grid_thw), **self._tower_layout(grid_thw)
        ).pooler_output
        parts = tokens.split([clips * per_clip for clips, per_clip in shapes])
        return [part.view(*shape, -1) for part, shape in zip(parts, shapes, strict=True)]

    def _tower_layout(self, grid_thw: tuple[tuple[int, int, int], ...]) -> dict[str, Tensor]:
        """What the stock tower derives from its grids, made on the CPU and kept: there the host would wait for the GPU
        at every call."""
        if (known := self._tower_layouts.get((self.device, grid_thw))) is not None:
            return known
        visual, grids = self.model.visual, torch.tensor(grid_thw)
        windows, cu_windows = get_vision_window_index(
            grids, visual.spatial_merge_size, visual.window_size, visual.patch_size
        )
        layout = {
            "position_ids": get_vision_position_ids(grids, visual.spatial_merge_size),
            "cu_seqlens": get_vision_cu_seqlens(grids),
            "window_index": windows,
            "cu_window_seqlens": cu_windows,
        }
        placed = {name: tensor.to(self.device) for name, tensor in layout.items()}
        for name in ("cu_seqlens", "cu_window_seqlens"):
            placed[name].segments = Segments(layout[name], self.device)
        if len(self._tower_layouts) == LAYOUTS:
            self._tower_layouts.pop(next(iter(self._tower_layouts)))
        self._tower_layouts[self.device, grid_thw] = placed
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
        """One pass over `input_ids` (B, L).

        `position_ids` (3, B, L). `attention_mask` is boolean (B, 1, L, keys), True where attention is allowed,
        or a FlexAttention block mask (text config's attention set to `flex_attention`), or None for plainly
        causal attention. The visual tokens, in feed order, come either ready as `visual_tokens` (all of them, C)
        or as `pixel_values_videos` and `video_grid_thw`, as a stock processor gives them; `visual_rows` (B, L) flags
        where they go, by default wherever `input_ids` is `config.video_token_id`.

        `labels` (B, L) holds the token that each row must predict, or -100: nothing is shifted here, and only
        rows with a label are scored. Otherwise `score` (B, L) flags the rows to score, by default all.
        Returns `loss` (mean over labels, or their sum over `num_items_in_batch`) and `logits`: (T, V) for
        chosen rows, (B, L, V) for all.
        """
        embeds = self.get_input_embeddings()(input_ids)
        if pixel_values_videos is not None:
            visual_tokens = torch.cat(self.get_video_features(pixel_values_videos, video_grid_thw).pooler_output)
        if visual_tokens is not None:
            rows = input_ids == self.config.video_token_id if visual_rows is None else visual_rows
            if int(rows.sum()) != len(visual_tokens):
                raise ValueError(f"{int(rows.sum())} places for visual tokens, but {len(visual_tokens)} came")
            embeds = embeds.masked_scatter(rows[:, :, None], visual_tokens.to(embeds))

        hidden = self.model.language_model(
            inputs_embeds=embeds,
            position_ids=position_ids,
            attention_mask={"full_attention": attention_mask},
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
        ).last_hidden_state

        if labels is not None:
            score = labels != -100
        logits = self.lm_head(hidden if score is None else hidden[score])
        loss = None
        if labels is not None:
            count = len(logits) if num_items_in_batch is None else num_items_in_batch
            loss = nn.functional.cross_entropy(logits.float(), labels[score], reduction="sum") / count
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)


UNLOADABLE = (
    *(OSError, ValueError, TypeError, AttributeError, RuntimeError, ImportError, KeyError, ArithmeticError),
    *(EOFError, UnpicklingError, StrictDataclassError),
)
"""What transformers raises for files that are not those of a checkpoint, or do not belong together."""


def load_config(path: str | Path) -> Qwen2_5_VLConfig:
    """The config of a checkpoint, in a folder or on the hub. Raises InputError where there is none of a Qwen2.5-VL that
    can hold a streaming mask."""
    config = _loaded(path, Qwen2_5_VLConfig.from_pretrained, weights=False)
    if not all_full(config):
        raise InputError(
            f"{str(path)!r} has sliding-window attention, which cannot hold a streaming mask: set "
            "use_sliding_window to false in its config.json"
        )
    return config


def load_model(path: str | Path, implementation: str, dtype: torch.dtype) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL from a folder or the hub, whose language model runs the attention `implementation`.

    Raises InputError, with the reason in one line, where it cannot be loaded.
    """
    config = load_config(path)
    check_layers(config, tensor_names(model_folder(path)), str(path))
    model, report = _loaded(
        path,
        lambda folder: Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", output_loading_info=True, trust_remote_code=False
        ),
    )
    if missing := sorted(report["missing_keys"]):
        raise InputError(f"{str(path)!r} lacks {len(missing)} weights, {missing[0]} among them: save it again whole")
    model.name_or_path = model.config._name_or_path = str(path)  # of a model on the hub its id, not the cache's folder
    # Under ZeRO-3 transformers also keeps renamings that did not apply, and would save weights under names of no one's.
    model._weight_conversions = [renaming for renaming in model._weight_conversions if renaming.was_used()]
    model.model.language_model.set_attn_implementation(implementation)
    return model


def all_full(config: Qwen2_5_VLConfig) -> bool:
    """Whether all layers attend to all tokens."""
    return set(config.text_config.layer_types) == {"full_attention"}


def _loaded(path: str | Path, load: Callable[[Path], Any], weights: bool = True) -> Any:
    if os.path.isfile(path):
        raise InputError(f"{path} is a file: give the folder of the checkpoint")
    folder = model_folder(path, weights)
    adapter = os.path.isfile(folder / "adapter_config.json")
    if not (adapter or os.path.isfile(folder / "config.json")):
        raise InputError(f"{folder} holds no config.json, and so no checkpoint: check the path")
    if adapter and not any(folder.glob("model*.safetensors")):
        raise InputError(
            f"{folder} holds an adapter, not a model: make one of it with "
            f"`python -m qwenvl.merge --adapter {folder} --output DIR`, run in code/qwen-vl-finetune"
        )
    try:
        given = Qwen2_5_VLConfig.get_config_dict(folder)[0]
        kind = given.get("model_type")
        if kind != Qwen2_5_VLConfig.model_type:  # transformers would take it with a warning
            raise ValueError(f"its config.json is of a model of type {kind}")
        check_config(given, str(folder / "config.json"))
        return load(folder)
    except InputError:
        raise
    except SafetensorError as error:
        raise InputError(f"the weights in {str(path)!r} are damaged ({error}): copy or download them again") from error
    except torch.OutOfMemoryError:
        raise
    except (*UNLOADABLE, LookupError) as error:  # the last by torch, for a damaged pickle
        if lost_worker(error):  # a DataLoader of the program says so wherever the program is
            raise
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"no Qwen2.5-VL could be loaded from {str(path)!r} ({first}): "
            "name a whole checkpoint of one, or copy it again"
        ) from error
