"""paper.sh: its steps, what their outputs say, running and resuming them, SLURM, the status page, and the demo."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from browser import Browser
from paper import checks, cli, forecast, slurm, slurm_queue, status
from paper.attempts import read_attempt
from paper.checks import DONE, PARTIAL, STARTED, TO_DO, State
from paper.queue_status import QueueStatus
from paper.request import parse, read_request
from paper.runner import Runner, last_line
from paper.settings import PAPER, PAPER_VARIANTS
from paper.states import find_states, refusals
from paper.status import BLOCKED, FAILED, RUNNING, Progress
from paper.steps import EVALUATE, PREPARE, REPORT, TRAIN, Command, Folders, Step
from program_server import with_server
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.nvidia import visible_gpus
from qwen_vl_streaming.timeline.variants import VARIANTS
from qwenvl import headers as headers_module
from results import FIELDS, hash_rows, load_finished
from waiting import SECONDS, until

ROOT = Path(__file__).resolve().parents[1]
STREAMING = ["interleave", "overlap", "group", "gap"]


def asked(tmp_path, words="", output="out"):
    return read_request(parse(["--output", str(tmp_path / output), *words.split()]), tmp_path)


def names(request, kind):
    return [step.name for step in request.steps if step.kind == kind]


def test_the_steps_of_what_the_paper_prints(tmp_path, monkeypatch):
    assert list(VARIANTS) == [*PAPER_VARIANTS]
    monkeypatch.setitem(VARIANTS, "late", replace(VARIANTS["group"], name="late"))  # one's own is not the paper's
    whole = asked(tmp_path)
    assert [len(names(whole, kind)) for kind in (PREPARE, TRAIN, EVALUATE, REPORT)] == [2, 18, 22, 1]
    for number, step in enumerate(whole.steps):  # each follows what it needs
        assert {other.name for other in whole.steps[:number]} >= set(step.after)
    random = [name for name in names(whole, EVALUATE) if "-random-" in name]
    assert random == [f"evaluate-3B-description-random-{variant}" for variant in STREAMING]
    assert len(names(asked(tmp_path, "--everywhere"), EVALUATE)) == 32
    part = asked(tmp_path, "--sizes 7B --variants gap,group --tasks description")
    trained = ["train-7B-description-group", "train-7B-description-gap"]
    assert [step.name for step in part.steps] == [
        "prepare-description", trained[0], "evaluate-7B-description-fixed-group", trained[1],
        "evaluate-7B-description-fixed-gap", "report",
    ]  # fmt: skip
    first = part.steps[1].command.of("group")
    assert first.environment["QWEN2_5_VL_MODEL_PATH"] == PAPER.models["7B"]
    assert part.steps[1].after == ("prepare-description",)
    assert first.words[2:] == ("--output_dir", str(tmp_path / "out/7B/qwen2_5vl-pe-group"), *PAPER.train)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--sizes 13B", "--sizes 13B: choose from 3B, 7B"),
        ("--variants grup", "--variants grup: choose from origin,"),
        ("--tasks qa", "--tasks qa: choose from description, funqa"),
        (
            "--sizes 7B --tasks funqa",
            "--sizes 7B: the paper has no table of it with the other flags: remove one; --every",
        ),
        ("--sizes 3B 7B --schedules random", "--sizes 7B: the paper has no table"),
        ("--tasks funqa --schedules random", "--tasks funqa: the paper has no table"),
        (
            "--schedules random --variants origin gap",
            "--variants origin writes after the video and has no",
        ),
        ("--steps 3", "--steps is for the demo: add --demo, or remove it"),
        ("--demo --steps 0", "--steps 0: give a positive number"),
        ("--device cpu", "--device cpu is for the demo"),
        ("--demo --everywhere", "--everywhere contradicts --demo"),
        ("--plan --status", "--plan, --slurm, --status and --report exclude each other"),
        ("--judge-url http://judge", "--judge-url and --judge-model go together"),
        (f"--output {'a' * 300}", "cannot be used (File name too long): give another folder"),
        (f"--slurm {'a' * 300}", "cannot be used (File name too long): give another folder"),
    ],
)
def test_flags_that_contradict_each_other(tmp_path, words, message):
    with pytest.raises(InputError, match=re.escape(message)):
        asked(tmp_path, words)
    assert not (tmp_path / "out").exists()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def run_json(folder, variant="group", **changes):
    """A finished run; `changes` are facts, or arguments."""
    arguments = {"model_name_or_path": "Qwen/Small", "learning_rate": 2e-5, "max_steps": -1, "seed": 42}
    arguments |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    facts = {"variant": variant, "schedule": "wait-3", "world_size": 8, "data": {"sha256": changes.pop("sha256", "d")}}
    facts |= {"finished": "2026-11-29T06:00:00", "arguments": arguments}
    for name, value in changes.items():
        (arguments if name in arguments else facts)[name] = value
    write(folder / "run.json", facts)
    write(folder / "config.json", {})


def test_training_is_done_if_run_json_says_so(tmp_path):
    folder, data = tmp_path / "trained", tmp_path / "train.jsonl"
    check = partial(checks.trained, folder, data, "Qwen/Small", "group", {"max_steps": "-1", "learning_rate": "2e-5"})
    assert check().word == TO_DO
    run_json(folder, finished=None)
    assert check().word == STARTED and check().detail == "no checkpoint yet"
    (folder / "checkpoint-12").mkdir()
    assert check().detail == "checkpoint of step 12"
    run_json(folder)
    assert check().word == DONE and check().facts["the number of samples of a step"] == 128
    data.write_text("{}\n")
    with pytest.raises(InputError, match=r"run.json is of another run: the hash of train.jsonl is d, not ca3d1"):
        check()
    run_json(folder, sha256=checks.data_hash(data))
    assert check().done
    for change, message in (
        ({"variant": "gap"}, "variant is gap, not group"),
        ({"model_name_or_path": "Qwen/Large"}, "the model is Qwen/Large, not Qwen/Small"),
        ({"learning_rate": 1e-4}, "--learning_rate is 0.0001, not 2e-5"),
        ({"arguments": None}, "has no arguments and data"),
    ):
        run_json(folder, **{"sha256": checks.data_hash(data), **change})
        with pytest.raises(InputError, match=message):
            check()
    run_json(folder, sha256=checks.data_hash(data))
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="its checkpoint is missing"):
        check()
    (folder / "run.json").write_text("[")
    with pytest.raises(InputError, match="cannot be read"):
        check()


def test_runs_that_do_not_belong_in_one_table_are_refused(tmp_path):
    """With other GPUs, a step has other samples; the planner's split of them may differ."""
    request = asked(tmp_path, "--sizes 3B --tasks description --variants group gap")
    for variant, change in (("group", {}), ("gap", {"world_size": 16, "per_device_train_batch_size": 2})):
        run_json(
            request.folders.trained("3B", "description", variant),
            variant,
            **change,
            model_name_or_path=PAPER.models["3B"],
        )
    assert find_states(request.steps)["train-3B-description-gap"].done
    run_json(
        request.folders.trained("3B", "description", "gap"), "gap", world_size=4, model_name_or_path=PAPER.models["3B"]
    )
    message = (
        "train-3B-description-gap and train-3B-description-group do not belong in one table: the number of samples of "
        "a step is 64 and 128: move away"
    )
    with pytest.raises(InputError, match=message):
        find_states(request.steps)


