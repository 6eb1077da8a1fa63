"""Writes the steps as sbatch files, one for each group of steps that differ in the variant alone, and submits them with
their dependencies.

A file that exists is submitted as it is, so that it can be edited. Array indices and dependencies, which depend on what
is done, are flags of sbatch. What is queued or running, SLURM itself says (squeue), so nothing is submitted twice.
"""

import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.files import write_atomic

from .settings import ROOT, SBATCH, SBATCH_CPU
from .steps import EVALUATE, REPORT, TRAIN, Step

VARIANT = "@variant@"
"""Stands for the variant in the commands of an array."""
REQUEUE = 'if [ "$status" -eq 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi  # saved before the time limit'


@dataclass(frozen=True)
class Job:
    """A group of steps: a job, or an array with an index for each variant."""

    group: str
    steps: tuple[Step, ...]
    """All of the group, in the order of the array's indices."""
    todo: tuple[Step, ...]
    """Those to submit."""

    @property
    def is_array(self) -> bool:
        return bool(self.steps[0].variant)

    @property
    def indices(self) -> list[int]:
        return [number for number, step in enumerate(self.steps) if step in self.todo]


def make_jobs(steps: Sequence[Step], done: set[str]) -> list[Job]:
    """The groups with steps that are not `done`, in order."""
    groups: dict[str, list[Step]] = {}
    for step in steps:
        groups.setdefault(step.group, []).append(step)
    jobs = [Job(name, tuple(some), tuple(s for s in some if s.name not in done)) for name, some in groups.items()]
    order = {job.group: number for number, job in enumerate(jobs)}
    # Reports last, and an array after the array that it needs: the steps come variant by variant.
    ranks = {TRAIN: 1, EVALUATE: 2, REPORT: 3}
    jobs.sort(key=lambda job: (ranks.get(job.steps[0].kind, 0), order[job.group]))
    return [job for job in jobs if job.todo]


def quote(word: str) -> str:
    """`word` for bash, with the variable $variant in place of VARIANT."""
    escaped = "".join(f"\\{letter}" if letter in '\\"$`' else letter for letter in word)
    plain = escaped == word and all(letter.isalnum() or letter in "@%+=:,./-_" for letter in word)
    escaped = escaped.replace(VARIANT, "$variant" if plain and word.endswith(VARIANT) else "${variant}")
    return escaped if plain and word else f'"{escaped}"'


def script(job: Job, after_each: Sequence[str]) -> str:
    """The sbatch file of a job. `after_each` is the command that rewrites the status page."""
    step = job.steps[0]
    gpu = step.kind in (TRAIN, EVALUATE)
    lines = ["#!/bin/bash", f"# {job.group}: written by paper.sh, which submits it. Edit it as needed."]
    lines += [f"#SBATCH {line}" for line in (SBATCH if gpu else SBATCH_CPU)]
    lines += [f"cd {quote(str(ROOT))}", "unset ${!QWEN2_5_VL_@}"]
    environment, command = step.environment, step.command
    if job.is_array:
        lines += [f"variants=({' '.join(s.variant for s in job.steps)})", "variant=${variants[$SLURM_ARRAY_TASK_ID]}"]
        command = tuple(_generic(word, step.variant) for word in command)
        environment = {name: _generic(value, step.variant) for name, value in environment.items()}
    lines += [f"export {name}={quote(value)}" for name, value in environment.items()]
    lines += [("srun " if gpu else "") + " ".join(map(quote, command)), "status=$?"]
    lines += [" ".join(map(quote, after_each)), *([REQUEUE] if gpu else []), 'exit "$status"']
    return "\n".join(lines) + "\n"


def _generic(word: str, variant: str) -> str:
    """`word` with VARIANT for the variant, where it stands alone or ends a folder's or begins a file's name."""
    if word == variant:
        return VARIANT
    head, slash, name = word.rpartition("/")
    for start, end in (("", "_infer.json"), ("", "_random_infer.json")):
        if name == f"{start}{variant}{end}":
            return f"{head}{slash}{VARIANT}{end}"
    return f"{word.removesuffix(variant)}{VARIANT}" if name.endswith(f"-{variant}") else word


