"""PE-Video's preparation: filtering, rows, sources and bad input."""

import errno
import gzip
import io
import json
import os
import tarfile
from fractions import Fraction
from pathlib import Path

import pytest
from mani import KEPT, MP4, SECONDS, good, ids, make_options, rows, skipped
from media import make_files, make_tar, make_video, sample_json, sound_bytes, video_bytes
from pe_video import sources
from pe_video.run import prepare_dataset
from preparation.rules import MAX_JSON_BYTES, Rules
from qwen_vl_streaming.common.errors import InputError

# --- rules and rows ------------------------------------------------------------------------------------------------


def test_rows_keep_all_fields_and_add_ids_and_paths(tmp_path):
    make_files(tmp_path / "source/train", {"7.json": good(keywords=["a", "ü"], model_caption="m")})
    options = make_options(tmp_path)
    tally = prepare_dataset(options)["train"]
    assert rows(options) == [
        {
            "category": "test",
            "video_duration_in_s": 6.0,
            "human_caption": " ".join(["word"] * KEPT),
            "keywords": ["a", "ü"],
            "model_caption": "m",
            "video_id": "7",
            "video_path": "dataset/PE-Video/videos/train/7.mp4",
        }
    ]
    assert tally.without_video == 1


def test_the_jsons_video_path_is_kept_if_the_source_has_no_video(tmp_path):
    """As in the published script. A video beside the JSON or in the default folder takes precedence."""
    named = {f"{n}.json": good(video_path=path) for n, path in enumerate(("clips/a.mp4", "clips/b.mp4", "", None, 7))}
    make_files(tmp_path / "source/train", named)
    make_files(tmp_path / "clips", {"b.mp4": MP4})
    make_files(tmp_path / "dataset/PE-Video/videos/train", {"4.mp4": MP4})
    options = make_options(tmp_path)
    tally = prepare_dataset(options)["train"]
    usual = "dataset/PE-Video/videos/train"
    paths = ["clips/a.mp4", "clips/b.mp4", *(f"{usual}/{n}.mp4" for n in (2, 3, 4))]
    assert [row["video_path"] for row in rows(options)] == paths
    assert tally.without_video == 3  # of 0, 2 and 3


@pytest.mark.parametrize(
    ("words", "seconds", "outcome"),
    [
        (15, 5.0, "kept"),
        (25, 5.0, "kept"),
        (14, 5.0, "too few tokens per second"),
        (26, 5.0, "too many tokens per second"),
        (20, 4.99, "too short"),
        (100, 30.0, "kept"),
        (100, 30.01, "too long"),
    ],
)
def test_bounds_are_inclusive(tmp_path, words, seconds, outcome):
    make_files(tmp_path / "source/train", {"7.json": sample_json(words, seconds)})
    assert prepare_dataset(make_options(tmp_path))["train"].outcomes == {outcome: 1}


def test_caption_prefix_and_invalid_bounds(tmp_path):
    caption = "The video shows " + " ".join(["word"] * 17)
    make_files(tmp_path / "source/train", {"1.json": good(human_caption=caption), "2.json": good()})
    options = make_options(tmp_path, rules=Rules(caption_prefix="the video shows"))
    assert prepare_dataset(options)["train"].outcomes == {"kept": 1, "caption prefix": 1}
    assert ids(options) == ["1"]
    with pytest.raises(InputError, match="--min-seconds 9 and --max-seconds 3"):
        Rules(min_seconds=9, max_seconds=3)


@pytest.mark.parametrize("field", ["video_duration_in_s", "video_duration", "duration"])
def test_duration_field_names(tmp_path, field):
    data = json.loads(sample_json(KEPT, None)) | {field: "6"}
    make_files(tmp_path / "source/train", {"7.json": json.dumps(data).encode()})
    options = make_options(tmp_path)
    prepare_dataset(options)
    assert rows(options)[0]["video_duration_in_s"] == 6.0