def test_a_contradiction_stops_the_tables_of_its_size_only(tmp_path, capsys):
    request = asked(tmp_path, "--tasks description --variants group gap --schedules fixed")
    for size, rate in (("3B", 1e-4), ("7B", 2e-5)):
        for variant, change in (("group", {}), ("gap", {"learning_rate": rate})):
            folder = request.folders.trained(size, "description", variant)
            run_json(folder, variant, **change, model_name_or_path=PAPER.models[size])
    states = find_states(request.steps)
    (line,) = refusals(request.steps, states)
    assert line.startswith(
        "3B, description is refused: train-3B-description-gap and train-3B-description-group do not belong in one "
        "table: --learning_rate is 0.0001 and 2e-05: move away"
    )
    words = {step.name: states[step.name].word for step in request.steps}
    assert {words[name] for name in words if "-3B-" in name} == {"refused"}
    assert words["train-7B-description-gap"] == DONE and words["evaluate-7B-description-fixed-gap"] == TO_DO
    steps = [replace(step, command=Command(("false",))) for step in request.steps]
    progress = {step.name: Progress(step, states[step.name].word, states[step.name].detail) for step in steps}
    assert Runner(steps, request.folders, states, progress).run() == 1
    out = capsys.readouterr().out
    assert "train-3B-description-gap: refused, train-3B" in out and "as all of 3B, description" in out
    assert (
        "evaluate-7B-description-fixed-gap: failed" in out and "evaluate-3B-description-fixed-gap: running" not in out
    )


def test_a_run_with_other_flags_than_the_plan_and_the_defaults_is_refused(tmp_path):
    folder, data = tmp_path / "trained", tmp_path / "train.jsonl"
    check = partial(checks.trained, folder, data, "Qwen/Small", "group", {"learning_rate": "2e-5"})
    run_json(folder, recipe_differences={"max_steps": 7, "seed": 43}, max_steps=-1, seed=42)
    message = (
        f"{folder}/run.json is of another run: --max_steps is -1, not 7; --seed is 42, not 43: move trained away, or "
        "give another --output"
    )
    with pytest.raises(InputError) as caught:
        check()
    assert str(caught.value) == message
    run_json(folder, recipe_differences={"learning_rate": 1e-3})  # as planned
    assert check().done
    run_json(folder, recipe_differences={"step_samples": 16}, gradient_accumulation_steps=2)  # as the GPUs are twice
    assert check().done


def test_an_evaluation_is_done_if_it_is_complete_and_of_this_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "of_checkpoint", lambda folder: "w")
    data, trained, out = write(tmp_path / "test.jsonl", "{}\n{}\n"), tmp_path / "trained", tmp_path / "group_infer.json"
    write(trained / "config.json", {})
    write(trained / "run.json", {"arguments": {"wait_k": 3, "max_pixels_per_frame": 9}})
    made = {"variant": "group", "schedule": "wait-3", "model": "m", "model_sha256": "w", "data": "d", "seed": 0}
    made["data_sha256"] = checks.data_hash(data)
    arguments, scores = tmp_path / "group_infer.args.json", tmp_path / "group_scores.json"
    check = partial(checks.evaluated, out, data, trained, "fixed", "group", {"bleurt": "b"})
    assert check().word == TO_DO
    write(arguments, made)
    assert check().word == TO_DO
    row = {name: [] if kind is list else 1 if name in ("clips", "seconds") else "x" for name, kind in FIELDS.items()}
    lines = [json.dumps({**row, "video_id": str(number)}) + "\n" for number in range(2)]
    write(out, lines[0])
    assert (check().word, check().detail) == (STARTED, "1 of 2 captions")
    write(out, "".join(lines))
    assert (check().word, check().detail) == (STARTED, "2 captions, without scores")
    write(scores, {"count": 2, "not_computed": {"BLEURT": "no checkpoint"}})
    assert (check().word, check().detail) == (PARTIAL, "2 captions, without BLEURT (no checkpoint)")
    write(scores, {"count": 2, "BLEURT": 50.0})
    shared = {"data_sha256": made["data_sha256"], "seed": 0, "the K of the schedule": "3"}
    assert check().done and check().facts == shared
    rows = list(load_finished(out).values())
    write(scores, {"count": 2, "BLEURT": 50.0, "captions": hash_rows([{**row, "result": "old"} for row in rows])})
    assert (check().word, check().detail) == (STARTED, "2 captions, without scores")
    write(scores, {"count": 2, "BLEURT": 50.0, "captions": hash_rows(rows)})
    assert check().done
    for change, message in (
        ({"model_sha256": "v"}, "the hash of the checkpoint is v, not w: delete it to start over"),
        ({"data_sha256": "e"}, "the hash of test.jsonl is e, not "),
        ({"schedule": "random-3"}, "the schedule is random, not wait"),
        ({"repetition_penalty": 1.0}, "--repetition-penalty is 1.0, not 1.15"),
        ({"schedule": "wait-5"}, "the K of the schedule is 5, not 3"),
        ({"max_pixels_per_frame": 7}, "--max-pixels-per-frame is 7, not 9"),
    ):
        write(arguments, made | change)
        with pytest.raises(InputError, match=message):
            check()
    write(arguments, made)
    (trained / "config.json").unlink()
    with pytest.raises(InputError, match="the hash of the checkpoint is w, which is not there"):
        check()


def test_data_that_were_sampled_otherwise_are_refused(tmp_path):
    rows, report = [write(tmp_path / f"{split}.jsonl", "{}\n") for split in ("train", "test")], tmp_path / "report.json"
    check = partial(checks.prepared, rows, report, {"max_samples": 20000})
    assert check().word == TO_DO
    write(report, {"max_samples": 20000})
    assert check().done
    write(report, {"max_samples": 20000, "splits": {"train": {"rows": 0}, "test": {"rows": 1}}})
    assert check().word == TO_DO  # the rows are of an earlier run
    write(report, {"max_samples": None})
    with pytest.raises(InputError, match=r"report\.json was made with --max-samples None, not 20000"):
        check()
    request = asked(tmp_path, "--tasks funqa")
    prepare = request.steps[0]
    for split in ("train", "test"):
        write(request.folders.rows("funqa", split), "{}\n")
    planned = {"rules": {"min_seconds": 0.0, "max_seconds": None}, "max_samples": 20000, "seed": 0, "max_questions": 1}
    report = write(request.folders.data / "funqa_report.json", planned)
    assert prepare.check().done
    write(report, planned | {"rules": {"min_seconds": 5.0}, "max_questions": None})
    with pytest.raises(InputError, match=r"--max-questions None, not 1, and with --min-seconds 5\.0, not 0\.0: give"):
        prepare.check()


def test_demo_videos_are_compared_with_the_defaults_too(tmp_path):
    request = asked(tmp_path, "--demo --test-videos 3")
    made = {"output": None, "train_videos": 1200, "test_videos": 3, "dropped": 2, "other_openings": 0, "seed": 0}
    saved = write(request.folders.data / "PE-Video/make_data.json", made)
    assert request.steps[0].check().word == TO_DO
    write(saved, made | {"train_videos": 8})
    with pytest.raises(InputError, match="PE-Video was made with --train-videos 8, not 1200: give another --output"):
        request.steps[0].check()


