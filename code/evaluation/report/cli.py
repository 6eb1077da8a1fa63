"""One HTML page and one Markdown file from result files: metrics in the paper's layout with the paper's figures beside
ours, fixed against random schedules, and a gallery of what was said by which second.

    python code/evaluation/report.py code/evaluation/output/*_infer.json --output report

writes report.html, a single file that needs no network, and report.md. Beside each result file lie its .args.json and
its scores, as eval.sh leaves them; a metric without a value is shown as a dash with the reason. Videos and tokenizers
are those that the arguments name; where one is gone, the gallery says so. No model is run.
"""

import argparse
import base64
import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from qwen_vl_streaming.common.errors import InputError, OneLineParser
from qwen_vl_streaming.common.files import write_atomic
from qwen_vl_streaming.common.paths import find_path
from qwen_vl_streaming.common.progress import Progress
from settings import ROOT

from report import paper
from report.charts import main_panels, schedule_panels
from report.gallery import Tokenizers, choose_videos, tell
from report.loading import Result, differences, labels, load_results, metrics_of
from report.tables import main_table, markdown_table, plain, runs_table, schedule_table, subtask_table

PAGE = Path(__file__).with_name("page")
ABOUT_RANDOM = (
    "Checkpoints trained with one schedule and disturbed at test time: a random schedule writes between 1 and 2K-1 "
    "tokens a slot, K in the mean. Offline variants write everything after the video, so no schedule changes them."
)


def about(results: Sequence[Result], task: str, size: str) -> str:
    """What the figures called the paper's are, and what ours are over."""
    sizes = Counter()
    for result in results:
        sizes[result.args["data"]] = max(sizes[result.args["data"]], len(result.rows))
    data = " and ".join(f"{count} of {path}" for path, count in sizes.items())
    told = f"Ours are over {data}. All metrics are times 100 but fluency, which a judge gives from 1 to 5"
    judges = sorted({str(result.scores["judge"].get("model")) for result in results if "judge" in result.scores})
    told += f" (ours by {', '.join(judges)})." if judges else "."
    if {"AL", "LAAL", "early_words"} & set(metrics_of(results)):
        told += " Lags (AL, LAAL) are in clips, that is seconds; early_words are words before the last clip."
    if not any(key[0] == task for key in paper.FIGURES):
        return f"The paper gives no figures for this task. {told}"
    return (
        f"Rows marked paper are from arXiv 2601.06843: Qwen2.5-VL-{size}, fully fine-tuned by its authors and "
        f"measured on {paper.TASKS[task][1]}. What a checkpoint of ours was trained on, and whether our videos are the "
        f"paper's, is not in a result file. {told}"
    )


def sections(results: Sequence[Result], size: str) -> list[dict]:
    """A section for each task, in the paper's order."""
    order = list(paper.TASKS)
    tasks = sorted({result.task for result in results}, key=lambda task: (task not in order, task))
    made = []
    for task in tasks:
        mine = [result for result in results if result.task == task]
        made.append(
            {
                "table": main_table(mine, task, size),
                "panels": main_panels(mine, task, size),
                "subtasks": subtask_table(mine),
                "schedules": schedule_table(mine, task),
                "schedule_panels": schedule_panels(mine),
                "differences": differences(mine, size) if task in order else [],
                "about": about(mine, task, size),
            }
        )
    return made


def summarize(results: Sequence[Result]) -> str:
    variants = {result.variant.name for result in results}
    videos = {video_id for result in results for video_id in result.rows}
    counts = [(len(results), "result file"), (len(videos), "video")]
    told = ", ".join(f"{count} {what}{'s' * (count != 1)}" for count, what in counts)
    return f"{told}, {len(variants)} of the six variants."


def make_page(results: Sequence[Result], made: list[dict], stories: list, chosen: bool) -> str:
    environment = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["minus"] = lambda text: text.replace("-", "−") if len(text) > 1 else text
    environment.filters["groupby_kept"] = lambda lines, name: [
        (key, list(same)) for key, same in groupby(lines, attrgetter(name))
    ]
    script = (PAGE / "page.js").read_text(encoding="utf-8")
    how = "those that were asked for" if chosen else "the first of the data, not picked by how well they went"
    return environment.get_template("page.html").render(
        summary=summarize(results),
        sections=made,
        about_random=ABOUT_RANDOM,
        stories=stories,
        about_gallery=f"Videos are {how}. Each frame is the newest one when its slot opens; words that this slot added "
        "are marked. Reference captions describe the whole video.",
        short_labels=labels(results, brief=True),
        runs=runs_table(results),
        style=(PAGE / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def make_markdown(results: Sequence[Result], made: list[dict]) -> str:
    parts = ["# Speak While Watching: evaluation", summarize(results)]
    for section in made:
        parts.append(f"## {plain(section['table'].title)}")
        if section["differences"]:
            parts.append("**Not a comparison of equals: ours is not the paper's set-up.**")
            parts.append("\n".join(f"- {plain(text)} ({plain(who)})" for text, who in section["differences"]))
        parts += [plain(section["about"]), markdown_table(section["table"])]
        if section["subtasks"]:
            parts += [f"### {section['subtasks'].title}", markdown_table(section["subtasks"])]
        if section["schedules"]:
            parts += [f"### {section['schedules'].title}", ABOUT_RANDOM, markdown_table(section["schedules"])]
    heads, *rows = runs_table(results)
    lines = ["| " + " | ".join(map(plain, row)) + " |" for row in rows]
    parts += ["## What was run", "\n".join(["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads), *lines])]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def outputs(name: str) -> tuple[Path, Path]:
    """The page and the Markdown file. Raises InputError where they cannot be written there."""
    path = Path(name)
    if path.is_dir() or not path.name:
        raise InputError(f"--output {name} is a folder: give the report a name, such as {path / 'report'}")
    base = path.with_suffix("") if path.suffix in (".html", ".md") else path
    return base.with_name(base.name + ".html"), base.with_name(base.name + ".md")


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="result files, <variant>_infer.json")
    parser.add_argument("--output", default="report", help="name of the report, without an ending [report]")
    parser.add_argument("--size", choices=paper.SIZES, default="3B", help="whose figures of the paper to show [3B]")
    parser.add_argument("--videos", type=int, default=4, help="how many videos the gallery shows; 0 for none [4]")
    parser.add_argument("--video-ids", nargs="+", default=[], metavar="ID", help="which videos the gallery shows")
    parser.add_argument("--tokenizer", help="folder with a tokenizer for results whose model is no longer there")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.videos < 0:
        raise InputError(f"--videos {arguments.videos} must be 0 or more")
    page, markdown = outputs(arguments.output)
    results = load_results([find_path(file, ROOT, "the result file") for file in arguments.files])
    ids = choose_videos(results, arguments.videos, arguments.video_ids)
    tokenizers = Tokenizers(arguments.tokenizer)
    stories = [tell(results, video_id, tokenizers) for video_id in Progress(ids, "gallery", unit="video")]
    made = sections(results, arguments.size)
    texts = {page: make_page(results, made, stories, bool(arguments.video_ids)), markdown: make_markdown(results, made)}
    try:
        for path, text in texts.items():
            write_atomic(path, text.encode(errors="replace"))
    except OSError as error:
        raise InputError(f"--output {arguments.output} cannot be written ({error.strerror}): give another") from None
    print(f"page: {page}\ntable: {markdown}")
