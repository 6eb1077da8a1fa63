"""Fuzzes report.py, verify.py and `eval.sh --score-only` with mutated result files, and everything that loads a
checkpoint with mutated checkpoints. Each must succeed or report one line.

    python code/benchmarks/fuzz_programs.py             # 1,000 result files and 500 checkpoints, minutes on one core

The programs' functions are called in a sandbox (see sandbox.py). A finding is an exception other than a one-line
InputError, no answer within a minute, a process that dies, for example of memory, code from a checkpoint that is
executed, or files or processes outside the sandbox's folder. Each input is determined by --seed and its number.
"""

import contextlib
import json
import pickle
import random
import shutil
from functools import cache, partial
from pathlib import Path
from unittest.mock import patch

from fuzzing import main, outcome_of
from mutators import mutate_bytes, mutate_json
from qwen_vl_streaming.common.errors import run
from sandbox import Try

REAL_SCORES_SHARE = 0.03
"""Share of the inputs that are scored by the real metrics, which start Java; the rest use a stub."""


def make_inputs(folder: Path) -> tuple[Path, Path]:
    """Create a tiny checkpoint and rows of three videos, unless they exist. Returns both paths."""
    import tarfile

    from make_data import make_dataset
    from make_model import tiny_checkpoint
    from samples import DataConfig

    data, model = folder / "inputs/rows.jsonl", folder / "inputs/model"
    if data.exists():
        return model, data
    make_dataset(DataConfig(folder / "inputs/data", train_videos=3, test_videos=0, dropped=0, size=56))
    for shard in (folder / "inputs/data/train").glob("*.tar"):
        with tarfile.open(shard) as archive:
            archive.extractall(folder / "inputs/videos", filter="data")
    tiny_checkpoint(model)
    rows = []
    for path in sorted((folder / "inputs/videos").glob("*.json"))[:3]:
        rows.append({**json.loads(path.read_text()), "video_path": str(path.with_suffix(".mp4"))})
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return model, data


def call(program, *arguments: object) -> str:
    """The outcome of a program's main with `arguments` as its command line."""
    with patch("sys.argv", ["program", *map(str, arguments)]):
        return outcome_of(program)


def results(folder: Path) -> Try:
    """Mutated result files: the rows, or the files beside them."""
    import eval as evaluation
    import verify
    from metrics import scorecard
    from report import cli

    model, data = make_inputs(folder)
    out = folder / "inputs/output"
    flags = ["--model", model, "--device", "cpu", "--workers", "0"]
    call(evaluation.main, "--variant", "group", "--data", data, "--output-dir", out, *flags)
    names = ("infer.json", "infer.args.json", "scores.json")
    valid = {name: (out / f"group_{name}").read_bytes() for name in names} | {"rows.jsonl": data.read_bytes()}
    verify.load_processor = scorecard.load_processor = cache(verify.load_processor)
    case, score = folder / "case", scorecard.score

    def try_one(draw: random.Random) -> str:
        shutil.rmtree(case)
        case.mkdir()
        target = draw.choices([*valid], [6, 2, 1, 1])[0]
        args = json.loads(valid["infer.args.json"]) | {"data": str(case / "group_rows.jsonl")}
        files = valid | {"infer.args.json": json.dumps(args).encode()}
        files[target] = mutate_file(files[target], draw)
        for name, content in files.items():
            (case / f"group_{name}").write_bytes(content)
        file = case / "group_infer.json"
        outcomes = [call(cli.main, file, "--output", case / "report", "--videos", "1"), call(verify.main, file)]
        real = draw.random() < REAL_SCORES_SHARE
        with patch.object(scorecard, "score", score if real else lambda references, captions: {"BLEU-1": 1.0}):
            outcomes.append(call(evaluation.main, "--score-only", file))
        return ", ".join(
            f"{name} {outcome}" for name, outcome in zip(("report", "verify", "score"), outcomes, strict=True)
        )

    return try_one