def test_a_report_is_done_if_it_has_these_rows_and_is_newer(tmp_path):
    files = [(tmp_path / f"{name}_infer.json", f"qwen2_5vl-pe-{name}") for name in ("gap", "group")]
    page, check = tmp_path / "report-3B.html", partial(checks.reported, tmp_path / "report-3B.html", files)
    for name in ("gap", "group"):
        write(tmp_path / f"{name}_scores.json", {})
    assert check().word == TO_DO
    row = "| {0}\\_infer.json | {0} | wait-3 | qwen2\\_5vl-pe-{0} | 3B |\n"
    head = "# Title\n\n## Runs\n\n| File | Variant | Schedule | Model | Size |\n| --- | --- | --- | --- | --- |\n"
    write(page, "")
    write(page.with_suffix(".md"), head + row.format("group"))
    assert check().word == TO_DO  # of a part
    write(page.with_suffix(".md"), head + row.format("group") + row.format("gap"))
    assert check().done
    os.utime(tmp_path / "gap_scores.json", (time.time() + 60,) * 2)
    assert check().word == TO_DO


def script(name, text, *after, kind=PREPARE, variant=""):
    """A step that runs `text` in bash and writes the file `name`, which says that it is done."""
    done = partial(checks.exists, Path(name))
    command = Command(("bash", "-c", f'{text} && echo done > "{name}"'))
    return Step(Path(name).name, kind, command, done, after, variant=variant)


def runner(tmp_path, steps):
    states = find_states(steps)
    progress = {step.name: Progress(step, states[step.name].word) for step in steps}
    return Runner(steps, Folders(tmp_path, False), states, progress)


def test_steps_of_the_demo_share_the_gpus_one_each(tmp_path):
    files = [str(tmp_path / f"{number}") for number in range(6)]
    steps = [script(file, f'sleep 0.5; echo "$CUDA_VISIBLE_DEVICES" > "{file}.gpu"', kind=TRAIN) for file in files]
    shared = runner(tmp_path, steps)
    shared.jobs, shared.gpus = 6, visible_gpus({"CUDA_VISIBLE_DEVICES": "4, GPU-5,6,-1,7"})
    assert shared.run() == 0
    used = sorted(Path(f"{file}.gpu").read_text().strip() for file in files)
    assert used == ["4", "4", "6", "6", "GPU-5", "GPU-5"]


def test_a_training_of_the_demo_uses_one_gpu_and_one_of_the_paper_all(tmp_path):
    for words, processes in (("--demo", "1"), ("", None)):
        trainings = [step for step in asked(tmp_path, words).steps if step.kind == TRAIN]
        assert trainings and {step.command.environment.get("NPROC_PER_NODE") for step in trainings} == {processes}


def test_a_failed_step_names_its_log_and_independent_steps_go_on(tmp_path, capsys):
    a, b, c, d, report = (str(tmp_path / name) for name in ("a", "b", "c", "d", "report"))
    steps = [
        script(a, "echo started; echo 'error: no space' >&2; echo more; exit 2"),
        script(b, "true", "a"),
        script(c, "true", kind=EVALUATE),
        script(d, "exit 3", kind=EVALUATE),
        script(report, "true", "c", "d", kind=REPORT),
    ]
    assert runner(tmp_path, steps).run() == 1
    out, err = capsys.readouterr()
    assert "[1/5] a: failed in 0 s, error: no space" in out and "[2/5] b: not run, needs a" in out
    assert "[3/5] c: done" in out and "[5/5] report: done" in out
    assert f"failed: a: see {tmp_path}/logs/a.log" in err and "not run: b: needs a" in err
    assert (tmp_path / "logs/a.log").read_text().startswith("+ bash -c")
    page = (tmp_path / "status.html").read_text()
    assert "nothing left to run" in page and 'http-equiv="refresh"' not in page and 'href="logs/a.log"' in page

    steps[0], steps[3] = script(a, "true"), script(d, "true", kind=EVALUATE)
    assert runner(tmp_path, steps).run() == 0
    out = capsys.readouterr().out
    assert "c: already done" in out and "b: done" in out and "report: running" in out  # d's row is new in the report
    assert runner(tmp_path, steps).run() == 0
    assert "running" not in capsys.readouterr().out


def test_steps_side_by_side(tmp_path, capsys):
    """Each of two steps waits until the other has started; the third has to wait for a place."""
    a, b, c = (str(tmp_path / name) for name in "abc")
    meets = 'touch "{0}.on"; for i in $(seq 1200); do [ -e "{1}.on" ] && break; sleep 0.05; done; [ -e "{1}.on" ]'
    run = runner(tmp_path, [script(a, meets.format(a, b)), script(b, meets.format(b, a)), script(c, "true")])
    run.jobs = 2
    assert run.run() == 0
    out = capsys.readouterr().out
    assert out.index("b: running") < out.index("a: done") and out.index("c: running") > out.index(": done")
    assert (tmp_path / "logs/a.log").exists() and (tmp_path / "logs/b.log").exists()
    attempt = read_attempt(tmp_path / "logs", "a")
    assert attempt and attempt.job == "local" and attempt.status == 0 and attempt.took >= 0


def test_a_step_that_is_only_behind_another_runs_if_that_fails(tmp_path):
    a, b = (str(tmp_path / name) for name in "ab")
    run = runner(tmp_path, [script(a, "exit 2"), replace(script(b, "true"), behind=("a",))])
    assert run.run() == 1
    assert (run.progress["a"].word, run.progress["b"].word) == (FAILED, DONE)
    attempt = read_attempt(tmp_path / "logs", "a")
    assert attempt and attempt.status == 2


def test_an_incomplete_output_is_used_and_completed_the_next_time(tmp_path, capsys):
    """Captions without a metric: the report has them, and another run computes the metric alone."""
    made, scored, report = tmp_path / "made", tmp_path / "scored", str(tmp_path / "report")

    def check():
        half = State(PARTIAL, "2 captions, without METEOR (no Java)")
        return State(DONE) if scored.exists() else half if made.exists() else State()

    one = Step("one", EVALUATE, Command(("touch", str(made))), check, complete=Command(("touch", str(scored))))
    steps = [one, script(report, "true", "one", kind=REPORT)]
    assert runner(tmp_path, steps).run() == 0
    out, err = capsys.readouterr()
    assert "one: incomplete in 0 s, 2 captions, without METEOR (no Java)" in out and "report: done" in out
    assert "incomplete: one: 2 captions, without METEOR (no Java)" in err
    assert runner(tmp_path, steps).run() == 0
    out = capsys.readouterr().out
    assert "one: done" in out and out.count("report: running") == 1


def test_a_step_whose_output_is_not_complete_has_failed(tmp_path):
    short = Step("short", PREPARE, Command(("true",)), lambda: State(STARTED, "1 of 2 captions"))
    run = runner(tmp_path, [short])
    assert run.run() == 1
    assert run.progress["short"].detail == "ended, but its output is incomplete: 1 of 2 captions"


