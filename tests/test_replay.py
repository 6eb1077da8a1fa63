"""A recorded session can be replayed, and differences are reported."""

import contextlib
import json
import math
import random
import resource
import signal
import sys
import time
from dataclasses import replace

import pytest
import torch
from qwen_vl_streaming.common.errors import InputError, run
from qwen_vl_streaming.common.versions import versions
from qwen_vl_streaming.model.loading import load_model
from qwen_vl_streaming.model.prompts import clip_pixels, load_processor, make_template
from qwen_vl_streaming.replay import cli, compare, replay
from qwen_vl_streaming.sessions import open_session
from qwen_vl_streaming.sessions.record import read_record
from qwen_vl_streaming.timeline.variants import VARIANTS
from qwen_vl_streaming.video.clip_recorder import ClipRecorder, read_clips
from qwen_vl_streaming.video.frames import read_video
from sessions import play, random_case
from tiny import tiny_model

SEED = time.time_ns() % 100_000


def recorded(model, case, mode, path):
    options = {**case.options, "max_new_tokens": 12}
    with open_session(model, case.variant, case.template, case.layout, mode=mode, record=path, **options) as session:
        play(session, case)
    return read_record(path)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_replay_gives_every_token(model, variant, tmp_path):
    print("seed", SEED)
    draw = random.Random(f"{SEED} {variant.name}")
    for mode in ("serial", "fused") if variant.parallel else ("serial",):
        for _ in range(3):
            case = random_case(draw, variant, may_be_late=True)
            record = recorded(model, case, mode, tmp_path / "r.json")
            assert record.end in ("ended", "max_new_tokens")
            assert all(difference.tie for difference in replay(record, model, list(case.pixels)))


def test_a_package_that_is_not_installed_has_no_version():
    """This package, for example, when it is read from its folder: the record of a session is still written."""
    assert versions(["torch", "no-such-package"]).items() >= {"no-such-package": None}.items()
    assert torch.__version__.startswith(versions()["torch"])


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_an_interrupted_session_can_be_replayed(model, variant, tmp_path):
    print("seed", SEED)
    draw = random.Random(f"{SEED} {variant.name}")
    path = tmp_path / "r.json"
    for rounds in (0, 3, 5, 9):
        case = random_case(draw, variant)
        with open_session(
            model, variant, case.template, case.layout, record=path, **{**case.options, "schedule": "wait-2"}
        ) as session:
            for pixels in case.pixels:
                session.feed(pixels)  # none is the last
            for _ in range(rounds):
                session.step()
        assert all(difference.tie for difference in replay(read_record(path), model, list(case.pixels)))


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_the_full_pass_in_pieces(model, variant, tmp_path, monkeypatch):
    """Gives the same logits as one in a single piece."""
    print("seed", SEED)
    case = random_case(random.Random(f"{SEED} {variant.name}"), variant)
    for window in (None, (1, 3)):
        options = {**case.options, "record": tmp_path / "r.json", "window": window, "max_new_tokens": 12}
        with open_session(model, variant, case.template, case.layout, **options) as session:
            play(session, case)
        record = read_record(tmp_path / "r.json")
        visual = model.perceive(case.pixels[: len(record.counts)], case.layout.grid)
        whole = list(compare._full_pass(record, model, visual, record.counts))
        with monkeypatch.context() as patch:
            patch.setattr(compare, "ROWS", 5)
            pieces = list(compare._full_pass(record, model, visual, record.counts))
        assert [index for index, _ in pieces] == [index for index, _ in whole] == list(range(len(record.tokens)))
        for (_, one), (_, other) in zip(pieces, whole, strict=True):
            assert torch.allclose(one, other, atol=1e-4)


def test_slots_that_do_not_match_the_schedule_are_refused(model, tmp_path):
    case = random_case(random.Random(3), VARIANTS["group"], "wait-2")
    case.pixels, case.steps = torch.randn(3, *case.pixels.shape[1:]), [0, 0, 0]
    record = recorded(model, case, "serial", tmp_path / "r.json")
    moved = [record.counts[0] + 1, record.counts[1] - 1, *record.counts[2:]]
    with pytest.raises(InputError, match="3 tokens in slot 1, for which wait-2 gives 2"):
        replay(replace(record, counts=moved), model, list(case.pixels))


@pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyboardInterrupt()], ids=["failed", "stopped"])
def test_a_session_that_ends_with_pending_tokens_can_be_replayed(model, tmp_path, monkeypatch, error):
    """Slots that started because of tokens that were never read are not in its record."""
    print("seed", SEED)
    draw = random.Random(f"{SEED} {error}")
    for number in range(40):
        case = random_case(draw, draw.choice([variant for variant in VARIANTS.values() if variant.parallel]))
        options = {**case.options, "record": tmp_path / "r.json", "ahead": draw.choice([1, 2])}
        mode, left = draw.choice(["serial", "fused"]), iter(range(number % 10))
        session = open_session(model, case.variant, case.template, case.layout, mode=mode, **options)
        run = session.runner.step

        def stop(asks, run=run, left=left):
            if next(left, None) is None:
                raise error
            return run(asks)

        monkeypatch.setattr(session.runner, "step", stop)
        with contextlib.suppress(type(error)):
            play(session, case)
        session.close()
        assert all(difference.tie for difference in replay(read_record(tmp_path / "r.json"), model, list(case.pixels)))


