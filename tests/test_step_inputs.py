"""What the host does for a step of live streams: the integers that it sends, and how much work that is."""

import random
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from qwen_vl_streaming.engine.kv_cache import BLOCK_SIZE, TEXT_OFFSET, BlockTable, PagedKVCache
from qwen_vl_streaming.engine.step_inputs import StepInputs
from qwen_vl_streaming.engine.step_request import BatchSlot, StepRequest
from qwen_vl_streaming.engine.stream_state import DueRows, StreamState
from qwen_vl_streaming.sessions.session_pool import SessionPool
from qwen_vl_streaming.timeline.plan import Window
from qwen_vl_streaming.timeline.timeline import CLIP, HEADER
from qwen_vl_streaming.timeline.variants import VARIANTS
from tiny import random_template
from torch.utils._python_dispatch import TorchDispatchMode

SEED = time.time_ns() % 100_000
CONFIG = SimpleNamespace(num_key_value_heads=1, num_attention_heads=3, hidden_size=12, num_hidden_layers=1)
SLOTS, CHUNKS, WIDTH, TEXT_CAPACITY = 4, 5, 6, 150


def made_slots(draw: random.Random, cache: PagedKVCache) -> tuple[list[BatchSlot], list[StreamState]]:
    """A stream in each slot, some with long answers, so that its text run has started to reuse its blocks."""
    slots, states = [], []
    for index in range(SLOTS):
        template = random_template(draw)
        layout = template.layout((draw.randint(1, 3), draw.randint(1, 3)), 2.0)
        cache.allocate(index, 3 * BLOCK_SIZE, 3 * BLOCK_SIZE)
        blocks = cache.allocated[index]
        runs = BlockTable(cache, blocks[:3], 0, layout.prompt), BlockTable(cache, blocks[3:], TEXT_OFFSET, 9)
        slots.append(BatchSlot(index, layout, *runs))
        states.append(StreamState(VARIANTS["group"], template, layout, Window(2, 40)))
        for _ in range(draw.randint(1, 60)):
            states[-1].feed_clip(False)
        for _ in range(draw.choice([3, 900])):
            states[-1].stream.write(draw.randrange(150))
        states[-1].feed_text()
    return slots, states