def test_logs_that_cannot_be_written_are_one_line(tmp_path):
    run = runner(tmp_path, [script(str(tmp_path / "a"), "true")])
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(InputError, match=r"logs/a\.attempt cannot be written"):
        run.run()
    (tmp_path / "logs").unlink()
    (tmp_path / "logs/a.log").mkdir(parents=True)
    with pytest.raises(InputError, match=r"logs/a\.log cannot be written \(Is a directory\)"):
        runner(tmp_path, [script(str(tmp_path / "a"), "true")]).run()


def test_the_last_line_of_a_log(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"\n")
    assert last_line(log) == ""
    log.write_bytes(b"a\nerror: b\n" + b"50%|\r51%|\r\n")
    assert last_line(log) == "error: b" and last_line(log, start=11) == "51%|"


def test_the_last_line_of_the_log_of_a_slurm_job(tmp_path):
    """Appended to where a job is requeued; srun and slurmstepd write into it too."""
    log, task = tmp_path / "log", "srun: error: n1: task 0: "
    first = "+ job 28_4, start 1\nerror: no space\n" + task + "Exited with exit code 1\n"
    log.write_text(first)
    assert last_line(log) == "error: no space"
    step = "slurmstepd-n1: error: StepId=77.0 exceeded memory limit (461918208 > 314572800), being killed"
    second = first + "slurmstepd-n1: error: *** JOB 28 ON n1 CANCELLED AT 15:21 DUE TO JOB REQUEUE ***\n"
    second += "+ job 28_4, start 2\n"
    log.write_text(second)
    assert last_line(log) == last_line(log, running=True) == ""
    log.write_text(second + "stopped by SIGTERM; step 36 is saved\n" + task + "Exited with exit code 143\n")
    assert last_line(log) == last_line(log, running=True) == "stopped by SIGTERM; step 36 is saved"
    log.write_text(second + f"50%|\n{step}\n{task}Killed\n")
    assert last_line(log) == step
    log.write_text(second + f"50%|\n{task}Killed\n")
    assert last_line(log) == f"{task}Killed"


PROGRAM = """
import sys
from pathlib import Path
from paper.runner import Stopped
from test_paper import runner, script
waits = "trap 'echo saved; exit 143' TERM; echo ready; sleep 60 & wait"
try:
    runner(Path(sys.argv[1]), [script(sys.argv[1] + "/a", waits)]).run()
except Stopped as stopped:
    sys.exit(128 + stopped.number)
"""


def test_a_signal_is_passed_on_and_the_step_ends_first(tmp_path):
    paths = os.pathsep.join([*sys.path, str(ROOT / "tests")])
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path)], env={**os.environ, "PYTHONPATH": paths})
    log = tmp_path / "logs/a.log"
    until(lambda: log.exists() and "\nready\n" in log.read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS) == 143 and log.read_text().endswith("saved\n")
    assert "stopped" in (tmp_path / "status.html").read_text()


# As of SLURM 22.05. A queue: a line for each element of an array, as squeue shows it.
SBATCH = """#!/bin/bash
file=${!#}
grep -q broken "$file" && {
  echo "sbatch: error: invalid partition specified: nope" >&2
  echo "sbatch: error: Batch job submission failed: Invalid partition name specified" >&2
  exit 1
}
number=$((100 + $(ls "$QUEUE/calls" | wc -l)))
echo "$*" >"$QUEUE/calls/$number"
reason=None
for word in "$@"; do case $word in
  --job-name=*) name=${word#*=} ;;
  --array=*) array=${word#*=} ;;
  --dependency=*) reason=Dependency ;;
esac; done
for index in ${array//,/ }; do echo "$name $index $number PENDING $reason" >>"$QUEUE/jobs"; done
[ -n "$array" ] || echo "$name N/A $number PENDING $reason" >>"$QUEUE/jobs"
echo "$number;cluster"
"""
SQUEUE = """#!/bin/bash
cat "$QUEUE/jobs" 2>/dev/null || true
"""
SCANCEL = """#!/bin/bash
# Fails for a job that has left the queue, also with --quiet.
[ "$1 $2" = "--quiet --state=PENDING" ] || exit 1
for id in "${@:3}"; do
  [[ $id = *_* ]] && line=" ${id#*_} ${id%_*} PENDING" || line=" N/A $id PENDING"
  grep -q "$line" "$QUEUE/jobs" || status=1
  sed -i "\\|$line|d" "$QUEUE/jobs"
done
exit ${status:-0}
"""


def without_slurm(tmp_path):
    """A PATH with what sbatch files and the stand-ins need, on a machine that may have SLURM."""
    folder = tmp_path / "tools"
    folder.mkdir(exist_ok=True)
    for name in ("bash", "cat", "date", "env", "grep", "ls", "sed", "sleep", "wc"):
        if not (folder / name).exists():
            (folder / name).symlink_to(shutil.which(name))
    return str(folder)


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """Stand-ins for SLURM's commands. Returns a function that lists the arguments of all calls of sbatch."""
    folder = tmp_path / "queue"
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scancel", SCANCEL)):
        write(folder / "bin" / name, text).chmod(0o755)
    (folder / "calls").mkdir()
    monkeypatch.setenv("QUEUE", str(folder))
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{without_slurm(tmp_path)}")
    return lambda: [path.read_text().strip() for path in sorted((folder / "calls").iterdir())]


def submit(request, folder, done=(), partial=()):
    left = [step for step in request.steps if step.name not in done]
    return slurm.submit(
        slurm.make_jobs(left, partial), folder, request.folders.output, ["bash", "paper.sh", "--status"]
    )


def test_slurm_jobs_with_dependencies(tmp_path, queue):
    request = asked(tmp_path, "--sizes 3B --tasks description --variants origin group gap")
    done = ("prepare-description", "train-3B-description-gap")
    folder = tmp_path / "my jobs"
    lines = submit(request, folder, done)
    assert lines == [
        "train-3B-description: job 100, array 0,4",
        # gap is trained: its evaluations wait for nothing. The others wait for the same index of the training.
        "evaluate-3B-description-fixed: job 101, array 0,4, aftercorr:100",
        "evaluate-3B-description-fixed: job 102, array 5",
        "evaluate-3B-description-random: job 103, array 4, aftercorr:100",
        "evaluate-3B-description-random: job 104, array 5",
        "report: job 105, afterany:101:103:102:104",
    ]
    first, second, *_, last = queue()
    output = f"{tmp_path}/out/logs"
    assert first == (
        f"--parsable --job-name={slurm.entry(request.steps[1], request.folders.output)[0]} --kill-on-invalid-dep=yes "
        f"--output={output}/train-3B-description-%A_%a.log --array=0,4 {folder}/train-3B-description.sbatch"
    )
    assert "--array=0,4 --dependency=aftercorr:100 " in second and "--array" not in last and "report-%j.log" in last
    assert (tmp_path / "out/logs").is_dir()
    again = submit(request, folder, done)
    assert len(again) == 8 and all(": already in the queue as job 10" in line for line in again) and len(queue()) == 6


