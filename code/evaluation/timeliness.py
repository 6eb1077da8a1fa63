"""Measure when captions say what happens: the delay from each event to the word that names it.

    python code/evaluation/timeliness.py code/evaluation/output/*_infer.json --times TIMES.jsonl --picture said.png

prints a line per result file, writes <variant>_timeliness.jsonl beside each, and adds `timeliness` to its scores, so
that report.py shows it. eval.sh --times does the same while it scores. TIMES.jsonl has references with times, JSON
Lines of video_id and segments or events; without --times they are the segments of the data's rows. No model is run.
docs/evaluation.md says what is measured.
"""

import argparse
import json
import logging
import textwrap
from pathlib import Path
from statistics import fmean

from identity import read_arguments
from metrics import lag
from metrics.references import read_times
from metrics.scorecard import find_decoder
from metrics.timing import ABOUT, NAMES, measure_file, times_of
from qwen_vl_streaming.common.errors import InputError, OneLineParser, run
from qwen_vl_streaming.common.files import write_file
from qwen_vl_streaming.common.paths import find_path
from report.said_times import draw_picture
from results import CAPTION_FIELDS, POINTS, SCORES, load_finished, scores_of, sibling
from settings import ROOT
from text import text_table

logger = logging.getLogger(__name__)


def measure(path: Path, times: dict | None) -> tuple[str, dict]:
    """A name for the result file at `path`, and its timeliness with `AL` and `LAAL`; adds it to its scores, if it has
    some. Raises InputError."""
    rows = list(load_finished(path, CAPTION_FIELDS, whole=True).values())
    if (times := times_of(rows, path, times)) is None:
        raise InputError(f"the rows of {path} have no segments: give references with --times")
    try:
        decode = find_decoder(path)
        found = measure_file(rows, path, times, decode)
        lags = [lag.measure(row, decode) for row in rows]
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    scores, unscored = scores_of(path, rows)
    if scores:
        write_file(sibling(path, SCORES), json.dumps({**scores, "timeliness": found}, indent=2) + "\n")
    else:
        logger.warning("%s: timeliness is not added to its scores: %s", path.name, unscored)
    for name in ("AL", "LAAL"):
        if values := [each[name] for each in lags if name in each]:
            found = {**found, name: fmean(values)}
    made = read_arguments(path, {"variant": str, "schedule": str})
    return f"{made['variant']} {made['schedule']}", found


def table(measured: list[tuple[str, dict]]) -> str:
    """The values of each file, one line per file."""
    columns = {**NAMES, "AL": "AL", "LAAL": "LAAL"}
    lines = [["variant, schedule", *columns.values()]]
    for name, found in measured:
        values = [found.get(key) for key in columns]
        lines.append([name, *("-" if v is None else str(v) if isinstance(v, int) else f"{v:.2f}" for v in values)])
    return text_table(lines)


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="result files, <variant>_infer.json")
    parser.add_argument("--times", help="references with times, JSON Lines [the rows' own segments]")
    parser.add_argument("--picture", type=Path, help="draw event time against said time into this PNG file")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.picture and arguments.picture.suffix != ".png":
        raise InputError(f"--picture {arguments.picture}: give a name that ends in .png")
    paths = [find_path(file, ROOT, "the result file") for file in arguments.files]
    times = read_times(find_path(arguments.times, ROOT, "--times")) if arguments.times else None
    measured = [measure(path, times) for path in paths]
    print(table(measured))
    print(textwrap.fill(ABOUT, 120))
    for path in paths:
        print(f"events: {sibling(path, POINTS)}")
    if arguments.picture:
        draw_picture([(name, path) for (name, _), path in zip(measured, paths, strict=True)], arguments.picture)
        print(f"picture: {arguments.picture}")


if __name__ == "__main__":
    run(main)