def plain_index(run: BlockTable, index: int) -> int:
    """Where token `index` of a run is in the cache, counted block by block."""
    blocks, kept, place = [*map(int, run.blocks)], run.kept, 0
    for _ in range(index // BLOCK_SIZE):
        place = place + 1 if place + 1 < len(blocks) else kept
    return blocks[place] * BLOCK_SIZE + index % BLOCK_SIZE


def test_each_row_of_a_step_is_sent():
    """Row by row, for steps of random requests with as many decode rows or more."""
    print("seed", SEED)
    draw = random.Random(SEED)
    cache = PagedKVCache(CONFIG, SLOTS, SLOTS * 6, 6, torch.float32, "cpu")
    slots, states = made_slots(draw, cache)
    for _ in range(30):
        requests, room = [], CHUNKS
        for slot, state in draw.sample([*zip(slots, states, strict=True)], draw.randint(0, SLOTS)):
            prefill, decode = DueRows.empty(), DueRows.empty()
            if draw.random() < 0.5:
                prefill = state.feed_clip(False).split(room * WIDTH)[0]
            if draw.random() < 0.7:
                state.stream.write(draw.randrange(150))
                decode = state.feed_text()
            requests.append(StepRequest(slot, decode, prefill, draw.random() < 0.5, draw.randrange(900)))
            room -= requests[-1].chunks(WIDTH)
        decode_rows = draw.randint(max(1, len(requests)), SLOTS)
        inputs = StepInputs(SLOTS, decode_rows, CHUNKS, WIDTH, TEXT_CAPACITY, torch.device("cpu"))
        table, of_rows, choices = (part.numpy() for part in inputs.split(inputs.pack(requests)))
        expected = {}
        begin, of_chunks = decode_rows, []
        for decode_row, request in enumerate(requests):
            slot = request.batch_slot
            given = [*zip(range(begin, begin + len(request.prefill)), request.prefill.table.T.tolist(), strict=True)]
            given += [(decode_row, row) for row in request.decode.table.T.tolist()]
            own = -(-len(request.prefill) // WIDTH)
            for at, row in given:
                *place, index, seen_visual, seen_text, visual, text, token, text_row, clip_row, part = row
                cached = plain_index(slot.text if part >= HEADER else slot.visual, index)
                assert text_row == (index if part >= HEADER else -1) and (clip_row >= 0) == (part == CLIP)
                text_row = text_row % (TEXT_CAPACITY + 1) if part >= HEADER else -1
                expected[at] = [*place, cached, seen_visual, seen_text, visual, text, token, text_row, clip_row]
            for at in range(begin + len(request.prefill), begin + own * WIDTH):  # idle rows see what the last one sees
                last = begin + len(request.prefill) - 1
                expected[at] = [0, 0, 0, 0, *expected[last][4:8], 0, -1, -1]
            of_chunks += [slot.index] * own
            begin += own * WIDTH
            newest = given[-1][0] if given else -1
            assert choices[:, decode_row].tolist() == [newest, request.sample, request.next_row % (TEXT_CAPACITY + 1)]
        for at in range(table.shape[1]):
            assert table[:, at].tolist() == expected.get(at, [0, 0, 0, 0, 1, 0, 0, 0, 0, -1, -1]), at
        assert of_rows[: len(requests)].tolist() == [request.batch_slot.index for request in requests]
        assert len({*of_rows[:decode_rows]} & {*range(SLOTS)}) == decode_rows  # no two write the same slot
        assert of_rows[decode_rows:].tolist() == of_chunks + [0] * (CHUNKS - len(of_chunks))
        assert (choices[:, len(requests) :] == np.array([[-1], [0], [0]])).all()


def test_a_number_and_an_array_have_the_same_index_in_the_cache():
    print("seed", SEED)
    draw = random.Random(SEED)
    for _ in range(50):
        count, kept = draw.randint(2, 6), draw.randint(1, 500)
        cache = PagedKVCache(CONFIG, 1, count, count, torch.float32, "cpu")
        one, all_at_once = (BlockTable(cache, draw.sample(range(1, count + 1), count), 0, kept) for _ in range(2))
        all_at_once.blocks = one.blocks
        first = draw.randrange(3000)
        index = np.arange(first, first + draw.randint(1, 300))
        found = [int(one.cache_index(each)) for each in index.tolist()]
        assert found == all_at_once.cache_index(index).tolist() == [plain_index(one, each) for each in index.tolist()]
        assert one.last_block == all_at_once.last_block


class Counter(TorchDispatchMode):
    """Counts the tensor operations inside."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_session_that_decodes_adds_no_tensor_operation_to_a_step(model, name, monkeypatch):
    """Each takes 5 µs on the host, and many sessions soon take longer than the device."""
    variant, counts = VARIANTS[name], []
    template = replace(random_template(random.Random(3)), end=-1)
    layout = template.layout((2, 3), 2.0)
    for sessions in (2, 9):
        with SessionPool(model, sessions, layout, max_clips=4, max_new_tokens=90, window=(2, 40)) as pool:
            mode = "fused" if variant.parallel else "serial"
            for _ in range(sessions):
                session = pool.open(variant, template, layout, mode=mode, schedule="wait-60")
                session.feed(torch.randn(24, 1176), last=True)
            while not all(session.written for session in pool.sessions):
                pool.step()
            monkeypatch.setattr(pool.runner, "_step", lambda *_: None)
            with Counter() as counter:
                assert len(pool.step()) == sessions
            counts.append(counter.count)
    assert counts[0] == counts[1] < 60