def test_sbatch_files_run_the_steps_and_may_be_edited(tmp_path, queue):
    request = asked(tmp_path, "--sizes 3B --tasks description")
    folder = tmp_path / "jobs"
    submit(request, folder)
    path = folder / "evaluate-3B-description-random.sbatch"
    assert "#SBATCH --nodes=1" in path.read_text() and "--requeue" in path.read_text()
    says = 'shift; echo "$QWEN2_5_VL_EVAL_OUTPUT_FILE $QWEN2_5_VL_EVAL_MODEL_PATH $*"; exit 3'
    write(tmp_path / "queue/bin/srun", f"#!/bin/bash\n{says}\n").chmod(0o755)
    text = path.read_text()
    write(tmp_path / "out/logs/status.sh", "")
    ran = subprocess.run(
        ["bash"], input=text, env={**os.environ, "SLURM_ARRAY_TASK_ID": "2"}, capture_output=True, text=True
    )
    begin, line = ran.stdout.splitlines()
    captions, model, program, *flags = line.split()
    assert begin.startswith("+ job ")
    step = next(s for s in request.steps if s.name == "evaluate-3B-description-random-interleave")
    command = step.command.of("interleave")
    assert captions == "interleave_random_infer.json" and model == command.environment["QWEN2_5_VL_EVAL_MODEL_PATH"]
    assert (program, *flags) == command.words[1:] and ran.returncode == 3

    for job in (tmp_path / "queue").glob("jobs"):
        job.unlink()  # all have ended
    path.write_text(path.read_text().replace("#SBATCH --time=24", "#SBATCH --time=2"))
    lines = submit(request, folder)
    assert lines[0] == f"{path} was edited, and is kept as it is"
    assert "#SBATCH --time=2:" in path.read_text()
    # It serves for other parts of the tables; the status page and the report are of what was submitted last.
    report = path.with_name("report.sbatch")
    report.write_text(report.read_text().replace("#SBATCH --time=24", "#SBATCH --time=1"))
    part = asked(tmp_path, "--sizes 3B --tasks description --variants gap --schedules random")
    (tmp_path / "queue/jobs").write_text("")  # a queued report may not become smaller
    assert f"{report} was edited, and is kept as it is" in submit(part, folder)
    says = "bash paper.sh --report --output", "--variants gap --tasks description --schedules random"
    assert all(word in (tmp_path / "out/logs/report.sh").read_text().replace(f"{ROOT}/", "") for word in says)
    assert f"bash {tmp_path}/out/logs/report.sh\n" in report.read_text()
    # For another output, files that were not edited are written anew, and one that was is refused.
    other = asked(tmp_path, "--sizes 3B --tasks description", "other")
    with pytest.raises(
        InputError, match=r"random\.sbatch was edited, and written for other commands than now: delete it"
    ):
        submit(other, folder)
    path.unlink()
    report.unlink()
    submit(other, folder)
    assert all(f"{tmp_path}/other/" in path.read_text() for path in folder.glob("train-*.sbatch"))


def test_metrics_that_are_missing_need_no_gpu(tmp_path, queue):
    """As on one machine: captions that are complete are only scored. The rest of the array runs as before."""
    request = asked(tmp_path, "--sizes 3B --tasks description --variants group gap --schedules fixed")
    names = [step.name for step in request.steps]
    partial = "evaluate-3B-description-fixed-gap"
    done = [name for name in names if not name.startswith("evaluate")]
    lines = submit(request, tmp_path / "jobs", done, [partial])
    assert lines == [
        "evaluate-3B-description-fixed: job 100, array 4",
        "evaluate-3B-description-fixed: job 101, array 5",
    ]
    assert queue()[0].endswith("/evaluate-3B-description-fixed.sbatch")
    assert queue()[1].endswith("/score-evaluate-3B-description-fixed.sbatch")
    text = (tmp_path / "jobs/score-evaluate-3B-description-fixed.sbatch").read_text()
    assert "gpus" not in text and "srun" not in text and "requeue" not in text
    text = text.replace(f"bash {ROOT}/eval.sh", "echo")
    write(tmp_path / "out/logs/status.sh", "")
    given = {**os.environ, "SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_JOB_ID": "101"}
    ran = subprocess.run(["bash"], input=text, env=given, capture_output=True, text=True)
    step = next(step for step in request.steps if step.name == partial)
    assert (ran.returncode, tuple(ran.stdout.splitlines()[1].split())) == (0, step.complete.of("gap").words[2:])
    assert f"{partial}: already in the queue as job 101" in submit(request, tmp_path / "jobs", done, [partial])


