"""Time and memory to build timeline, positions and dense mask of a sample.

python code/benchmarks/timeline.py
"""

import time
from statistics import median

import torch
from qwen_vl_streaming.timeline.attention import dense_mask
from qwen_vl_streaming.timeline.positions import timeline_positions
from qwen_vl_streaming.timeline.timeline import Layout, make_schedule, make_timeline
from qwen_vl_streaming.timeline.variants import VARIANTS

CLIPS, GRID, ANSWER = 30, (7, 14), 117  # similar to the baseline: 30 s, 98 visual tokens per clip
REPEATS = 50


def milliseconds(work) -> float:
    """The median time of REPEATS calls, after one for warm-up."""
    work()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - began))
    return median(times)


def tensor_bytes(timeline) -> int:
    """Bytes of the tensors of a timeline and its positions."""
    rows = timeline.rows
    tensors = (rows.part, rows.clip, rows.index, rows.slot, timeline.produces, timeline_positions(timeline))
    return sum(tensor.element_size() * tensor.nelement() for tensor in tensors)


def main() -> None:
    torch.set_num_threads(1)
    layout = Layout(prompt=40, tail=3, header=3, grid=GRID)
    print(f"{CLIPS} clips of {GRID[0]} x {GRID[1]} tokens, {ANSWER} answer tokens; median of {REPEATS}, one CPU thread")
    print(f"{'variant':<12}{'tokens':>8}{'timeline':>12}{'positions':>12}{'dense mask':>12}{'bytes/token':>15}")
    for variant in VARIANTS.values():
        counts = make_schedule("wait-3", variant, CLIPS).counts(ANSWER)
        timeline = make_timeline(variant, layout, counts)
        rows = timeline.rows
        timings = (
            milliseconds(lambda v=variant, c=counts: make_timeline(v, layout, c)),
            milliseconds(lambda t=timeline: timeline_positions(t)),
            milliseconds(lambda r=rows, v=variant: dense_mask(r.visual[None], r.text[None], v.parallel)),
        )
        cells = "".join(f"{value:>9.2f} ms" for value in timings)
        print(f"{variant.name:<12}{len(rows):>8}{cells}{tensor_bytes(timeline) / len(rows):>15.0f}")


if __name__ == "__main__":
    main()