def test_a_different_token_is_found_with_its_margin(model, tmp_path):
    case = random_case(random.Random(3), VARIANTS["group"], "wait-1")
    record = recorded(model, case, "fused", tmp_path / "r.json")
    where = len(record.tokens) // 2
    other = replace(record, tokens=[*record.tokens[:where], 150, *record.tokens[where + 1 :]])
    found = replay(other, model, list(case.pixels))
    assert [d.how for d in found[:2]] == ["serial", "full pass"]
    for difference in found[:2]:
        assert (difference.index, difference.recorded, difference.replayed) == (where, 150, record.tokens[where])
        assert difference.margin > 0
        assert f"token {where} (slot {record.slots[where]}) was 150" in str(difference)


def test_in_bfloat16_a_difference_is_a_near_tie(tmp_path):
    """Two ways of rounding a sum may give different tokens that are almost equally likely; the margin shows this."""
    print("seed", SEED)
    model = tiny_model().to(torch.bfloat16)
    draw = random.Random(SEED)
    for _ in range(4):
        case = random_case(draw, VARIANTS["overlap"], "wait-2")
        record = recorded(model, case, "fused", tmp_path / "r.json")
        assert record.model["dtype"] == "bfloat16"
        differences = replay(record, model, list(case.pixels))
        print(*differences, sep="\n")
        assert all(abs(difference.margin) < 0.25 for difference in differences)  # logits spread over about 10
        assert all(difference.margin >= 0 for difference in differences if difference.how == "full pass")


def test_other_clips_and_other_models_are_refused(model, tmp_path):
    case = random_case(random.Random(3), VARIANTS["group"], "wait-1")
    case.pixels, case.layout = torch.randn(3, 24, 1176), case.template.layout((2, 3), 2.0)
    case.steps = [0, 0, 0]
    record, clips = recorded(model, case, "serial", tmp_path / "r.json"), list(case.pixels)
    with pytest.raises(InputError, match="clip 2 differs from the recorded one"):
        replay(record, model, [clips[0], clips[1] + 1e-6, clips[2]])
    with pytest.raises(InputError, match="of 3 clips, but only 2"):
        replay(record, model, clips[:2])
    with pytest.raises(InputError, match="other weights"):
        replay(record, tiny_model(1), clips)
    assert all(difference.tie for difference in replay(record, tiny_model(), clips))


def test_an_invalid_record_is_refused(model, tmp_path):
    path = tmp_path / "r.json"
    case = random_case(random.Random(3), VARIANTS["group"], "wait-1")
    recorded(model, case, "fused", path)
    good = json.loads(path.read_text())
    for bad, match in (
        ("{", "cannot be read"),
        ("[]", "no session's record|not a session's record"),
        (json.dumps({**good, "form": 0}), "form 3"),
        (json.dumps({k: v for k, v in good.items() if k != "counts"}), "counts"),
        (json.dumps({**good, "tokens": good["tokens"][:-1]}), "contradicts itself"),
        (json.dumps({**good, "layout": {}}), "no valid template and layout"),
        *(
            (json.dumps({**good, name: value(good[name])}), f"contradicts itself: {match}")
            for name, value, match in (
                ("way", lambda _: "sideways", "variant 'group' cannot run in mode 'sideways'"),
                ("variant", lambda _: "origin", "variant 'origin' cannot run in mode 'fused'"),
                ("variant", lambda _: "other", "variant 'other' cannot run"),
                ("slots", lambda slots: slots[::-1], "the slots of its"),
                ("times", lambda times: [0.0] * len(times), "the times of its tokens run backwards"),
                ("visible", lambda visible: visible[:-1], r"it has \d+ slots, but"),
                ("hashes", lambda hashes: hashes[:-1], r"it has \d+ hashes for \d+ clips"),
                ("tokens", lambda tokens: [-1, *tokens[1:]], "tokens, slots or counts"),
                ("tokens", lambda tokens: ["a", *tokens[1:]], "tokens, slots or counts"),
                ("tokens", lambda tokens: [good["template"]["end"], *tokens[1:]], "its end is 'max_new_tokens'"),
                ("end", lambda _: "ended", "its end is 'ended'"),
                ("max_new_tokens", lambda most: most + 1, r"it has \d+ tokens of at most"),
                ("window", lambda _: [3], "its window is"),
                ("about", lambda _: None, "its end, penalty or about"),
                ("end", lambda _: 5, "its end, penalty or about|its end is 5"),
                ("model", lambda _: {}, "its model is"),
                ("template", lambda template: {**template, "prompt": "abc"}, "the template has values"),
                ("template", lambda template: {**template, "video": -1}, "the template has values"),
                ("layout", lambda layout: {**layout, "prompt": layout["prompt"] + 1}, "the template's parts have"),
                ("bare", lambda _: True, r"it has \d+ slots for \d+ clips and an empty one"),
                ("schedule", lambda _: [-1] * 9, "its schedule"),
                ("schedule", lambda _: None, "values of unexpected types"),
                ("counts", lambda _: None, "values of unexpected types"),
                ("hashes", lambda _: None, "values of unexpected types"),
                ("counts", lambda counts: [10**12, *counts[1:]], "its counts .* are not those of its"),
                ("counts", lambda counts: [*counts[:-1], 10**400], "its counts .* are not those of its|unexpected"),
                ("window", lambda _: [10**30, 3], "its window is"),
                ("penalty", lambda _: 10**30, "its end, penalty or about"),
                *(
                    ("layout", lambda layout, grid=grid: {**layout, "grid": grid}, "its grid is")
                    for grid in ([], [1], [2, 3, 4], [1.5, 10], [math.nan, 10], [True, 10])
                ),
                *(
                    ("layout", lambda layout, steps=steps: {**layout, "steps_per_clip": steps}, "its steps_per_clip")
                    for steps in (math.nan, math.inf, 1e30, True)
                ),
            )
        ),
    ):
        path.write_text(bad)
        with pytest.raises(InputError, match=match) as error:
            read_record(path)
        assert str(path) in str(error.value)

    grid = good["layout"]["grid"]
    for other in ([1000, 10], [grid[0] + 1, grid[1]], [2 * grid[0], 2 * grid[1]], [10**9, 10**9]):
        path.write_text(json.dumps({**good, "layout": {**good["layout"], "grid": other}}))
        with pytest.raises(InputError, match=f"but the record is of clips of {other[0]} x {other[1]} visual tokens"):
            replay(read_record(path), model, list(case.pixels))
    path.write_text(json.dumps({**good, "hashes": []}))
    with pytest.raises(InputError, match=r"of \d+ clips, but only 0 were given"):
        replay(read_record(path), model, [])
    path.write_text(json.dumps({**good, "template": {**good["template"], "video": 10**6}}))
    with pytest.raises(InputError, match="token 1000000, which"):
        replay(read_record(path), model, list(case.pixels))