def test_missing_duration_is_read_from_the_video(tmp_path):
    make_files(tmp_path / "source/train", {"1.json": sample_json(KEPT, None), "1.mp4": MP4})
    make_tar(tmp_path / "source/train/a.tar", [("2.mp4", MP4), ("2.json", sample_json(KEPT, None))])
    options = make_options(tmp_path)
    prepare_dataset(options)
    assert [(row["video_id"], row["video_duration_in_s"]) for row in rows(options)] == [("1", 6.0), ("2", 6.0)]


BAD_JSON = {
    "broken": (b"{", "JSON is broken"),
    "empty": (b"  ", "JSON is empty"),
    "latin1": (b'{"human_caption": "\xe9"}', "JSON is not UTF-8"),
    "list": (b"[1]", "JSON is not an object"),
    "huge": (b" " * (MAX_JSON_BYTES + 1), "JSON is too large"),
    "deep": (b"[" * 200_000, "JSON is nested too deeply"),
    "negative": (sample_json(KEPT, -3), "video_duration_in_s is not a duration"),
    "nan": (sample_json(KEPT, float("nan")), "video_duration_in_s is not a duration"),
    "infinite": (sample_json(KEPT, float("inf")), "video_duration_in_s is not a duration"),
    "zero": (sample_json(KEPT, 0), "video_duration_in_s is not a duration"),
    "truth": (sample_json(KEPT, True), "video_duration_in_s is not a duration"),
    "absent": (sample_json(KEPT, None), "no duration in the JSON"),
    "nocaption": (b'{"video_duration_in_s": 6}', "no human_caption"),
    "emptycaption": (sample_json(0, 6), "human_caption is empty"),
    "numbercaption": (good(human_caption=7), "human_caption is not text"),
    "surrogate": (good(human_caption="\ud800 word"), "human_caption is not valid Unicode"),
    "nanfield": (good(score=float("nan")), "JSON contains text or a number that cannot be written back"),
}


def test_bad_json_is_counted_with_its_reason(tmp_path):
    make_files(tmp_path / "source/train", {f"{name}.json": data for name, (data, _) in BAD_JSON.items()})
    make_files(tmp_path / "source/train", {"fine.json": good()})
    options = make_options(tmp_path)
    tally = prepare_dataset(options)["train"]
    assert ids(options) == ["fine"]
    found = {entry["video_id"]: entry["reason"].partition(": ")[0] for entry in skipped(options)}
    assert found == {name: reason for name, (_, reason) in BAD_JSON.items()}
    assert sum(tally.reasons.values()) == len(BAD_JSON)


# --- sources -------------------------------------------------------------------------------------------------------


def test_folder_with_missing_videos_and_orphans(tmp_path):
    source = {"1.json": good(), "1.mp4": MP4, "2.json": good(), "3.mp4": MP4, "4.json": good(), "4.mp4": b"no video"}
    make_files(tmp_path / "source/train", source)
    make_files(tmp_path / "dataset/PE-Video/videos/train", {"2.mp4": MP4})
    options = make_options(tmp_path)
    tally = prepare_dataset(options)["train"]
    paths = {row["video_id"]: row["video_path"] for row in rows(options)}
    assert paths == {"1": "source/train/1.mp4", "2": "dataset/PE-Video/videos/train/2.mp4"}
    assert tally.without_video == 0
    reasons = {entry["video_id"]: entry["reason"] for entry in skipped(options)}
    assert reasons["3"] == "video without its JSON"
    assert reasons["4"].startswith("video cannot be used: ")


