"""The model decides when a slot ends: streamed equals full, in every variant, mode and batch. Tests print the seeds."""

import json
import random
import shutil
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import takewhile
from types import SimpleNamespace

import pytest
import torch
import verify
from evaluating import finish, rows, start
from qwen_vl_streaming.common.errors import InputError, run
from qwen_vl_streaming.engine.batch import Job, caption_all
from qwen_vl_streaming.live.figures import figures
from qwen_vl_streaming.live.screen import Pieces
from qwen_vl_streaming.model.prompts import END_OF_SLOT as DEFAULT
from qwen_vl_streaming.model.prompts import QUESTIONS, answer_ids, load_processor, make_template
from qwen_vl_streaming.model.trained import choose_schedule
from qwen_vl_streaming.reference import Streams
from qwen_vl_streaming.replay import replay
from qwen_vl_streaming.serve.catalog import ServedModel
from qwen_vl_streaming.serve.metrics import Metrics
from qwen_vl_streaming.serve.response import Response
from qwen_vl_streaming.sessions import PerceptionClient, SessionPool, caption_sessions, open_session, recorded
from qwen_vl_streaming.sessions.record import read_record
from qwen_vl_streaming.sessions.slot_scheduler import SlotScheduler
from qwen_vl_streaming.stream import PENALTY
from qwen_vl_streaming.timeline.attention import dense_mask
from qwen_vl_streaming.timeline.positions import timeline_positions
from qwen_vl_streaming.timeline.timeline import (
    CLIP,
    NOTHING,
    Layout,
    ModelSchedule,
    Schedule,
    make_timeline,
    model_schedule_fault,
    model_schedule_most,
)
from qwen_vl_streaming.timeline.variants import VARIANTS
from qwen_vl_streaming.video.pixel_budget import PixelBudget
from qwenvl.data import IGNORED, StreamingDataset
from qwenvl.merge import training_config
from qwenvl.prescan import scan
from safetensors.torch import load_file, save_file
from sessions import (
    END_OF_SLOT,
    PARALLEL,
    check_deciding,
    close_done,
    decided,
    deciding_case,
    deciding_model,
    feed_some,
    most_of,
    play,
)
from tiny import timeline_ids
from transformers import PretrainedConfig
from waiting import SECONDS

SEED = time.time_ns() % 100_000
STREAMING = [variant for variant in VARIANTS.values() if variant.streams]
GROUP = VARIANTS["group"]


@pytest.fixture(scope="module")
def model():
    return deciding_model()


@pytest.fixture(scope="module")
def client():
    with PerceptionClient(deciding_model, patience=SECONDS) as client:
        yield client


def slot_ends(tokens, counts) -> Counter:
    """How the slots of `counts` but the last ended."""
    found, done = Counter(), 0
    for count in counts[:-1]:
        own, done = tokens[done : done + count], done + count
        if done < len(tokens):
            found["silent" if own == [END_OF_SLOT] else "token" if own[-1:] == [END_OF_SLOT] else "bound"] += 1
    return found


ENDS = ("silent", "token", "bound")


def numbers(how: Counter, least: int) -> Iterator[int]:
    """Of random cases: `least`, and then as many as it takes until each way to end a slot has occurred."""
    return takewhile(lambda number: number < least or not all(how[name] for name in ENDS), range(20 * least))


@pytest.mark.parametrize("variant", STREAMING, ids=lambda v: v.name)
def test_streamed_equals_full(model, variant, monkeypatch):
    """The logits of each step are those of one pass over the timeline with the counts that the model chose."""
    print("seed", SEED)
    how = Counter()
    for number in numbers(how, 12):
        case = deciding_case(random.Random(f"{SEED} {number} {variant.name}"), variant)
        steps, choose = [], Streams._choose
        monkeypatch.setattr(
            Streams, "_choose", lambda self, c=choose, s=steps: (s.append(self.logits.clone()), c(self))[1]
        )
        written = decided(model, case)
        monkeypatch.undo()
        how += slot_ends(written.tokens, written.schedule)
        assert model_schedule_fault(written.tokens, written.schedule, most_of(case), END_OF_SLOT) is None
        timeline = make_timeline(variant, case.layout, written.schedule)
        rows = timeline.rows
        with torch.no_grad():
            logits = model(
                input_ids=timeline_ids(timeline, case.template, written.tokens)[None],
                position_ids=timeline_positions(timeline)[:, None],
                attention_mask=dense_mask(rows.visual[None], rows.text[None], variant.parallel),
                visual_tokens=model.perceive(case.pixels, case.layout.grid).flatten(0, 1),
                visual_rows=rows.part[None] == CLIP,
                score=(timeline.produces != NOTHING)[None],
            ).logits
        full = logits[timeline.produces[timeline.produces != NOTHING].argsort()]
        assert (full - torch.cat(steps)).abs().max() < 1e-4
    print(how)
    assert min(how[name] for name in ENDS) > 0


