"""The planner of sft.sh: what it chooses for which GPUs, what it predicts and refuses, and that its flags train the
same steps."""

import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.utils import send_to_device
from media import make_video
from program_server import with_server
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.errors import run as run_program
from qwen_vl_streaming.devices import Devices
from qwen_vl_streaming.model.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from qwen_vl_streaming.model.prompts import load_processor
from qwen_vl_streaming.model.released import released_config
from qwen_vl_streaming.timeline.variants import VARIANTS
from qwen_vl_streaming.video.pixel_budget import PixelBudget
from qwenvl import device, run_checks, train
from qwenvl import headers as headers_module
from qwenvl.arguments import ModelArguments, check_checkpoint_layers
from qwenvl.batches import collate, collate_for_trainer, first_fit, pack
from qwenvl.data import StreamingDataset
from qwenvl.headers import Headers
from qwenvl.planner import __main__ as program
from qwenvl.planner import gpus as machine
from qwenvl.planner.constants import GIB
from qwenvl.planner.gpus import find_card, parse_gpus
from qwenvl.planner.host import available_memory, limits
from qwenvl.planner.lengths import assumed_lengths, find_lengths
from qwenvl.planner.memory import estimate, saved_per_token
from qwenvl.planner.nodes import agree
from qwenvl.planner.plan import EQUAL, PAPER_SAMPLES, Given, choose, command_line, evaluate, plans, step_samples, worth
from qwenvl.planner.request import PLANNED, Request
from qwenvl.planner.settings import Settings, configurations
from qwenvl.planner.shape import find_shape
from qwenvl.planner.speed import predict, sample_flops
from qwenvl.planner.table import rows
from qwenvl.prescan import scan
from qwenvl.rows import read_rows
from qwenvl.training_arguments import SftArguments
from tiny import tiny_model
from training import finish, flags, free_port, history, start
from waiting import until

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "code/qwen-vl-finetune/scripts/sft.sh"
ZERO = {zero.file: zero for zero in configurations()}
LENGTHS = assumed_lengths(8192)
MIXED = replace(LENGTHS, tokens=(*range(1_700, 3_400, 17), 8_192), note="one is long")


@pytest.fixture(scope="module")
def shapes():
    arguments = {
        "full": ModelArguments(model_name_or_path=str(ROOT)),
        "LoRA": ModelArguments(str(ROOT), lora_enable=True),
    }
    return {
        (size, how): find_shape(released_config(size), arguments[how]) for size in ("3B", "7B") for how in arguments
    }