def test_the_video_beside_the_json_is_used(tmp_path, monkeypatch):
    """Otherwise a video without its own JSON. Independent of the order in which the disk lists files."""
    for folder, seconds in (("b", 7), ("a", 6), ("c", 8)):
        caption = b"{" if folder == "a" else good(video_duration_in_s=seconds)
        files = {"0.json": caption, "0.mp4": video_bytes(seconds=seconds, size=(64, 48))}
        make_files(tmp_path / "source/train" / folder, files)
    make_files(tmp_path / "source/train/json", {"0.json": good(), "1.json": good()})
    for folder in ("z", "y"):
        make_files(tmp_path / "source/train" / folder, {"1.mp4": MP4})
        make_files(tmp_path / "dataset/PE-Video/videos/train" / folder, {"0.json": good(), "0.mp4": MP4, "1.mp4": MP4})
    options = make_options(tmp_path)
    unpacked = options.videos / "train"
    for order in (list, lambda found: reversed(list(found))):
        with monkeypatch.context() as patch:
            patch.setattr(sources, "_walk", lambda folder, order=order, real=sources._walk: order(real(folder)))
            (unit,) = sources.find_units("train", options.splits["train"], unpacked)
        own = {f"{folder}/0.json": f"{folder}/0.mp4" for folder in "abc"}
        assert dict(unit.files) == {**own, "json/0.json": str(unpacked / "y/0.mp4"), "json/1.json": "y/1.mp4"}
    prepare_dataset(options)
    assert [row["video_path"] for row in rows(options)] == ["source/train/b/0.mp4", "source/train/y/1.mp4"]
    reasons = {entry["where"]: entry["reason"] for entry in skipped(options)}
    twice = "duplicate id: first in train/b/0.json"
    assert reasons == {"train/a/0.json": "JSON is broken", "train/c/0.json": twice, "train/json/0.json": twice}


def test_broken_and_circular_links_are_counted(tmp_path):
    folder = make_files(tmp_path / "source/train", {"1.json": good(), "1.mp4": MP4, "2.json": good(), "3.json": good()})
    links = {"2.mp4": "2.mp4", "3.mp4": "gone", "4.json": "4.json", "5.json": "gone", "6.tar": "6.tar"}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    options = make_options(tmp_path)
    tally = prepare_dataset(options)["train"]
    assert ids(options) == ["1"]
    assert tally.reasons == {"video cannot be used": 2, "JSON cannot be read": 2, "shard cannot be read": 1}
    reasons = {entry["where"]: entry["reason"] for entry in skipped(options)}
    assert reasons["train/4.json"] == f"JSON cannot be read: {os.strerror(errno.ELOOP)}"
    assert reasons["train/5.json"] == f"JSON cannot be read: {os.strerror(errno.ENOENT)}"
    assert reasons["train/6.tar"] == f"shard cannot be read: {os.strerror(errno.ELOOP)}"


def test_an_unreadable_folder_is_an_error(tmp_path, monkeypatch):
    make_files(tmp_path / "source/train/locked", {"1.json": good(), "1.mp4": MP4})
    make_files(tmp_path / "source/train", {"2.json": good(), "2.mp4": MP4})
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(InputError, match=r"train/locked cannot be read \(Permission denied\): make it readable"):
        prepare_dataset(make_options(tmp_path))


def test_only_kept_videos_are_unpacked(tmp_path):
    members = [("1.json", good()), ("1.mp4", MP4), ("2.mp4", MP4), ("2.json", sample_json(3, SECONDS))]
    make_tar(tmp_path / "source/train/a.tar", members)
    options = make_options(tmp_path)
    prepare_dataset(options)
    videos = tmp_path / "dataset/PE-Video/videos/train"
    assert [path.name for path in videos.iterdir()] == ["1.mp4"]
    assert (videos / "1.mp4").read_bytes() == MP4
    assert (tmp_path / rows(options)[0]["video_path"]).read_bytes() == MP4


def test_members_in_any_order(tmp_path):
    names = [f"{i:02d}" for i in range(8)]
    members = [(f"./{n}.mp4", MP4) for n in names] + [(f"./{n}.json", good()) for n in reversed(names)]
    make_tar(tmp_path / "source/train/a.tar", members)
    options = make_options(tmp_path)
    prepare_dataset(options)
    assert ids(options) == names


def test_long_names_of_both_tar_dialects(tmp_path):
    name = "x" * 150
    for dialect in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        path = tmp_path / f"source/train/{dialect}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", format=dialect) as tar:
            for ending, data in ((".json", good()), (".mp4", MP4)):
                part = make_files(tmp_path / "parts", {"x": data}) / "x"
                deep = f"{'d' * 90}/{'e' * 30}/" if dialect == tarfile.USTAR_FORMAT else ""
                tar.add(part, f"{deep}{dialect}{name[:60] if deep else name}{ending}")
    options = make_options(tmp_path)
    prepare_dataset(options)
    assert len(rows(options)) == 3
    assert not skipped(options)


