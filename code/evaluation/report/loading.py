"""The input of a report: result files with their arguments and scores, and how they differ from the paper's setup.
Knows nothing about tables, charts and pages."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from identity import AGAIN, read_arguments
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.files import read_object
from qwen_vl_streaming.common.paths import places
from qwen_vl_streaming.timeline.timeline import SCHEDULE_NAME
from qwen_vl_streaming.timeline.variants import VARIANTS, Variant, get_variant
from results import Row, check_row, load_finished, sibling
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
    scores_path: Path
    scores: dict
    """Empty if there are none."""
    model_folder: Path | None
    """On this machine; None if it is missing."""

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
    def data_name(self) -> str:
        return last_part(self.args["data"])

    @cached_property
    def size(self) -> str:
        """The checkpoint's size: 3B or 7B by its shape, else its number of parameters, such as 1.2M, or UNKNOWN."""
        return model_size(self.model_folder)

    @cached_property
    def run(self) -> dict:
        """What sft.sh recorded of the training; empty where it did not write the checkpoint."""
        path = self.model_folder / "run.json" if self.model_folder else None
        return read_object(path, "remove it") if path and path.exists() else {}

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

    @cached_property
    def trained_as(self) -> str | None:
        """The variant that the checkpoint was trained as, or None if unknown."""
        return (
            read_object(self.model_folder / "config.json", AGAIN).get("streaming_variant")
            if self.model_folder
            else None
        )

    def score(self, metric: str) -> tuple[float | None, str]:
        """The value of `metric` and an empty string, or None and the reason why it is missing."""
        if not self.scores:
            return None, f"{self.path.name} is not scored: {self.scores_path.name} does not exist"
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
    return (
        None,
        f"{metric} was not computed: {without_folders(reasons[metric])}" if metric in reasons else "not requested",
    )


def is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # too large for a float
        return False


def load_results(paths: Sequence[Path]) -> list[Result]:
    """The result files in the order of the paper's tables; those of one variant in the given order.

    Raises InputError for a file that is missing, invalid or without arguments, and for two files of the same task,
    variant, schedule, seed, model, precision of its weights and data.
    """
    results = [load_result(Path(path)) for path in paths]
    seen: dict[tuple, Path] = {}
    for result in results:
        contents = (str(result.args.get(name)) for name in ("data_sha256", "schedule_sha256"))
        key = (result.task, result.variant.name, result.schedule, result.seed, result.model, result.weights, *contents)
        if key in seen:
            raise InputError(
                f"{seen[key]} and {result.path} are both {result.variant.name}, {result.schedule}, of {result.model}: "
                "remove one of them"
            )
        seen[key] = result.path
    order = list(VARIANTS)
    return sorted(results, key=lambda result: (order.index(result.variant.name), result.kind != "fixed"))


def load_result(path: Path) -> Result:
    if not path.is_file():
        raise InputError(f"{path} does not exist: give result files written by eval.sh")
    rows = load_finished(path)
    if not rows:
        raise InputError(f"{path} has no rows: give result files written by eval.sh")
    args = read_arguments(path)
    variant = get_variant(args["variant"])
    for video_id, row in rows.items():
        check_row(f"{path}, video {video_id!r}", row, variant.name)
    tasks = {task_of(row) for row in rows.values()}
    if len(tasks) > 1:
        raise InputError(f"{path} has rows of several tasks ({', '.join(sorted(tasks))}): use one file per task")
    return Result(path, variant, args, rows, tasks.pop(), *load_scores(path), find_model(args["model"]))


def load_scores(path: Path) -> tuple[Path, dict]:
    """The path of the scores of a result file, and the scores."""
    found = sibling(path, "scores.json")
    scores = read_object(found, AGAIN) if found.exists() else {}
    for name in ("not_computed", "tasks", "judge", "lag", "timeliness"):
        if not isinstance(scores.get(name, {}), dict):
            raise InputError(f"{found}: {name} is not an object: score again with eval.sh --score-only")
    return found, scores


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


def model_size(folder: Path | None) -> str:
    if folder is None:
        return UNKNOWN
    config = read_object(folder / "config.json", AGAIN)
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