@pytest.mark.parametrize("size, count, zero, samples, row, recomputed, compiled, gib, tokens", [
    ("3B", 4, "zero3.json", 1, 0, 36, False, 16.7, 4_314),
    ("7B", 2, "zero3.json", 1, 0, 0, False, 79.0, 5_037),
    ("7B", 2, "zero3.json", 4, 11904, 0, True, 115.9, 19_098),
    ("3B", 1, "zero1.json", 4, 11904, 0, True, 92.3, 19_922),
    ("3B", 1, "zero2.json", 4, 11904, 0, True, 92.6, 18_768),
    ("3B", 2, "zero1.json", 4, 11904, 0, True, 72.0, 40_601),
    ("3B", 2, "zero2.json", 4, 11904, 0, True, 69.5, 39_625),
    ("3B", 4, "zero1.json", 4, 11904, 0, True, 63.0, 83_044),
    ("3B", 4, "zero2.json", 4, 11904, 0, True, 58.8, 74_101),
    ("7B", 2, "zero1.json", 4, 11904, 0, True, 134.0, 19_689),
    ("7B", 2, "zero2.json", 4, 11904, 0, True, 127.9, 18_916),
    ("7B", 4, "zero1.json", 4, 11904, 0, True, 109.0, 42_854),
    ("7B", 4, "zero2.json", 4, 11904, 0, True, 99.4, 40_756),
])  # fmt: skip
def test_predictions_are_what_was_measured(shapes, size, count, zero, samples, row, recomputed, compiled, gib, tokens):
    settings = Settings(ZERO[zero], samples, row, PAPER_SAMPLES // samples, recomputed, compiled)
    memory = estimate(shapes[size, "full"], settings, LENGTHS, count)
    assert memory.peak / GIB == pytest.approx(gib, rel=0.10)
    assert predict(shapes[size, "full"], settings, LENGTHS, parse_gpus(f"{count}xH200")).tokens == pytest.approx(
        tokens, rel=0.15
    )


LONG = replace(LENGTHS, tokens=(7_519,), visual=81 * 91)


@pytest.mark.parametrize("size, how, zero, recomputed, gib, tokens", [
    ("7B", "LoRA", "zero3_offload.json", 14, 21.9, 6_526),
    ("3B", "full", "zero3_offload.json", 24, 12.7, 6_514),
    ("3B", "LoRA", "zero1.json", 33, 14.0, 13_278),
])  # fmt: skip
def test_predictions_for_small_gpus(shapes, size, how, zero, recomputed, gib, tokens):
    """Measured with videos of 80 s, and four samples a step. One interval between steps was timed."""
    settings, gpus = Settings(ZERO[zero], 1, 7552, 4, recomputed, True), parse_gpus("H200")
    assert estimate(shapes[size, how], settings, LONG, 1).peak / GIB == pytest.approx(gib, rel=0.10)
    assert predict(shapes[size, how], settings, LONG, gpus).tokens == pytest.approx(tokens, rel=0.12)


@pytest.mark.parametrize("size", ["3B", "7B"])
def test_flops_are_those_of_the_benchmark(shapes, size, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "code/benchmarks")
    from training import __file__ as tests_own

    monkeypatch.delitem(sys.modules, "training")
    try:
        import training as benchmark

        assert benchmark.__file__ != tests_own
        with torch.device("meta"):
            model = Qwen2_5_VLForConditionalGeneration(released_config(size, None))
        timeline = benchmark.make_timeline(
            VARIANTS["batch"], benchmark.LAYOUT, benchmark.answer_counts(VARIANTS["batch"])
        )
        expected = benchmark.flops(timeline, model)
    finally:
        sys.modules.pop("training")
    tokens = len(timeline.rows)
    assert sample_flops(shapes[size, "full"], tokens, 30 * 91, 117, 91)[0] == pytest.approx(expected, rel=1e-3)


MACHINES = [
    *(f"{count}x{card}" for count in (1, 2, 4, 8) for card in ("L4", "A100-40GB", "L40S-48GB", "H100-80GB", "H200")),
    "RTX4080",
    "4xRTX3090",
    "8xB200",
]


@pytest.mark.parametrize("how", ["full", "LoRA"])
@pytest.mark.parametrize("size", ["3B", "7B"])
def test_every_machine_has_a_plan_that_fits(shapes, size, how):
    """The optimizer's step stays the paper's, and nothing is planned that is worth less than what also fits."""
    for machine_name in MACHINES:
        gpus, shape = parse_gpus(machine_name), shapes[size, how]
        for lengths in (LENGTHS, MIXED):
            plan = choose(shape, lengths, gpus, Given())
            settings = plan.settings
            assert plan.fits and plan.needed <= gpus.memory, machine_name
            assert settings.samples * settings.accumulation == PAPER_SAMPLES
            assert not settings.pack_tokens or settings.pack_tokens >= lengths.longest
            assert all(worth(other) * EQUAL <= worth(plan) for other in plans(
                shape, lengths, gpus, Given()) if other.fits)  # fmt: skip


@pytest.mark.parametrize("size, how, machine_name, stages, offload, recomputes", [
    ("3B", "full", "H200", (1, 2), False, False),
    ("3B", "full", "H100-80GB", (1, 2), False, False),
    ("3B", "full", "L4", (3,), True, None),
    ("3B", "full", "8xH100-80GB", (1, 2), False, False),
    ("7B", "full", "4xH200", (1, 2), False, False),
    ("7B", "full", "H100-80GB", (3,), True, None),
    ("3B", "LoRA", "RTX4080", (1, 2), False, None),
    ("7B", "LoRA", "L4", (1, 2), False, True),
    ("7B", "LoRA", "H100-80GB", (1, 2), False, False),
    ("7B", "LoRA", "RTX4080", (3,), True, True),
])  # fmt: skip
def test_what_is_chosen(shapes, size, how, machine_name, stages, offload, recomputes):
    settings = choose(shapes[size, how], LENGTHS, parse_gpus(machine_name), Given()).settings
    assert settings.zero.stage in stages and settings.zero.offload == offload
    assert recomputes is None or (settings.checkpointed > 0) == recomputes
    assert settings.compiled


def test_flash_attention_trains_without_packing_and_compilation(shapes, tmp_path, monkeypatch):
    """Also a run that an earlier version has planned and finished."""
    words = f"--variant batch --attention flash_attention_2 --output_dir {tmp_path}"
    arguments = {"arguments": {"compile_layers": True}, "finished": "now"}
    (tmp_path / "run.json").write_text(json.dumps(arguments))
    request = given_by(words, monkeypatch)
    assert request.resumed()["compile_layers"] is False
    assert given_by(words.replace("flash_attention_2", "auto"), monkeypatch).resumed()["compile_layers"] is True
    settings = choose(shapes["3B", "full"], LENGTHS, parse_gpus("H200"), request.choices()).settings
    assert not settings.compiled and not settings.pack_tokens


@pytest.mark.parametrize("size, how", [("3B", "full"), ("7B", "full"), ("7B", "LoRA")])
def test_more_memory_is_never_worth_less(shapes, size, how):
    for count in (1, 2, 8):
        gpus, before = parse_gpus(f"{count}xH100"), 0.0
        for gib in range(16, 192, 8):
            try:
                plan = choose(shapes[size, how], LENGTHS, replace(gpus, memory=gib * GIB), Given())
            except InputError:
                assert not before, "more memory is refused where less was not"
                continue
            assert worth(plan) >= EQUAL * before
            before = max(before, worth(plan))


@pytest.mark.parametrize("size, kib", [("3B", 34.8), ("7B", 60.5)])
def test_dropout_of_adapters_is_saved_for_the_backward_pass(shapes, size, kib):
    with_dropout = find_shape(released_config(size), ModelArguments(str(ROOT), lora_enable=True, lora_dropout=0.1))
    more = saved_per_token(with_dropout, True) - saved_per_token(shapes[size, "LoRA"], True)
    assert more / 1024 == pytest.approx(kib, rel=0.01)


def test_memory_falls_with_recomputation_and_processes(shapes):
    shape, gpus = shapes["3B", "full"], parse_gpus("4xH200")
    for zero in ZERO.values():
        for compiled in (True, False):
            needed = [
                evaluate(Settings(zero, 4, 12288, 4, layers, compiled), shape, LENGTHS, gpus).needed
                for layers in range(1, shape.layers + 1)
            ]
            assert needed == sorted(needed, reverse=True)
        each = [estimate(shape, Settings(zero, 1, 0, 16, 0, False), LENGTHS, count).peak for count in (1, 2, 4, 8)]
        assert each == sorted(each, reverse=True)


@pytest.mark.parametrize("field, flag, value", [
    ("zero", "deepspeed", ZERO["zero2.json"]), ("zero", "deepspeed", ZERO["zero3.json"]),
    ("samples", "per_device_train_batch_size", 1), ("samples", "per_device_train_batch_size", 8),
    ("accumulation", "gradient_accumulation_steps", 3), ("pack_tokens", "pack_tokens", 0),
    ("pack_tokens", "pack_tokens", 8192), ("checkpointing", "gradient_checkpointing", True),
    ("checkpointing", "gradient_checkpointing", False), ("checkpointed", "checkpoint_layers", 5),
    ("compiled", "compile_layers", False),
])  # fmt: skip
def test_a_given_flag_wins(shapes, field, flag, value):
    given = Given(**{field: value}, flags={field: f"--{flag} {value}"})
    settings = choose(shapes["3B", "full"], LENGTHS, parse_gpus("4xH200"), given).settings
    found = settings.flags(36)[flag]
    assert found == (value.file if field == "zero" else value)
    samples = settings.samples * settings.accumulation
    assert samples == (3 if field == "accumulation" else PAPER_SAMPLES)
    if field == "pack_tokens" and value:
        assert settings.samples * LENGTHS.longest <= value


def given_by(words: str, monkeypatch, checkpoint="none") -> Request:
    monkeypatch.delenv("DEEPSPEED_CONFIG", raising=False)
    return Request.parse([f"--model_name_or_path={checkpoint}", *words.split()])


@pytest.mark.parametrize("gpus, words, reasons", [
    ("2xFoo", "", ["'Foo' is not known", "H100"]),
    ("8xH100-81GB", "", ["H100 has 80GB or 94GB or 96GB"]),
    ("0xH100", "", ["between 1 and 1024"]),
    ("8x", "", ["COUNTxNAME-MEMORY"]),
    ("", "", ["COUNTxNAME-MEMORY"]),
    ("L4", "--deepspeed zero1.json", ["zero1.json needs", "the nearest that fits is", "zero3_offload.json"]),
    ("L4", "--deepspeed zero1.json --gradient_checkpointing True", ["needs", "nearest that fits"]),
    ("4xH200", "--per_device_train_batch_size 5", ["does not divide the 16 samples"]),
    ("4xH200", "--per_device_train_batch_size 0", ["must be above 0"]),
    ("4xH200", "--checkpoint_layers 3 --gradient_checkpointing False", ["contradicts"]),
    ("4xH200", "--checkpoint_layers 99", ["the model has 36 layers"]),
    ("4xH200", "--deepspeed nothing.json", ["nothing.json"]),
    ("4xH200", "--pack_tokens many", ["invalid int value: 'many'"]),
    ("4xH200", "--variant batch --attention flash_attention_2 --pack_tokens 6144", ["packed"]),
    ("4xH200", "--variant batch --attention flash_attention_2 --compile_layers True", ["does not work with"]),
    ("RTX4080", "--model_name_or_path Qwen/Qwen2.5-VL-7B-Instruct --max_steps 1 --gradient_accumulation_steps 1 "
     "--deepspeed zero2.json --lora_enable True --lora_r 512", ["needs", "the nearest that fits"]),
])  # fmt: skip
def test_refusals(gpus, words, reasons, monkeypatch, capsys):
    """In one line, with status 2, before a model loads."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("DEEPSPEED_CONFIG", raising=False)
    first = ["--model_name_or_path", "Qwen/Qwen2.5-VL-3B-Instruct", "--train_data", "nowhere.jsonl"]
    monkeypatch.setattr(sys, "argv", ["planner", "0", "1", *first, *words.split(), "--gpus", gpus])
    with pytest.raises(SystemExit) as ended:
        run_program(program.main)
    said = capsys.readouterr()
    assert (ended.value.code, said.out, said.err.count("\n")) == (2, "", 1), said
    assert all(reason in said.err for reason in reasons), said.err


def test_a_step_keeps_its_samples_in_what_is_proposed(shapes):
    """Where the batch and the accumulation are given, the nearest settings have the same product."""
    given = Given(samples=64, accumulation=2, flags={"samples": "--b 64", "accumulation": "--a 2"})
    with pytest.raises(InputError) as refused:
        choose(shapes["3B", "full"], LENGTHS, parse_gpus("L4"), given)
    said = str(refused.value)
    assert said.startswith("--b 64 --a 2 needs ") and ": the nearest that fits is " in said and "--no_plan" in said
    batch, accumulation = re.search(r"batch_size (\d+) --gradient_accumulation_steps (\d+)", said).groups()
    assert int(batch) * int(accumulation) == 128


def test_one_meaning_of_the_batch_size(tmp_path, monkeypatch):
    """On a CPU, where nothing is planned, as on GPUs: 16 samples a step unless asked."""
    monkeypatch.setattr("qwenvl.training_arguments.choose_training_device", lambda training: "")
    for words, steps in (({}, 16), ({"per_device_train_batch_size": 8}, 2), ({"gradient_accumulation_steps": 3}, 3)):
        assert SftArguments(str(tmp_path), report_to="none", bf16=False, **words).gradient_accumulation_steps == steps
        given = given_by(" ".join(f"--{name} {value}" for name, value in words.items()), monkeypatch).choices()
        assert step_samples(given) == steps * words.get("per_device_train_batch_size", 1)
    with pytest.raises(InputError, match="--per_device_train_batch_size 5 does not divide the 16 samples of a step"):
        SftArguments(str(tmp_path), per_device_train_batch_size=5)


def test_a_run_that_resumes_keeps_its_accumulation(made, tmp_path, monkeypatch):
    """The default was 16 forward passes once, and now follows from the batch."""
    monkeypatch.delenv("RANK", raising=False)
    words = ["--per_device_train_batch_size", "2", "--output_dir", str(tmp_path), "--use_cpu", "True", "--bf16=False"]

    def accumulation(*more):
        command = ["sft.sh", "--model_name_or_path", str(made[0]), "--train_data", str(made[1]), *words, *more]
        monkeypatch.setattr(sys, "argv", command)
        return train.parse()[-1].gradient_accumulation_steps

    record = {"arguments": {"gradient_accumulation_steps": 16}, "finished": None}
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert accumulation() == 8  # it has no checkpoint, and starts anew
    (tmp_path / "run.json").write_text(json.dumps({**record, "finished": "now"}))
    assert accumulation() == 16 and accumulation("--gradient_accumulation_steps", "4") == 4


@pytest.mark.parametrize("words, states", [
    ("", 8), ("--optim adamw_8bit", 2), ("--optim paged_adamw_8bit", 2), ("--optim adafactor", 4), ("--optim sgd", 0),
    ("--optim sgd --optim_args momentum=0.9", 4), ("--optim sgd --optim_args momentum=0", 0),
    ("--optim rmsprop --optim_args centered=True,momentum=0.5", 12), ("--optim lion_32bit", 4),
])  # fmt: skip
def test_memory_follows_the_optimizer(shapes, monkeypatch, words, states):
    given = given_by(words, monkeypatch).choices()
    assert given.states == states
    both = (Settings(ZERO["zero1.json"], 1, 0, 16, 0, True, states=size) for size in (8.0, given.states))
    peaks = [estimate(shapes["3B", "full"], settings, LENGTHS, 1).step for settings in both]
    saved = sum(peaks[0].values()) - sum(peaks[1].values())
    assert saved == pytest.approx((8 - states) * shapes["3B", "full"].trained)


def test_an_optimizer_of_unknown_memory_is_refused(monkeypatch):
    with pytest.raises(InputError, match=r"--optim galore_adamw: the planner does not know its memory: .*--no_plan"):
        given_by("--optim galore_adamw", monkeypatch).choices()


@pytest.mark.parametrize("files, left", [
    ({"proc/self/cgroup": "0::/job\n", "job/memory.max": "1000", "job/memory.current": "700",
      "job/memory.stat": "anon 1\ninactive_file 200\n", "memory.max": "900", "memory.current": "100",
      "memory.stat": "inactive_file 0\n"}, [500, 800]),
    ({"proc/self/cgroup": "0::/job\n", "job/memory.max": "max", "job/memory.current": "7", "job/memory.stat": ""}, []),
    ({"proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/a/b\n", "memory/a/memory.limit_in_bytes": "50",
      "memory/a/memory.usage_in_bytes": "60", "memory/a/memory.stat": "total_inactive_file 5\n"}, [0]),
    ({}, []),
])  # fmt: skip
def test_memory_limits_of_a_container(tmp_path, files, left):
    for name, text in files.items():
        path = tmp_path / (name if name.startswith("proc") else f"sys/fs/cgroup/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert limits(tmp_path) == left
    assert available_memory(tmp_path) <= min([*left, 2**60])


def on_nodes(*looks, decide=sum, timeout=20, found=None):
    """What `agree` returns or raises on each node."""
    port, found = free_port(), [None] * len(looks) if found is None else found

    def node(rank):
        try:
            found[rank] = agree(rank, len(looks), "127.0.0.1", port, looks[rank], decide, timeout=timeout)
        except InputError as error:
            found[rank] = str(error)

    with ThreadPoolExecutor(len(looks)) as pool:
        list(pool.map(node, range(len(looks))))
    return found


def test_nodes_follow_the_plan_of_node_0(monkeypatch):
    monkeypatch.setattr("qwenvl.planner.nodes.signal.signal", lambda *_: None)  # not in threads
    assert on_nodes(lambda: 3, lambda: 4, lambda: 5) == [12, 12, 12]

    def busy():
        raise InputError("a GPU cannot be used")

    assert on_nodes(lambda: 1, busy) == ["node 1: a GPU cannot be used"] * 2
    assert on_nodes(lambda: 1, lambda: 1, decide=lambda found: busy()) == ["a GPU cannot be used"] * 2
    # The others are told, of its own error too, and a plan may take longer than they wait for each other.
    assert on_nodes(busy, lambda: 1) == ["node 0: a GPU cannot be used"] * 2
    monkeypatch.setattr("qwenvl.planner.nodes.BEAT", 0.1)
    monkeypatch.setattr("qwenvl.planner.nodes.SILENCE", 3.0)  # a machine may pause for a second
    assert on_nodes(lambda: 1, lambda: 2, decide=lambda found: time.sleep(3.3) or 7, timeout=3) == [7, 7]
    monkeypatch.setattr("qwenvl.planner.nodes.SILENCE", 0.5)
    monkeypatch.setattr("qwenvl.planner.nodes.BEAT", 60)
    told = [None, None]
    first, second = on_nodes(lambda: 1, lambda: 2, decide=lambda _: until(lambda: told[1]) and 7, timeout=3, found=told)
    assert second.startswith("node 0 has stopped planning: no sign of life for 0 s: see what it says")
    assert "no answer" not in second and first == 7
    with pytest.raises(InputError, match=r"no answer for 0 s \(node 1\): run the same command on every node"):
        agree(0, 2, "127.0.0.1", free_port(), lambda: 1, sum, timeout=0.2)


def test_a_node_says_what_it_waits_for(monkeypatch, capsys):
    """Also before it has reached node 0."""
    monkeypatch.setattr("qwenvl.planner.nodes.NOTICE", 0.1)
    port = free_port()
    with pytest.raises(InputError, match="the nodes cannot agree on a plan"):
        agree(1, 2, "127.0.0.1", port, lambda: 1, sum, timeout=2)
    assert capsys.readouterr().err.count(f"planning: waiting for node 0 at 127.0.0.1:{port}\n") == 1

    def refused():
        raise InputError("--pack_tokens many")

    with pytest.raises(InputError, match=r"^node 0: --pack_tokens many$"):
        agree(0, 3, "127.0.0.1", free_port(), refused, sum, timeout=2)
    assert "planning: waiting for node 1, node 2, to tell them: --pack_tokens many\n" in capsys.readouterr().err


def test_flags_that_a_node_refuses_are_agreed_on(monkeypatch):
    """As a node that fails before the others meet it would leave them waiting."""
    monkeypatch.setattr("qwenvl.planner.nodes.agree", lambda node, nodes, address, port, look, decide: look())
    monkeypatch.setattr(device, "look", lambda environment: Devices(2, bfloat16=True))
    words = ["--node", "0", "127.0.0.1", "1", "--pack_tokens", "many"]
    monkeypatch.setattr(sys, "argv", ["planner", "2", "2", *words])
    with pytest.raises(InputError, match="invalid int value: 'many'") as refused:
        program.plan()
    assert any(entry.name == "look" for entry in refused.traceback)


def test_the_least_memory_of_all_nodes_is_planned_for():
    large, small = replace(parse_gpus("4xH100"), here=True), replace(parse_gpus("2xH100"), memory=60 * GIB, here=True)
    gpus = machine.all_nodes([large, small])
    assert (gpus.count, gpus.nodes, gpus.memory, gpus.describe()) == (
        6, 2, 60 * GIB, "6 x H100 on 2 nodes, 60.0 GiB free"
    )  # fmt: skip
    with pytest.raises(InputError, match="the GPUs of the nodes differ: H100 on node 0, L4 on node 1"):
        machine.all_nodes([large, parse_gpus("L4")])


def test_memory_too_small_for_anything(shapes):
    with pytest.raises(
        InputError, match=r"too little .* 8\.3B parameters, which needs [\d.]+ GiB .* --lora_enable True"
    ):
        choose(shapes["7B", "full"], LENGTHS, replace(parse_gpus("L4"), memory=2 * GIB), Given())


@pytest.mark.parametrize("name, card", [
    ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA GH200 480GB", "GH200"), ("NVIDIA GeForce RTX 4090", "RTX4090"),
    ("NVIDIA L40S", "L40S"), ("NVIDIA L4", "L4"), ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA A10G", "A10"),
    ("NVIDIA RTX 6000 Ada Generation", "RTX6000Ada"), ("Tesla V100-SXM2-32GB", None),
])  # fmt: skip
def test_cards_by_the_drivers_name(name, card):
    assert getattr(find_card(name), "name", None) == card


def test_gpus_that_others_use(monkeypatch, shapes):
    """One in exclusive mode is refused in one line, and memory that others hold is named."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def busy(index):
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "mem_get_info", busy)
    with pytest.raises(InputError, match=r"^a GPU .* \(CUDA error: all .* busy or unavailable\): .*nvidia-smi") as said:
        machine.gpus_here(1)
    assert "\n" not in str(said.value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (2 * GIB, 22 * GIB))
    with pytest.raises(InputError, match=r"L4, 2.0 GiB free: .*other processes use 20.0 GiB of one: end them"):
        choose(shapes["3B", "full"], LENGTHS, machine.gpus_here(1), Given())
    assert (here := machine.gpus_here(1)).host_link == parse_gpus("L4").host_link == parse_gpus("H200").host_link / 2
    assert (here.rate, here.link, here.nodes) == (parse_gpus("L4").rate, parse_gpus("L4").link, 1)