BAD_VIDEOS = {
    "undecodable": b"no video at all",
    "empty": b"",
    "short": video_bytes(seconds=3, fps=5, size=(64, 48)),
    "long": video_bytes(seconds=8, fps=5, size=(64, 48)),
    "sound": sound_bytes(),
}


def test_bad_videos_are_counted_and_not_written(tmp_path):
    members = [(f"{name}{e}", d) for name, data in BAD_VIDEOS.items() for e, d in ((".json", good()), (".mp4", data))]
    make_tar(tmp_path / "source/train/a.tar", members)
    options = make_options(tmp_path)
    prepare_dataset(options)
    assert not rows(options)
    reasons = {entry["video_id"]: entry["reason"].partition(": ")[0] for entry in skipped(options)}
    assert reasons == {
        "undecodable": "video cannot be used",
        "empty": "video is empty",
        "short": "video is shorter than its JSON says",
        "long": "video is longer than its JSON says",
        "sound": "video cannot be used",
    }
    assert not list((tmp_path / "dataset").rglob("*.mp4"))


def test_samples_before_damage_in_a_shard_are_used(tmp_path):
    members = [(f"{i}{e}", d) for i in range(6) for e, d in ((".json", good()), (".mp4", MP4))]
    whole = make_tar(tmp_path / "whole.tar", members).read_bytes()
    pair = len(whole[: whole.index(b"1.json\0")])  # bytes of the first sample
    broken = bytearray(whole)
    broken[2 * pair + 130] ^= 0xFF
    shards = {
        "a-cut.tar": whole[: 3 * pair + 1000],
        "b-header.tar": bytes(broken).replace(b"0.json", b"9.json").replace(b"0.mp4\0", b"9.mp4\0"),
        "c-none.tar": b"",
        "d-noise.tar": os.urandom(5000),
    }
    make_files(tmp_path / "source/train", shards)
    options = make_options(tmp_path)
    tally = prepare_dataset(options)["train"]
    assert ids(options) == ["0", "1", "2"]
    damaged = [entry for entry in skipped(options) if entry["reason"].startswith("shard damaged")]
    assert [entry["where"] for entry in damaged] == [f"train/{name}" for name in shards]
    assert tally.reasons["shard damaged"] == 4


def unsafe_members():
    link = tarfile.TarInfo("link.mp4")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard = tarfile.TarInfo("hard.json")
    hard.type, hard.linkname = tarfile.LNKTYPE, "1.json"
    device = tarfile.TarInfo("device.mp4")
    device.type, device.devmajor, device.devminor = tarfile.CHRTYPE, 1, 3
    names = ["../up", "a/../../up2", "/absolute", "..", "new\nline", "x" * 230]
    unsafe = [(f"{name}{e}", d) for name in names for e, d in ((".json", good()), (".mp4", MP4))]
    return [(link, b""), (hard, b""), (device, b""), *unsafe, ("1.json", good()), ("1.mp4", MP4)]


def test_unsafe_members_write_nothing_outside(tmp_path):
    make_tar(tmp_path / "source/train/a.tar", unsafe_members())
    options = make_options(tmp_path)
    before = {path for path in tmp_path.rglob("*") if "dataset" not in path.parts}
    tally = prepare_dataset(options)["train"]
    assert ids(options) == ["1"]
    assert {path for path in tmp_path.rglob("*") if "dataset" not in path.parts} == before
    assert [path.name for path in (tmp_path / "dataset").rglob("*.mp4")] == ["1.mp4"]
    assert tally.reasons["member refused"] >= 3 + 4 * 2
    assert not Path("/absolute.mp4").exists()


