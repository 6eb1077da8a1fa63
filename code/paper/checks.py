"""Whether a step is done, as its output says: run.json of training, result files and their arguments, reports of the
data. Nothing else keeps a state. Knows nothing about how steps run."""

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from identity import arguments_path, read_arguments
from metrics.scoring import METRICS as CORPUS_METRICS
from qwen_vl_streaming.common.data_rows import hash_data
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.files import read_object
from qwen_vl_streaming.model.checkpoint import of_checkpoint
from qwen_vl_streaming.model.trained import training_record
from qwenvl.fixed import FIXED_FLAGS, FREE_FLAGS
from report.paper import SETTINGS
from results import SCORES, Row, count_skipped, load_finished, scores_of, sibling

DONE, STARTED, TO_DO = "done", "started", "to do"
PARTIAL = "incomplete"
"""What comes after can use it, and another run completes it: captions without one of their metrics."""
REFUSED = "refused"
"""It contradicts the plan, or another output."""
FIX = "remove it, or give another --output"
ABSENT = "absent"
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

    @property
    def usable(self) -> bool:
        """Whether what comes after can use it."""
        return self.word in (DONE, PARTIAL)


def exists(path: Path) -> State:
    """A step that writes `path` last."""
    return State(DONE if path.exists() else TO_DO, where=path)


def demo_videos(folder: Path, planned: dict[str, object]) -> State:
    """The demo's data set. Raises InputError if it was made with other settings than `planned`."""
    settings = folder / "make_data.json"
    if settings.exists():
        compare(f"{folder} was made", read_object(settings, FIX), planned, "delete its folder")
    return exists(folder / "truth.jsonl")


def prepared(rows: list[Path], report: Path, planned: dict[str, object]) -> State:
    """Rows of mani_data.py, which writes its `report` last. Raises InputError if it selected and sampled otherwise than
    `planned`."""
    if not report.exists() or not all(path.exists() for path in rows):
        return State(where=report)
    made = read_object(report, FIX)
    found, wanted = ({**each, **each.get("rules", {})} for each in (made, planned))
    compare(f"{report} was made", found, wanted, "delete it to prepare the data again")
    train, test = counts = [count_rows(path) for path in rows]
    if isinstance(splits := made.get("splits"), dict) and counts != [
        splits.get(name, {}).get("rows", count) for name, count in zip(("train", "test"), counts, strict=True)
    ]:
        return State(where=report)  # the rows are of an earlier run: this one kept none
    return State(DONE, f"{train:,} rows for training, {test:,} for evaluation", where=report)


def compare(what: str, made: dict, planned: dict[str, object], fix: str) -> None:
    """Raises InputError, with all of them, where values of `planned` that `made` has differ."""
    flags = [
        f"--{name.replace('_', '-')} {made[name]}, not {value}"
        for name, value in planned.items()
        if name in made and made[name] != value and not isinstance(value, dict)
    ]
    if flags:
        raise InputError(f"{what} with {', and with '.join(flags)}: give another --output, or {fix}")


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
    recipe = planned_flags(made, arguments, flags)
    pairs += [(f"--{name}", arguments.get(name), value) for name, value in recipe.items()]
    if data.exists():
        pairs.append((f"the hash of {data.name}", used.get("sha256"), data_hash(data)))
    refuse_other(path, pairs, f"move {folder.name} away")
    # The samples that do not count (left_out) may differ: a variant has longer sequences than another.
    facts = {f"--{name}": value for name, value in arguments.items() if decides(name)}
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


def planned_flags(made: dict, arguments: dict, flags: dict[str, str]) -> dict[str, object]:
    """The values of the flags that decide a training: those of `flags`, and for the others in which the run differs
    from sft.sh's defaults, the default. Half as many samples a GPU on twice as many GPUs are the same."""
    differences: dict[str, object] = dict(made.get("recipe_differences") or {})
    planned = {name: value for name, value in differences.items() if name != "step_samples"}
    planned |= {name: value for name, value in flags.items() if name == "wait_k" or decides(name)}
    if arguments.get("use_cpu") and "bf16" not in flags:
        planned["bf16"] = "False"  # as sft.sh sets it there
    return planned


def decides(flag: str) -> bool:
    """Whether the rows of a table must share the value of a flag of sft.sh."""
    fixed = flag in FIXED_FLAGS.split() and flag not in FREE_FLAGS.split()
    return fixed or flag.startswith(("tune_", "lora_"))


def refuse_other(path: Path, pairs: list[tuple[str, object, object]], fix: str) -> None:
    """Raises InputError, with all of them, where the found and the planned value of `pairs` differ."""
    others = [
        f"{what} is {found}, {'which is not there' if planned == ABSENT else f'not {planned}'}"
        for what, found, planned in pairs
        if not same(found, planned)
    ]
    if others:
        raise InputError(f"{path} is of another run: {'; '.join(others)}: {fix}, or give another --output")


