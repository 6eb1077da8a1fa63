"""Seconds per video of streaming evaluation, with random weights of the real shapes, and a lower bound for the GPU.

    python code/benchmarks/evaluation.py --size 7B --batch 32 64 1

The workload is that of workload.py. Pixels are in pinned memory; decoding is not timed. Batches run one after another;
the time of a batch is from the end of the previous one to its end. Reports the median over all batches except the
first.

The lower bound adds two terms. Perception: the FLOPs of vision encoder, merger and language model over the clips (2 x
weights x rows, attention 4 x pairs x width), at the measured rate of a bf16 matrix product. Generation: for each token
that no row of a clip produces, the bytes of the language model's weights and of the keys and values that the streams of
the batch attend to, at the measured memory bandwidth.
"""

import argparse
import time
from itertools import pairwise
from statistics import median

import torch
from qwen_vl_streaming.common.errors import OneLineParser, run
from qwen_vl_streaming.engine.batch import Job, caption_all
from qwen_vl_streaming.timeline.plan import make_plan
from qwen_vl_streaming.timeline.timeline import NOTHING, make_schedule
from qwen_vl_streaming.timeline.variants import VARIANTS, Variant
from workload import (
    ANSWER,
    CLIPS,
    LAYOUT,
    PATCHES,
    PUBLISHED,
    SIZES,
    TEMPLATE,
    device_name,
    find_device,
    matrices,
    matrix_rate,
    memory_rate,
    peak_gib,
    random_model,
    tower_flops,
)


def make_jobs(variant: Variant, count: int) -> list[Job]:
    """`count` videos of random pixels with a wait-3 schedule."""
    pixels = torch.randn(CLIPS, PATCHES, 1176, dtype=torch.bfloat16)
    if torch.cuda.is_available():
        pixels = pixels.pin_memory()
    schedule = make_schedule("wait-3", variant, CLIPS)
    return [Job(str(i), pixels, LAYOUT, TEMPLATE, schedule) for i in range(count)]


def lower_bound(model, variant: Variant, batch: int, flop_rate: float, byte_rate: float) -> float:
    """Minimum seconds per video, as described at the top of this file."""
    text, layers = model.config.text_config, model.model.language_model.layers
    plan = make_plan(variant, LAYOUT, make_schedule("wait-3", variant, CLIPS), ANSWER)
    flops = CLIPS * (tower_flops(model, PATCHES) + 2.0 * PATCHES / 4 * matrices(model.model.visual.merger))
    flops += 2.0 * len(plan.visual) * matrices(layers)
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
    parser.add_argument("--repeats", type=int, default=3, help="timed batches (default: %(default)s)")
    arguments = parser.parse_args()
    device = find_device(arguments.size)
    model = random_model(arguments.size, device).eval()
    print(
        f"{device_name(device)}, torch {torch.__version__}, Qwen2.5-VL {arguments.size}, random weights, {model.dtype}"
    )
    flop_rate, byte_rate = matrix_rate(device), memory_rate(device)
    print(
        f"bf16 matrix product: {flop_rate / 1e12:.3g} TFLOP/s; memory bandwidth: {byte_rate / 1e12:.3g} TB/s",
        flush=True,
    )
    print(
        f"{'variant':<12}{'batch':>6}{'s/video':>11}{'min':>8}{'max':>8}{'bound':>8}{'ratio':>7}{'published':>11}"
        f"{'speed-up':>9}{'GiB':>7}"
    )
    for variant in (VARIANTS[name] for name in arguments.variants):
        for batch in arguments.batch:
            # The first call compiles. In the second, the first batch includes the set-up.
            for count in (batch, batch * (1 + arguments.repeats)):
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                began, ends = time.perf_counter(), []
                jobs = make_jobs(variant, count)
                for _, caption in caption_all(model, variant, jobs, batch_size=batch, max_new_tokens=ANSWER):
                    assert len(caption.tokens) == ANSWER
                    ends.append(time.perf_counter() - began)
                print(f"  {count} videos including set-up: {ends[-1]:.2f} s", flush=True)
            each = [(end - before) / batch for before, end in pairwise(ends[batch - 1 :: batch])]
            took = median(each)
            bound = lower_bound(model, variant, batch, flop_rate, byte_rate)
            published = PUBLISHED.get(variant.name, float("nan")) if arguments.size == "7B" else float("nan")
            print(
                f"{variant.name:<12}{batch:>6}{took:>11.4f}{min(each):>8.4f}{max(each):>8.4f}{bound:>8.4f}"
                f"{took / bound:>7.2f}{published:>11.1f}{published / took:>9.1f}{peak_gib(device):>7.1f}",
                flush=True,
            )


if __name__ == "__main__":
    run(main)
