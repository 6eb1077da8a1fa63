"""The input of a report: result files with their arguments and scores. Knows nothing about tables, charts and pages."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from checked_results import load_checked
from huggingface_hub import try_to_load_from_cache
from identity import AGAIN
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.files import read_object
from qwen_vl_streaming.common.numbers import is_number
from qwen_vl_streaming.common.paths import places
from qwen_vl_streaming.model.checkpoint import of_checkpoint
from qwen_vl_streaming.model.trained import training_record
from qwen_vl_streaming.timeline.timeline import SCHEDULE_NAME
from qwen_vl_streaming.timeline.variants import VARIANTS, Variant, get_variant
from results import Row, scores_of
from safetensors import SafetensorError, safe_open
from settings import ROOT
from tasks import TASKS

from report import paper

HIDDEN = ("BLEU-2", "BLEU-3")  # the paper's tables have no columns for them
UNKNOWN = "size unknown"
NOT_METRICS = ("count", "skipped")
SHORT = 8
"""Characters of a hash that a report shows."""


@dataclass(frozen=True)
class Result:
    """One result file."""

    path: Path
    variant: Variant
    args: dict
    rows: dict[str, Row]
    """By video id, in the file's order; at least one."""
    task: str
    scores: dict
    """Of these rows; empty if there are none."""
    unscored: str
    """Why there are no scores; empty if there are."""
    model_folder: Path | None
    """On this machine; None if it is missing."""
    model_changed: bool = False
    """Whether the folder has another checkpoint now than the one that wrote the captions."""

    @property
    def schedule(self) -> str:
        return self.args["schedule"]

    @property
    def kind(self) -> str:
        """fixed or random, or the name of the schedule if it is neither."""
        named = SCHEDULE_NAME.fullmatch(self.schedule)
        return {"wait": "fixed", "random": "random"}[named[1]] if named else self.schedule

    @property
    def k(self) -> str:
        named = SCHEDULE_NAME.fullmatch(self.schedule)
        return named[2] if named else ""

    @property
    def seed(self) -> str:
        """The seed of a random schedule, else empty."""
        return str(self.args.get("seed")) if self.kind == "random" else ""

    @property
    def weights(self) -> str:
        """The precision to which the weights were quantized when the model was loaded, else empty."""
        return self.args.get("weights") or ""

    @property
    def model(self) -> str:
        return self.args["model"]

    @property
    def model_name(self) -> str:
        """The hub id, or the name of the folder: reports do not show local paths."""
        return last_part(self.model)

    @property
    def checkpoint(self) -> str:
        """Identifies the checkpoint that wrote the captions: by its contents, in files of earlier versions by its
        path."""
        return str(self.args.get("model_sha256") or self.model)

    @property
    def data_name(self) -> str:
        return last_part(self.args["data"])

    @property
    def checkpoint_folder(self) -> Path | None:
        """The folder of the checkpoint that wrote the captions; None where it is missing or has changed."""
        return None if self.model_changed else self.model_folder

    @cached_property
    def config(self) -> dict:
        """The checkpoint's config.json; empty without its folder."""
        return read_object(self.checkpoint_folder / "config.json", AGAIN) if self.checkpoint_folder else {}

    @cached_property
    def size(self) -> str:
        """The checkpoint's size: 3B or 7B by its shape, else its number of parameters, such as 1.2M, or UNKNOWN."""
        return model_size(self.checkpoint_folder, self.config) if self.checkpoint_folder else UNKNOWN

    @cached_property
    def run(self) -> dict:
        """What sft.sh recorded of the training, as `training_record`; empty where that is not known."""
        return training_record(self.checkpoint_folder) if self.checkpoint_folder else {}

    @property
    def trained(self) -> str:
        """The day on which the training finished, or the step of an intermediate checkpoint; - where that is not
        known."""
        return f"step {self.run['step']}" if "step" in self.run else str(self.run.get("finished") or "-")[:10]

    @property
    def commit(self) -> str:
        """The commit that trained the checkpoint, with a + if its files had changed; - where that is not known."""
        found = self.run.get("commit")
        if not isinstance(found, dict):
            return "-"
        return str(found.get("hash"))[:SHORT] + "+" * bool(found.get("changed"))

    @property
    def training_data(self) -> str:
        """The file that the checkpoint was trained on and the start of its hash; - where that is not known."""
        found = self.run.get("data")
        if not isinstance(found, dict):
            return "-"
        return f"{last_part(str(found.get('path')))} {str(found.get('sha256'))[:SHORT]}"

    @property
    def data(self) -> str:
        """The file that was evaluated on and the start of its hash."""
        return f"{self.data_name} {str(self.args.get('data_sha256', '-'))[:SHORT]}"

    @property
    def trained_as(self) -> str | None:
        """The variant that the checkpoint was trained as, or None if unknown."""
        return self.config.get("streaming_variant")

    def score(self, metric: str) -> tuple[float | None, str]:
        """The value of `metric` and an empty string, or None and the reason why it is missing."""
        if self.unscored:
            return None, f"{self.path.name} is not scored: {self.unscored}"
        return score_in(self.scores, metric)

    @property
    def timeliness(self) -> dict:
        """When the captions say what happens; empty where that was not measured."""
        return self.scores.get("timeliness", {})

    @property
    def subtasks(self) -> dict[str, dict]:
        """The scores of each sub-task; empty if the task has none."""
        return {name: one for name, one in self.scores.get("tasks", {}).items() if isinstance(one, dict)}


