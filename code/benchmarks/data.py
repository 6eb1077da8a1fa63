"""Speed and memory of mani_data.py, compared with a loop that reads and tokenizes one row at a time.

    python code/benchmarks/data.py            # 120,000 rows, both on the same files, about two minutes

Generates the rows, and a byte-level BPE tokenizer with Qwen's pre-tokenizer.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from preparation.tokens import QWEN_SPLIT
from qwen_vl_streaming.common.errors import OneLineParser, run
from qwen_vl_streaming.common.progress import Progress
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
SYLLABLES = "ba ce di fo gu ha jin kel lor man nes pol qui ras ten ver wan xi yor zel tion ing er"


def make_rows(folder: Path, count: int) -> list[str]:
    """Write `count` JSON files with PE-Video's fields. Returns the first thousand captions."""
    draw = random.Random(0)
    words = ["".join(draw.choices(SYLLABLES.split(), k=draw.randint(1, 3))) for _ in range(4000)]
    weights = [1 / (rank + 10) for rank in range(len(words))]
    folder.mkdir(parents=True)
    captions = []
    for number in Progress(range(count), desc="make rows", unit="row"):
        caption = "The video shows " + " ".join(draw.choices(words, weights, k=draw.randint(25, 90))) + "."
        data = {
            "category": "animals",
            "keywords": draw.choices(words, k=12),
            "video_duration_in_s": round(draw.uniform(3, 32), 3),
            "fps": 30.0,
            "height": 1080,
            "width": 1920,
            "model_caption": " ".join(draw.choices(words, weights, k=60)),
            "human_caption": caption,
        }
        (folder / f"{number:08d}.json").write_text(json.dumps(data))
        if len(captions) < 1000:
            captions.append(caption)
    return captions


def make_tokenizer(folder: Path, captions: list[str]) -> None:
    """Train a tokenizer of 1,500 tokens on `captions` and save it in `folder`."""
    tokenizer = Tokenizer(BPE())
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(captions, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def run_loop(folder: Path, tokenizer_folder: Path) -> tuple[float, float, int]:
    """Run the loop of the published script. Returns (seconds, CPU seconds, rows kept)."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    begin, cpu = time.perf_counter(), time.process_time()
    kept = []
    for path in sorted(folder.glob("*.json")):
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
        seconds = data["video_duration_in_s"]
        tokens = len(tokenizer(data["human_caption"].strip(), add_special_tokens=False)["input_ids"])
        if 5 <= seconds <= 30 and 3 <= tokens / seconds <= 5:
            kept.append(json.dumps(data, ensure_ascii=False) + "\n")
    (folder.parent / "loop.jsonl").write_text("".join(kept))
    return time.perf_counter() - begin, time.process_time() - cpu, len(kept)


def run_mani_data(source: Path, tokenizer: Path, output: Path, workers: int) -> tuple[float, float, int, float]:
    """Run mani_data.py. Returns (seconds, CPU seconds, rows kept, peak MiB of all its processes together)."""
    arguments = ["--source", source, "--dataset-root", output, "--tokenizer-model-id", tokenizer, "--workers", workers]
    begin, cpu = time.perf_counter(), children_cpu_seconds()
    process = subprocess.Popen([sys.executable, ROOT / "mani_data.py", *map(str, arguments)], stdout=subprocess.DEVNULL)
    peak = 0
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        peak = max(peak, sum(map(resident_bytes, process_tree(watched))))
        time.sleep(0.1)
    if process.returncode:
        sys.exit(f"error: mani_data.py ended with status {process.returncode}")
    seconds = time.perf_counter() - begin
    with open(output / "train_3_5.jsonl", encoding="utf-8") as file:
        return seconds, children_cpu_seconds() - cpu, sum(1 for _ in file), peak / 2**20


def children_cpu_seconds() -> float:
    """CPU seconds of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def process_tree(process: psutil.Process) -> list[psutil.Process]:
    """A process and its descendants; empty if it has ended."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def resident_bytes(process: psutil.Process) -> int:
    """Resident memory in bytes; shared libraries are counted in each process."""
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=120_000, help="JSON files to generate (default: %(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="worker counts to time (default: 1 2)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = folder / "tokenizer"
        make_tokenizer(tokenizer, make_rows(folder / "source" / "train", arguments.rows))
        seconds, cpu, kept = run_loop(folder / "source" / "train", tokenizer)
        base = arguments.rows / seconds
        print(f"{'':24}{'seconds':>9}{'CPU s':>7}{'rows/s':>10}{'speed-up':>9}{'kept':>8}{'MiB':>7}")
        print(f"{'one row at a time':24}{seconds:9.1f}{cpu:7.1f}{base:10.0f}{1:9.2f}{kept:8d}{'':>7}")
        for workers in arguments.workers:
            seconds, cpu, rows, peak = run_mani_data(folder / "source", tokenizer, folder / f"out{workers}", workers)
            rate = arguments.rows / seconds
            label = f"mani_data.py, {workers} worker{'s' if workers > 1 else ''}"
            print(f"{label:24}{seconds:9.1f}{cpu:7.1f}{rate:10.0f}{rate / base:9.2f}{rows:8d}{peak:7.0f}")


if __name__ == "__main__":
    run(main)