def test_the_status_of_a_job_is_not_in_its_log(tmp_path, queue):
    """Where it names another table that is refused, the page would show that as the reason of this step."""
    request = asked(tmp_path, "--sizes 3B --tasks description --variants group")
    (job,) = [job for job in slurm.make_jobs(request.steps) if job.group.startswith("prepare")]
    write(tmp_path / "status.sh", "echo status: page; echo error: 7B is refused >&2")
    text = slurm.script(job, tmp_path)
    text = text.replace(slurm.quote(job.steps[0].command.words[0]), "false")
    ran = subprocess.run(["bash"], input=text, env={**os.environ, "SLURM_JOB_ID": "1"}, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (1, "+ job 1, start 1\n", "")


def test_the_status_reads_what_was_predicted_when_it_was_submitted(tmp_path, queue, monkeypatch, capsys):
    """A job holds its GPUs while it rewrites the page; and the planner may refuse."""
    asked_for = []

    def predict(steps, gpus):
        asked_for.append(gpus)
        return {step.name: forecast.Forecast(7_200) for step in steps if step.kind == TRAIN}

    def run(*words):
        flags = ["--output", str(tmp_path / "out"), "--sizes", "3B", "--tasks", "description"]
        monkeypatch.setattr(sys, "argv", ["paper.sh", *words, *flags])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        return capsys.readouterr().err

    monkeypatch.setattr(cli, "forecast", predict)
    run("--slurm", str(tmp_path / "jobs"), "--gpus", "8xH100-80GB")
    text = (tmp_path / "out/logs/status.sh").read_text()
    assert "--status" in text and "--gpus 8x" not in text
    page = tmp_path / "out/status.html"
    for words in (["--status"], ["--status", "--gpus", "8xH100-80GB"]):
        assert run(*words) == "" and "about 2.0 h" in page.read_text()
        page.unlink()
    said = run("--status", "--gpus", "8xFOO")
    assert "has no forecast for 8xFOO" in said and "about 2.0 h" not in page.read_text()
    write(tmp_path / "out/forecast.json", "{}")
    assert "training is not predicted" in run("--status") and asked_for == ["8xH100-80GB"]


def test_groups_of_one_plan_share_what_is_read(made, monkeypatch):
    opened = []
    look = headers_module.open_film
    monkeypatch.setattr(headers_module, "open_film", lambda path: opened.append(path) or look(path))
    words = ["--model_name_or_path", str(made[0]), "--train_data", str(made[1])]
    found = forecast.predict({"one": words, "two": words}, "8xH100-80GB")
    assert found["one"] == found["two"] and found["one"]["seconds"] > 0 and len(opened) == 8


def test_an_array_changes_nothing_but_its_own_words(tmp_path, queue):
    """A judge may be called like a variant, and so may a folder."""
    words = "--sizes 3B --tasks description --variants gap --judge-url http://judge --judge-model my-gap"
    request = asked(tmp_path, words, "gap")
    submit(request, tmp_path / "jobs")
    text = (tmp_path / "jobs/evaluate-3B-description-fixed.sbatch").read_text()
    assert "--judge-model my-gap" in text and f"{tmp_path}/gap/3B/qwen2_5vl-pe-$variant" in text
    assert 'QWEN2_5_VL_EVAL_OUTPUT_FILE="${variant}_infer.json"' in text or "=${variant}_infer.json" in text


def test_a_queued_report_waits_for_what_is_submitted_again(tmp_path, queue):
    request = asked(tmp_path, "--sizes 3B --tasks description --variants group gap")
    done, folder = ("prepare-description",), tmp_path / "jobs"
    submit(request, folder, done)
    jobs = tmp_path / "queue/jobs"
    lines = jobs.read_text().splitlines(keepends=True)
    names = [line.split()[:3] for line in lines]
    assert [number for _, _, number in names] == ["100", "100", "101", "101", "102", "102", "103"]
    jobs.write_text("".join(lines[2::2]))  # gap's training was cancelled, and its evaluations with it
    lines = submit(request, folder, (*done, "train-3B-description-group"))
    assert lines == [
        "train-3B-description: job 104, array 5",
        "evaluate-3B-description-fixed-group: already in the queue as job 101",
        "evaluate-3B-description-fixed: job 105, array 5, aftercorr:104",
        "evaluate-3B-description-random-group: already in the queue as job 102",
        "evaluate-3B-description-random: job 106, array 5, aftercorr:104",
        "report: job 103 must wait for jobs that are submitted now, and is replaced",
        "report: job 107, afterany:101:102:105:106",
    ]
    assert " 103 " not in jobs.read_text()
    # A report that runs cannot wait: another one is submitted, once.
    found = jobs.read_text().replace("107 PENDING Dependency", "107 RUNNING None").splitlines(keepends=True)
    jobs.write_text("".join(line for line in found if " 105 " not in line))
    lines = submit(request, folder, (*done, "train-3B-description-group"))
    assert lines[-1] == "report: job 109, afterany:101:102:108:106"
    assert "report: already in the queue as job 109" in submit(request, folder, (*done, "train-3B-description-group"))


def test_a_queued_report_is_not_made_smaller(tmp_path, queue):
    words, folder = "--sizes 3B --tasks description --schedules fixed --variants group", tmp_path / "jobs"
    submit(asked(tmp_path, words), folder)
    text = (tmp_path / "out/logs/report.sh").read_text()
    with pytest.raises(InputError, match=r"job 103 in the queue reports evaluate-3B-.*-group too, which these flags"):
        submit(asked(tmp_path, words.replace("group", "gap")), folder)
    assert (tmp_path / "out/logs/report.sh").read_text() == text
    lines = submit(asked(tmp_path, f"{words} gap"), folder)
    assert lines[-2:] == [
        "report: job 103 must wait for jobs that are submitted now, and is replaced",
        "report: job 106, afterany:102:105",
    ]
    assert "gap" in (tmp_path / "out/logs/report.sh").read_text()


def test_jobs_that_wait_for_one_that_ends_are_submitted_again(tmp_path, queue):
    """After scancel, SLURM shows a job until its last process is gone, and then still those that wait for it."""
    request = asked(tmp_path, "--sizes 3B --tasks description --variants group gap --schedules fixed")
    done, folder, jobs = ("prepare-description",), tmp_path / "jobs", tmp_path / "queue/jobs"
    submit(request, folder, done)
    first = jobs.read_text()
    running = first.replace("100 PENDING None", "100 RUNNING None")
    jobs.write_text(re.sub(r" 5 100 RUNNING", " 5 100 COMPLETING", running))
    again = [
        "train-3B-description-group: already in the queue as job 100",
        "train-3B-description-gap: job 100_5 is ending",
        "train-3B-description: job 103, array 5, afterany:100_5",
        "evaluate-3B-description-fixed-group: already in the queue as job 101",
        "evaluate-3B-description-fixed-gap: job 101_5 must wait for jobs that are submitted now, and is replaced",
        "evaluate-3B-description-fixed: job 104, array 5, aftercorr:103",
        "report: job 102 must wait for jobs that are submitted now, and is replaced",
        "report: job 105, afterany:101:104",
    ]
    assert submit(request, folder, done) == again
    lines = jobs.read_text().splitlines()
    jobs.write_text("\n".join(reversed(lines)) + "\n")  # squeue may list them in any order
    assert all("already in the queue" in line for line in submit(request, folder, done))

    # It saved before its time limit, and goes back into the queue.
    jobs.write_text(re.sub(r" 5 100 RUNNING", " 5 100 COMPLETING", running))
    write(tmp_path / "out/logs/train-3B-description-gap.attempt", "100_5 1000 1600 143")
    assert all("already in the queue" in line for line in submit(request, folder, done))
    # It failed, and its file still rewrites the status page.
    jobs.write_text(running)
    write(tmp_path / "out/logs/train-3B-description-gap.attempt", "100_5 1000 1600 1")
    assert "train-3B-description-gap: job 100_5 is ending" in submit(request, folder, done)
    # Where SLURM does not remove what can no longer run.
    jobs.write_text(first.replace(" 5 101 PENDING Dependency", " 5 101 PENDING DependencyNeverSatisfied"))
    lines = submit(request, folder, (*done, "train-3B-description-gap"))
    assert "evaluate-3B-description-fixed-gap: job 101_5 waits for jobs that have ended, and is replaced" in lines


def test_funqa_waits_for_the_end_of_pe_video_not_for_its_success(tmp_path, queue):
    lines = submit(asked(tmp_path, "--sizes 3B --variants group"), tmp_path / "jobs")
    assert lines[:2] == ["prepare-description: job 100", "prepare-funqa: job 101, afterany:100"]
    assert "train-3B-funqa: job 103, array 4, afterok:101" in lines


def test_an_element_of_an_array_is_requeued_alone_and_has_its_cores(tmp_path, queue):
    submit(asked(tmp_path, "--sizes 3B --tasks description --variants group"), tmp_path / "jobs")
    text = (tmp_path / "jobs/train-3B-description.sbatch").read_text()
    write(tmp_path / "out/logs/status.sh", "")
    for name, says in (("srun", 'echo "cores $SRUN_CPUS_PER_TASK"; exit 143'), ("scontrol", 'echo "$*"')):
        write(tmp_path / "queue/bin" / name, f"#!/bin/bash\n{says}\n").chmod(0o755)
    given = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "4", "SLURM_CPUS_PER_TASK": "64"}
    ran = subprocess.run(["bash"], input=text, env={**os.environ, **given}, capture_output=True, text=True)
    assert ran.stdout.splitlines() == ["+ job 7_4, start 1", "cores 64", "requeue 7_4"] and ran.returncode == 143
    attempt = read_attempt(tmp_path / "out/logs", "train-3B-description-group")
    assert attempt and (attempt.job, attempt.status) == ("7_4", 143) and attempt.began <= attempt.ended
    given["SLURM_RESTART_COUNT"] = "20"
    ran = subprocess.run(["bash"], input=text, env={**os.environ, **given}, capture_output=True, text=True)
    assert ran.stdout.splitlines() == ["+ job 7_4, start 21", "cores 64"] and ran.returncode == 143
    assert ran.stderr == "error: stopped at the time limit 21 times: submit it again to go on\n"


SACCT = r"""#!/bin/bash
[ "${!#}" = --jobs=100_5,101_5,102_5,102_4 ] && printf "100_5|RUNNING\n102_5|TIMEOUT\n"
"""