def test_gpus_that_differ_are_refused(monkeypatch):
    names = ["NVIDIA H100 80GB HBM3", "NVIDIA L4"]
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="3 processes on a machine with 2 GPUs"):
        machine.gpus_here(3)
    with pytest.raises(InputError, match=r"differ .*CUDA_VISIBLE_DEVICES"):
        machine.gpus_here(2)


def test_processes_that_differ_are_refused(monkeypatch):
    """Those of other nodes: the same check on all processes."""

    class Training:
        device, deepspeed, activation_checkpointing = torch.device("cpu"), None, False
        per_device_train_batch_size, gradient_accumulation_steps = 4, 4

    class Data:
        pack_tokens = 12288

    for change, said in (
        (None, ""),
        (("GPU", "L4"), "differ in GPU"),
        (("--pack_tokens", 8192), "12288 on the first, 8192"),
    ):
        monkeypatch.setattr(
            run_checks, "gather_object", lambda mine, change=change: [*mine, mine[0] | dict([change] if change else [])]
        )
        if not said:
            run_checks.check_same_machines(ModelArguments(str(ROOT)), Data, Training)
            continue
        with pytest.raises(InputError, match=said):
            run_checks.check_same_machines(ModelArguments(str(ROOT)), Data, Training)


def test_lengths_come_from_headers(made):
    """They are upper bounds, close to the real ones, and any batch fits into the row."""
    checkpoint, data = made
    budget = PixelBudget(3136, 3136)
    samples = StreamingDataset(
        read_rows(data), ROOT, load_processor(checkpoint), 2, VARIANTS["group"], "wait-3", budget, 4096
    )
    headers = Headers()
    lengths = find_lengths(samples, headers)
    real = [len(samples[index].input_ids) for index in range(len(samples))]
    assert len(lengths.tokens) == len(headers.headers) == len(real) == lengths.rows
    assert all(a <= b <= a + 8 for a, b in zip(real, lengths.tokens, strict=True))  # within one clip of 4 tokens
    for count in (1, 2, 4, 8):
        assert lengths.row(count) % 128 == 0
        assert len(pack([samples[index] for index in range(count)], lengths.row(count))) == 1


