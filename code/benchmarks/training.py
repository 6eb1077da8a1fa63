"""Training speed with random weights of the real shapes on one GPU: tokens/s, model FLOP/s and peak memory.

    python code/benchmarks/training.py --size 3B --variants group --compile

The workload is that of the published baseline: a video of 30 clips of 196 x 364 pixels (91 visual tokens per clip) and
an answer of 117 tokens. Language model and merger are trained, the vision encoder is frozen. Weights and gradients are
bf16, master weights and moments float32. The time per sample includes a sixteenth of an optimizer step. Activations are
not recomputed.

Model FLOPs per sample: 6 x size x rows for each trained weight matrix (2 forward, 4 backward), 2 x size x rows for a
frozen one; for attention 4 x pairs x width forward, where pairs are those that the mask allows, times 3 if trained. The
embedding is a look-up and is not counted; the output matrix is counted for rows with a label.
"""

import argparse
import os
import sys

import torch
from arithmetic import matrices, matrix_rate, seconds, tower_flops
from qwen_vl_streaming.common.errors import InputError, OneLineParser, run
from qwen_vl_streaming.devices import choose_device, look
from qwen_vl_streaming.model.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration, compile_layers, indices
from qwen_vl_streaming.model.released import SIZES, released_config
from qwen_vl_streaming.model.vision_tower import VisionAttention
from qwen_vl_streaming.timeline.attention import dense_mask, make_mask
from qwen_vl_streaming.timeline.positions import timeline_positions
from qwen_vl_streaming.timeline.timeline import CLIP, NOTHING, Layout, Timeline, make_timeline
from qwen_vl_streaming.timeline.variants import VARIANTS, Variant
from transformers import Qwen2_5_VLConfig

CLIPS, GRID, ANSWER, PROMPT = 30, (7, 13), 117, 40
LAYOUT = Layout(PROMPT, 3, 3, GRID)
ACCUMULATION = 16


def answer_counts(variant: Variant) -> tuple[int, ...]:
    """Answer tokens of each slot by wait-3; for offline variants all are in the last slot."""
    each = 3 if variant.streams else 0
    return (each,) * (CLIPS - 1) + (ANSWER - each * (CLIPS - 1),)


def make_batch(variant: Variant, samples: int, config: Qwen2_5_VLConfig, device: str) -> tuple[dict, tuple]:
    """Pack `samples` samples into one row, as `--pack_tokens` does, padded to a multiple of 128 tokens. In parallel
    variants the rows of text are last, as `text_last` of training has them.

    Returns the model's inputs, and the visual, text, sample and feed tensors from which each step builds the mask.
    """
    timeline = make_timeline(variant, LAYOUT, answer_counts(variant))
    rows, length = timeline.rows, len(timeline.rows)
    feed = rows.text.int().argsort(stable=True) if variant.parallel else torch.arange(length)
    rows = rows[feed]
    padding = -(length * samples) % 128
    ids = torch.randint(0, 150_000, (length,))
    ids[rows.part == CLIP] = config.video_token_id

    def row(piece: torch.Tensor, value=0) -> torch.Tensor:
        return torch.nn.functional.pad(piece.repeat(samples), (0, padding), value=value)[None].to(device)

    numbers = torch.arange(1, samples + 1).repeat_interleave(length)
    sample = torch.nn.functional.pad(numbers, (0, padding))[None].to(device) if samples > 1 else None
    patches = 4 * GRID[0] * GRID[1]
    labels = row(torch.where(timeline.produces[feed] == NOTHING, -100, 7), -100)
    inputs = {
        "input_ids": row(ids),
        "position_ids": torch.stack([row(axis) for axis in timeline_positions(timeline)[:, feed]]),
        "labels": labels,
        "visual_rows": indices(row(rows.part == CLIP, False), labels.shape),
        "score": indices(labels != -100, labels.shape),
        "pixel_values_videos": torch.randn(samples * CLIPS * patches, 1176, device=device, dtype=torch.bfloat16),
        "video_grid_thw": torch.tensor([[CLIPS, 2 * GRID[0], 2 * GRID[1]]] * samples),
        "num_items_in_batch": samples * ANSWER,
    }
    moved = row(feed.int(), length) if variant.parallel else None
    return inputs, (row(rows.visual, False), row(rows.text, False), sample, moved)


def flops(timeline: Timeline, model) -> float:
    """Model FLOPs of one sample, as described at the top of this file. Uses only the shapes of `model`."""
    config, rows, clips = model.config, timeline.rows, len(timeline.counts)
    pairs = int(dense_mask(rows.visual[None], rows.text[None], timeline.variant.parallel).sum())
    visual, tokens = clips * timeline.layout.tokens_per_clip, len(rows)
    text, tower = config.text_config, model.model.visual
    total = 6.0 * tokens * matrices(model.model.language_model.layers)
    total += 12.0 * pairs * text.hidden_size * text.num_hidden_layers
    total += 6.0 * sum(timeline.counts) * text.hidden_size * text.vocab_size
    total += 6.0 * visual * matrices(tower.merger)
    return total + clips * tower_flops(model, 4 * timeline.layout.tokens_per_clip)