def test_a_link_in_place_of_a_video_is_replaced_and_not_followed(tmp_path):
    make_tar(tmp_path / "source/train/a.tar", [("1.json", good()), ("1.mp4", MP4)])
    videos = make_files(tmp_path / "dataset/PE-Video/videos/train", {})
    outside = make_files(tmp_path / "outside", {"mine": b"mine"}) / "mine"
    (videos / "1.mp4").symlink_to(outside)
    prepare_dataset(make_options(tmp_path))
    assert outside.read_bytes() == b"mine"
    assert not (videos / "1.mp4").is_symlink()


def test_the_first_good_duplicate_is_used(tmp_path):
    other = video_bytes(seconds=7, fps=5, size=(64, 48))
    make_tar(tmp_path / "source/train/a.tar", [("1.json", b"{"), ("1.mp4", MP4), ("2.json", good()), ("2.mp4", MP4)])
    make_tar(
        tmp_path / "source/train/b.tar", [(n, d) for i in "12" for n, d in ((i + ".json", good()), (i + ".mp4", other))]
    )
    options = make_options(tmp_path)
    prepare_dataset(options)
    assert ids(options) == ["1", "2"]
    videos = tmp_path / "dataset/PE-Video/videos/train"
    assert (videos / "1.mp4").read_bytes() == other and (videos / "2.mp4").read_bytes() == MP4
    assert [entry["reason"] for entry in skipped(options)] == ["JSON is broken", "duplicate id: first in train/a.tar:2"]


def test_invalid_names_and_sizes_in_headers(tmp_path):
    """Found by fuzzing: a member named ".", and a size larger than any file."""
    whole = make_tar(tmp_path / "whole.tar", [("0.json", good()), ("0.mp4", MP4)]).read_bytes()
    for name, start, field in (
        ("nameless", 0, b".".ljust(100, b"\0")),
        ("endless", 124, b"\x80" + b"\x7f" * 11),
        ("endless-extension", 124, b"\x80" + b"\x7f" * 11 + bytes(20) + b"g"),
    ):
        header = bytearray(whole[:512])
        header[start : start + len(field)] = field
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        make_files(tmp_path / "source/train", {f"{name}.tar": bytes(header) + whole[512:]})
    options = make_options(tmp_path)
    tally = prepare_dataset(options)["train"]
    assert not rows(options)
    once = ["member refused", "video without its JSON", "JSON without its video"]
    assert tally.reasons == {"shard damaged": 2, **dict.fromkeys(once, 1)}


# --- containers and compression ---------------------------------------------------------------------------------------

FORMATS = {
    **{"mov": "mov", "MKV": "matroska", "webm": "webm", "avi": "avi", "m4v": "mp4", "MP4": "mp4", "ts": "mpegts"},
    **{"M2TS": "mpegts", "flv": "flv", "wmv": "asf", "3gp": "3gp", "mpg": "mpeg", "gif": "gif"},
}
CODECS = {"webm": "libvpx", "wmv": "mpeg4", "mpg": "mpeg2video", "gif": "gif"}
PIXELS = {"gif": "rgb8"}


def film(ending):
    how = {"container": FORMATS[ending], "codec": CODECS.get(ending, "libx264")}
    how |= {"fps": 25, "time_base": Fraction(1, 25)} if how["codec"].startswith("mpeg") else {"fps": 5}
    return make_video(io.BytesIO(), seconds=6, size=(64, 48), pixels=PIXELS.get(ending, "yuv420p"), **how).getvalue()


FILMS = {ending: film(ending) for ending in FORMATS}


@pytest.mark.parametrize("kind", ["files", "tar"])
def test_videos_of_every_container(tmp_path, kind):
    members = [(f"{e}.{part}", d) for e, data in FILMS.items() for part, d in (("json", good()), (e, data))]
    source = tmp_path / "source/train"
    make_files(source, dict(members)) if kind == "files" else make_tar(source / "a.tar", members)
    options = make_options(tmp_path)
    for _ in range(2):  # the second run finds everything unpacked
        tally = prepare_dataset(options)["train"]
        found = {row["video_id"]: row["video_path"] for row in rows(options)}
        folder, small = ("source/train", str) if kind == "files" else ("dataset/PE-Video/videos/train", str.lower)
        assert found == {ending: f"{folder}/{ending}.{small(ending)}" for ending in FILMS}
        assert not skipped(options) and tally.without_video == 0
        assert all((tmp_path / path).read_bytes() == FILMS[name] for name, path in found.items())