def job_name(job: Job, output: Path) -> str:
    """The name in the queue, which differs between output folders."""
    return f"{job.group}-{hashlib.sha256(str(output).encode()).hexdigest()[:6]}"


def queued_jobs() -> dict[str, str]:
    """The ids of the user's jobs in the queue, by name; none where squeue cannot be run. Of an array, its first id."""
    if not shutil.which("squeue"):
        return {}
    found = _run(["squeue", "--me", "--noheader", "--format=%j %F"], "squeue")
    return dict(line.split()[:2] for line in found.splitlines() if len(line.split()) >= 2)


def submit(jobs: Sequence[Job], folder: Path, output: Path, after_each: Sequence[str]) -> list[str]:
    """Write the files of `jobs` into `folder` and submit what is not queued. Returns a line for each job.

    Raises InputError where sbatch is missing or refuses a file, naming it and what is queued already.
    """
    for job in jobs:
        path = folder / f"{job.group}.sbatch"
        if not path.exists():
            write_atomic(path, script(job, after_each).encode())
    if not shutil.which("sbatch"):
        raise InputError(
            f"sbatch is not on this machine, so nothing was submitted; the files are in {folder}: give the same command "
            "where SLURM is, or omit --slurm to run here"
        )
    queue, ids, lines = queued_jobs(), {}, []
    for job in jobs:
        path, name = folder / f"{job.group}.sbatch", job_name(job, output)
        if name in queue:
            ids[job.group] = queue[name]
            lines.append(f"{job.group}: already in the queue as job {queue[name]}")
            continue
        parts = split_by_need(job, ids)
        for dependency, indices in parts:
            command = ["sbatch", "--parsable", f"--job-name={name}", f"--output={output}/logs/{job.group}-%j.log"]
            command += [f"--array={','.join(map(str, indices))}"] if job.is_array else []
            command += [f"--dependency={dependency}"] if dependency else []
            try:
                answer = _run([*command, str(path)], f"sbatch {path}")
            except InputError as error:
                queued = ", ".join(f"{group} ({number})" for group, number in ids.items()) or "nothing"
                raise InputError(f"{error}; in the queue: {queued}, which is not submitted again") from error
            number = answer.strip().split(";")[0]
            ids[job.group] = f"{ids[job.group]}:{number}" if job.group in ids else number
            array = f", array {','.join(map(str, indices))}" if job.is_array else ""
            lines.append(f"{job.group}: job {number}{array}{f', {dependency}' if dependency else ''}")
    return lines


def split_by_need(job: Job, ids: dict[str, str]) -> list[tuple[str, list[int]]]:
    """(dependency, indices) for each call of sbatch. `ids` are the jobs of the groups that are in the queue.

    An index of an array waits for the same index of the array of its training, where that still has to run.
    """
    if job.steps[0].kind == REPORT:
        groups = dict.fromkeys(
            name for name, number in ids.items() if name.startswith(f"evaluate-{job.steps[0].size}-")
        )
        return [(f"afterany:{':'.join(ids[name] for name in groups)}" if groups else "", [])]
    parts: dict[str, list[int]] = {}
    for index, step in enumerate(job.steps):
        if step not in job.todo:
            continue
        needs = dict.fromkeys(_group_of(name, step.variant) for name in step.after)
        kind = "aftercorr" if step.kind == EVALUATE else "afterok"
        waits = [f"{kind}:{ids[group]}" for group in needs if group in ids]
        parts.setdefault(",".join(waits), []).append(index)
    return list(parts.items())


def _group_of(name: str, variant: str) -> str:
    return name.removesuffix(f"-{variant}") if variant else name


def _run(command: list[str], what: str) -> str:
    """The output of `command`. Raises InputError with its last line of stderr where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise InputError(f"{what} failed ({reason}): fix that and give the same command")
    return done.stdout