class MasterAdamW:
    """AdamW on float32 master copies of bf16 weights, like DeepSpeed's bf16 optimizer."""

    def __init__(self, parameters):
        self.parameters = list(parameters)
        self.masters = [parameter.detach().float() for parameter in self.parameters]
        self.adamw = torch.optim.AdamW(self.masters, lr=1e-6, weight_decay=0.0, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad = parameter.grad.float()
            parameter.grad = None
        self.adamw.step()
        self.adamw.zero_grad()
        torch._foreach_copy_(self.parameters, self.masters)


def random_model(config: Qwen2_5_VLConfig, device: str) -> Qwen2_5_VLForConditionalGeneration:
    """A model with random bf16 weights."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    return model


def find_device(size: str = "tiny") -> str:
    """Return "cuda", or "cpu" with a note on stderr if there is no GPU.

    Raises InputError if there is a GPU that cannot be used, and for a `size` other than tiny on a CPU.
    """
    device, line = choose_device("", look(os.environ), cpu="")
    if device == "cpu" and size != "tiny":
        raise InputError(f"--size {size} needs a GPU: on a CPU give --size tiny")
    if line:
        print(line, file=sys.stderr)
    return device


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="3B")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["group"])
    parser.add_argument("--samples", type=int, nargs="+", default=[1], help="samples per packed row (default: 1)")
    parser.add_argument("--compile", action="store_true", help="compile the layers, like --compile_layers of sft.sh")
    parser.add_argument("--stock-tower", action="store_true", help="also time the vision encoder of transformers")
    parser.add_argument(
        "--no-update",
        action="store_true",
        help="forward and backward only: at 7B the optimizer does not fit on one GPU",
    )
    parser.add_argument("--layers", type=int, help="use fewer layers, for a quick test")
    parser.add_argument("--repeats", type=int, default=10, help="timed steps (default: %(default)s)")
    arguments = parser.parse_args()
    device = find_device()
    config = released_config(arguments.size, arguments.layers)
    model = random_model(config, device)
    tower = model.model.visual
    tower.requires_grad_(False)
    tower.merger.requires_grad_(True)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, Qwen2.5-VL {arguments.size}, compiled layers: {arguments.compile}")

    rate = matrix_rate(device) if device == "cuda" else float("nan")
    print(f"bf16 matrix product of 8192 x 8192: {rate / 1e12:.0f} TFLOP/s", flush=True)

    batch, _ = make_batch(VARIANTS["group"], 1, config, device)
    video = batch["pixel_values_videos"], batch["video_grid_thw"].to(device)
    with torch.no_grad():
        print(f"vision encoder, 30 clips: {1e3 * seconds(lambda: tower(*video), 5, device):.1f} ms", flush=True)
        if arguments.stock_tower:
            from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as stock

            for block in tower.blocks:
                block.attn.__class__ = stock.Qwen2_5_VLVisionAttention
            print(f"  of transformers: {1e3 * seconds(lambda: tower(*video), 5, device):.1f} ms", flush=True)
            for block in tower.blocks:
                block.attn.__class__ = VisionAttention
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    optimizer = None if arguments.no_update else MasterAdamW(trained)
    if arguments.compile:
        compile_layers(model)
    update = 0.0 if arguments.no_update else None
    print(f"{'variant':<12}{'samples/row':>14}{'ms/sample':>13}{'tokens/s':>10}{'TFLOP/s':>9}{'of peak':>9}{'GiB':>7}")
    for variant in (VARIANTS[name] for name in arguments.variants):
        implementation = "flex_attention" if device == "cuda" else "sdpa"
        model.model.language_model.set_attn_implementation(implementation)
        for samples in arguments.samples:
            batch, (visual, text, *packed) = make_batch(variant, samples, config, device)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()

            def step(batch=batch, flags=(visual, text, variant.parallel, implementation, *packed)):
                model(**batch, attention_mask=make_mask(*flags)).loss.backward()

            each = seconds(step, arguments.repeats, device)
            if update is None:
                update = seconds(lambda s=step: (s(), optimizer.step()), 3, device) - each
                print(f"optimizer step: {1e3 * update:.1f} ms per {ACCUMULATION} samples", flush=True)
            each = each / samples + update / ACCUMULATION
            tokens = len(batch["input_ids"][0]) // samples
            work = flops(make_timeline(variant, LAYOUT, answer_counts(variant)), model) / each
            memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan")
            print(
                f"{variant.name:<12}{samples:>14}{1e3 * each:>13.1f}{tokens / each:>10.0f}{work / 1e12:>9.0f}"
                f"{work / rate:>9.1%}{memory:>7.1f}",
                flush=True,
            )


if __name__ == "__main__":
    run(main)