def test_json_files_find_videos_that_were_unpacked_before(tmp_path):
    make_files(tmp_path / "source/train", {f"{ending}.json": good() for ending in FILMS})
    options = make_options(tmp_path)
    make_files(options.videos / "train", {f"{ending}.{ending}": data for ending, data in FILMS.items()})
    assert prepare_dataset(options)["train"].without_video == 0 and len(rows(options)) == len(FILMS)


@pytest.mark.parametrize("kind", ["files", "tar"])
def test_several_videos_with_one_json(tmp_path, kind):
    """One is used, preferably MP4, and the others are reported."""
    members = [("a.mp4", MP4), ("a.json", good()), ("a.avi", FILMS["avi"]), ("b.json", good()), ("b.mkv", FILMS["MKV"])]
    source = tmp_path / "source/train"
    make_files(source, dict(members)) if kind == "files" else make_tar(source / "a.tar", members)
    options = make_options(tmp_path)
    prepare_dataset(options)
    assert [Path(row["video_path"]).name for row in rows(options)] == ["a.mp4", "b.mkv"]
    assert [(entry["video_id"], entry["reason"]) for entry in skipped(options)] == [("a", sources.OTHER_VIDEO)]


@pytest.mark.parametrize("name", ["a.tar.gz", "a.TGZ", "a.tar"])
def test_gzip_shards(tmp_path, name):
    members = [(f"{i}{e}", d) for i in range(3) for e, d in ((".json", good(video_duration_in_s=None)), (".mp4", MP4))]
    whole = make_tar(tmp_path / "whole", members).read_bytes()
    make_files(tmp_path / "source/train", {name: gzip.compress(whole)})
    options = make_options(tmp_path)
    prepare_dataset(options)
    assert ids(options) == ["0", "1", "2"] and not skipped(options)
    assert all((tmp_path / row["video_path"]).read_bytes() == MP4 for row in rows(options))
    kept = {path.suffix for path in (tmp_path / "dataset/.mani_data").rglob("*") if path.is_file()}
    assert kept <= {"", ".done", ".tsv", ".jsonl"}


def test_damaged_gzip_shards(tmp_path):
    noise = os.urandom(100_000)  # does not compress
    members = [(f"{i}{e}", d) for i in range(3) for e, d in ((".json", good()), (".mp4", MP4))]
    packed = gzip.compress(make_tar(tmp_path / "whole", [*members, ("x", noise)]).read_bytes())
    flipped = bytearray(packed)
    flipped[-50_000] ^= 0xFF
    bomb = gzip.compress(bytes(1 << 28))
    shards = {
        "a.tar.gz": packed[:-50_000],
        "b.tar.gz": bytes(flipped),
        "c.tar.gz": bomb,
        "d.tar.gz": b"",
        "e.tgz": bomb[:9],
    }
    make_files(tmp_path / "source/train", shards)
    options = make_options(tmp_path)
    prepare_dataset(options)
    assert ids(options) == ["0", "1", "2"]
    reasons = {entry["where"]: entry["reason"] for entry in skipped(options)}
    for name, reason in (
        ("a.tar.gz", "the file is truncated"),
        ("b.tar.gz", "shard cannot be read: CRC check failed"),
        ("c.tar.gz", "shard cannot be read: it decompresses to more than"),
        ("d.tar.gz", "the file is truncated"),
        ("e.tgz", "the file is truncated"),
    ):
        assert reason in reasons[f"train/{name}"], name


@pytest.mark.parametrize("ending", ["tar.zst", "tar.bz2", "TAR.XZ", "txz", "tar.lz4"])
def test_shards_with_other_compression_are_refused(tmp_path, ending):
    make_files(tmp_path / "source/train", {"0.json": good(), "0.mp4": MP4, f"a.{ending}": b"whatever"})
    with pytest.raises(InputError, match=rf"a\.{ending} has an unsupported compression"):
        prepare_dataset(make_options(tmp_path))
