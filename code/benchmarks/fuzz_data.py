"""Fuzzes mani_data.py's readers with mutated tar shards and JSON files; each must give rows or reasons.

    python code/benchmarks/fuzz_data.py                 # 10,000 shards and 10,000 JSON files, a few minutes

A finding is an exception, an input that takes more than 10 seconds, memory that grows by more than 256 MiB, or a file
outside the folders that shards may write to. Each input is determined by --seed and its number.
"""

import gzip
import io
import itertools
import json
import random
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import av
from fuzzing import main
from mutators import mutate_bytes
from pe_video import stages
from pe_video.sources import FOLDER, TAR, Unit
from preparation.rules import KEPT, Rules
from qwen_vl_streaming.common.errors import run
from sandbox import Try
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

NUMBERS = [b"-1", b"NaN", b"1e999", b"Infinity", b"null", b"true", b'"6"', b"[]", b"{}", b"9" * 5000, b"0", b"6e0"]
NAMES = [
    b"../../up.mp4",
    b"/tmp/absolute.mp4",
    b"a/../../../b.json",
    b"..",
    b".",
    b"",
    b"a" * 100,
    b"\xff\xfe.json",
    b"x\ny.mp4",
]


def valid_json(number: int) -> bytes:
    caption = " ".join(["word"] * 24)
    data = {"category": "é", "video_duration_in_s": 6.0, "human_caption": caption, "keywords": [1, None], "n": number}
    return json.dumps(data, ensure_ascii=False).encode()


def valid_video() -> bytes:
    """Six seconds of grey frames of 32 × 32 pixels, as MP4."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=2)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for number in range(12):
            frame = av.VideoFrame(32, 32, "yuv420p")
            for plane in frame.planes:
                plane.update(bytes([number * 9]) * plane.buffer_size)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()


def valid_tar(video: bytes, dialect: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=dialect) as tar:
        for number in range(3):
            name = f"{number}" if number < 2 else f"{'d' * 90}/{'x' * 80}"
            for ending, data in ((".json", valid_json(number)), (".mp4", video)):
                info = tarfile.TarInfo(name + ending)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def mutate_header(data: bytes, rng: random.Random) -> bytes:
    """Change fields of headers and correct the checksums, so that the reader accepts the headers."""
    mutant = bytearray(data)
    headers = [at for at in range(0, len(mutant) - 512, 512) if mutant[at + 257 : at + 262] == b"ustar"]
    for _ in range(rng.randint(1, 3)):
        at = rng.choice(headers)
        field = rng.randrange(5)
        if field == 0:
            mutant[at : at + 100] = rng.choice(NAMES)[:100].ljust(100, b"\0")
        elif field == 1:
            sizes = [
                b"%011o\0" % rng.choice([0, 1, 511, 513, 1 << 20, 1 << 32]),
                b"-0000000001\0",
                b"\xff" * 12,
                b"9" * 12,
            ]
            mutant[at + 124 : at + 136] = rng.choice([*sizes, b"\x80" + rng.randbytes(11)])
        elif field == 2:
            mutant[at + 156] = rng.choice(b"01234567xgLKSDVNA\0\xff")
        elif field == 3:
            mutant[at + 345 : at + 500] = rng.choice(NAMES)[:155].ljust(155, b"\0")
        else:
            mutant[at + rng.randrange(512)] = rng.randrange(256)
        mutant[at + 148 : at + 156] = b" " * 8
        mutant[at + 148 : at + 156] = b"%06o\0 " % sum(mutant[at : at + 512])
    return bytes(mutant)


def mutate_json_bytes(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return mutate_bytes(data, rng)
    old = rng.choice([b"6.0", b'"\xc3\xa9"', b"[1, null]", b'"video_duration_in_s"', b'"human_caption"'])
    return data.replace(old, rng.choice(NUMBERS), 1)


def run_stages(unit: Unit, job: stages.Job) -> Counter[str]:
    """Run both stages on one unit. Returns the number of samples of each outcome."""
    stages.read_unit(unit)
    records = []
    for part in stages.finished_unit(unit, job.state).parts:
        with open(part, encoding="utf-8", newline="\n") as file:
            records += map(stages.Record.parse, file)
    for record in records:
        if record.outcome == KEPT:
            json.loads(record.text)
    videos = [
        stages.UnitVideo(unit, job.videos / unit.split, r.video_id, r.where, r.video, float(r.seconds))
        for r in records
        if r.outcome == KEPT and r.video
    ]
    bad = sum(bool(result.error) for _, result in stages.check_videos(videos)) if videos else 0
    return Counter(record.outcome for record in records) + Counter({"bad video": bad})


def make_runner(folder: Path) -> Callable[[Unit, bytes], Counter[str]]:
    """Return a function that runs both stages on a unit whose one file or shard is `case/source/input`, given its
    content. It deletes the output, and raises AssertionError for files in other places."""
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    dataset, source = folder / "case/dataset", folder / "case/source"
    source.mkdir(parents=True)
    job = stages.Job(Rules(), folder / "tokenizer.json", folder, dataset / "videos", dataset / "state")
    stages.initialize_worker(job)

    def run_unit(unit: Unit, data: bytes) -> Counter[str]:
        (source / "input").write_bytes(data)
        outcomes = run_stages(unit, job)
        for path in (folder / "case").rglob("*"):
            if path.is_file() or path.is_symlink():
                inside = path.parent in (dataset / "videos" / "train", dataset / "state")
                assert not path.is_symlink() and (inside or path == source / "input"), f"wrote {path}"
                if inside:
                    path.unlink()
        return outcomes

    return run_unit


def shards(folder: Path) -> Try:
    """Mutated tar shards."""
    run_unit, video, number = make_runner(folder), valid_video(), itertools.count()
    tars = [valid_tar(video, dialect) for dialect in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)]

    def try_one(rng: random.Random) -> Iterable[str]:
        whole = rng.choice(tars)
        if rng.random() < 0.1:  # compressed by gzip, mutated before, and sometimes after
            data = gzip.compress(mutate_header(whole, rng), 1)
            data = mutate_bytes(data, rng) if rng.random() < 0.5 else data
        else:
            data = mutate_header(whole, rng) if rng.random() < 0.6 else mutate_bytes(whole, rng)
        unit = Unit(TAR, "train", "train/input", str(folder / "case/source/input"), str(next(number)))
        return run_unit(unit, data).elements()

    return try_one


def jsons(folder: Path) -> Try:
    """Mutated JSON files."""
    run_unit, number = make_runner(folder), itertools.count()

    def try_one(rng: random.Random) -> Iterable[str]:
        name, source = str(next(number)), str(folder / "case/source")
        unit = Unit(FOLDER, "train", "train/files", source, name, (("input", ""),))
        return run_unit(unit, mutate_json_bytes(valid_json(rng.randrange(1_000)), rng)).elements()

    return try_one


if __name__ == "__main__":
    in_memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # each input writes a few files and syncs them
    bounds = {"seconds": 10, "memory_mib": 256}
    run(lambda: main(__doc__, "fuzz_data", {"shards": 10_000, "jsons": 10_000}, in_memory, **bounds))