def test_large_data_are_planned_from_a_sample(made, monkeypatch):
    """The row holds a sample that was not read, of any length, and the pre-scan reads the rest."""
    monkeypatch.setattr("qwenvl.planner.lengths.MOST_READ", 3)
    samples = StreamingDataset(
        read_rows(made[1]), ROOT, load_processor(made[0]), 2, VARIANTS["group"], "wait-3", PixelBudget(3136, 3136), 4096
    )
    headers = Headers()
    lengths = find_lengths(samples, headers)
    assert (len(headers.headers), lengths.rows, len(lengths.tokens), lengths.longest) == (3, 8, 4, 4096)
    assert lengths.row(1) == 4096 and "3 headers read at random, and one sample of 4,096 tokens" in lengths.note
    assert lengths.row(2) >= 4096 + lengths.descending[1]
    assert not scan(samples, known=headers).bad and len(headers.headers) == 8


def test_the_longest_samples_of_heavy_tailed_data_fit_into_one_row(shapes):
    """Any batch is one row, although 5,000 of 5,002 samples are short; a given row that is smaller is counted twice."""
    tail = replace(LENGTHS, tokens=(*[1_000] * 5_000, 7_000, 7_500))
    assert (tail.row(1), tail.row(2), tail.row(4)) == (7_552, 14_592, 16_512)
    lengths = [7_000, 1_000, 7_500, 1_000]
    assert len(first_fit(lengths, tail.row(4))) == 1
    assert tail.rows_filled(4, 8_192) == len(first_fit(lengths, 8_192)) == 3
    assert first_fit([3, 4, 1], 5) == [[0, 2], [1]]
    # So do pixels and targets: those of a batch with both long samples.
    settings = Settings(ZERO["zero1.json"], 2, 14_592, 8, 0, True)
    few, many = (
        estimate(shapes["3B", "full"], settings, lengths, 1).step["pixels"]
        for lengths in (replace(tail, tokens=(1_000,)), tail)
    )
    assert many == pytest.approx(7.25 * few, rel=0.01)


