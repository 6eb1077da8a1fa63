"""Writes the steps as sbatch files, one for each group of steps that differ in the variant alone, and submits them with
their dependencies.

A file that was edited is submitted as it is, if it was written for the same commands. Array indices and dependencies,
which depend on what is done, are flags of sbatch. What squeue shows as queued or running is not submitted again. Each
file also writes when its step began and ended and its exit status (attempts.py), which the status page shows. What
depends on the part of the tables that is asked for, the commands of the status page and the report, is in files beside
the logs, so that a file that was edited serves for any part.
"""

import hashlib
import re
import shlex
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.files import reporting_write_errors, write_file

from .attempts import Attempt, attempt_path, read_attempt, submission_path
from .runner import BEGINS
from .settings import PAPER_VARIANTS, REQUEUES, ROOT, SBATCH, SBATCH_CPU
from .slurm_queue import NEVER, REQUEUED, Queued, call, queued_jobs, run
from .steps import EVALUATE, PREPARE, REPORT, TRAIN, VARIANT, Step

REQUEUE = (
    f'if [ "$status" -eq {REQUEUED} ]; then  # saved before the time limit',
    f'  if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {REQUEUES} ]; then scontrol requeue "$job"',
    f'  else echo "error: stopped at the time limit {REQUEUES + 1} times: submit it again to go on" >&2; fi',
    "fi",
)
STATUS_FILE, REPORT_FILE = "status.sh", "report.sh"
"""In the folder of the logs: rewrites the status page, and writes the report, of what was last submitted."""
COVERS = "# of "
"""Before the evaluations that a report is of, in its first line."""
STAMP = "# for these commands: "
"""Before the hash of the text that was written, in a line of its own."""


@dataclass(frozen=True)
class Job:
    """Steps of a group: a job, or elements of an array with an index for each variant."""

    group: str
    steps: tuple[Step, ...]
    """Those that still have to run."""
    scores: bool = False
    """Whether only metrics are missing: the job needs no GPU."""

    @property
    def file(self) -> str:
        """The name of its sbatch file."""
        return f"{'score-' * self.scores}{self.group}.sbatch"

    @property
    def is_array(self) -> bool:
        return bool(self.steps[0].variant)


def make_jobs(left: Sequence[Step], partial: Collection[str] = ()) -> list[Job]:
    """The steps that are `left`, by group. Those named in `partial` are completed, in jobs of their own. The steps come
    variant by variant; of the groups, each follows those that it needs."""
    groups: dict[tuple[str, bool], list[Step]] = {}
    for step in left:
        scores = step.name in partial and step.complete is not None
        groups.setdefault((step.group, scores), []).append(step)
    rank = (PREPARE, TRAIN, EVALUATE, REPORT)
    jobs = [Job(group, tuple(steps), scores) for (group, scores), steps in groups.items()]
    return sorted(jobs, key=lambda job: rank.index(job.steps[0].kind))


def entry(step: Step, output: Path) -> tuple[str, str]:
    """(job name, array index) of a step in the queue. The name differs between output folders; the index does not
    depend on which variants were asked for."""
    name = f"{step.group}-{hashlib.sha256(str(output).encode()).hexdigest()[:6]}"
    return name, str(PAPER_VARIANTS.index(step.variant)) if step.variant else "N/A"


def quote(word: str) -> str:
    """`word` for bash, with the variable $variant in place of VARIANT."""
    escaped = "".join(f"\\{letter}" if letter in '\\"$`' else letter for letter in word)
    plain = escaped == word and all(letter.isalnum() or letter in "@%+=:,./-_" for letter in word)
    escaped = escaped.replace(VARIANT, "$variant" if plain and word.endswith(VARIANT) else "${variant}")
    return escaped if plain and word else f'"{escaped}"'


def log_path(logs: Path, group: str, job: str) -> Path:
    """The log of a job, or of an element such as 12_4."""
    return logs / f"{group}-{job}.log"


