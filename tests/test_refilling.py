"""A batch that is refilled as captions end changes nothing: each caption equals that of the reference for the video
alone."""

import random
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from qwen_vl_streaming.engine import batch
from qwen_vl_streaming.engine.batch import Job, caption_all
from qwen_vl_streaming.reference import Streams, caption
from qwen_vl_streaming.timeline.timeline import Schedule
from qwen_vl_streaming.timeline.variants import VARIANTS
from tiny import random_counts, random_template

SEED = time.time_ns() % 100_000
MOST = 14


def plain(model, variant, job):
    """The caption of one job by reference.py."""
    with torch.no_grad():
        clips = [model.perceive(job.pixels, job.grid)]
    return caption(Streams(model, variant, [job.template], [job.layout]), clips, [job.schedule], MOST)[0]


def random_jobs(draw, model, variant, count):
    """Videos of all lengths and grids, each with its own schedule. In most, a token that the model often writes ends
    the answer."""
    jobs = []
    for number in range(count):
        counts, grid = random_counts(draw, variant, 7), (draw.randint(1, 3), draw.randint(1, 3))
        template = random_template(draw)
        pixels = torch.randn(len(counts), 4 * grid[0] * grid[1], 1176)
        layout = template.layout(grid, draw.choice([2.0, 1.5, 2.6667]))
        jobs.append(Job(str(number), pixels, layout, template, Schedule(tuple(counts[:-1]))))
    said = Counter(token for job in jobs[:5] for token in set(plain(model, variant, job).tokens))
    end = said.most_common(1)[0][0]
    return [replace(job, template=replace(job.template, end=end)) if draw.random() < 0.7 else job for job in jobs]


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda v: v.name)
def test_a_refilled_batch_changes_nothing(model, variant, monkeypatch):
    """With batches of 1, 8 and 32, in any order, with videos encoded together and separately."""
    print("seed", SEED)
    draw = random.Random(SEED)
    torch.manual_seed(SEED)
    jobs = random_jobs(draw, model, variant, 20)
    expected = {job.key: plain(model, variant, job) for job in jobs}
    assert len({len(written.tokens) for written in expected.values()}) > 1

    def written(jobs, batch_size):
        found = list(caption_all(model, variant, iter(jobs), batch_size=batch_size, max_new_tokens=MOST))
        assert len(found) == len(jobs)
        return {job.key: written for job, written in found}

    assert written(jobs, 1) == written(jobs, 8) == expected
    assert written(draw.sample(jobs, len(jobs)), 32) == expected
    monkeypatch.setattr(batch, "ENCODER_PATCHES", 1)
    longest_first = sorted(jobs, key=lambda job: len(job.pixels) * job.layout.tokens_per_clip, reverse=True)
    assert written(longest_first, 8) == expected