def test_status_on_slurm(tmp_path, queue, monkeypatch):
    """Jobs by the queue, the exit statuses and sacct; and without SLURM's commands."""
    request = asked(tmp_path, "--sizes 3B --tasks description --variants group gap")
    logs = request.folders.logs
    submit(request, tmp_path / "jobs", ("prepare-description",))

    def attempt(name, text, log=""):
        write(logs / f"{name}.attempt", text)
        if log:
            write(logs / log, "loading\nerror: no space\nending\n")

    attempt("train-3B-description-group", "100_4 1000 1600 1", "train-3B-description-100_4.log")
    attempt("train-3B-description-gap", "100_5 1000", "train-3B-description-100_5.log")
    attempt("evaluate-3B-description-fixed-gap", "101_5 1000")
    attempt("evaluate-3B-description-random-gap", "102_5 1000")
    jobs = tmp_path / "queue/jobs"
    lines = [line.replace("100 PENDING", "100 RUNNING") for line in jobs.read_text().splitlines(keepends=True)]
    kept = [line for line in lines if " 4 100 " not in line and " 5 101 " not in line and " 5 102 " not in line]
    jobs.write_text("".join(line for line in kept if " 4 102 " not in line))
    write(tmp_path / "queue/bin/sacct", SACCT).chmod(0o755)

    def words():
        progress = {step.name: Progress(step, TO_DO) for step in request.steps}
        progress["prepare-description"].word = DONE
        shown = QueueStatus(request.folders)
        shown.update(request.steps, progress)
        assert shown.is_finished(list(progress.values())) is False
        short = (name.replace("3B-description-", "") for name in progress)
        return progress, dict(zip(short, ((one.word, one.detail) for one in progress.values()), strict=True))

    progress, found = words()
    assert found == {
        "prepare-description": (DONE, ""),
        "train-group": (FAILED, "error: no space"),
        "evaluate-fixed-group": ("queued", "job 101_4, waits (Dependency)"),
        "evaluate-random-group": (BLOCKED, "needs train-3B-description-group"),
        "train-gap": (RUNNING, "ending"),
        "evaluate-fixed-gap": (FAILED, "ended without an exit status"),
        "evaluate-random-gap": (FAILED, "TIMEOUT"),
        "report": ("queued", "job 103, waits (Dependency)"),
    }
    one = progress["train-3B-description-group"]
    assert one.log == logs / "train-3B-description-100_4.log" and one.took == 600
    status.write_page(request.folders, list(progress.values()))
    page = request.folders.page.read_text()
    assert 'href="logs/train-3B-description-100_4.log"' in page and "error: no space" in page

    # The job of a step whose exit status is written is still in the queue while it rewrites the page.
    jobs.write_text(jobs.read_text().replace(" 5 100 RUNNING", " 5 100 COMPLETING"))
    attempt("train-3B-description-gap", "100_5 1000 1200 2")
    assert words()[1]["train-gap"] == (FAILED, "error: no space")
    monkeypatch.setenv("PATH", without_slurm(tmp_path))
    attempt("train-3B-description-gap", "100_5 1000")
    found = words()[1]
    assert found["train-group"] == (FAILED, "error: no space")
    assert found["train-gap"] == (
        TO_DO,
        "began as job 100_5; the queue, which would say whether it still runs, is not known here",
    )


def test_a_job_that_ended_before_it_began(tmp_path, queue):
    """SLURM could not write its log on the node; it was cancelled while it waited; or it waits for such a one."""
    request = asked(tmp_path, "--sizes 3B --tasks description --variants group gap --schedules fixed", "5%j @")
    submit(request, tmp_path / "jobs", ("prepare-description",))
    assert f"--output={tmp_path}/5%%j @/logs/report-%j.log" in queue()[-1]
    (tmp_path / "queue/jobs").write_text("")
    says = '[ "${!#}" = --jobs=100_4,101_4,100_5,101_5,102 ] && printf "100_4|FAILED\\n100_[5,7-9]|CANCELLED by 0\\n"'
    write(tmp_path / "queue/bin/sacct", f"#!/bin/bash\n{says}\n").chmod(0o755)
    # An earlier attempt failed in another way.
    write(request.folders.logs / "train-3B-description-group.attempt", "90_4 1000 1600 1")

    def words():
        progress = {step.name: Progress(step, TO_DO) for step in request.steps}
        progress["prepare-description"].word = DONE
        QueueStatus(request.folders).update(request.steps, progress)
        return [(one.word, one.detail) for one in progress.values()][1:]

    node = f": check that its node can write {request.folders.logs}"
    assert words() == [
        (FAILED, f"job 100_4 ended before it began (FAILED){node}"),
        (BLOCKED, "needs train-3B-description-group"),
        (FAILED, "job 100_5 ended before it began (CANCELLED by 0)"),
        (BLOCKED, "needs train-3B-description-gap"),
        (BLOCKED, "needs evaluate-3B-description-fixed-group"),
    ]
    (tmp_path / "queue/bin/sacct").unlink()
    why = f"job 100_5 ended before it began (cancelled, or its node cannot write {request.folders.logs})"
    assert words()[2] == (FAILED, why)
    # It was started since, by another job or here.
    write(request.folders.logs / "train-3B-description-group.attempt", f"local {time.time() + 9} {time.time() + 9} 1")
    assert words()[0] == (FAILED, "exit status 1")


def test_sbatch_that_fails_or_is_missing(tmp_path, queue, monkeypatch):
    request = asked(tmp_path, "--sizes 3B --tasks description --variants group")
    folder = tmp_path / "jobs"
    broken = write(folder / "evaluate-3B-description-fixed.sbatch", "broken")
    with pytest.raises(InputError) as caught:
        submit(request, folder)
    assert str(caught.value) == (
        f"sbatch {broken} failed (invalid partition specified: nope; Batch job submission failed: Invalid partition "
        "name specified): fix that and give the same command; jobs in the queue, which are not submitted again: "
        "100, 101"
    )
    broken.unlink()
    lines = submit(request, folder)  # nothing is lost, and nothing submitted twice
    assert lines[:2] == [
        "prepare-description: already in the queue as job 100",
        "train-3B-description-group: already in the queue as job 101",
    ]
    assert "evaluate-3B-description-fixed: job 102, array 4, aftercorr:101" in lines
    monkeypatch.setenv("PATH", without_slurm(tmp_path))
    with pytest.raises(InputError, match=r"sbatch is not on this machine, so nothing was submitted; the files are in "):
        submit(request, tmp_path / "others")
    assert (tmp_path / "others/train-3B-description.sbatch").exists()


def test_what_sbatch_says_is_shown(tmp_path, queue):
    """Warnings, and what a site adds around the id."""
    sbatch = tmp_path / "queue/bin/sbatch"
    says = "echo 'sbatch: warning: 16 nodes are down' >&2; echo 'Welcome to 8 nodes'"
    sbatch.write_text(SBATCH.replace('echo "$number;', f'{says}; echo "$number;'))
    lines = submit(asked(tmp_path, "--sizes 3B --tasks description --variants group"), tmp_path / "jobs")
    assert lines[:2] == ["sbatch: warning: 16 nodes are down", "prepare-description: job 100"]
    assert "train-3B-description: job 101, array 4, afterok:100" in lines
    sbatch.write_text("#!/bin/bash\necho done")
    (tmp_path / "queue/jobs").write_text("")
    with pytest.raises(InputError, match=r"prepare-funqa\.sbatch printed no job id, but 'done': see squeue --me"):
        submit(asked(tmp_path, "--sizes 3B --tasks funqa"), tmp_path / "jobs")


