"""Streamed equals full, the most important test."""

import random
import time

import pytest
import torch
from qwen_vl_streaming.reference import Streams, caption
from qwen_vl_streaming.timeline.attention import dense_mask
from qwen_vl_streaming.timeline.positions import timeline_positions
from qwen_vl_streaming.timeline.timeline import CLIP, NOTHING, Schedule, make_timeline
from qwen_vl_streaming.timeline.variants import VARIANTS
from tiny import END, VIDEO, VOCABULARY, random_counts, random_template, timeline_ids
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

SEED = time.time_ns() % 100_000


def full_pass(model, timeline, template, answer, visual_tokens):
    """Logits (A, V) for each answer token from one pass over the whole timeline."""
    rows = timeline.rows
    with torch.no_grad():
        logits = model(
            input_ids=timeline_ids(timeline, template, answer)[None],
            position_ids=timeline_positions(timeline)[:, None],
            attention_mask=dense_mask(rows.visual[None], rows.text[None], timeline.variant.parallel),
            visual_tokens=visual_tokens.flatten(0, 1),
            visual_rows=rows.part[None] == CLIP,
        ).logits[0]
    rows_of_answer = torch.empty(len(answer), dtype=torch.long)
    predicts = timeline.produces != NOTHING
    rows_of_answer[timeline.produces[predicts]] = predicts.nonzero().squeeze(1)
    return logits[rows_of_answer]


class Forced(Streams):
    """Streams that write given answers and keep the logits for each token."""

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
            # A stream that waits or has ended also gets the steps of other streams: keep only its own.
            difference = (torch.stack(streamed) - expected).abs().max()
            assert difference < 1e-4, (size, i, counts, float(difference))


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda v: v.name)
def test_every_token_is_fed_once_and_equals_the_full_pass(model, variant):
    """Greedy streaming with the repetition penalty: each token is the argmax of one full pass over the result, and no
    token is fed twice."""
    print("seed", SEED)
    draw = random.Random(SEED)
    torch.manual_seed(SEED)
    cases = random_batch(draw, variant, 5)
    streams = Streams(model, variant, [c[1] for c in cases], [c[2] for c in cases], penalty=1.3)
    schedules = [Schedule(tuple(c[0][:-1])) for c in cases]
    captions = caption(streams, [c[4] for c in cases], schedules, max_new_tokens=12)
    for stream, written, (_, template, layout, _, visual) in zip(streams.streams, captions, cases, strict=True):
        timeline = make_timeline(variant, layout, written.schedule)
        logits = full_pass(model, timeline, template, written.tokens, visual)
        used = [*template.prompt, template.video, *template.tail, *template.header]
        for j, token in enumerate(written.tokens):
            ids = torch.tensor([used + written.tokens[:j]])
            scores = RepetitionPenaltyLogitsProcessor(1.3)(ids, logits[j : j + 1].clone())
            top = scores.topk(2).values[0]
            assert scores[0, token] >= top[0] - 1e-4, (j, token)
        assert written.slots == [slot for slot, count in enumerate(written.schedule, 1) for _ in range(count)]
        if stream.complete:
            assert len(timeline.rows) - 1 <= stream.fed <= len(timeline.rows)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda v: v.name)
def test_a_batch_changes_nothing(model, variant):
    """The same tokens alone, in a ragged batch, and in another order."""
    print("seed", SEED)
    draw = random.Random(SEED)
    torch.manual_seed(SEED)
    cases = random_batch(draw, variant, 6)

    def run(chosen):
        streams = Streams(model, variant, [c[1] for c in chosen], [c[2] for c in chosen])
        return caption(streams, [c[4] for c in chosen], [Schedule(tuple(c[0][:-1])) for c in chosen], 15)

    together = run(cases)
    assert together[::-1] == run(cases[::-1])
    assert together == [run([case])[0] for case in cases]


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda v: v.name)
def test_feed_and_decode_equal_one_step_for_both(model, variant):
    """`feed`, then `decode`, against one step that does both."""
    torch.manual_seed(SEED)
    counts, template, layout, _, visual = random_batch(random.Random(SEED), variant, 1)[0]
    at_once = caption(Streams(model, variant, [template], [layout]), [visual], [Schedule(tuple(counts[:-1]))], 10)[0]
    streams = Streams(model, variant, [template], [layout])
    for slot, count in enumerate(at_once.schedule, 1):
        streams.feed([visual[slot - 1 : slot]], [slot == len(counts)])
        for _ in range(count):
            streams.decode([True])
    assert streams.streams[0].written == at_once.tokens


@pytest.mark.parametrize("variant", [v for v in VARIANTS.values() if v.streams], ids=lambda v: v.name)
def test_a_clip_changes_nothing_that_was_written_before_its_slot(model, variant):
    """And it does change something afterwards."""
    torch.manual_seed(SEED)
    draw = random.Random(SEED)
    template = random_template(draw)
    layout, visual = template.layout((2, 2), 2.0), torch.randn(4, 4, 32)
    schedules = [Schedule((3, 3, 3))] * 5
    versions = [visual.clone() for _ in range(5)]
    for j in range(4):
        versions[j + 1][j] = torch.randn(4, 32) * 3
    streams = Forced(
        model, variant, [template] * 5, [layout] * 5, answers=[[draw.randrange(150) for _ in range(14)] + [END]] * 5
    )
    for answer in streams.answers[1:]:
        answer[:] = streams.answers[0]
    caption(streams, versions, schedules)
    plain, *changed = (torch.stack(logits) for logits in streams.produced)
    for j, logits in enumerate(changed):
        assert torch.allclose(logits[: 3 * j], plain[: 3 * j], atol=1e-5)
        assert (logits[3 * j :] - plain[3 * j :]).abs().max() > 1e-3


def test_a_model_may_write_the_placeholder_id_of_visual_tokens(model):
    """It is text, both in the stream and in the full pass, because visual rows are found by their part."""
    template = random_template(random.Random(0))
    layout, visual = template.layout((1, 2), 2.0), torch.randn(3, 2, 32)
    answer = [5, VIDEO, 7, VIDEO, 9, END]
    streams = Forced(model, VARIANTS["group"], [template], [layout], answers=[answer])
    caption(streams, [visual], [Schedule((2, 2))])
    timeline = make_timeline(VARIANTS["group"], layout, (2, 2, 2))
    expected = full_pass(model, timeline, template, answer, visual)
    assert (torch.stack(streams.produced[0]) - expected).abs().max() < 1e-4


def test_misuse_is_refused(model):
    template = random_template(random.Random(0))
    layout, clip = template.layout((1, 1), 2.0), torch.randn(1, 1, 32)
    streams = Streams(model, VARIANTS["group"], [template], [layout])
    with pytest.raises(ValueError, match="after its first clip"):
        streams.decode([True])
    streams.feed([clip], [True])
    with pytest.raises(ValueError, match="last clip"):
        streams.feed([clip], [False])
    with pytest.raises(ValueError, match="schedule for 3 clips"):
        caption(Streams(model, VARIANTS["group"], [template], [layout]), [clip], [Schedule((3, 3))])
