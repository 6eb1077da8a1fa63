"""Creates questions about the demo's videos in the layout of FunQA on the hub: FunQA_train.json, FunQA_test.json, and
the videos in train.zip and test.zip.

    python code/demo/make_questions.py --data DIR --output FUNQA_DIR

DIR is the output of make_data.py. Each video has a description question (sub-tasks H2, C2, M2), which its caption
answers, and a reasoning question (H3, C3, M3) about how it begins and changes. The same data give the same questions.
Does not depend on tokenizers and models.
"""

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

from make_data import read_shards
from qwen_vl_streaming.common.errors import InputError, OneLineParser, run
from qwen_vl_streaming.common.files import write_file

KINDS = "HCM"
"""FunQA's three kinds of videos, humor, creative and magic, which the videos here take turns to be."""
DESCRIBE = "What is the scene and activity shown in this video?"
EXPLAIN = "What can be observed first, and what changes in this video?"


def explain(events: list[dict]) -> str:
    """The answer to EXPLAIN from a video's events in `truth.jsonl`: the shape that it begins with, and each change."""
    first, *later = events
    changes = [f"The {event['shape']} {event['event']}." for event in later]
    return " ".join([f"A {first['colour']} {first['shape']}.", *(changes or ["The scene stays."])])


def make_entries(rows: list[dict]) -> list[dict]:
    """FunQA's entries for the rows of `truth.jsonl` of a split."""
    entries = []
    for number, row in enumerate(rows):
        kind = KINDS[number % len(KINDS)]
        for level, question, answer in (("2", DESCRIBE, row["caption"]), ("3", EXPLAIN, explain(row["events"]))):
            entries.append(
                {
                    "instruction": question,
                    "visual_input": f"{row['video_id']}.mp4",
                    "output": answer,
                    "task": kind + level,
                    "ID": f"{kind}{level}_{row['video_id']}",
                }
            )
    return entries


def zipped(videos: Iterator[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in videos:
            archive.writestr(zipfile.ZipInfo(name), content)  # its default date: the same bytes each time
    return buffer.getvalue()


def make_questions(data: Path, output: Path) -> int:
    """Write the questions and videos; an annotation file is written after its videos. Returns the number of questions.

    Raises InputError where `data` is not complete.
    """
    path = data / "truth.jsonl"
    if not path.is_file():
        raise InputError(f"{path} does not exist: create it with code/demo/make_data.py --output {data}")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    count = 0
    for split in ("train", "test"):
        entries = make_entries([row for row in rows if row["split"] == split and row["dropped"] is None])
        names = {entry["visual_input"] for entry in entries}
        write_file(output / f"{split}.zip", zipped(read_shards(data / split, names.__contains__)))
        write_file(output / f"FunQA_{split}.json", json.dumps(entries, indent=1).encode())
        count += len(entries)
    return count


def main() -> None:
    parser = OneLineParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="output of make_data.py")
    parser.add_argument("--output", type=Path, required=True, help="folder of the data set")
    arguments = parser.parse_args()
    print(f"wrote {arguments.output}: {make_questions(arguments.data, arguments.output)} questions")


if __name__ == "__main__":
    run(main)