def test_a_given_row_that_does_not_hold_the_batch_needs_memory_for_all_its_rows(shapes):
    one, four = (Settings(ZERO["zero1.json"], 4, row, 4, 0, True) for row in (11_648, 2_944))
    assert LENGTHS.rows_filled(4, 11_648) == 1 and LENGTHS.rows_filled(4, 2_944) == 4
    needed = [estimate(shapes["3B", "full"], settings, LENGTHS, 1).peak for settings in (one, four)]
    assert needed[1] == pytest.approx(needed[0], rel=0.02)
    speeds = [predict(shapes["3B", "full"], settings, LENGTHS, parse_gpus("H200")).tokens for settings in (one, four)]
    assert 0.5 * speeds[0] < speeds[1] < speeds[0]


def test_headers_are_read_once(made, tmp_path, monkeypatch):
    """What the planner has read and counted, the pre-scan does not again, nor a video that several rows share."""
    checkpoint, data = made
    rows = read_rows(data)
    make_video(tmp_path / "slow.mp4", [float(i) for i in range(12)], fps=1)  # its timestamps are counted
    rows = [*rows, *rows[:3], {**rows[0], "video_path": str(tmp_path / "slow.mp4")}, {**rows[0], "video_path": "none"}]
    samples = StreamingDataset(
        rows, ROOT, load_processor(checkpoint), 2, VARIANTS["group"], "wait-3", PixelBudget(3136, 3136), 4096
    )
    opened = []
    for name in ("open_film", "index_video"):
        look = getattr(headers_module, name)
        monkeypatch.setattr(headers_module, name, lambda path, look=look: opened.append(str(path)) or look(path))
    expected = scan(samples)
    assert len(expected.bad) == 1 and "none" in expected.bad[len(rows) - 1]
    assert len(opened) == 10 and opened.count(str(tmp_path / "slow.mp4")) == 2  # a header, and its timestamps
    headers = Headers()
    assert find_lengths(samples, headers).rows == len(rows)
    headers.save(tmp_path / "headers.json")
    opened.clear()
    counted, count = [], samples.count_tokens
    monkeypatch.setattr(samples, "count_tokens", lambda index: counted.append(index) or count(index))
    found = scan(samples, known=Headers.take(tmp_path / "headers.json"))
    assert (
        found == expected
        and opened == []
        and counted == [len(rows) - 1]
        and not (tmp_path / "headers.json").read_text()
    )
    assert Headers.take(tmp_path / "headers.json").headers == {}