def test_a_queue_that_does_not_answer(tmp_path, queue, monkeypatch):
    request = asked(tmp_path, "--sizes 3B --tasks description --variants group")
    monkeypatch.setattr(slurm_queue, "TIMEOUT", 0.2)
    write(tmp_path / "queue/bin/squeue", "#!/bin/bash\nexec sleep 60\n")
    with pytest.raises(InputError, match=r"^squeue has not answered for 0 s: give the same command later$"):
        submit(request, tmp_path / "jobs")
    assert not queue() and not QueueStatus(request.folders).known


def test_words_with_spaces_and_dollars_in_sbatch_files():
    for word in ("plain/a-b.c", "a b", "$HOME", 'say "x"', "back`tick", "", "a\\b"):
        said = subprocess.run(["bash", "-c", f"printf %s {slurm.quote(word)}"], capture_output=True, text=True).stdout
        assert said == word
    words = f"/my folder/x-{slurm.VARIANT}", f"{slurm.VARIANT}_infer.json"
    line = " ".join(map(slurm.quote, words))
    said = subprocess.run(["bash", "-c", f"variant=gap; printf '%s|' {line}"], capture_output=True, text=True).stdout
    assert said == "/my folder/x-gap|gap_infer.json|"


def test_how_long_the_rest_takes():
    def one(word, kind=TRAIN, **values):
        step = Step("x", kind, Command(()), lambda: State(), size="3B", task="funqa")
        return Progress(step, word, **values)

    steps = [one(DONE, took=100.0), one(RUNNING, began=1000.0), one(TO_DO), one(FAILED), one(BLOCKED)]
    assert status.seconds_left(steps, 1030.0) == (170.0, 0)
    assert status.seconds_left([one(TO_DO, EVALUATE), one(TO_DO, predicted=7200.0)], 0) == (7200.0, 1)
    assert status.left_text([one(TO_DO, EVALUATE), one(TO_DO, predicted=7200.0)], 0) == (
        "about 2.0 h left and 1 step of unknown length"
    )


def test_status_page(tmp_path, monkeypatch):
    request = asked(tmp_path)
    progress = [Progress(step, TO_DO, predicted=3600.0) for step in request.steps]
    progress[0].word, progress[0].took = DONE, 300.0
    progress[1].word, progress[1].detail = FAILED, "error: <b>no space</b> " + "x" * 200
    progress[2].word, progress[2].began = RUNNING, 1000.0
    monkeypatch.setattr(status, "time", SimpleNamespace(**{**vars(time), "time": lambda: 1060.0}))
    write(request.folders.log(progress[1].step.name), "error: no space\n")
    status.write_page(request.folders, progress)
    with Browser(tmp_path / "browser") as page:
        for width in (1200, 390):
            page.open(request.folders.page, width)
            assert page.run("document.documentElement.scrollWidth <= innerWidth")
        assert page.run("document.title") == "1 of 43 steps, Speak While Watching"
        assert page.run("document.querySelectorAll('tbody tr').length") == 43
        assert page.run("document.querySelector('.failed a').getAttribute('href')") == "logs/prepare-funqa.log"
        assert page.run("document.querySelector('.failed .detail').innerText").startswith("error: <b>no space</b>")
        assert page.run("document.querySelector('.running .time').innerText") == "60 s"
        assert "1 done, 1 running, 1 failed, 43 steps in all: about 41.0 h left" in page.run("document.body.innerText")
        assert page.run("document.querySelector('meta[http-equiv=refresh]').content") == "10"
        assert not page.errors


def paper(tmp_path, *words, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("QWEN2_5_VL_")}
    return subprocess.run(
        ["bash", str(ROOT / "paper.sh"), *words],
        cwd=tmp_path, env=with_server({**clean, **environment}), capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.mark.long
def test_the_demo_from_videos_to_the_report(tmp_path):
    """One variant, fixed and random, descriptions and questions; then again, and with settings that contradict it."""
    flags = ["--demo", "--device", "cpu", "--output", "the demo", "--variants", "group"]
    flags += ["--train-videos", "8", "--test-videos", "1", "--steps"]
    done = paper(tmp_path, *flags, "2")
    assert done.returncode == 0, done.stdout + done.stderr
    output = tmp_path / "the demo"
    assert done.stdout.count(": running, log in ") == 11 and f"report: {output / 'report.html'}" in done.stdout
    table = (output / "report.md").read_text()
    assert "## Video question answering" in table and "random, K = 3" in table and "| *12.52* |" in table
    runs = table.partition("## Runs")[2].strip().splitlines()[2:]
    assert len(runs) == 3 and all(
        re.search(r"\| [0-9a-f]{8}\+? \| \S+ [0-9a-f]{8} \| \S+ [0-9a-f]{8} \|", row) for row in runs
    )
    made = json.loads((output / "demo/qwen2_5vl-pe-group/run.json").read_text())
    assert made["recipe_differences"] == {
        "min_pixels_per_frame": 78400, "max_pixels_per_frame": 602112, "tune_mm_vision": False, "max_steps": -1,
        "learning_rate": 2e-5, "weight_decay": 0.0, "adam_beta2": 0.999, "bf16": True, "step_samples": 16,
    }  # fmt: skip
    questions = [json.loads(line) for line in (output / "dataset/funqa_test.jsonl").read_text().splitlines()]
    assert [row["task"] for row in questions] == ["H2", "H3"]
    assert "nothing left to run" in (output / "status.html").read_text()

    again = paper(tmp_path, *flags, "2")
    assert again.returncode == 0 and again.stdout.count(": already done") == 11 and "running" not in again.stdout
    plan = paper(tmp_path, *flags, "2", "--plan", "--tasks", "description")
    assert plan.returncode == 0 and "6 of 7 steps are done" in plan.stdout, plan.stdout + plan.stderr
    other = paper(tmp_path, *flags, "3")
    assert other.returncode == 2 and other.stderr.count("\n") == 1 and "--max_steps is 2, not 3" in other.stderr


def test_the_plan_predicts_hours_and_disk(tmp_path):
    """For GPUs that are not here, with the data assumed; the model's shape is that of its name."""
    plan = paper(tmp_path, "--plan", "--gpus", "8xH100-80GB", "--output", "out", "--sizes", "3B", HF_HUB_OFFLINE="1")
    assert plan.returncode == 0, plan.stderr
    (line,) = [line for line in plan.stdout.splitlines() if "train-3B-funqa-gap" in line]
    assert re.search(r"to do +train-3B-funqa-gap +\d+ min, 5\d GB$", line)
    assert re.search(r"0 of 31 steps are done; .*\ntraining: \S+ \w+ one after the other, and 6\d\d GB", plan.stdout)
    assert not (tmp_path / "out").exists()
    unknown = paper(tmp_path, "--plan", "--gpus", "8xFOO")
    assert unknown.returncode == 2 and unknown.stderr.startswith("error: --gpus 8xFOO: 'FOO' is not known")
