"""Feeds mutated result files to report.py, verify.py and `eval.sh --score-only`, and mutated checkpoint folders to
everything that loads one, and looks for anything but an answer or one plain line.

    python code/benchmarks/fuzz_programs.py             # 1,000 result files and 500 checkpoints, some minutes on a core

The programs' own functions are called, in a process that is watched (see fuzzing.py). A finding is an exception that is
not a plain line, no answer within a minute, a process that dies, as of memory, code of a checkpoint that runs, or
anything written, removed or started outside the process's folder. Every input follows from --seed and its number.
"""

import contextlib
import json
import pickle
import random
import shutil
from functools import cache
from pathlib import Path
from unittest.mock import patch

from fuzzing import Try, answer_of, main, mutate_bytes, mutate_tree
from qwen_vl_streaming.common.errors import run

REAL_SCORES = 0.03
"""Share of the inputs that are scored by the real metrics, which start Java; the others by a stand-in."""


def tiny_world(folder: Path) -> tuple[Path, Path]:
    """A tiny checkpoint, and three videos with their rows."""
    import tarfile

    from make_data import DataConfig, make_dataset
    from make_model import tiny_checkpoint

    data, model = folder / "world/rows.jsonl", folder / "world/model"
    if data.exists():
        return model, data
    make_dataset(DataConfig(folder / "world/data", train_videos=3, test_videos=0, dropped=0, size=56))
    for shard in (folder / "world/data/train").glob("*.tar"):
        with tarfile.open(shard) as archive:
            archive.extractall(folder / "world/videos", filter="data")
    tiny_checkpoint(model)
    rows = []
    for path in sorted((folder / "world/videos").glob("*.json"))[:3]:
        rows.append({**json.loads(path.read_text()), "video_path": str(path.with_suffix(".mp4"))})
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return model, data


def call(program, *arguments: object) -> str:
    with patch("sys.argv", ["program", *map(str, arguments)]):
        return answer_of(program)


def results(folder: Path) -> Try:
    """Tries mutated result files: the rows, or what lies beside them."""
    import eval as evaluation
    import verify
    from metrics import scorecard
    from report import cli

    model, data = tiny_world(folder)
    out = folder / "world/output"
    flags = ["--model", model, "--device", "cpu", "--workers", "0"]
    call(evaluation.main, "--variant", "group", "--data", data, "--output-dir", out, *flags)
    names = ("infer.json", "infer.args.json", "scores.json")
    sound = {name: (out / f"group_{name}").read_bytes() for name in names} | {"rows.jsonl": data.read_bytes()}
    verify.load_processor = scorecard.load_processor = cache(verify.load_processor)
    case, score = folder / "case", scorecard.score

    def try_one(draw: random.Random) -> str:
        shutil.rmtree(case)
        case.mkdir()
        target = draw.choices([*sound], [6, 2, 1, 1])[0]
        args = json.loads(sound["infer.args.json"]) | {"data": str(case / "group_rows.jsonl")}
        files = sound | {"infer.args.json": json.dumps(args).encode()}
        files[target] = mutate_file(files[target], draw)
        for name, content in files.items():
            (case / f"group_{name}").write_bytes(content)
        file = case / "group_infer.json"
        told = [call(cli.main, file, "--output", case / "report", "--videos", "1"), call(verify.main, file)]
        real = draw.random() < REAL_SCORES
        with patch.object(scorecard, "score", score if real else lambda references, captions: {"BLEU-1": 1.0}):
            told.append(call(evaluation.main, "--score-only", file))
        return ", ".join(f"{name} {answer}" for name, answer in zip(("report", "verify", "score"), told, strict=True))

    return try_one


def mutate_file(data: bytes, draw: random.Random) -> bytes:
    """Of JSON or JSON Lines: the values, or the bytes."""
    if draw.random() < 0.3:
        return mutate_bytes(data, draw)
    try:
        return json.dumps(mutate_tree(json.loads(data), draw)).encode()
    except ValueError:
        rows = mutate_tree([json.loads(line) for line in data.splitlines()], draw)
        rows = rows if isinstance(rows, list) else [rows]
        return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


class Payload:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return exec, (
            f"import pathlib; p = pathlib.Path({str(self.mark)!r}); p.parent.mkdir(exist_ok=True); p.touch()",
        )


CODE_OF_ITS_OWN = """
import pathlib
p = pathlib.Path({mark!r})
p.parent.mkdir(exist_ok=True)
p.touch()
class Evil:
    @classmethod
    def from_pretrained(cls, *args, **kwargs): return cls()
EvilConfig = EvilModel = EvilTokenizer = EvilProcessor = Evil
"""
AUTO_MAP = {
    "AutoConfig": "evil.EvilConfig",
    "AutoModel": "evil.EvilModel",
    "AutoModelForCausalLM": "evil.EvilModel",
    "AutoModelForImageTextToText": "evil.EvilModel",
    "AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"],
    "AutoProcessor": "evil.EvilProcessor",
    "AutoImageProcessor": "evil.EvilProcessor",
    "AutoVideoProcessor": "evil.EvilProcessor",
}
ODD_TYPES = ("evil", "qwen2_5_vl", "qwen2_vl", "llama", "", None, 1, "EvilProcessor", "PreTrainedTokenizerFast")
TEMPLATES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch mark') }}",
    "{% include '/etc/passwd' %}",
    "{% for m in messages %}{{ m }}{% endfor %}",
    "{{ raise_exception('no') }}",
    "{% if %}",
    "",
    "{{ 'x' * 100000000000 }}",
    "{{ messages }}<|video_pad|>\n<|video_pad|>",
)


