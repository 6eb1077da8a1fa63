"""Streamed equals full: the test above all tests."""

import random
import time

import pytest
import torch
from qwen_vl_streaming.attention import dense_mask
from qwen_vl_streaming.positions import timeline_positions
from qwen_vl_streaming.streaming import Streams, caption
from qwen_vl_streaming.timeline import NOTHING, Schedule, make_timeline
from qwen_vl_streaming.variants import VARIANTS
from tiny import END, VOCABULARY, random_counts, random_template, timeline_ids, tiny_model

SEED = time.time_ns() % 100_000
PARALLEL = [variant for variant in VARIANTS.values() if variant.parallel]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def full_pass(model, timeline, template, answer, visual_tokens):
    """Logits (A, V) that one pass over the whole timeline gives for each answer token."""
    rows = timeline.rows
    with torch.no_grad():
        logits = model(
            input_ids=timeline_ids(timeline, template, answer)[None],
            position_ids=timeline_positions(timeline)[:, None],
            attention_mask=dense_mask(rows.visual[None], rows.text[None], timeline.variant.parallel),
            visual_tokens=visual_tokens.flatten(0, 1),
        ).logits[0]
    rows_of_answer = torch.empty(len(answer), dtype=torch.long)
    predicts = timeline.produces != NOTHING
    rows_of_answer[timeline.produces[predicts]] = predicts.nonzero().squeeze(1)
    return logits[rows_of_answer]


class Forced(Streams):
    """Streams that write given answers and keep the logits that each token would have been chosen from."""

    def __init__(self, *args, answers, **kwargs):
        super().__init__(*args, **kwargs)
        self.answers, self.produced = answers, [[] for _ in answers]

    def _choose(self):
        for kept, logits in zip(self.produced, self.logits, strict=True):
            kept.append(logits.clone())
        return [a[min(len(s.written), len(a) - 1)] for a, s in zip(self.answers, self.streams, strict=True)]


def random_batch(draw, variant, size):
    cases = []
    for _ in range(size):
        counts = random_counts(draw, variant)
        grid = (draw.randint(1, 3), draw.randint(1, 3))
        template = random_template(draw)
        layout = template.layout(grid, draw.choice([2.0, 1.5, 2.6667]))
        answer = [draw.randrange(VOCABULARY - 20) for _ in range(sum(counts) - 1)] + [END]
        visual = torch.randn(len(counts), grid[0] * grid[1], 32)
        cases.append((counts, template, layout, answer, visual))
    return cases


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda v: v.name)
def test_streamed_equals_full(model, variant):
    """Random schedules, grids, templates and lengths in one ragged batch, token by token with a cache."""
    print("seed", SEED)
    draw = random.Random(SEED)
    torch.manual_seed(SEED)
    for size in (1, 3, 8):
        cases = random_batch(draw, variant, size)
        streams = Forced(model, variant, [c[1] for c in cases], [c[2] for c in cases], answers=[c[3] for c in cases])
        captions = caption(streams, [c[4] for c in cases], [Schedule(tuple(c[0][:-1])) for c in cases])
        for i, (counts, template, layout, answer, visual) in enumerate(cases):
            assert captions[i].tokens == answer
            assert captions[i].schedule == counts
            timeline = make_timeline(variant, layout, counts)
            expected = full_pass(model, timeline, template, answer, visual)
            streamed = []
            for j in range(len(answer)):
                streamed.append(streams.produced[i][j])
            # A stream that waits or has ended sees the other streams' steps too: keep its own ones only.
            difference = (torch.stack(streamed) - expected).abs().max()
            assert difference < 1e-4, (size, i, counts, float(difference))
