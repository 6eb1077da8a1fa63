"""Write an HTML page and a Markdown file from result files: metrics in the paper's layout beside the paper's values,
fixed and random schedules, when events are named, and a gallery of captions, second by second.

    python code/evaluation/report.py code/evaluation/output/*_infer.json --output report

writes report.html, a single file that needs no network, and report.md. The .args.json and the scores that eval.sh
writes must be beside each result file; a missing metric is shown as a dash with the reason. Videos and tokenizers are
read from the paths in the arguments; if one is missing, the gallery says so. No model is run.
"""

import argparse
import base64
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from metrics import timing
from qwen_vl_streaming.common.errors import InputError, OneLineParser
from qwen_vl_streaming.common.files import write_file
from qwen_vl_streaming.common.paths import find_path
from qwen_vl_streaming.common.progress import Progress
from results import check_writable
from settings import ROOT
from text import counted

from report import paper
from report.charts import main_panels, schedule_panels
from report.differences import differences, labels
from report.gallery import Tokenizers, choose_videos, clean, make_video
from report.loading import Result, load_results, metrics_of, without_folders
from report.said_times import said_panels
from report.tables import main_table, markdown_table, plain, runs_table, schedule_table, subtask_table, timeliness_table

PAGE = Path(__file__).with_name("page")
ABOUT_RANDOM = (
    "Checkpoints trained with one schedule and evaluated with another: a random schedule writes 1 to 2K-1 tokens per "
    "slot, K on average. Offline variants write the caption after the video, so schedules do not affect them."
)


def about(results: Sequence[Result], task: str, size: str) -> str:
    """A paragraph that says what the paper's values and ours were measured on."""
    sizes = Counter()
    for result in results:
        sizes[result.data_name] = max(sizes[result.data_name], len(result.rows))
    data = " and ".join(f"{count} of {path}" for path, count in sizes.items())
    text = f"Our values are over {data}. Metrics are multiplied by 100, except Fluency, a judge's grade from 1 to 5"
    judges = sorted({str(result.scores["judge"].get("model")) for result in results if "judge" in result.scores})
    text += f" (here by {', '.join(judges)})." if judges else "."
    if {"AL", "LAAL", "early_words"} & set(metrics_of(results)):
        text += " AL and LAAL are lags in clips, which are longer than a second where a video has fewer than 2 frames"
        text += " a second; early_words counts the words before the last clip."
    if not any(key[0] == task for key in paper.FIGURES):
        return f"The paper has no values for this task. {text}"
    return (
        f"Rows marked paper are from arXiv 2601.06843: Qwen2.5-VL-{size}, fully fine-tuned by its authors and "
        f"evaluated on {paper.TASKS[task][1]}. Result files do not record whether our training data and videos are the "
        f"same as the paper's. {text}"
    )


def paper_size(result: Result, size: str | None) -> str:
    """The size of the paper's values beside a result: `size` where it is given, else its own, else 3B."""
    return size or (result.size if result.size in paper.SIZES else paper.SIZES[0])


def sections(results: Sequence[Result], size: str | None) -> list[dict]:
    """One section per size and task, in the paper's order. `size` is that of the paper's values; None for each
    result's own."""
    order = list(paper.TASKS)
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((paper_size(result, size), result.task), []).append(result)
    several = len({name for name, _ in groups}) > 1
    made = []
    for name, task in sorted(groups, key=lambda key: (paper.SIZES.index(key[0]), key[1] not in order, key[1])):
        mine = groups[name, task]
        table = main_table(mine, task, name)
        made.append(
            {
                "title": f"{table.title}, {name}" if several else table.title,
                "table": table,
                "panels": main_panels(mine, task, name),
                "subtasks": subtask_table(mine),
                "schedules": schedule_table(mine, task, name),
                "schedule_panels": schedule_panels(mine),
                "differences": differences(mine, name) if task in order else [],
                "about": about(mine, task, name),
                "timeliness": timeliness_table(mine),
                "said_panels": said_panels(mine, names_of(mine)),
            }
        )
    return made


def names_of(results: Sequence[Result]) -> list[str]:
    """A title for the panel of each result."""
    label = labels(results, brief=True)
    parts = [(result.variant.name, label[result.path]) for result in results]
    return [", ".join(filter(None, pair)) for pair in parts]


def summarize(results: Sequence[Result]) -> str:
    variants = {result.variant.name for result in results}
    videos = {video_id for result in results for video_id in result.rows}
    files = counted(len(results), "result file")
    return f"{files}, {counted(len(videos), 'video')}, {len(variants)} of 6 variants."