def script(job: Job, logs: Path) -> str:
    """The sbatch file of a job."""
    step = job.steps[0]
    gpu = step.kind in (TRAIN, EVALUATE) and not job.scores
    lines = ["#!/bin/bash", f"# {job.group}: written by paper.sh, which submits it. Edit it as needed."]
    lines += [f"#SBATCH {line}" for line in (SBATCH if gpu else SBATCH_CPU)]
    lines += [f"cd {quote(str(ROOT))}", "unset ${!QWEN2_5_VL_@}"]
    # SLURM_JOB_ID of one element of an array is the id of the whole array.
    lines += ["job=$SLURM_JOB_ID" if not job.is_array else "job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"]
    # From SLURM 22.05 on, srun does not take it from sbatch.
    lines += ["export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}"] * gpu
    command = (step.complete if job.scores else None) or step.command
    if job.is_array:
        lines += [f"variants=({' '.join(PAPER_VARIANTS)})", "variant=${variants[$SLURM_ARRAY_TASK_ID]}"]
    lines += [f"export {name}={quote(value)}" for name, value in command.environment.items()]
    words = ("bash", str(logs / REPORT_FILE)) if step.kind == REPORT else command.words
    name, show = f"{job.group}-{VARIANT}" if job.is_array else job.group, f"bash {quote(str(logs / STATUS_FILE))}"
    lines += [f'echo "{BEGINS}$job, start $((${{SLURM_RESTART_COUNT:-0}} + 1))"']
    lines += [f"attempt={quote(str(attempt_path(logs, name)))}", "began=$(date +%s)", 'echo "$job $began" >"$attempt"']
    show += " >/dev/null 2>&1"  # the log is that of the step alone
    lines += [f"{show} &"]
    lines += [("srun " if gpu else "") + " ".join(map(quote, words)), "status=$?"]
    lines += ['echo "$job $began $(date +%s) $status" >"$attempt"']
    lines += REQUEUE if gpu else ()  # at once: the time limit is near
    lines += ["wait", show, 'exit "$status"']
    lines.insert(2, STAMP + hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16])
    return "\n".join(lines) + "\n"


def write_script(path: Path, text: str) -> str:
    """Write the sbatch file `text`, unless it was edited. Returns a line about a file that is kept, or an empty string.

    Raises InputError for a file that was edited and written for other commands.
    """
    if not path.exists():
        write_file(path, text)
        return ""
    found = path.read_text(encoding="utf-8", errors="replace")
    stamps = [line.removeprefix(STAMP) for line in found.splitlines() if line.startswith(STAMP)]
    if not stamps:
        return f"{path} was not written by paper.sh, and is kept as it is"
    rest = "\n".join(line for line in found.splitlines() if not line.startswith(STAMP))
    if hashlib.sha256(rest.encode()).hexdigest()[:16] == stamps[0]:
        write_file(path, text)
        return ""
    if f"{STAMP}{stamps[0]}\n" not in text:
        raise InputError(
            f"{path} was edited, and written for other commands than now: delete it, or give --slurm another folder"
        )
    return f"{path} was edited, and is kept as it is"


