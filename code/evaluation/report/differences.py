"""How results differ: from each other, in their labels, and from the paper's setup."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from report import paper
from report.loading import SHORT, UNKNOWN, Result


def labels(results: Sequence[Result], brief: bool = False) -> dict[Path, str]:
    """A label that distinguishes a result from the others of its task and variant: schedule and size and, if needed,
    the precision of its weights, the model, the hash of its checkpoint, the seed of a random schedule and the data.
    `brief` omits a size that all results share."""
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
        lambda result: f"checkpoint {str(result.args.get('model_sha256', '-')).rpartition(' ')[2][:SHORT]}",
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
    """How the results differ from the paper's setup, each difference with the variants, or else the files, that it
    applies to."""
    found: dict[str, list[str]] = {}
    names = {result.path: f"{result.variant.name} {result.schedule}" for result in results}
    alike = Counter(names.values())
    for result in results:
        name = names[result.path] if alike[names[result.path]] == 1 else result.path.name
        for text in differences_of(result, size):
            found.setdefault(text, []).append(name)
    notes = [(text, "all" if len(who) == len(results) else ", ".join(who)) for text, who in found.items()]
    if any(result.rows.keys() != results[0].rows.keys() for result in results):
        counts = ", ".join(f"{result.variant.name} {result.schedule} {len(result.rows)}" for result in results)
        notes.append(("the files have different videos, so their rows are not comparable", f"videos: {counts}"))
    return notes


def differences_of(result: Result, size: str) -> list[str]:
    found = []
    if result.size != size:
        if result.model_changed:
            what = f"{result.model_name} has changed since these captions, so its size and training then are unknown"
        elif not result.model_folder:
            what = "the model is not on this machine, so its size and training are unknown"
        elif result.size == UNKNOWN:
            what = "the size of the model is unknown, as it has no readable safetensors files"
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
    if result.checkpoint_folder:
        found += training_differences(result)
    if missing := result.scores.get("missing_tasks"):
        found.append(f"the mean is not over all sub-tasks: {', '.join(missing)} have no rows")
    if result.scores.get("skipped"):
        found.append(f"{result.scores['skipped']} videos were skipped because they could not be used")
    if unjudged := result.scores.get("judge", {}).get("not_judged"):
        found.append(f"Fluency excludes {unjudged} captions that the judge did not grade")
    if wordless := result.scores.get("lag", {}).get("without_words"):
        found.append(f"AL and LAAL exclude {wordless} captions without words")
    return found


def training_differences(result: Result) -> list[str]:
    """How the training of a checkpoint that is on this machine differs from the paper's."""
    found, run = [], result.run
    if recipe := run.get("recipe_differences"):
        values = {"step_samples": run.get("step_samples"), **run.get("arguments", {})}
        named = {"step_samples": "samples a GPU in an optimizer step:"}
        flags = (
            f"{named.get(name, f'--{name}')} {values.get(name)} ({value} in the paper's recipe)"
            for name, value in recipe.items()
        )
        found.append(f"the checkpoint was trained with {', '.join(flags)}")
    if "step" in run:
        unfinished = "" if run.get("finished") else ", which has not finished"
        found.append(f"the checkpoint is that of step {run['step']} of its training{unfinished}")
    if not run and result.trained_as:
        found.append("how the checkpoint was trained is not recorded: its run.json is missing or not valid")
    elif not run:
        found.append("the checkpoint was not trained by this project: it is a base model, or was trained elsewhere")
    if run.get("data", {}).get("sha256") == result.args.get("data_sha256", ""):
        found.append("the checkpoint was trained on these videos")
    if result.trained_as not in (None, result.variant.name):
        found.append(f"the checkpoint was trained as {result.trained_as}, not as the evaluated variant")
    return found


def not_comparable(one: Result | None, other: Result | None) -> str:
    """Why the scores of two results cannot be compared; empty if they can."""
    if not one or not other:
        return ""
    names = f"{one.path.name} and {other.path.name}"
    if one.rows.keys() != other.rows.keys():
        both = len(one.rows.keys() & other.rows.keys())
        return f"{names} have different videos ({len(one.rows)} and {len(other.rows)}, {both} in both)"
    if any(row["annotation"] != other.rows[video_id]["annotation"] for video_id, row in one.rows.items()):
        return f"{names} have different reference captions"
    return ""