def test_some_layers_are_recomputed():
    """With the gradients of none."""
    model, ids = tiny_model(), torch.arange(12)[None]
    model.train()
    inputs = {"input_ids": ids, "position_ids": ids.expand(3, 1, -1), "attention_mask": None, "labels": ids + 1}

    def gradients():
        model.zero_grad()
        calls = []
        layers = model.model.language_model.layers
        hooks = [layer.mlp.register_forward_pre_hook(lambda *_, i=i: calls.append(i)) for i, layer in enumerate(layers)]
        model(**inputs).loss.backward()
        for hook in hooks:
            hook.remove()
        return sorted(calls), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    calls, expected = gradients()
    assert calls == [0, 1]
    for layers, calls in ((1, [0, 0, 1]), (None, [0, 0, 1, 1]), (2, [0, 0, 1, 1])):
        model.checkpointed_layers = layers
        model.activation_checkpointing_enable()
        found, same = gradients()
        assert found == calls
        assert all(torch.equal(a, b) for a, b in zip(same, expected, strict=True))


def test_layers_that_cannot_be_recomputed_are_refused():
    with pytest.raises(InputError, match="--checkpoint_layers 2 contradicts"):
        check_checkpoint_layers(2, False, 36)
    with pytest.raises(InputError, match="--checkpoint_layers 37: the model has 36 layers"):
        check_checkpoint_layers(37, True, 36)
    check_checkpoint_layers(36, True, 36)
    check_checkpoint_layers(None, False, 36)
    with pytest.raises(InputError, match="--checkpoint_layers 0: must be at least 1"):
        ModelArguments(str(ROOT), checkpoint_layers=0)


