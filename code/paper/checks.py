"""Whether a step is done, as its output says: run.json of training, result files and their arguments, reports of the
data. Nothing else keeps a state. Knows nothing about how steps run."""

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from identity import arguments_path, read_arguments
from qwen_vl_streaming.common.data_rows import hash_data
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.files import read_object
from qwen_vl_streaming.model.checkpoint import of_checkpoint
from qwenvl.fixed import FIXED_FLAGS
from results import count_skipped, load_finished, sibling

DONE, STARTED, TO_DO = "done", "started", "to do"
FREE = ("model_name_or_path", "pack_tokens", "per_device_train_batch_size", "gradient_accumulation_steps")
"""Of the flags that a run keeps, those that may differ between variants: only the samples of a step count."""
FIX = "remove it, or give another --output"
OF_A_ROW = ("variant", "position_rule", "data", "model", "model_sha256", "video_root", "schedule", "versions")
"""Arguments of a result file that differ from row to row of a table, or do not matter."""


@dataclass(frozen=True)
class State:
    """What an output says."""

    word: str = TO_DO
    detail: str = ""
    facts: dict[str, object] = field(default_factory=dict)
    """What all rows of a table must share."""
    where: Path | None = None
    """The output."""

    @property
    def done(self) -> bool:
        return self.word == DONE


def exists(path: Path) -> State:
    """A step that writes `path` last."""
    return State(DONE if path.exists() else TO_DO, where=path)


def demo_videos(folder: Path, given: dict[str, str]) -> State:
    """The demo's data set. Raises InputError if it was made with other settings than `given`."""
    settings = folder / "make_data.json"
    if settings.exists():
        made = read_object(settings, FIX)
        for name, value in given.items():
            if str(made.get(name)) != value:
                raise InputError(
                    f"{folder} was made with --{name.replace('_', '-')} {made.get(name)}, not {value}: give another "
                    "--output, or delete its folder"
                )
    return exists(folder / "truth.jsonl")


def prepared(rows: list[Path], report: Path, flags: dict[str, str]) -> State:
    """Rows of mani_data.py, which writes its `report` last. Raises InputError if it sampled otherwise than `flags`
    say."""
    if not report.exists() or not all(path.exists() for path in rows):
        return State(where=report)
    made = read_object(report, FIX)
    limit = int(flags["max-samples"]) if "max-samples" in flags else None
    if made.get("max_samples") != limit:
        raise InputError(
            f"{report} was made with --max-samples {made.get('max_samples')}, not {limit}: give another --output, or "
            "delete it to prepare the data again"
        )
    train, test = (count_rows(path) for path in rows)
    return State(DONE, f"{train:,} rows for training, {test:,} for evaluation", where=report)