def test_a_full_disk_is_one_line_and_keeps_the_frames_before(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    clips = [torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8) for _ in range(3)]
    keeper, none = ClipRecorder(tmp_path / "k.st"), ClipRecorder(tmp_path / "none.st")
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, limit[1]))
    try:
        for clip in clips[:2]:
            keeper.add(clip)
        with pytest.raises(InputError, match=r"k\.st cannot be written"):
            keeper.add(clips[2])
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        with pytest.raises(InputError, match=r"none\.st cannot be written"):
            none.add(clips[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert [path.name for path in tmp_path.iterdir()] == ["k.st"]
    assert torch.equal(read_clips(tmp_path / "k.st"), torch.cat(clips[:2]))


def test_the_command_reads_the_video_again(made, tmp_path, monkeypatch, capsys):
    folder, data = made
    row = json.loads(data.read_text().splitlines()[0])
    processor, model = load_processor(folder), load_model(folder, "sdpa", torch.float32).eval()
    video = read_video(row["video_path"])
    pixels, grid = clip_pixels(processor, video.frames)
    template = make_template(processor, "What happens?")
    path = tmp_path / "record.json"
    with open_session(
        model,
        VARIANTS["gap"],
        template,
        template.layout(grid, 2 * video.seconds_per_clip),
        mode="fused",
        max_new_tokens=12,
        max_clips=len(pixels),
        record=path,
        about={"question": "What happens?", "video": {"path": row["video_path"], "fps": 2.0}},
    ) as session:
        for number, clip in enumerate(pixels, 1):
            session.feed(clip, last=number == len(pixels))
        written = list(session.tokens())

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["replay", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            run(cli.main)
        said = capsys.readouterr()
        return end.value.code, said.out, said.err

    code, out, err = command(path, "--model", folder)
    assert (code, out) == (
        0,
        f"{len(written)} tokens, gap, fused, recorded in float32, replayed in float32: all the same\n",
    )
    assert torch.cuda.is_available() or err.endswith("using the CPU\n")
    assert command(path, "--model", folder, "--device", "cpu")[2] == ""
    other = json.loads(data.read_text().splitlines()[1])["video_path"]
    for arguments, match in (
        ((path, "--model", folder, "--video", other), "clip"),
        ((path, "--model", folder, "--video", ""), "folder"),
        ((path, "--model", tmp_path / "none"), "none"),
        ((tmp_path / "none.json", "--model", folder), "none.json cannot be read"),
        ((path,), "--model"),
        ((path, "--model", folder, "--tie", "nan"), "--tie nan"),
    ):
        code, _, err = command(*arguments)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and match in err, err
    tampered = json.loads(path.read_text())
    tampered["tokens"][2] += 1
    path.write_text(json.dumps(tampered))
    code, out, _ = command(path, "--model", folder)
    assert code == 1 and "token 2 (slot " in out and "margin" in out