def test_pixels_stay_in_host_memory(made):
    """Trainer and accelerate leave them where they are; the rest of a batch is unchanged."""
    checkpoint, data = made
    rows, processor = read_rows(data), load_processor(checkpoint)
    samples = StreamingDataset(rows, ROOT, processor, 2, VARIANTS["group"], "wait-3", PixelBudget(3136, 3136), 4096)
    plain, held = (make([samples[0], samples[1]]) for make in (collate, collate_for_trainer))
    pixels = held.pop("pixel_values_videos")
    assert torch.equal(pixels.tensor, plain.pop("pixel_values_videos")) and plain.keys() == held.keys()
    assert send_to_device({"pixels": pixels}, "meta")["pixels"] is pixels


def test_held_out_samples_are_no_steps(made, monkeypatch):
    words = (
        f"--train_data {made[1]} --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --num_train_epochs 3"
    )
    words += " --min_pixels_per_frame 3136 --max_pixels_per_frame 3136"
    for more, held, steps in (("", 0, 12), ("--eval_samples 4", 4, 6), ("--eval_share 0.25", 2, 9)):
        request = given_by(f"{words} {more}", monkeypatch, made[0])
        _, _, lengths, found = request.predict(parse_gpus("H200"))
        assert (lengths.rows, lengths.held_out, found) == (8, held, steps)
        assert (f"8 samples ({held} held out) of" in request.plan(parse_gpus("H200"))[0]) == bool(held)
    away = given_by("--train_data none.jsonl --eval_share 0.5", monkeypatch, made[0]).predict(parse_gpus("H200"))[2]
    assert (away.rows, away.held_out) == (20_000, 10_000)


def test_planned_flags_train_the_same_steps(made, tmp_path, monkeypatch, capsys):
    """Losses and gradient norms in float32 equal those of one sample at a time, and a resumed run keeps its plan."""
    common = {"min_pixels_per_frame": 3136, "max_pixels_per_frame": 3136}
    words = " ".join(f"--{name} {value}" for name, value in common.items())
    request = given_by(
        f"--train_data {made[1]} {words} --per_device_train_batch_size 4 --gradient_accumulation_steps 1 "
        "--compile_layers False --checkpoint_layers 1",
        monkeypatch,
        made[0],
    )
    text, planned = request.plan(parse_gpus("H200"))
    assert planned["pack_tokens"] > 0 and planned["gradient_checkpointing"] is True and "4 samples in a row" in text
    chosen = {**{name: value for name, value in planned.items() if name != "deepspeed"}, "checkpoint_layers": 1}
    alone = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    packed = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, **chosen}
    for name, changes in (("alone", alone), ("packed", packed)):
        finish(start(flags(made, tmp_path / name, save_steps=2, **changes), tmp_path / f"{name}.log"))
    a, b = history(tmp_path / "alone"), history(tmp_path / "packed")
    assert sorted(a) == sorted(b) == list(range(1, 7))
    for step in a:
        assert a[step] == pytest.approx(b[step], abs=1e-4), step

    resumed = given_by(f"--output_dir {tmp_path / 'packed'}", monkeypatch, made[0]).resumed()
    record = json.loads((tmp_path / "packed/run.json").read_text())["arguments"]
    assert resumed == {name: record[name] for name in PLANNED if name != "deepspeed"}
    assert resumed["pack_tokens"] == planned["pack_tokens"] and resumed["checkpoint_layers"] == 1
    again = given_by(f"--output_dir {tmp_path / 'packed'} --pack_tokens 1", monkeypatch, made[0]).resumed()
    assert "pack_tokens" not in again  # record.py compares what the user gives
    assert given_by(f"--output_dir {tmp_path / 'new'}", monkeypatch, made[0]).resumed() == {}
    # --plan shows the same: not a plan for the GPUs that are here now.
    monkeypatch.setattr(machine, "gpus_here", lambda *_: parse_gpus("H200"))
    monkeypatch.setattr(device, "look", lambda environment: Devices(1, bfloat16=True))
    words = ["--plan", "--model_name_or_path", str(made[0]), "--output_dir", str(tmp_path / "packed")]
    monkeypatch.setattr(sys, "argv", ["planner", "1", "1", *words])
    program.main()
    shown = f"plan: the settings that {tmp_path / 'packed'} was started with\n  flags: {command_line(resumed)}\n"
    assert capsys.readouterr().out == shown