def trained(folder: Path, data: Path, model: str, variant: str, flags: dict[str, str]) -> State:
    """A run of sft.sh, by its run.json. Raises InputError where it is another run than the plan's."""
    path = folder / "run.json"
    if not path.exists():
        return State(where=folder)
    made = read_object(path, FIX)
    arguments, used = made.get("arguments"), made.get("data")
    if not isinstance(arguments, dict) or not isinstance(used, dict):
        raise InputError(f"{path} has no arguments and data: remove {folder.name}, or give another --output")
    pairs = [("variant", made.get("variant"), variant)]
    pairs += [("the model", whole_path(arguments.get("model_name_or_path")), whole_path(model))]
    kept = FIXED_FLAGS.split()
    pairs += [(f"--{k}", arguments.get(k), v) for k, v in flags.items() if k in kept or k.startswith("tune_")]
    if data.exists():
        pairs.append((f"the hash of {data.name}", used.get("sha256"), data_hash(data)))
    for what, found, planned in pairs:
        if not same(found, planned):
            raise InputError(
                f"{path} is of another run: {what} is {found}, not {planned}: move {folder.name} away, or give another "
                "--output"
            )
    # The samples that do not count (left_out) may differ: a variant has longer sequences than another.
    facts = {f"--{name}": arguments[name] for name in kept if name in arguments and name not in FREE}
    facts |= {f"--{name}": value for name, value in arguments.items() if name.startswith(("tune_", "lora_"))}
    facts["the hash of the training data"], facts["the schedule"] = used.get("sha256"), made.get("schedule")
    facts["the hash of the base model"] = made.get("model_sha256")
    sizes = [arguments.get(name) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")]
    if all(isinstance(size, int) for size in (*sizes, made.get("world_size"))):
        facts["the number of samples of a step"] = sizes[0] * sizes[1] * made["world_size"]
    if not made.get("finished"):
        step = max((int(entry.name.split("-")[1]) for entry in folder.glob("checkpoint-[0-9]*")), default=0)
        return State(STARTED, f"checkpoint of step {step}" if step else "no checkpoint yet", facts, folder)
    if not (folder / "config.json").exists():
        raise InputError(f"{path} is of a finished run, but its checkpoint is missing: put it back, or remove {path}")
    return State(DONE, f"finished {made['finished']}", facts, folder)


def evaluated(out: Path, data: Path, checkpoint: Path, schedule: str, variant: str, metrics: list[str]) -> State:
    """A result file with its arguments and scores. Raises InputError where they are of other data, of another
    checkpoint or of another schedule than the plan's."""
    if not arguments_path(out).exists():
        return State(where=out)
    made = read_arguments(out)
    rows = len(load_finished(out))
    if not rows and not out.with_suffix(".parts").exists():
        return State(where=out)
    finished = (checkpoint / "config.json").exists()
    pairs = [("variant", made["variant"], variant)]
    pairs += [("the schedule", made["schedule"].split("-")[0], {"fixed": "wait", "random": "random"}[schedule])]
    if data.exists():
        pairs.append((f"the hash of {data.name}", made.get("data_sha256"), data_hash(data)))
    pairs.append(
        ("the hash of the checkpoint", made.get("model_sha256"), of_checkpoint(str(checkpoint)) if finished else None)
    )
    for what, found, planned in pairs:
        if found != planned:
            now = f"not {planned}" if planned else "which is not there"
            raise InputError(
                f"{out} is of another run: {what} is {found}, {now}: delete it to start over, or give another --output"
            )
    facts = {name: value for name, value in made.items() if name not in OF_A_ROW}
    facts["the K of the schedule"] = made["schedule"].partition("-")[2]
    skipped, total = count_skipped(out), count_rows(data) if data.exists() else rows
    if rows + skipped < total or out.with_suffix(".parts").exists():
        return State(STARTED, f"{rows:,} of {total:,} captions", facts, out)
    scores = read_object(path, FIX) if (path := sibling(out, "scores.json")).exists() else {}
    if "bleurt" in scores:
        facts["the BLEURT checkpoint"] = Path(scores["bleurt"]["checkpoint"]).name
    if "judge" in scores:
        facts["the judge"] = scores["judge"]["model"]
    reasons = scores.get("not_computed", {})
    missing = [f"{name} ({reasons.get(name, 'not scored')})" for name in metrics if name not in scores]
    if scores.get("count") != rows or missing:
        return State(STARTED, f"{rows:,} captions, without {', '.join(missing) or 'scores'}", facts, out)
    return State(DONE, f"{rows:,} captions{f', {skipped:,} skipped' if skipped else ''}", facts, out)


def reported(page: Path, rows: list[tuple[Path, str]]) -> State:
    """A report over exactly `rows`, (result file, name of the checkpoint), that is newer than the scores of each."""
    table, scores = page.with_suffix(".md"), [sibling(file, "scores.json") for file, _ in rows]
    if not (page.exists() and table.exists() and all(path.exists() for path in scores)):
        return State(where=page)
    lines = table.read_text(encoding="utf-8").partition("\n## Runs\n")[2].replace("\\", "").splitlines()
    cells = [line.split(" | ") for line in lines if line.startswith("| ")][2:]
    found = sorted((line[0].removeprefix("| "), line[3]) for line in cells)
    new = page.stat().st_mtime >= max(path.stat().st_mtime for path in scores)
    return State(DONE if new and found == sorted((file.name, name) for file, name in rows) else TO_DO, where=page)


def same(found: object, planned: str | None) -> bool:
    """Whether a value in run.json is that of a flag."""
    if isinstance(found, bool) or found is None or planned is None:
        return str(found) == str(planned)
    try:
        return float(str(found)) == float(planned)
    except ValueError:
        return str(found) == planned


def whole_path(model: object) -> str:
    """A folder as an absolute path without links; a hub id as it is."""
    return str(Path(str(model)).resolve()) if Path(str(model)).is_dir() else str(model)


def data_hash(path: Path) -> str:
    """The SHA-256 of a data file, read once for each version of the file."""
    return _read_rows(path, path.stat().st_mtime_ns)[0]


def count_rows(path: Path) -> int:
    """The number of rows of a JSON Lines file."""
    return _read_rows(path, path.stat().st_mtime_ns)[1]


@lru_cache
def _read_rows(path: Path, changed: int) -> tuple[str, int]:
    with path.open("rb") as lines:
        return hash_data(path), sum(bool(line.strip()) for line in lines)
