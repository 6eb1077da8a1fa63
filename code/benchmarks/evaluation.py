"""Seconds a video of streaming evaluation, on random weights of the true shapes, beside the least that the card needs.

    python code/benchmarks/evaluation.py --size 7B --batch 32 64 1

The work is the published baseline's: a video of 30 clips of 196 x 364 pixels (91 visual tokens a clip) and 117 tokens
written by wait-3. Pixels lie in pinned memory: decoding is not part of it. Batch follows batch; a batch's seconds are
those between its end and the end of the one before, and what is said is the median of all but the first.

The floor adds what nothing can avoid. For watching: the FLOPs of vision tower, merger and language model over the clips
(2 x weights x rows, attention 4 x pairs x width), at the measured rate of a bf16 matrix product. For each word that no
clip's own rows produce: the bytes of the language model's weights and of the keys and values that the batch's streams
see by then, at the measured rate of reading memory.
"""

import argparse
import time
from itertools import pairwise
from statistics import median

import torch
from qwen_vl_streaming.common.errors import OneLineParser, run
from qwen_vl_streaming.engine.batch import Job, caption_all
from qwen_vl_streaming.model.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from qwen_vl_streaming.model.prompts import Template
from qwen_vl_streaming.timeline.plan import make_plan
from qwen_vl_streaming.timeline.timeline import NOTHING, make_schedule
from qwen_vl_streaming.timeline.variants import VARIANTS, Variant
from training import ANSWER, CLIPS, GRID, LAYOUT, SHAPES, find_device, make_config, seconds

PUBLISHED = {"group": 3.9, "interleave": 3.7}
"""Seconds a video of the published code on one H200, by an earlier measurement of ours on the same work."""
PATCHES = 4 * GRID[0] * GRID[1]


def make_jobs(variant: Variant, count: int) -> list[Job]:
    template = Template(tuple(range(LAYOUT.prompt)), (1, 2, 3), (4, 5, 6), 7, -1)  # no id ends an answer early
    pixels = torch.randn(CLIPS, PATCHES, 1176).bfloat16()
    if torch.cuda.is_available():
        pixels = pixels.pin_memory()
    schedule = make_schedule("wait-3", variant, CLIPS)
    return [Job(str(i), pixels, template.layout(GRID, 2.0), template, schedule) for i in range(count)]


def rates(device: str) -> tuple[float, float]:
    """FLOPs a second of a bf16 matrix product, bytes a second of reading memory."""
    size = 8192 if device == "cuda" else 512
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    much = torch.ones(2**30 if device == "cuda" else 2**20, device=device)
    return 2 * size**3 / seconds(lambda: a @ b, 20, device), 4 * len(much) / seconds(lambda: much.sum(), 20, device)


def floor(model, variant: Variant, batch: int, flop_rate: float, byte_rate: float) -> float:
    """Seconds a video by the rule at the head of this file."""
    text, vision, tower = model.config.text_config, model.config.vision_config, model.model.visual

    def matrices(module) -> int:
        return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)

    patches = CLIPS * PATCHES
    whole = len(vision.fullatt_block_indexes)
    seen = whole * PATCHES + (vision.depth - whole) * min((vision.window_size // vision.patch_size) ** 2, PATCHES)
    flops = 2.0 * patches * (matrices(tower.blocks) + tower.patch_embed.proj.weight.numel())
    flops += 4.0 * patches * seen * vision.hidden_size
    flops += 2.0 * patches / 4 * matrices(tower.merger)
    (job,) = make_jobs(variant, 1)
    plan = make_plan(variant, job.layout, job.schedule, ANSWER)
    rows, layers = len(plan.visual), model.model.language_model.layers
    flops += 2.0 * rows * matrices(layers)
    flops += 4.0 * int((plan.visual.seen_visual + plan.visual.seen_text).sum()) * text.hidden_size * len(layers)
    weights = 2.0 * (matrices(layers) + text.hidden_size * text.vocab_size)
    each = 4.0 * len(layers) * text.num_key_value_heads * text.hidden_size / text.num_attention_heads
    spoken = (plan.text.seen_visual + plan.text.seen_text)[plan.text.produces != NOTHING]
    words = sum((weights / batch + each * int(count)) / byte_rate for count in spoken)
    return flops / flop_rate + words


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="7B")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["group"])
    parser.add_argument("--batch", type=int, nargs="+", default=[32])
    parser.add_argument("--layers", type=int, help="fewer layers, to try the command out")
    parser.add_argument("--repeats", type=int, default=3, help="batches that are timed")
    parser.add_argument("--words", type=int, default=ANSWER, help="fewer words, to try the command out")
    arguments = parser.parse_args()
    device = find_device()
    config = make_config(arguments.size, arguments.layers)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration(config).eval()
    torch.set_default_dtype(torch.float32)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, Qwen2.5-VL {arguments.size}, random weights, bf16")

    flop_rate, byte_rate = rates(device)
    print(f"bf16 matrix product {flop_rate / 1e12:.0f} TFLOP/s, reading memory {byte_rate / 1e12:.2f} TB/s", flush=True)

    print(
        f"{'variant':<12}{'batch':>6}{'s a video':>11}{'from':>8}{'to':>8}{'floor':>8}{'times':>7}{'published':>11}"
        f"{'times':>7}{'GiB':>7}"
    )
    for variant in (VARIANTS[name] for name in arguments.variants):
        for batch in arguments.batch:
            options = {"batch_size": batch, "max_new_tokens": arguments.words}
            # The first call compiles; in the second, the first batch pays for setting up.
            for count in (batch, batch * (1 + arguments.repeats)):
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                began, ends = time.perf_counter(), []
                for _, caption in caption_all(model, variant, make_jobs(variant, count), **options):
                    assert len(caption.tokens) == arguments.words
                    ends.append(time.perf_counter() - began)
                print(f"  {count} videos, set-up included: {ends[-1]:.2f} s", flush=True)
            each = [(end - before) / batch for before, end in pairwise(ends[batch - 1 :: batch])]
            took = median(each)
            least = floor(model, variant, batch, flop_rate, byte_rate)
            published = PUBLISHED.get(variant.name, float("nan")) if arguments.size == "7B" else float("nan")
            memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan")
            print(
                f"{variant.name:<12}{batch:>6}{took:>11.4f}{min(each):>8.4f}{max(each):>8.4f}{least:>8.4f}"
                f"{took / least:>7.2f}{published:>11.1f}{published / took:>7.1f}{memory:>7.1f}",
                flush=True,
            )


if __name__ == "__main__":
    run(main)