def mutate_file(data: bytes, draw: random.Random) -> bytes:
    """Mutate the values or the bytes of a JSON or JSON Lines file."""
    if draw.random() < 0.3:
        return mutate_bytes(data, draw)
    try:
        return json.dumps(mutate_json(json.loads(data), draw)).encode()
    except ValueError:
        rows = mutate_json([json.loads(line) for line in data.splitlines()], draw)
        rows = rows if isinstance(rows, list) else [rows]
        return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


class Payload:
    """Creates the file `mark` when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return exec, (
            f"import pathlib; p = pathlib.Path({str(self.mark)!r}); p.parent.mkdir(exist_ok=True); p.touch()",
        )


REMOTE_CODE = """
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
    """Mutated checkpoints: JSON files, tokenizer, chat template, weights, pickles and remote code."""
    import torch
    import verify  # noqa: F401 - imports its dependencies before memory is limited
    from qwen_vl_streaming.model.base_files import BaseFiles
    from qwen_vl_streaming.model.checkpoint import of_checkpoint, tensor_types
    from qwen_vl_streaming.model.loading import load_config, load_model
    from qwen_vl_streaming.model.prompts import load_processor
    from report import gallery

    valid = make_inputs(folder)[0]
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
    corruptions = {
        "json": corrupt_json,
        "weights": corrupt_weights,
        "pickle": partial(add_pickles, mark=mark),
        "code": partial(add_code, mark=mark),
        "template": corrupt_template,
    }
    for load in loaders.values():  # the valid one, before memory is limited
        shutil.copytree(valid, case, dirs_exist_ok=True)
        load()

    def try_one(draw: random.Random) -> str:
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(valid, case)
        how = draw.choices([*corruptions], [8, 5, 4, 4, 2])[0]
        corruptions[how](case, draw)
        outcomes = {name: outcome_of(load) for name, load in loaders.items()}
        refused = [name for name, outcome in outcomes.items() if outcome == "refused"]
        return f"{how}: " + (f"refused by {' '.join(refused)}" if refused else "accepted")

    return try_one


def corrupt_json(case: Path, draw: random.Random) -> None:
    """Mutate one or two of the JSON files."""
    for path in draw.sample(sorted(case.glob("*.json")), draw.choice([1, 1, 2])):
        path.write_bytes(mutate_file(path.read_bytes(), draw))


def corrupt_template(case: Path, draw: random.Random) -> None:
    """Replace the chat template wherever the checkpoint has one."""
    text = draw.choice(TEMPLATES)
    (case / "chat_template.jinja").write_text(text)
    for path in case.glob("*.json"):
        found = json.loads(path.read_text())
        if isinstance(found, dict) and "chat_template" in found:
            path.write_text(json.dumps(found | {"chat_template": text}))


def corrupt_weights(case: Path, draw: random.Random) -> None:
    """Mutate the header of a safetensors file, the length of its header, or its tensors."""
    path = draw.choice(sorted(case.glob("*.safetensors")))
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, tensors = data[8 : 8 + size], data[8 + size :]
    action = draw.randrange(5)
    if action == 0:
        size = draw.choice([0, 1, size - 1, size + 1, len(data), 2**31, 2**45, 2**63, 2**64 - 1])
    elif action < 3:
        header = json.dumps(mutate_json(json.loads(header), draw)).encode()
        size = len(header)
    elif action == 3:
        header = mutate_bytes(header, draw)
        size = len(header)
    else:
        tensors = mutate_bytes(tensors, draw)
    path.write_bytes(size.to_bytes(8, "little") + header + tensors)


def add_pickles(case: Path, draw: random.Random, mark: Path) -> None:
    """Add pickles that create `mark`, under file names that loaders look for, beside the weights or instead of them."""
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
    """Add a Python module to the checkpoint, and refer to it where transformers looks for remote code."""
    (case / "evil.py").write_text(REMOTE_CODE.format(mark=str(mark)))
    (case / "__init__.py").write_text(REMOTE_CODE.format(mark=str(mark)))
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