def labels(results: Sequence[Result], brief: bool = False) -> dict[Path, str]:
    """A label that distinguishes a result from the others of its task and variant: schedule and size and, if needed,
    the precision of its weights, the model, the seed of a random schedule and the data. `brief` omits a size that all
    results share."""
    same = brief and len({result.size for result in results}) == 1
    short = {}
    for result in results:
        # For offline variants, all fixed schedules are the same.
        parts = [result.schedule] if result.variant.streams or result.kind != "fixed" else []
        short[result.path] = ", ".join([*parts, *([] if same else [result.size])])
    names = {result.model: result.model_name for result in results}
    same_models = len(set(names.values())) == len(names)
    more: tuple[Callable[[Result], str], ...] = (
        lambda result: f"{result.weights} weights" if result.weights else "weights not quantized",
        lambda result: result.model_name if same_models else "/".join(Path(result.model).parts[-2:]),
        lambda result: f"seed {result.seed}",
        lambda result: result.data_name,
    )
    for what in more:
        alike: dict[tuple, list[Result]] = {}
        for result in results:
            alike.setdefault((result.task, result.variant.name, short[result.path]), []).append(result)
        for group in alike.values():
            if len({what(result) for result in group}) > 1:
                for result in group:
                    short[result.path] = f"{short[result.path]}, {what(result)}".removeprefix(", ")
    return short


def differences(results: Sequence[Result], size: str) -> list[tuple[str, str]]:
    """How the results differ from the paper's setup, each difference with the variants that it applies to."""
    found: dict[str, list[str]] = {}
    for result in results:
        for text in differences_of(result, size):
            found.setdefault(text, []).append(f"{result.variant.name} {result.schedule}")
    notes = [(text, "all" if len(who) == len(results) else ", ".join(who)) for text, who in found.items()]
    if any(result.rows.keys() != results[0].rows.keys() for result in results):
        counts = ", ".join(f"{result.variant.name} {result.schedule} {len(result.rows)}" for result in results)
        notes.append(("the files have different videos, so their rows are not comparable", f"videos: {counts}"))
    return notes


def differences_of(result: Result, size: str) -> list[str]:
    found = []
    if result.size != size:
        if result.size == UNKNOWN:
            what = "the model is not on this machine, so its size is unknown"
        elif result.size in paper.SIZES:
            what = f"the model is Qwen2.5-VL-{result.size}"
        else:
            what = f"the model has {result.size} parameters"
        found.append(f"{what}; the paper uses Qwen2.5-VL-{size}")
    if result.kind != "random" and result.schedule != paper.SCHEDULE and result.variant.streams:
        found.append(f"the schedule is {result.schedule}, {paper.SCHEDULE} in the paper")
    if result.weights:
        found.append(f"the weights of linear layers are quantized to {result.weights}, not in the paper")
    for name, value in paper.SETTINGS.items():
        if name in result.args and result.args[name] != value:
            found.append(f"{name} is {result.args[name]}, {value} in the paper")
    if recipe := result.run.get("recipe_differences"):
        values = result.run.get("arguments", {})
        flags = (f"--{name} {values.get(name)} ({value} in the paper's recipe)" for name, value in recipe.items())
        found.append(f"the checkpoint was trained with {', '.join(flags)}")
    if result.trained_as not in (None, result.variant.name):
        found.append(f"the checkpoint was trained as {result.trained_as}, not as the evaluated variant")
    scored = result.scores.get("count")
    if scored is not None and scored != len(result.rows):
        found.append(
            f"{result.scores_path.name} has the scores of {scored} videos, the file has {len(result.rows)}: score again"
        )
    if missing := result.scores.get("missing_tasks"):
        found.append(f"the mean is not over all sub-tasks: {', '.join(missing)} have no rows")
    if result.scores.get("skipped"):
        found.append(f"{result.scores['skipped']} videos were skipped because they could not be used")
    if unjudged := result.scores.get("judge", {}).get("not_judged"):
        found.append(f"Fluency excludes {unjudged} captions that the judge did not grade")
    if wordless := result.scores.get("lag", {}).get("without_words"):
        found.append(f"AL and LAAL exclude {wordless} captions without words")
    return found