@pytest.mark.parametrize("mode", ["serial", "fused", "pipelined"])
def test_sessions_write_the_reference_tokens(model, mode, request):
    """Whenever clips arrive, and however many tokens are in flight."""
    print("seed", SEED)
    how = Counter()
    more = {"perception_client": request.getfixturevalue("client")} if mode == "pipelined" else {}
    for number in numbers(how, 25):
        draw = random.Random(f"{SEED} {mode} {number}")
        case = deciding_case(draw, draw.choice(STREAMING if mode == "serial" else PARALLEL), may_be_late=True)
        options = {**case.options, **more, "ahead": draw.choice([0, 1, 2])}
        print(number, case.variant.name, case.schedule, case.steps, case.late)
        with open_session(model, case.variant, case.template, case.layout, mode=mode, **options) as session:
            check_deciding(model, case, play(session, case))
        how += slot_ends(session.caption().tokens, session.counts)
    print(how)
    assert min(how[name] for name in ENDS) > 0


def test_sessions_of_a_pool_write_the_reference_tokens(model):
    """Beside sessions of other schedules, with a window of none."""
    print("seed", SEED)
    draw = random.Random(SEED)
    pool = SessionPool(model, 4, Layout(40, 10, 10, (3, 3)), max_clips=6, max_new_tokens=30, chunk_counts=(1, 2))
    waiting, running = [deciding_case(draw, draw.choice(STREAMING)) for _ in range(20)], []
    while waiting or running:
        if waiting and len(running) < 3 and draw.random() < 0.4:
            case, mode = waiting.pop(), draw.choice(["serial", "fused"])
            mode = mode if case.variant.parallel else "serial"
            options = {**case.options, "ahead": draw.choice([0, 1, 3])}
            running.append((case, pool.open(case.variant, case.template, case.layout, mode=mode, **options), []))
        if len(pool.sessions) == len(running) and pool.runner.free_slots:  # another one, which is always busy
            other = replace(waiting[0] if waiting else running[0][0], schedule="wait-2", most=9)
            pool.open(GROUP, other.template, other.layout, **{**other.options, "max_clips": 6}).feed(other.pixels[0])
        feed_some(draw, running)
        pool.step()
        for case, session, _ in close_done(running):
            check_deciding(model, case, session)
    pool.close()


@pytest.mark.parametrize("variant", STREAMING, ids=lambda v: v.name)
def test_evaluation_writes_the_reference_tokens(model, variant):
    """In batches of any size, and with memory for two videos."""
    print("seed", SEED)
    draw = random.Random(f"{SEED} {variant.name}")
    cases = [deciding_case(draw, variant) for _ in range(6)]
    jobs = []
    for number, case in enumerate(cases):
        case.schedule, case.most = "model-3", 20 + len(case.pixels) - 1  # one more for each slot that may be silent
        jobs.append(Job(f"{number}", case.pixels, case.layout, case.template, ModelSchedule(len(case.pixels), 3)))
    expected = {job.key: decided(model, case) for job, case in zip(jobs, cases, strict=True)}
    for batch_size, memory in ((1, None), (4, None), (6, 200_000)):
        found = caption_sessions(model, variant, jobs, batch_size=batch_size, memory=memory, max_new_tokens=20)
        assert {job.key: written for job, written in found} == expected
    with pytest.raises(InputError, match="video 0 needs "):
        next(caption_sessions(model, variant, jobs, batch_size=1, memory=2000, max_new_tokens=20))
    with pytest.raises(ValueError, match="no plan in advance"):
        next(caption_all(model, variant, jobs, batch_size=1, max_new_tokens=20))
    known = replace(jobs[0], schedule=Schedule((1,) * (len(cases[0].pixels) - 1)))
    with pytest.raises(ValueError, match="is known in advance"):
        next(caption_sessions(model, variant, [known], batch_size=1, max_new_tokens=20))


