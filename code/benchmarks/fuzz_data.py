"""Feeds mani_data.py's readers mutated tar shards and JSON files, and looks for anything but a row or a reason.

    python code/benchmarks/fuzz_data.py                 # 10,000 shards and 10,000 JSON files, some minutes

A finding is an exception, an input that takes longer than ten seconds, more memory than 256 MiB on top of the
start's, or a file outside the folders where shards may write. Every input follows from --seed and its number.
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
from fuzzing import Try, main, mutate_bytes
from pe_video import stages
from pe_video.sources import FOLDER, TAR, Unit
from preparation.rules import KEPT, Rules
from qwen_vl_streaming.common.errors import run
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


def sound_json(number: int) -> bytes:
    caption = " ".join(["word"] * 24)
    data = {"category": "é", "video_duration_in_s": 6.0, "human_caption": caption, "keywords": [1, None], "n": number}
    return json.dumps(data, ensure_ascii=False).encode()


def sound_video() -> bytes:
    """Six seconds of grey, 32 × 32."""
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


def sound_tar(video: bytes, dialect: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=dialect) as tar:
        for number in range(3):
            name = f"{number}" if number < 2 else f"{'d' * 90}/{'x' * 80}"
            for ending, data in ((".json", sound_json(number)), (".mp4", video)):
                info = tarfile.TarInfo(name + ending)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def mutate_header(data: bytes, draw: random.Random) -> bytes:
    """Change a field of one header and put its checksum right, so that the reader has to believe it."""
    mutant = bytearray(data)
    headers = [at for at in range(0, len(mutant) - 512, 512) if mutant[at + 257 : at + 262] == b"ustar"]
    for _ in range(draw.randint(1, 3)):
        at = draw.choice(headers)
        field = draw.randrange(5)
        if field == 0:
            mutant[at : at + 100] = draw.choice(NAMES)[:100].ljust(100, b"\0")
        elif field == 1:
            sizes = [
                b"%011o\0" % draw.choice([0, 1, 511, 513, 1 << 20, 1 << 32]),
                b"-0000000001\0",
                b"\xff" * 12,
                b"9" * 12,
            ]
            mutant[at + 124 : at + 136] = draw.choice([*sizes, b"\x80" + draw.randbytes(11)])
        elif field == 2:
            mutant[at + 156] = draw.choice(b"01234567xgLKSDVNA\0\xff")
        elif field == 3:
            mutant[at + 345 : at + 500] = draw.choice(NAMES)[:155].ljust(155, b"\0")
        else:
            mutant[at + draw.randrange(512)] = draw.randrange(256)
        mutant[at + 148 : at + 156] = b" " * 8
        mutant[at + 148 : at + 156] = b"%06o\0 " % sum(mutant[at : at + 512])
    return bytes(mutant)


def mutate_json(data: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.5:
        return mutate_bytes(data, draw)
    old = draw.choice([b"6.0", b'"\xc3\xa9"', b"[1, null]", b'"video_duration_in_s"', b'"human_caption"'])
    return data.replace(old, draw.choice(NUMBERS), 1)


def read(unit: Unit, job: stages.Job) -> Counter[str]:
    """Both stages on one unit; returns how often each outcome came."""
    stages.read_unit(unit)
    records = []
    for part in stages.finished_unit(unit, job.state).parts:
        with open(part, encoding="utf-8", newline="\n") as file:
            records += map(stages.Record.parse, file)
    for record in records:
        if record.outcome == KEPT:
            json.loads(record.text)
    picks = [
        stages.Pick(r.video_id, r.where, r.video, float(r.seconds)) for r in records if r.outcome == KEPT and r.video
    ]
    bad = stages.check_videos((unit, picks))
    return Counter(record.outcome for record in records) + Counter({"bad video": len(bad)})


def reader(folder: Path) -> Callable[[Unit, bytes], Counter[str]]:
    """What feeds both stages a unit whose one file, or shard, is `case/source/input`, and clears up behind them."""
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    dataset, source = folder / "case/dataset", folder / "case/source"
    source.mkdir(parents=True)
    job = stages.Job(Rules(), folder / "tokenizer.json", folder, dataset / "videos", dataset / "state")
    stages.prepare(job)

    def feed(unit: Unit, data: bytes) -> Counter[str]:
        (source / "input").write_bytes(data)
        outcomes = read(unit, job)
        for path in (folder / "case").rglob("*"):
            if path.is_file() or path.is_symlink():
                inside = path.parent in (dataset / "videos" / "train", dataset / "state")
                assert not path.is_symlink() and (inside or path == source / "input"), f"wrote {path}"
                if inside:
                    path.unlink()
        return outcomes

    return feed


def shards(folder: Path) -> Try:
    """Tries mutated tar shards."""
    feed, video, number = reader(folder), sound_video(), itertools.count()
    tars = [sound_tar(video, dialect) for dialect in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)]

    def try_one(draw: random.Random) -> Iterable[str]:
        whole = draw.choice(tars)
        if draw.random() < 0.1:  # packed by gzip, and damaged before or after
            data = gzip.compress(mutate_header(whole, draw), 1)
            data = mutate_bytes(data, draw) if draw.random() < 0.5 else data
        else:
            data = mutate_header(whole, draw) if draw.random() < 0.6 else mutate_bytes(whole, draw)
        unit = Unit(TAR, "train", "train/input", str(folder / "case/source/input"), str(next(number)))
        return feed(unit, data).elements()

    return try_one


def jsons(folder: Path) -> Try:
    """Tries mutated JSON files."""
    feed, number = reader(folder), itertools.count()

    def try_one(draw: random.Random) -> Iterable[str]:
        name, source = str(next(number)), str(folder / "case/source")
        unit = Unit(FOLDER, "train", "train/files", source, name, (("input", ""),))
        return feed(unit, mutate_json(sound_json(draw.randrange(1_000)), draw)).elements()

    return try_one


if __name__ == "__main__":
    in_memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # each input writes and syncs a few files
    bounds = {"seconds": 10, "memory_mib": 256}
    run(lambda: main(__doc__, "fuzz_data", {"shards": 10_000, "jsons": 10_000}, in_memory, **bounds))
