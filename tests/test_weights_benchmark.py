"""The benchmark of 8-bit weights: scores over given tokens, comparisons, and the table of tiles that it writes."""

import random
from types import SimpleNamespace

import pytest
import torch
from qwen_vl_streaming.engine.quantized_linear import Tiles, interleave
from qwen_vl_streaming.model.quantization import quantize_model, scaled_linear
from qwen_vl_streaming.timeline.timeline import make_timeline
from qwen_vl_streaming.timeline.variants import VARIANTS
from test_batch import random_jobs, reference_captions
from tiny import tiny_model
from weights import products
from weights.quality import Forced, compare_forced, compare_written, forced_scores
from weights.tiles import ROWS, candidates, layer_shapes, tiles_file


@pytest.mark.parametrize("variant", ("origin", "interleave", "group"))
def test_tokens_of_a_caption_have_the_best_scores(variant):
    model, variant = tiny_model(), VARIANTS[variant]
    jobs = random_jobs(random.Random(variant.name), variant, 3)
    scores = []
    for job, caption in zip(jobs, reference_captions(model, variant, jobs).values(), strict=True):
        timeline = make_timeline(variant, job.layout, caption.schedule)
        case = Forced(timeline, job.template, caption.tokens, job.pixels)
        scores.append(forced_scores(model, case))
        assert scores[-1].argmax(-1).tolist() == caption.tokens
    assert compare_forced(scores, scores)["same"] == 1
    quantize_model(model, "int8")
    assert not torch.equal(forced_scores(model, case), scores[-1])


def test_comparisons():
    plain, other = torch.tensor([[3.0, 1, 0], [0, 2, 1.5]]), torch.tensor([[3.0, 1, 0], [0, 1, 2]])
    found = compare_forced([plain], [other])
    assert (found["tokens"], found["same"], found["margins"], found["median_lead"]) == (2, 0.5, [0.5], 1.25)
    found = compare_written({"a": [1, 2, 3], "b": [4]}, {"a": [1, 2, 3], "b": [4, 5]})
    assert (found["videos"], found["captions_same"], found["tokens_same"]) == (2, 0.5, 0.8)


def test_the_table_of_tiles_has_what_is_fastest():
    tiles = {"outputs": 64, "rows": 16, "more_rows": 0, "programs": 132, "warps": 4, "stages": 4}
    times = {1: {"few rows": 9.5}, 16: {"kernel": 9.5, "whole": 10}, 32: {"kernel": 11, "whole": 10}}
    rows = [
        {"size": "7B", "layer": "qkv", "m": m, "way": f"int8 {way}", "us": us, "tiles": tiles}
        for m, found in times.items()
        for way, us in found.items()
    ]
    namespace: dict = {}
    exec(tiles_file(rows, "int8", "X"), namespace)
    table = dict(namespace["TILES"][layer_shapes("7B")["qkv"]])
    assert table[16] == (64, 16, 0, 132, 4, 4) and 1 not in table and table[32] is None


def test_tiles_that_do_not_fit_are_reported_and_the_rest_is_measured(monkeypatch, capsys):
    """On a GPU that refuses wide tiles, also those that the engine chooses."""
    gpu = SimpleNamespace(major=9, minor=0, shared_memory_per_block_optin=10**6, multi_processor_count=4)

    def parts_of(x, weight, scale, tiles):
        if tiles.rows > 64:
            raise RuntimeError("out of resource: shared memory, Required: 253952, Hardware limit: 101376")
        return scaled_linear(x[:, interleave(torch.arange(x.shape[1])[None])[0].argsort()], weight, scale)[None]

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(products, "DEVICE", "cpu")
    monkeypatch.setattr(products, "CACHE", 0)
    for module in ("products", "tiles"):
        monkeypatch.setattr(f"weights.{module}.parts_of", parts_of)
    monkeypatch.setattr(products, "microseconds", lambda work, count: work(0) is None or 5.0)
    monkeypatch.setattr(products, "choose_tiles", lambda m, *_: Tiles(64, max(16, m), 0, 0, 4, 4))
    monkeypatch.setattr("weights.tiles.compiled_sum", lambda: lambda parts: parts.sum(0))
    monkeypatch.setattr(products, "few_rows_product", lambda *given: parts_of(*given, Tiles(64, 16, 0, 0, 4, 4))[0])
    monkeypatch.setattr(products, "in_slices", products.whole)
    monkeypatch.setattr(products, "converted", torch.Tensor.bfloat16)
    table, layer = products.Table(), products.Layer(384, 256, ["int8"])
    for m in (1, 64, 256):
        products.measure_rows(table, ("7B", "qkv"), layer, "int8", m, True, set(), False)
    products.show(table.rows, "7B", "qkv", "int8", (384, 256))
    refused = [row for row in table.rows if "error" in row]
    assert {row["way"] for row in refused} == {"int8 tiles", "int8 chosen"} and {row["m"] for row in refused} == {256}
    out = capsys.readouterr().out
    assert "int8 chosen: RuntimeError: out of resource" in out and "failed" in out and "WRONG" not in out
    assert table.best_tiles(("7B", "qkv"), 64).rows == 64 and table.best_tiles(("7B", "qkv"), 256) is None


def test_candidates_have_room_for_all_rows_and_inputs_for_all_programs():
    for n, k in layer_shapes("3B").values():
        for m in ROWS:
            for tiles in candidates(m, n, k, 132):
                assert isinstance(tiles, Tiles) and tiles.parts(n, k)[0] <= 12
                assert tiles.rows + tiles.more_rows >= min(m, 128)
