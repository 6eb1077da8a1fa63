"""Seconds per video of streaming evaluation, with random weights of the real shapes, and a lower bound for the GPU.

    python code/benchmarks/evaluation.py --size 7B --batch 32 64 1

The workload is that of the published baseline: a video of 30 clips of 196 x 364 pixels (91 visual tokens per clip) and
117 tokens generated with wait-3. Pixels are in pinned memory; decoding is not timed. Batches run one after another; the
time of a batch is from the end of the previous one to its end. Reports the median over all batches except the first.

The lower bound adds two terms. Perception: the FLOPs of vision encoder, merger and language model over the clips (2 x
weights x rows, attention 4 x pairs x width), at the measured rate of a bf16 matrix product. Generation: for each token
that no row of a clip produces, the bytes of the language model's weights and of the keys and values that the streams of
the batch attend to, at the measured memory bandwidth.

The matrix product is measured twice: for milliseconds, and after SUSTAINED seconds of products, by when the GPU has
lowered its clock to stay within its power. The second rate gives the bound that is called sustained. An evaluation,
which does not only multiply, may draw less power and run its products faster.
"""

import argparse
import time
from itertools import pairwise
from statistics import median

import torch
from arithmetic import matrices, matrix_rate, seconds, tower_flops
from qwen_vl_streaming.common.errors import OneLineParser, run
from qwen_vl_streaming.engine.batch import Job, caption_all
from qwen_vl_streaming.model.prompts import Template
from qwen_vl_streaming.model.released import SIZES, released_config
from qwen_vl_streaming.timeline.plan import make_plan
from qwen_vl_streaming.timeline.timeline import NOTHING, make_schedule
from qwen_vl_streaming.timeline.variants import VARIANTS, Variant
from training import ANSWER, CLIPS, GRID, LAYOUT, find_device, random_model

PUBLISHED = {"group": 3.9, "interleave": 3.7}
"""Seconds per video of the published code on one H200, which we measured earlier on the same workload."""
PATCHES = 4 * GRID[0] * GRID[1]
SUSTAINED = 3.0
"""Seconds of matrix products after which their rate no longer changes on an H200."""


def make_jobs(variant: Variant, count: int) -> list[Job]:
    """`count` videos of random pixels with a wait-3 schedule."""
    template = Template(
        tuple(range(LAYOUT.prompt)), (1, 2, 3), (4, 5, 6), 7, -1
    )  # the end token -1 never occurs, so all answers have full length
    pixels = torch.randn(CLIPS, PATCHES, 1176).bfloat16()
    if torch.cuda.is_available():
        pixels = pixels.pin_memory()
    schedule = make_schedule("wait-3", variant, CLIPS)
    return [Job(str(i), pixels, template.layout(GRID, 2.0), template, schedule) for i in range(count)]


def rates(device: str) -> tuple[float, float]:
    """Measure the FLOP/s of a bf16 matrix product and the bytes/s of reading memory."""
    block = torch.ones(2**30 if device == "cuda" else 2**20, device=device)
    return matrix_rate(device), 4 * len(block) / seconds(lambda: block.sum(), 20, device)


def lower_bound(model, variant: Variant, batch: int, flop_rate: float, byte_rate: float) -> float:
    """Minimum seconds per video, as described at the top of this file."""
    text = model.config.text_config
    flops = CLIPS * (tower_flops(model, PATCHES) + 2.0 * PATCHES / 4 * matrices(model.model.visual.merger))
    (job,) = make_jobs(variant, 1)
    plan = make_plan(variant, job.layout, job.schedule, ANSWER)
    rows, layers = len(plan.visual), model.model.language_model.layers
    flops += 2.0 * rows * matrices(layers)
    flops += 4.0 * int((plan.visual.seen_visual + plan.visual.seen_text).sum()) * text.hidden_size * len(layers)
    weights = 2.0 * (matrices(layers) + text.hidden_size * text.vocab_size)
    each = 4.0 * len(layers) * text.num_key_value_heads * text.hidden_size / text.num_attention_heads
    context = (plan.text.seen_visual + plan.text.seen_text)[plan.text.produces != NOTHING]
    generation = sum((weights / batch + each * int(count)) / byte_rate for count in context)
    return flops / flop_rate + generation


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="7B")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["group"], help="default: group")
    parser.add_argument("--batch", type=int, nargs="+", default=[32], help="batch sizes (default: 32)")
    parser.add_argument("--layers", type=int, help="use fewer layers, for a quick test")
    parser.add_argument("--repeats", type=int, default=3, help="timed batches (default: %(default)s)")
    parser.add_argument("--answer-tokens", type=int, default=ANSWER, help="generate fewer tokens, for a quick test")
    arguments = parser.parse_args()
    device = find_device()
    config = released_config(arguments.size, arguments.layers)
    model = random_model(config, device).eval()
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, Qwen2.5-VL {arguments.size}, random weights, bf16")

    flop_rate, byte_rate = rates(device)
    sustained_rate = matrix_rate(device, SUSTAINED)
    print(
        f"bf16 matrix product: {flop_rate / 1e12:.0f} TFLOP/s, sustained {sustained_rate / 1e12:.0f}; memory "
        f"bandwidth: {byte_rate / 1e12:.2f} TB/s",
        flush=True,
    )

    print(
        f"{'variant':<12}{'batch':>6}{'s/video':>11}{'min':>8}{'max':>8}{'bound':>8}{'ratio':>7}{'sustained':>11}"
        f"{'ratio':>7}{'published':>11}{'speed-up':>9}{'GiB':>7}"
    )
    for variant in (VARIANTS[name] for name in arguments.variants):
        for batch in arguments.batch:
            options = {"batch_size": batch, "max_new_tokens": arguments.answer_tokens}
            # The first call compiles. In the second, the first batch includes the set-up.
            for count in (batch, batch * (1 + arguments.repeats)):
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                began, ends = time.perf_counter(), []
                for _, caption in caption_all(model, variant, make_jobs(variant, count), **options):
                    assert len(caption.tokens) == arguments.answer_tokens
                    ends.append(time.perf_counter() - began)
                print(f"  {count} videos including set-up: {ends[-1]:.2f} s", flush=True)
            each = [(end - before) / batch for before, end in pairwise(ends[batch - 1 :: batch])]
            took = median(each)
            bounds = [lower_bound(model, variant, batch, rate, byte_rate) for rate in (flop_rate, sustained_rate)]
            published = PUBLISHED.get(variant.name, float("nan")) if arguments.size == "7B" else float("nan")
            memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan")
            print(
                f"{variant.name:<12}{batch:>6}{took:>11.4f}{min(each):>8.4f}{max(each):>8.4f}{bounds[0]:>8.4f}"
                f"{took / bounds[0]:>7.2f}{bounds[1]:>11.4f}{took / bounds[1]:>7.2f}{published:>11.1f}"
                f"{published / took:>9.1f}{memory:>7.1f}",
                flush=True,
            )


if __name__ == "__main__":
    run(main)