def evaluated(out: Path, data: Path, checkpoint: Path, schedule: str, variant: str, flags: dict[str, str]) -> State:
    """A result file with its arguments and scores. Raises InputError where they are of other data, of another
    checkpoint, of another schedule or of other settings than the plan's, which `flags` of eval.sh and its defaults
    are."""
    if not arguments_path(out).exists():
        return State(where=out)
    made, rows = read_arguments(out), list(load_finished(out).values())
    unmerged = out.with_suffix(".parts").exists()
    if not rows and not unmerged:
        return State(where=out)
    name, _, k = made["schedule"].partition("-")
    pairs = [("variant", made["variant"], variant)]
    pairs.append(("the schedule", name, {"fixed": "wait", "random": "random"}[schedule]))
    if data.exists():
        pairs.append((f"the hash of {data.name}", made.get("data_sha256"), data_hash(data)))
    now = of_checkpoint(str(checkpoint)) if (checkpoint / "config.json").exists() else ABSENT
    pairs.append(("the hash of the checkpoint", made.get("model_sha256"), now))
    # The sizes of frames are those of the training, unless eval.sh is given others.
    trained_with = training_arguments(checkpoint)
    settings = {setting: trained_with.get(setting, value) for setting, value in SETTINGS.items()}
    settings |= {flag.replace("-", "_"): value for flag, value in flags.items() if flag != "schedule"}
    pairs += [(f"--{flag.replace('_', '-')}", made[flag], settings[flag]) for flag in made if flag in settings]
    if "wait_k" in trained_with and k.isdigit():
        pairs.append(("the K of the schedule", k, trained_with["wait_k"]))
    refuse_other(out, pairs, "delete it to start over")
    facts = {fact: value for fact, value in made.items() if fact not in OF_A_ROW} | {"the K of the schedule": k}
    skipped, total = count_skipped(out), count_rows(data) if data.exists() else len(rows)
    if len(rows) + skipped < total or unmerged:
        return State(STARTED, f"{len(rows):,} of {total:,} captions", facts, out)
    return scored(out, rows, skipped, flags, facts)


def scored(out: Path, rows: list[Row], skipped: int, flags: dict[str, str], facts: dict[str, object]) -> State:
    """The scores of a complete result file with these rows, that many skipped videos, and these `facts`. Raises
    InputError where the judge is not the one of the `flags`."""
    scores, _ = scores_of(out, rows)
    if "bleurt" in scores:
        facts["the BLEURT checkpoint"] = Path(scores["bleurt"]["checkpoint"]).name
    if "judge" in scores:
        facts["the judge"] = judge = scores["judge"]["model"]
        pairs = [("the judge", judge, flags.get("judge-model", judge))]
        refuse_other(sibling(out, SCORES), pairs, "delete it to score again")
    if not scores:
        return State(STARTED, f"{len(rows):,} captions, without scores", facts, out)
    asked = [metric for metric, flag in (("BLEURT", "bleurt"), ("Fluency", "judge-url")) if flag in flags]
    reasons = scores.get("not_computed", {})
    wanted = [*asked, *(metric for metric in CORPUS_METRICS if metric in reasons)]
    lacking = [metric for metric in wanted if metric not in scores]
    # One reason, such as a missing Java, may explain several metrics.
    missing: dict[str, list[str]] = {}
    for metric in lacking:
        missing.setdefault(reasons.get(metric, "not scored"), []).append(metric)
    without = "; ".join(f"{', '.join(metrics)} ({reason})" for reason, metrics in missing.items())
    detail = f"{len(rows):,} captions" + (f", {skipped:,} skipped" if skipped else "")
    detail += f", without {without}" if without else ""
    # CIDEr has no value for a single video, however often it is computed; Java may be there the next time.
    again = {*asked, "METEOR"} & set(lacking)
    return State(PARTIAL if again else DONE, detail, facts, out)


def training_arguments(checkpoint: Path) -> dict[str, object]:
    """The arguments that a checkpoint was trained with. Empty where run.json does not say."""
    arguments = training_record(checkpoint).get("arguments")
    return arguments if isinstance(arguments, dict) else {}


def reported(page: Path, rows: list[tuple[Path, str]]) -> State:
    """A report over exactly `rows`, (result file, name of the checkpoint), that is newer than the scores of each."""
    table, scores = page.with_suffix(".md"), [sibling(file, SCORES) for file, _ in rows]
    if not (page.exists() and table.exists() and all(path.exists() for path in scores)):
        return State(where=page)
    lines = table.read_text(encoding="utf-8").partition("\n## Runs\n")[2].replace("\\", "").splitlines()
    cells = [line.split(" | ") for line in lines if line.startswith("| ")][2:]
    found = sorted((line[0].removeprefix("| "), line[3]) for line in cells)
    new = page.stat().st_mtime >= max(path.stat().st_mtime for path in scores)
    return State(DONE if new and found == sorted((file.name, name) for file, name in rows) else TO_DO, where=page)


def same(found: object, planned: object) -> bool:
    """Whether a value in run.json is that of a flag."""
    if str(found) == str(planned):
        return True
    try:
        return float(str(found)) == float(str(planned))
    except ValueError:
        return False


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