def make_page(
    results: Sequence[Result], made: list[dict], videos: list, chosen: bool, notes: Sequence[str] = ()
) -> str:
    environment = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["minus"] = lambda text: text.replace("-", "−") if len(text) > 1 else text
    environment.filters["groupby_kept"] = lambda lines, name: [
        (key, list(same)) for key, same in groupby(lines, attrgetter(name))
    ]
    script = (PAGE / "page.js").read_text(encoding="utf-8")
    how = "the ones given by --video-ids" if chosen else "the first in the data of each task, not selected by quality"
    return environment.get_template("page.html").render(
        summary=summarize(results),
        notes=notes,
        sections=made,
        about_random=ABOUT_RANDOM,
        about_timeliness=timing.ABOUT,
        videos=videos,
        about_gallery=f"The videos are {how}. Each frame is the last one that has arrived when a slot starts; words "
        "written in this slot are highlighted. Reference captions describe the whole video.",
        short_labels=labels(results, brief=True),
        runs=runs_table(results),
        style=(PAGE / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def make_markdown(results: Sequence[Result], made: list[dict], notes: Sequence[str] = ()) -> str:
    parts = ["# Speak While Watching: evaluation", summarize(results)]
    parts += ["\n".join(f"- {plain(note)}" for note in notes)] if notes else []
    for section in made:
        parts.append(f"## {plain(section['title'])}")
        if section["differences"]:
            parts.append("**Our setup differs from the paper's, so the values are not directly comparable.**")
            parts.append("\n".join(f"- {plain(text)} ({plain(who)})" for text, who in section["differences"]))
        parts += [plain(section["about"]), markdown_table(section["table"])]
        if section["subtasks"]:
            parts += [f"### {section['subtasks'].title}", markdown_table(section["subtasks"])]
        if section["timeliness"]:
            parts += [f"### {section['timeliness'].title}", timing.ABOUT, markdown_table(section["timeliness"])]
        if section["schedules"]:
            parts += [f"### {section['schedules'].title}", ABOUT_RANDOM, markdown_table(section["schedules"])]
    heads, *rows = runs_table(results)
    lines = ["| " + " | ".join(map(plain, row)) + " |" for row in rows]
    parts += ["## Runs", "\n".join(["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads), *lines])]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def outputs(name: str) -> tuple[Path, Path]:
    """Paths of the page and of the Markdown file. Raises InputError if `name` is a folder or they cannot be written."""
    path = Path(name)
    if os.path.isdir(path) or not path.name:
        raise InputError(f"--output {name} is a folder: give the report a name, such as {path / 'report'}")
    base = path.with_suffix("") if path.suffix in (".html", ".md") else path
    files = base.with_name(base.name + ".html"), base.with_name(base.name + ".md")
    for file in files:
        check_writable(file)
    return files


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="result files, <variant>_infer.json")
    parser.add_argument("--output", default="report", help="path of the report, without extension [report]")
    parser.add_argument(
        "--size", choices=paper.SIZES, help="model size of the paper's values [that of each result; 3B for others]"
    )
    parser.add_argument("--videos", type=int, default=4, help="number of videos in the gallery [4]")
    parser.add_argument("--video-ids", nargs="+", default=[], metavar="ID", help="ids of the videos in the gallery")
    parser.add_argument(
        "--note", action="append", default=[], metavar="TEXT", help="a line for the top of the report; may be repeated"
    )
    parser.add_argument("--tokenizer", help="folder with a tokenizer, for results whose model is missing")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.videos < 0:
        raise InputError(f"--videos {arguments.videos}: give 0 or more")
    page, markdown = outputs(arguments.output)
    results = load_results([find_path(file, ROOT, "the result file") for file in arguments.files])
    ids = choose_videos(results, arguments.videos, arguments.video_ids)
    tokenizers = Tokenizers(arguments.tokenizer)
    videos = [make_video(results, video_id, tokenizers) for video_id in Progress(ids, "gallery", unit="video")]
    made = sections(results, arguments.size)
    notes = [without_folders(clean(note)) for note in arguments.note]
    texts = {
        page: make_page(results, made, videos, bool(arguments.video_ids), notes),
        markdown: make_markdown(results, made, notes),
    }
    for path, text in texts.items():
        write_file(path, text.encode(errors="replace"))
    print(f"page: {page}\ntable: {markdown}")