def test_the_table_of_the_docs_is_the_planners():
    assert "\n".join(rows()) in (ROOT / "docs/training.md").read_text(), "paste python -m qwenvl.planner.table"


STAND_IN = """
import os, sys
if "qwenvl.planner" in sys.orig_argv:
    import torch
    from qwen_vl_streaming import devices
    os.write(1, b"--a_word of a library written in C\\n")
    devices.look = lambda environment: devices.Devices(2, bfloat16=True)
    torch.cuda.device_count = lambda: 2
    torch.cuda.get_device_name = lambda index: "NVIDIA H100 80GB HBM3"
    torch.cuda.mem_get_info = lambda index: (70 * 2**30, 80 * 2**30)
elif "qwen_vl_streaming.launch" in sys.orig_argv[:3]:
    os._exit(0)
"""


def test_the_bare_command_is_planned(made, tmp_path):
    """sft.sh on two GPUs: the plan is printed, its flags are part of the echoed command, and given ones come last. The
    launcher can read what the planner has read, in a file that does not stay, and when the run was started."""
    read, times, temporary = tmp_path / "read", tmp_path / "times", tmp_path / "tmp"
    temporary.mkdir()
    leave = f"cat $QWENVL_HEADERS >{read}; echo $QWENVL_TIMES >{times}"
    text = STAND_IN.replace("os._exit(0)", f"os._exit(os.system('{leave}'))")
    (tmp_path / "sitecustomize.py").write_text(text)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
        "QWEN2_5_VL_MODEL_PATH": str(made[0]),
        "QWEN2_5_VL_TRAIN_DATA": str(made[1]),
        "DEEPSPEED_CONFIG": "zero2.json",
        "TMPDIR": str(temporary),
    }
    words = ["--pack_tokens", "4096", "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(["bash", SCRIPT, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    started, planned = map(float, times.read_text().split())
    assert started < planned < time.time() < started + 600
    assert [len(known) for known in json.loads(read.read_text()).values()] == [8, 8] and not list(temporary.iterdir())
    assert "plan for 2 x H100, 70.0 GiB free" in done.stderr and "predicted:" in done.stderr
    (echo,) = [line for line in done.stdout.splitlines() if line.startswith("+ ")]
    assert "--a_word" not in done.stdout and done.stderr.count("--a_word of a library") == 1
    assert echo.count("--pack_tokens") == 1 and "--pack_tokens 4096" in echo
    assert "--deepspeed zero2.json" in echo and echo.count("--deepspeed") == 1
    assert "--compile_layers True" in echo and "--nproc_per_node 2" in echo and "--gradient_accumulation_steps" in echo


def test_ctrl_c_while_planning_leaves_no_file(tmp_path):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    interrupt = "    import signal\n    signal.signal(signal.SIGINT, signal.SIG_DFL)\n    os.killpg(0, signal.SIGINT)\n"
    (tmp_path / "sitecustomize.py").write_text(f"{STAND_IN}\nif 'qwenvl.planner' in sys.orig_argv:\n{interrupt}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), "TMPDIR": str(temporary)}
    done = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True, start_new_session=True)
    assert done.returncode in (-2, 130) and not list(temporary.iterdir()), done.stderr


def test_a_plan_for_a_machine_that_is_not_here(made):
    environment = {**os.environ, "QWEN2_5_VL_MODEL_PATH": str(made[0]), "QWEN2_5_VL_TRAIN_DATA": str(made[1])}
    done = subprocess.run(
        ["bash", SCRIPT, "--plan", "--gpus", "8xH100-80GB"],
        env=with_server({**environment, "NNODES": "2", "MASTER_ADDR": "x"}),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("plan for 16 x H100 on 2 nodes") and "network: each GPU sends" in done.stdout
    assert "flags: --deepspeed zero1.json" in done.stdout


def test_a_plan_without_gpus_asks_for_them(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["planner", "0", "1", "--plan"])
    with pytest.raises(SystemExit) as ended:
        run_program(program.main)
    assert ended.value.code == 2 and "--gpus 8xH100-80GB" in capsys.readouterr().err