def test_at_most_one_pool_is_in_memory(model, monkeypatch):
    """Where shorter videos, which come later, have larger clips. If the largest clips are known, one pool is enough."""
    template, jobs = deciding_case(random.Random(0), GROUP).template, []
    for height, width in ((1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (3, 3)):
        clips = 18 // (height * width)
        pixels = torch.randn(clips, 4 * height * width, 3 * 2 * 14 * 14)
        layout = template.layout((height, width), 2.0)
        jobs.append(Job(f"{clips}", pixels, layout, template, ModelSchedule(clips, 3)))
    made = []

    class Pool(SessionPool):
        def __init__(self, *arguments, **options):
            assert not any(runner() for runner, _ in made)  # its memory was freed
            super().__init__(*arguments, **options)
            made.append((weakref.ref(self.runner), self.runner.chunk_size))

    monkeypatch.setattr(recorded, "SessionPool", Pool)
    plain = [written for _, written in caption_sessions(model, GROUP, jobs, batch_size=1, max_new_tokens=9)]
    assert len(made) > 1 and len({chunk for _, chunk in made}) == 1  # nothing is compiled for another chunk size
    del made[:]
    known = caption_sessions(model, GROUP, jobs, batch_size=1, max_new_tokens=9, clip_tokens=9)
    assert [written for _, written in known] == plain and len(made) == 1


@pytest.mark.parametrize("variant", STREAMING, ids=lambda v: v.name)
def test_a_clip_changes_nothing_before_its_slot(model, variant):
    print("seed", SEED)
    later = 0
    for number in range(60):
        if number >= 6 and later:
            break
        case = deciding_case(random.Random(f"{SEED} {number} {variant.name}"), variant)
        plain = decided(model, case)
        for clip in range(len(case.pixels)):
            other = replace(case, pixels=case.pixels.clone())
            other.pixels[clip] = torch.randn_like(case.pixels[clip])
            changed = decided(model, other)
            assert changed.schedule[:clip] == plain.schedule[:clip]
            before = sum(plain.schedule[:clip])
            assert changed.tokens[:before] == plain.tokens[:before]
            later += changed.tokens != plain.tokens
    assert later


def test_the_penalty_does_not_apply_to_the_end_of_a_slot(model):
    """A model that prefers it by less than the penalty still writes it in every slot, in all implementations."""
    case = deciding_case(random.Random(1), GROUP)
    case.template, case.schedule, case.most = replace(case.template, end=-1), "model-2", 12
    case.pixels = torch.randn(6, *case.pixels.shape[1:], generator=torch.Generator().manual_seed(0))
    case.steps = [0] * 6

    class Head(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden):
            logits = self.inner(hidden).clamp(-1, 1)
            logits[..., END_OF_SLOT] = 1.05
            return logits

    head, model.lm_head = model.lm_head, Head(model.lm_head)
    try:
        assert 1.05 / PENALTY < 1
        # One in each slot. In the last one it ends the answer, and does not fill it up.
        assert decided(model, case).tokens == [END_OF_SLOT] * 6
        for ahead in (0, 2):
            with open_session(model, GROUP, case.template, case.layout, **case.options, ahead=ahead) as session:
                assert play(session, case).caption().tokens == [END_OF_SLOT] * 6 and session.ended
        # Silence does not use up the tokens of an answer.
        job = Job("0", case.pixels, case.layout, case.template, ModelSchedule(6, 2))
        ((_, written),) = caption_sessions(model, GROUP, [job], batch_size=1, max_new_tokens=2)
        assert written.schedule == [1] * 6
        # By the counts of another run, as from a file: the same.
        by_counts = replace(job, schedule=Schedule((1,) * 5))
        ((_, written),) = caption_all(model, GROUP, [by_counts], batch_size=1, max_new_tokens=12)
        assert written.schedule == [1] * 6
        logits = torch.full((3, 200), 1.0)
        logits[:, END_OF_SLOT] = 1.05
        for template, wrong in ((case.template, 0), (replace(case.template, end_of_slot=None), 2)):
            found = verify.find_mismatches(logits, template, [END_OF_SLOT] * 3, PENALTY, torch.float32)
            assert len(found) == wrong
    finally:
        model.lm_head = head


def test_records_are_replayed_and_checked(model, tmp_path):
    print("seed", SEED)
    path = tmp_path / "record.json"
    for number in range(4):
        draw = random.Random(f"{SEED} {number}")
        case = deciding_case(draw, draw.choice(STREAMING), may_be_late=True)
        case.template, case.most = replace(case.template, end=-1), 25
        with open_session(model, case.variant, case.template, case.layout, **case.options, record=path) as session:
            play(session, case)
        record = read_record(path)
        assert record.template.end_of_slot == END_OF_SLOT and record.schedule == case.schedule
        assert all(difference.tie for difference in replay(record, model, list(case.pixels)))
    # Versions that do not know the token read the records of other schedules.
    options = {**case.options, "schedule": "wait-2", "record": tmp_path / "plain.json"}
    plain = replace(case.template, end_of_slot=None)
    with open_session(model, case.variant, plain, case.layout, **options) as session:
        play(session, case)
    assert "end_of_slot" not in json.loads((tmp_path / "plain.json").read_text())["template"]
    assert read_record(tmp_path / "plain.json").template == plain
    data = json.loads(path.read_text())
    for changes, fault in (
        ({"schedule": "model-999"}, "slot 1 has ended before its end"),
        ({"tokens": [END_OF_SLOT] + [5] * 24}, "slot 1 goes on after its end"),
        ({"tokens": [5] * 3 + [END_OF_SLOT] + [5] * 21}, "its tokens end differently"),
        ({"end": "ended"}, "its tokens end differently"),
        ({"template": {**data["template"], "end_of_slot": None}}, "there is no end-of-slot token"),
        ({"template": {**data["template"], "end_of_slot": "x"}}, "its end-of-slot token is 'x'"),
    ):
        counts = {"counts": [2, 23], "slots": [1, 1] + [2] * 23, "tokens": [5] * 25, "schedule": "model-2"}
        counts |= {"arrived": data["arrived"][:1] * 2, "visible": data["visible"][:1] * 2, "hashes": [], "bare": False}
        counts |= {"times": data["visible"][:1] * 25, "end": "max_new_tokens"}
        path.write_text(json.dumps({**data, **counts, "complete": True, **changes}))
        with pytest.raises(InputError, match=fault):
            read_record(path)


def test_a_slot_is_over_only_when_its_token_was_read():
    """model-3, step by step: what may happen when."""
    scheduler = SlotScheduler(GROUP, "model-3", 20, 9)
    for _ in range(3):
        scheduler.arrive(last=False)
        scheduler.commit()
    scheduler.begin_slot()
    assert scheduler.may_write and not scheduler.may_begin_slot
    scheduler.request()
    assert not scheduler.may_write and not scheduler.may_begin_slot and scheduler.reads_first  # it may end the slot
    assert scheduler.read(end=False, end_of_slot=True) == 1
    assert not scheduler.may_write and scheduler.may_begin_slot  # a silent slot
    scheduler.begin_slot()
    for _ in range(3):
        assert scheduler.may_write and not scheduler.may_begin_slot
        scheduler.request()
        if scheduler.counts[-1] < 3:
            scheduler.read(end=False)
    assert scheduler.may_begin_slot and not scheduler.may_write  # the bound, whatever the third token is
    scheduler.begin_slot()
    assert not scheduler.may_write  # it may still be the end of the answer
    scheduler.read(end=False, end_of_slot=True)
    assert scheduler.may_write and not scheduler.slot_ended  # it belongs to the slot before
    scheduler.request()
    scheduler.read(end=False, end_of_slot=True)
    scheduler.arrive(last=True)
    assert scheduler.counts_before_next_clip() == [1, 3, 1]
    scheduler.limit(9)
    scheduler.commit()
    scheduler.begin_slot()
    for _ in range(3):
        scheduler.request()
    assert scheduler.complete and scheduler.may_write and not scheduler.reads_first
    scheduler.read(end=False)
    scheduler.read(end=False, end_of_slot=True)  # nothing is left to wait for: it ends the answer
    assert scheduler.done and scheduler.ended and not scheduler.pending
    assert scheduler.counts == [1, 3, 1, 2]


def test_the_limit_after_the_last_clip_counts_from_the_last_slot():
    """How far a session is behind neither shortens its answer nor makes it longer."""
    scheduler = SlotScheduler(GROUP, "model-8", 2000, 60)
    for number in range(1, 61):
        scheduler.arrive(last=number == 60)
    scheduler.limit(300)
    for _ in range(59):
        scheduler.commit()
        scheduler.begin_slot()
        assert scheduler.may_write and scheduler.max_new_tokens == 2000
        scheduler.request()
        scheduler.read(end=False, end_of_slot=True)
    scheduler.commit()
    scheduler.begin_slot()
    assert scheduler.max_new_tokens == 59 + 300
    scheduler.limit(20)
    assert scheduler.max_new_tokens == 59 + 20


def test_bad_input_is_refused(made, model):
    processor = load_processor(made[0])
    for text, fault in (
        ("two words", "not one token of the vocabulary, but"),
        ("<|unknown|>", "not one token of the vocabulary, but"),
        ("", "not one token of the vocabulary, but 0"),
        ("<|im_end|>", "part of the chat template or ends a text"),
        ("<|vision_end|>", "part of the chat template or ends a text"),
        ("<|endoftext|>", "part of the chat template or ends a text"),
    ):
        with pytest.raises(InputError, match=fault):
            make_template(processor, QUESTIONS[-1], text)
    template = make_template(processor, QUESTIONS[-1], " red")
    with pytest.raises(InputError, match="contains the end-of-slot token"):
        answer_ids(processor, template, "A red ring.")
    assert template.end_of_slot not in answer_ids(processor, template, "A blue ring.")
    # A special token in a caption is text.
    template = make_template(processor, QUESTIONS[-1], DEFAULT)
    assert template.end_of_slot not in answer_ids(processor, template, f"A {DEFAULT} ring.")

    case = deciding_case(random.Random(2), GROUP)
    with pytest.raises(InputError, match="needs an end-of-slot token"):
        open_session(model, GROUP, replace(case.template, end_of_slot=None), case.layout, **case.options)
    with pytest.raises(InputError, match="origin writes only after the whole video"):
        open_session(model, VARIANTS["origin"], case.template, case.layout, **case.options)
    plain, own = PretrainedConfig(wait_k=2), PretrainedConfig(wait_k=2, end_of_slot=DEFAULT, max_tokens_per_slot=6)
    assert [choose_schedule(None, config, "m", GROUP) for config in (plain, own)] == ["wait-2", "model-6"]
    assert [choose_schedule(text, own, "m", GROUP) for text in ("model", "model-4", "wait-1")] == [
        "model-6",
        "model-4",
        "wait-1",
    ]
    assert choose_schedule(None, own, "m", VARIANTS["origin"]) == "wait-2"
    with pytest.raises(InputError, match="trained without an end-of-slot token"):
        choose_schedule("model", plain, "m", GROUP)
    with pytest.raises(InputError, match="batch writes only after the whole video"):
        choose_schedule("model-4", own, "m", VARIANTS["batch"])
    assert model_schedule_most("model-12") == 12 and model_schedule_most("model-0") is None


def test_text_and_figures_leave_the_token_out():
    pieces = Pieces(lambda ids: "".join("ab é"[token] if token != 9 else "END" for token in ids), end_of_slot=9)
    assert "".join(map(pieces.add, [0, 9, 9, 2, 1, 9])) + pieces.rest() == "a b"
    record = SimpleNamespace(
        visible=[1.1, 2.1, 3.1, 4.1],
        tokens=[9, 1, 9, 9, 2],
        slots=[1, 2, 2, 3, 4],
        times=[1.2, 2.2, 2.4, 3.2, 4.4],
        complete=True,
        schedule="model-2",
        template=SimpleNamespace(end_of_slot=9),
    )
    completed, fed = [1.0, 2.0, 3.0, 4.0], range(4)
    found = figures(record, completed, fed)
    assert found["tokens"] == 2 and found["tokens_per_second"] == pytest.approx(1 / 2.2)
    assert found["silent_slots"] == 2 and found["missed_deadlines"] == 0  # silence is not late
    assert found["first_token_after_first_clip"] == pytest.approx(0.2)
    record.times = [2.2, 2.3, 2.4, 3.2, 4.4]
    assert figures(record, completed, fed)["missed_deadlines"] == 1  # to decide on silence too late is
    record.template.end_of_slot = None
    plain = figures(record, completed, fed)
    assert plain["silent_slots"] is None and plain["tokens"] == 5


def test_metrics_count_what_is_said():
    model, metrics = SimpleNamespace(name="g", decode=str, end_of_slot_id=9), Metrics()
    connection = SimpleNamespace(send=lambda kind, **fields: None)
    response = Response(model, None, None, lambda clip: (clip, None), lambda: 0, connection, metrics)
    for token in (9, 7, 9):
        response.token(token, 1, 12.0)
    assert response.tokens == 1 and metrics.registry.get_sample_value("qwen_vl_tokens_total", {"model": "g"}) == 1


@pytest.fixture(scope="module")
def timed(made, tmp_path_factory):
    """The videos of `made` with times: each sentence has a few seconds, and the last row has no times."""
    path = tmp_path_factory.mktemp("timed") / "train.jsonl"
    read = [json.loads(line) for line in made[1].read_text().splitlines()]
    for row in read[:-1]:
        draw, texts = random.Random(row["video_id"]), row.pop("human_caption").split(". ")
        times = sorted(draw.uniform(0, row["video_duration_in_s"]) for _ in range(2 * len(texts)))
        row["segments"] = [
            {"start": begin, "end": end, "text": text}
            for begin, end, text in zip(times[::2], times[1::2], texts, strict=True)
        ]
    path.write_text("".join(json.dumps(row) + "\n" for row in read))
    return path, read


@pytest.mark.parametrize("variant", STREAMING, ids=lambda v: v.name)
def test_training_samples_end_their_slots(made, timed, variant):
    path, read = timed
    processor, budget = load_processor(made[0]), PixelBudget(3136, 3136)
    fields = [{"place": "", "human_caption": None, "segments": None, "question": None, **row} for row in read]
    samples = StreamingDataset(
        fields, path.parent, processor, 2, variant, "wait-3", budget, 4096, max_tokens_per_slot=5, end_of_slot=DEFAULT
    )
    end = make_template(processor, QUESTIONS[-1], DEFAULT).end_of_slot
    silent = 0
    for index, row in enumerate(fields):
        sample = samples[index]
        assert sample.bad is None
        clips = int(sample.grid_thw[0])
        slots = samples.slots(index, clips, 1.0)
        labels = sample.labels[sample.labels != IGNORED].tolist()
        assert labels == [token for slot in slots for token in slot]  # in the loss, like any other token
        assert all((slot[-1:] == [end]) == (len(slot) < 5 or end in slot) for slot in slots[:-1])
        assert all(len(slot) <= 5 and end not in slot[:-1] for slot in slots[:-1]) and end not in slots[-1]
        if row["segments"] is None:  # wait-3 and the token
            assert all(len(slot) == 4 for slot in slots[:3])
        silent += sum(slot == [end] for slot in slots)
        words = [token for token in labels if token != end]
        assert words == answer_ids(processor, samples.template(index), samples.caption(index))
        assert (
            len(sample.input_ids)
            <= len(words)
            + samples.slot_ends(clips)
            + sum(len(part) for part in (samples.template(index).prompt, samples.template(index).tail))
            + len(samples.template(index).header)
            + clips * 4
        )
    assert silent
    # A caption with fewer tokens than clips: the rest of the slots are silent.
    short = [{**fields[-1], "segments": None, "human_caption": "red"}]
    one = StreamingDataset(short, path.parent, processor, 2, variant, "wait-3", budget, 4096, end_of_slot=DEFAULT)
    assert not scan(one).bad and one[0].bad is None
    clips = int(one[0].grid_thw[0])
    word = answer_ids(processor, one.template(0), "red")[:-1]
    assert len(word) < clips and one.slots(0, clips, 1.0)[:2] == [[*word, end], [end]]
    # A caption that contains the token is skipped, with the reason, and no other.
    samples = StreamingDataset(
        fields, path.parent, processor, 2, variant, "wait-3", budget, 4096, max_tokens_per_slot=5, end_of_slot=" red"
    )
    with_it = {i for i in range(len(fields)) if " red" in samples.caption(i)}
    found = {i: reason for i, reason in scan(samples).bad.items() if "contains the end-of-slot token" in reason}
    assert found.keys() == with_it and 0 < len(with_it) < len(fields)
    assert samples[min(with_it)].bad[1] == found[min(with_it)]


def test_the_page_offers_the_models_own_schedule(made):
    config = PretrainedConfig(wait_k=2, end_of_slot=DEFAULT, max_tokens_per_slot=6)
    served = ServedModel("g", "m", GROUP, config, 2.0, PixelBudget(), load_processor(made[0]))
    assert served.schedules[:2] == ["model", "wait-2"] and served.end_of_slot_id is not None
    assert [served.check_schedule(name) for name in (None, "", "model", "wait-3")] == ["model-6"] * 3 + ["wait-3"]
    plain = replace(served, config=PretrainedConfig(wait_k=2))
    assert plain.schedules[0] == "wait-2" and plain.end_of_slot_id is None
    with pytest.raises(InputError, match="trained without an end-of-slot token"):
        plain.check_schedule("model")


def test_a_merged_adapter_keeps_its_schedule(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    keys = {"streaming_variant": "group", "wait_k": 3, "end_of_slot": DEFAULT, "max_tokens_per_slot": 6}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    assert training_config(tmp_path).items() >= keys.items()


def test_eval_runs_by_the_models_own_schedule(made, tmp_path, monkeypatch, capsys):
    """In batches and in two processes that resume; verify.py confirms every token, and finds what was changed."""
    folder, log = tmp_path / "model", tmp_path / "log"
    shutil.copytree(made[0], folder)
    config = json.loads((folder / "config.json").read_text())
    end = make_template(load_processor(folder), QUESTIONS[-1], DEFAULT).end_of_slot
    more = {"streaming_variant": "overlap", "wait_k": 3, "position_rule": "largest+1"}
    more |= {"end_of_slot": DEFAULT, "max_tokens_per_slot": 4}
    (folder / "config.json").write_text(json.dumps({**config, **more}))
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("embed_tokens.weight"))
    weights[name][end] *= 4
    save_file(weights, folder / "model.safetensors", {"format": "pt"})

    given = (folder, made[1])
    finish(start(given, tmp_path / "alone", log, variant="overlap", batch_size=1, limit=3), log)
    alone = rows(tmp_path / "alone", "overlap")
    out = tmp_path / "alone/overlap_infer.json"
    made_from = json.loads(out.with_suffix(".args.json").read_text())
    assert made_from["schedule"] == "model-4" and made_from["end_of_slot"] == DEFAULT
    assert all(row["end_of_slot"] == end and "<|" not in row["result"] for row in alone)
    lengths = Counter(count for row in alone for count in row["schedule"][:-1])
    assert len(lengths) > 1 and max(lengths) <= 4
    finish(start(given, tmp_path / "batch", log, variant="overlap", batch_size=3, limit=3, schedule="model"), log)
    assert rows(tmp_path / "batch", "overlap") == alone
    # Resumes: the row that was lost is written again.
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[1:]))
    finish(start(given, tmp_path / "alone", log, variant="overlap", batch_size=1, limit=3), log)
    assert rows(tmp_path / "alone", "overlap") == alone

    monkeypatch.setattr("sys.argv", ["verify.py", str(out), "--device", "cpu"])
    with pytest.raises(SystemExit) as status:
        run(verify.main)
    total = sum(len(row["tokens"]) for row in alone)
    assert (
        status.value.code == 0 and f"{total} of {total} tokens of 3 videos are the arg-max" in capsys.readouterr().out
    )
    # The same tokens by the counts of the file: the schedule is then known in advance, and silence counts.
    finish(start(given, tmp_path / "counts", log, variant="overlap", limit=3, schedule=out), log)
    most = made_from["max_new_tokens"]
    assert [row["tokens"] for row in rows(tmp_path / "counts", "overlap")] == [row["tokens"][:most] for row in alone]
    row = json.loads(out.read_text().splitlines()[0])
    slot = next(i for i, count in enumerate(row["schedule"][:-1]) if count > 1)
    row["schedule"][slot] -= 1
    row["schedule"][slot + 1] += 1
    row["slots"] = [number for number, count in enumerate(row["schedule"], 1) for _ in range(count)]
    out.write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit) as status:
        run(verify.main)
    assert status.value.code == 1 and f"model-4: slot {slot + 1} has ended before its end" in capsys.readouterr().out