def checkpoints(folder: Path) -> Try:
    """Tries mutated checkpoints: JSON files, tokenizer, chat template, weights, pickles and code of their own."""
    import torch
    import verify  # noqa: F401 - what it brings in is loaded before memory is bounded
    from qwen_vl_streaming.model.base_files import BaseFiles
    from qwen_vl_streaming.model.checkpoint import of_checkpoint, tensor_types
    from qwen_vl_streaming.model.modeling_qwen2_5_vl import load_config, load_model
    from qwen_vl_streaming.model.prompts import load_processor
    from report import gallery

    sound = tiny_world(folder)[0]
    case, mark = folder / "case/model", folder / "marks/mark"
    loaders = {
        "config": lambda: load_config(case),
        "model": lambda: load_model(case, "sdpa", torch.float32),
        "processor": lambda: load_processor(case),
        "identity": lambda: of_checkpoint(str(case)),
        "files": lambda: BaseFiles.of(case),
        "types": lambda: [tensor_types(path) for path in case.glob("*.safetensors")],
        "tokenizer": lambda: gallery.Tokenizers._load(case),
    }
    for load in loaders.values():  # the sound one, before memory is bounded
        shutil.copytree(sound, case, dirs_exist_ok=True)
        load()

    def try_one(draw: random.Random) -> str:
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(sound, case)
        how = draw.choices(["json", "weights", "pickle", "code", "template"], [8, 5, 4, 4, 2])[0]
        {"json": spoil_json, "weights": spoil_weights, "template": spoil_template}.get(
            how, lambda *_: (add_pickles if how == "pickle" else add_code)(case, draw, mark)
        )(case, draw)
        answers = {name: answer_of(load) for name, load in loaders.items()}
        refused = [name for name, answer in answers.items() if answer == "refused"]
        return f"{how}: " + (f"refused by {' '.join(refused)}" if refused else "accepted")

    return try_one


def spoil_json(case: Path, draw: random.Random) -> None:
    for path in draw.sample(sorted(case.glob("*.json")), draw.choice([1, 1, 2])):
        path.write_bytes(mutate_file(path.read_bytes(), draw))


def spoil_template(case: Path, draw: random.Random) -> None:
    text = draw.choice(TEMPLATES)
    (case / "chat_template.jinja").write_text(text)
    for path in case.glob("*.json"):
        found = json.loads(path.read_text())
        if isinstance(found, dict) and "chat_template" in found:
            path.write_text(json.dumps(found | {"chat_template": text}))


def spoil_weights(case: Path, draw: random.Random) -> None:
    """The header of a safetensors file, its length, or any of the bytes."""
    path = draw.choice(sorted(case.glob("*.safetensors")))
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, tensors = data[8 : 8 + size], data[8 + size :]
    action = draw.randrange(5)
    if action == 0:
        size = draw.choice([0, 1, size - 1, size + 1, len(data), 2**31, 2**45, 2**63, 2**64 - 1])
    elif action < 3:
        header = json.dumps(mutate_tree(json.loads(header), draw)).encode()
        size = len(header)
    elif action == 3:
        header = mutate_bytes(header, draw)
        size = len(header)
    else:
        tensors = mutate_bytes(tensors, draw)
    path.write_bytes(size.to_bytes(8, "little") + header + tensors)


def add_pickles(case: Path, draw: random.Random, mark: Path) -> None:
    """Pickles that leave a mark, under the names that loaders look for, beside the weights or in their place."""
    import io

    import torch

    payload, packed = Payload(mark), io.BytesIO()
    torch.save({"model.embed_tokens.weight": payload}, packed)
    old = io.BytesIO()
    torch.save({"w": payload}, old, _use_new_zipfile_serialization=False)
    data = draw.choice([pickle.dumps(payload), pickle.dumps({"w": payload}), packed.getvalue(), old.getvalue()])
    names = ["pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "model.safetensors"]
    for name in draw.sample(names, draw.randint(1, 3)):
        (case / name).write_bytes(data)
    if draw.random() < 0.5:
        for path in case.glob("*.safetensors"):
            path.unlink()
    if draw.random() < 0.3:
        target = draw.choice(["pytorch_model.bin", "../../marks/x", "/etc/passwd", "model.safetensors"])
        index = {"metadata": {}, "weight_map": {"lm_head.weight": target}}
        name = draw.choice(["pytorch_model.bin.index.json", "model.safetensors.index.json"])
        (case / name).write_text(json.dumps(index))
    if draw.random() < 0.2:
        (case / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(case)})
        )


def add_code(case: Path, draw: random.Random, mark: Path) -> None:
    """A module of the checkpoint's own, named wherever transformers looks for one."""
    (case / "evil.py").write_text(CODE_OF_ITS_OWN.format(mark=str(mark)))
    (case / "__init__.py").write_text(CODE_OF_ITS_OWN.format(mark=str(mark)))
    paths = sorted(path for path in case.glob("*.json") if "config" in path.name)
    for path in draw.sample(paths, draw.randint(1, len(paths))):
        found = json.loads(path.read_text())
        found["auto_map"] = draw.choice([AUTO_MAP, {draw.choice([*AUTO_MAP]): "evil.EvilModel"}, f"{case}--evil.Evil"])
        for name in ("model_type", "tokenizer_class", "processor_class", "image_processor_type", "architectures"):
            if draw.random() < 0.3:
                found[name] = draw.choice(ODD_TYPES)
        if draw.random() < 0.3:
            found["trust_remote_code"] = True
        path.write_text(json.dumps(found))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        run(lambda: main(__doc__, "fuzz_programs", {"results": 1_000, "checkpoints": 500}))