def last_part(path: str) -> str:
    """The name of a file or folder without the folders that it is in, if `path` is absolute: as `without_folders`, but
    for a path alone, which may have spaces."""
    return Path(path).name if path.startswith("/") else path


def without_folders(text: str) -> str:
    """`text` with absolute paths shortened to their last part: a report is shared, and shows no local paths."""
    return re.sub(r"(?<![\w./:-])/(?:[^\s/:,;()'\"]+/)+", "", text)


def score_in(scores: dict, metric: str) -> tuple[float | None, str]:
    """The value of `metric` and an empty string, or None and the reason why it is missing."""
    value = scores.get(metric)
    if is_number(value):
        return float(value), ""
    reasons = scores.get("not_computed", {})
    if metric not in reasons:
        return None, "not requested"
    return None, f"{metric} was not computed: {without_folders(reasons[metric])}"


def load_results(paths: Sequence[Path]) -> list[Result]:
    """The result files in the order of the paper's tables; those of one variant in the given order.

    Raises InputError for a file that is missing, invalid or without arguments, and for two files of the same task,
    variant, schedule, seed, model, precision of its weights and data.
    """
    identify = cache(identify_folder)  # of one checkpoint once
    results = [load_result(Path(path), identify) for path in paths]
    seen: dict[tuple, Path] = {}
    for result in results:
        contents = (str(result.args.get(f"{name}_sha256")) for name in ("data", "schedule", "model"))
        key = (result.task, result.variant.name, result.schedule, result.seed, result.model, result.weights, *contents)
        if key in seen:
            raise InputError(
                f"{seen[key]} and {result.path} are both {result.variant.name}, {result.schedule}, of {result.model}: "
                "remove one of them"
            )
        seen[key] = result.path
    order = list(VARIANTS)
    return sorted(results, key=lambda result: (order.index(result.variant.name), result.kind != "fixed"))


def load_result(path: Path, identify: Callable[[Path, str], str]) -> Result:
    """One result file. `identify` is `identify_folder`. Raises InputError."""
    args, rows = load_checked(path, whole=False)
    variant = get_variant(args["variant"])
    tasks = {task_of(row) for row in rows.values()}
    if len(tasks) > 1:
        raise InputError(f"{path} has rows of several tasks ({', '.join(sorted(tasks))}): use one file per task")
    scores, unscored = scores_of(path, list(rows.values()))
    for name in ("not_computed", "tasks", "judge", "lag", "timeliness"):
        if not isinstance(scores.get(name, {}), dict):
            raise InputError(f"the scores of {path}: {name} is not an object: score again with eval.sh --score-only")
    folder, wrote = find_model(args["model"]), args.get("model_sha256")
    changed = bool(folder and wrote) and identify(folder, args["model"]) not in ("", wrote)
    return Result(path, variant, args, rows, tasks.pop(), scores, unscored, folder, changed)


def identify_folder(folder: Path, model: str) -> str:
    """What `of_checkpoint` returns for the checkpoint of `model` that is in `folder`, without a query to the Hub. Empty
    where its weights cannot be read."""
    if folder not in places(model, ROOT):
        return f"{model} {folder.name}"  # of the Hub's cache: a folder for each commit
    if not any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir()):
        return ""  # its weights were deleted: config.json and run.json are still there
    try:
        return of_checkpoint(str(folder))
    except (InputError, OSError):
        return ""


def task_of(row: Row) -> str:
    return next((task.name for task in TASKS.values() if row["task"] in task.subtasks), row["task"])


def find_model(model: str) -> Path | None:
    """The checkpoint's folder on this machine, looked up as in `places` and in the hub's cache, or None. Nothing is
    downloaded."""
    for folder in places(model, ROOT):
        if (folder / "config.json").exists():
            return folder
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        cached = try_to_load_from_cache(model, "config.json")
        return Path(cached).parent if isinstance(cached, str) else None
    return None


def model_size(folder: Path, config: dict) -> str:
    """The size of the checkpoint in a folder, as `Result.size`."""
    text = config.get("text_config", config)
    shape = (text.get("hidden_size"), text.get("num_hidden_layers"))
    if shape in paper.SHAPES:
        return paper.SHAPES[shape]
    count = 0
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, "numpy") as file:
                count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except (SafetensorError, OSError):
            return UNKNOWN
    if not count:
        return UNKNOWN
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.2g}M"


def metrics_of(results: Sequence[Result]) -> list[str]:
    """The paper's metrics, then the other metrics in the scores."""
    found = [name for result in results for name, value in result.scores.items() if is_number(value)]
    found += [name for result in results for name in result.scores.get("not_computed", {})]
    more = [name for name in dict.fromkeys(found) if name not in (*paper.METRICS, *HIDDEN, *NOT_METRICS)]
    return [*paper.METRICS, *more]