def submit(jobs: Sequence[Job], folder: Path, output: Path, after_each: Sequence[str]) -> list[str]:
    """Write the files of `jobs` into `folder` and submit what is not queued. Returns a line for each job. `after_each`
    is the command that rewrites the status page.

    A job that waits for one that is submitted again is cancelled and submitted too, as it would wait for a job that has
    ended. One that is ending is submitted again, to run after its end.
    Raises InputError where sbatch is missing or refuses a file, naming it and what is queued already.
    """
    logs = output / "logs"
    lines: list[str] = []
    for job in jobs:
        path = folder / job.file
        if line := write_script(path, script(job, logs)):
            lines.append(line)
    if not shutil.which("sbatch"):
        raise InputError(
            f"sbatch is not on this machine, so nothing was submitted; the files are in {folder}: give the same "
            "command where SLURM is, or omit --slurm to run here"
        )
    with reporting_write_errors(logs):
        logs.mkdir(parents=True, exist_ok=True)  # without it, SLURM drops the logs
    queue = queued_jobs()
    texts = {STATUS_FILE: f"exec {shlex.join(after_each)}\n"}
    for report in (job.steps[0] for job in jobs if job.steps[0].kind == REPORT):
        path = logs / REPORT_FILE
        if (queued := queue.get(entry(report, output))) and path.exists():
            first = path.read_text(encoding="utf-8").partition("\n")[0]
            if others := sorted({*first.removeprefix(COVERS).split()} - {*report.after} if COVERS in first else ()):
                raise InputError(
                    f"job {queued.job} in the queue reports {others[0]} too, which these flags leave out: give the "
                    f"flags of both parts, or cancel it first (scancel {queued.job})"
                )
        texts[REPORT_FILE] = f"{COVERS}{' '.join(report.after)}\nexec {shlex.join(report.command.words)}\n"
    for name, text in texts.items():
        write_file(logs / name, text)
    found = {step.name: queue.get(entry(step, output)) for job in jobs for step in job.steps}
    ending = {name: one.id for name, one in found.items() if one and one.has_ended(read_attempt(logs, name))}
    ids = {name: one.job for name, one in found.items() if one and name not in ending}
    new: set[str] = set()
    for job in jobs:
        parts: dict[str, list[Step]] = {}
        old: list[str] = []
        for step in job.steps:
            queued, anew = found[step.name], bool(new & {*step.after, *step.behind})
            if step.name in ending:
                lines.append(f"{step.name}: job {ending[step.name]} is ending")
            elif queued and queued.waits and (anew or queued.reason == NEVER):
                old.append(queued.id)
                why = "must wait for jobs that are submitted now" if anew else "waits for jobs that have ended"
                lines.append(f"{step.name}: job {queued.id} {why}, and is replaced")
            elif queued and not (anew and step.kind == REPORT):  # a report that runs lacks the rows submitted now
                lines.append(f"{step.name}: already in the queue as job {queued.job}")
                continue
            new.add(step.name)
            parts.setdefault(dependency(step, ids, ending.get(step.name, "")), []).append(step)
        if old:  # one that has gone meanwhile is what scancel reports
            call(["scancel", "--quiet", "--state=PENDING", *old])
        for needs, steps in parts.items():
            number, said = _submit_one(job, steps, needs, folder, output, ids)
            lines += said
            ids |= dict.fromkeys((step.name for step in steps), number)
            for step in steps:
                submitted = Attempt(Queued(number, "PENDING", index=entry(step, output)[1]).id, int(time.time()))
                write_file(submission_path(logs, step.name), str(submitted))
    return lines


def _submit_one(
    job: Job, steps: Sequence[Step], needs: str, folder: Path, output: Path, ids: Mapping[str, str]
) -> tuple[str, list[str]]:
    """Submit `steps` of a job, to wait for what it `needs`. Returns the id and lines to show. `ids` are queued."""
    entries, path = [entry(step, output) for step in steps], folder / job.file
    indices = ",".join(index for _, index in entries)
    command = ["sbatch", "--parsable", f"--job-name={entries[0][0]}", "--kill-on-invalid-dep=yes"]
    logs = Path(str(output / "logs").replace("%", "%%"))
    command += [f"--output={log_path(logs, job.group, '%A_%a' if job.is_array else '%j')}"]
    command += [f"--array={indices}"] if job.is_array else []
    command += [f"--dependency={needs}"] if needs else []
    try:
        out, notes = run([*command, str(path)], what=f"sbatch {path}")
    except InputError as error:
        there = ", ".join(dict.fromkeys(ids.values())) or "none"
        raise InputError(f"{error}; jobs in the queue, which are not submitted again: {there}") from error
    numbers = re.findall(r"^(\d+)(?:;\S*)?$", out, re.MULTILINE)  # sites add lines of their own
    if not numbers:
        raise InputError(f"sbatch {path} printed no job id, but {out.strip() or 'nothing'!r}: see squeue --me")
    more = [f"array {indices}"] * job.is_array + [needs] * bool(needs)
    return numbers[-1], [*notes, ", ".join([f"{job.group}: job {numbers[-1]}", *more])]


def dependency(step: Step, ids: Mapping[str, str], before: str = "") -> str:
    """What a step waits for: the jobs, of `ids` by step name, of the steps that it needs, and the end of the job
    `before`; empty for nothing.

    An element of an array of evaluations waits for the same element of its training (aftercorr). The report waits for
    all evaluations to end, in whatever way (afterany), as a step does for those that it is only behind.
    """
    kind = {EVALUATE: "aftercorr", REPORT: "afterany"}.get(step.kind, "afterok")
    parts = []
    for how, names in ((kind, step.after), ("afterany", step.behind)):
        if jobs := dict.fromkeys(ids[name] for name in names if name in ids):
            parts.append(f"{how}:{':'.join(jobs)}")
    return ",".join([*parts, *([f"afterany:{before}"] if before else [])])
