"""Decoder layers with adapters compile like those without: whole, and once for all layers."""

from types import SimpleNamespace

import pytest
import torch
from qwen_vl_streaming.model import modeling_qwen2_5_vl, vision_tower
from qwen_vl_streaming.model.modeling_qwen2_5_vl import compile_layers
from qwenvl.arguments import ModelArguments
from qwenvl.param_groups import make_trainable
from tiny import VIDEO, tiny_model
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters

LAYERS, LENGTH = 4, 24


class Graphs:
    """A backend of torch.compile that counts its graphs."""

    def __init__(self, name: str = "aot_eager"):
        self.count, self.backend = 0, lookup_backend(name)

    def __call__(self, graph, inputs):
        self.count += 1
        return self.backend(graph, inputs)


def train_once(lora: bool, dropout: float, checkpointed: int, backend: Graphs | None):
    """Loss and gradients of one pass in float32, with adapters that are not zero."""
    adapters = {"lora_dropout": dropout, "lora_r": 4} if lora else {}
    model = tiny_model(num_hidden_layers=LAYERS)
    model.set_attn_implementation("sdpa")
    model.checkpointed_layers = checkpointed
    given = ModelArguments(variant="group", model_name_or_path="tiny", lora_enable=lora, **adapters)
    model = make_trainable(model, given, SimpleNamespace(seed=1, deepspeed=None)).train()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.1)
    if checkpointed:
        model.activation_checkpointing_enable()
    if backend:
        torch._dynamo.reset()
        counters.clear()
        torch.compiler.set_default_backend(backend)
        try:
            compile_layers(model)
        finally:
            torch.compiler.set_default_backend("inductor")
    torch.manual_seed(0)
    ids = torch.randint(0, 180, (1, LENGTH))
    ids[:, 2:10] = VIDEO
    loss = model(
        input_ids=ids,
        position_ids=torch.arange(LENGTH).expand(3, 1, -1),
        attention_mask=torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None],
        visual_tokens=torch.randn(8, 32, requires_grad=True),  # as those of a merger that trains
        labels=ids,
    ).loss
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return loss.item(), gradients


def assert_same(got, expected) -> None:
    assert got[0] == pytest.approx(expected[0], rel=1e-6) and got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert torch.allclose(got[1][name], gradient, atol=1e-5, rtol=1e-4), name
    assert all(gradient.abs().max() > 1e-5 for gradient in expected[1].values())


@pytest.mark.parametrize(
    "lora, dropout, checkpointed", [(False, 0.0, 3), (True, 0.0, 0), (True, 0.0, 3), (True, 0.3, LAYERS)]
)
def test_layers_compile_whole_and_once(lora, dropout, checkpointed):
    graphs = Graphs()
    got = train_once(lora, dropout, checkpointed, graphs)
    assert graphs.count == (2 if checkpointed == 3 else 1)  # layers that recompute, and those that do not
    assert not counters["graph_break"] and counters["frames"]["ok"] == counters["frames"]["total"] == graphs.count
    assert any("lora_A" in name for name in got[1]) is lora
    assert_same(got, train_once(lora, dropout, checkpointed, None))


def test_layers_compile_for_all_rows_and_modes():
    """Rows of several numbers and lengths, in training and evaluation, with some layers that recompute."""
    model = tiny_model(num_hidden_layers=2)
    model.set_attn_implementation("sdpa")
    model.checkpointed_layers = 1
    model.activation_checkpointing_enable()
    graphs = Graphs("eager")
    torch._dynamo.reset()
    torch.compiler.set_default_backend(graphs)
    try:
        with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
            compile_layers(model)
            for training in (True, False):
                model.train(training)
                for rows, length in ((2, 10), (1, 10), (1, 12), (3, 14)):
                    ids = torch.zeros(rows, length, dtype=torch.long)
                    positions = torch.arange(length).expand(3, rows, -1)
                    with torch.set_grad_enabled(training):
                        model(input_ids=ids, position_ids=positions, attention_mask=None, labels=ids)
    finally:
        torch.compiler.set_default_backend("inductor")
    assert graphs.count > 8


def segment_attention(query, key, value, bounds, _, longest, __, scale):
    """`varlen_attn` on a CPU."""
    segment = torch.bucketize(torch.arange(len(query)), bounds[1:], right=True)
    q, k, v = (tensor.transpose(0, 1) for tensor in (query, key, value))
    mask = segment[:, None] == segment
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return mixed.transpose(0, 1) + 0 * longest


def test_blocks_of_the_vision_tower_compile_whole_and_for_all_grids(monkeypatch):
    """As on a GPU, in half precision: few graphs serve windows, whole clips and all grids."""
    monkeypatch.setattr(vision_tower, "varlen_attn", segment_attention)
    model = tiny_model().to(torch.bfloat16)
    model.model.visual.blocks.requires_grad_(False)
    videos = [[(3, 4, 6)], [(2, 8, 8), (3, 4, 6)], [(1, 12, 16)], [(5, 4, 4)], [(2, 16, 10)]]
    per_patch = model.model.visual.patch_embed.proj.weight[0].numel()

    @torch.no_grad()
    def tokens(grids):
        torch.manual_seed(0)
        pixels = torch.randn(sum(t * h * w for t, h, w in grids), per_patch).bfloat16()
        layout = model._make_tower_layout(grids)
        assert ("max_seqlen" in layout) is modeling_qwen2_5_vl.has_flash(model.device)
        return model.model.visual(pixels, grid_thw=torch.tensor(grids), **layout).pooler_output

    dense = list(map(tokens, videos))
    monkeypatch.setattr(modeling_qwen2_5_vl, "has_flash", lambda _: True)
    graphs = Graphs("eager")
    torch._dynamo.reset()
    counters.clear()
    torch.compiler.set_default_backend(graphs)
    try:
        compile_layers(model)
        for grids, expected in zip(videos, dense, strict=True):
            assert torch.allclose(tokens(grids), expected, atol=0.05)
    finally:
        torch.compiler.set_default_backend("inductor")
    assert not counters["graph_break"] and graphs.count <= 4
