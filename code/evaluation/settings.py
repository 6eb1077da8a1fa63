"""Every setting of the evaluation, with the paper's values as defaults. Environment variables give the defaults of
the flags that bear their names. Knows nothing about models and metrics."""

import argparse
import ast
import dataclasses
import inspect
import itertools
import json
import os
from pathlib import Path

from qwen_vl_streaming.common.errors import InputError, OneLineParser
from qwen_vl_streaming.timeline.variants import ENVIRONMENT_VARIABLE, VARIANTS, chosen_variant
from qwen_vl_streaming.video.frames import PixelBudget
from tasks import get_task

MOST_GIB = 100_000
LIMITS = {
    "batch_size": (1, 10**6),
    "max_new_tokens": (1, 10**6),
    "repetition_penalty": (1e-2, 1e2),
    "limit": (1, 10**9),
    "seed": (-(2**63), 2**63 - 1),
    "processes": (0, 10**4),
    "workers": (0, 10**4),
    "judge_workers": (1, 10**3),
}
"""The least and the most of what is a number."""

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "model": "QWEN2_5_VL_EVAL_MODEL_PATH",
    "data": "QWEN2_5_VL_EVAL_DATA_DIR",
    "video_root": "QWEN2_5_VL_EVAL_IMG_ROOT",
    "output_dir": "QWEN2_5_VL_EVAL_OUTPUT_DIR",
    "output_file": "QWEN2_5_VL_EVAL_OUTPUT_FILE",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    variant: str = "group"
    """One of origin, batch, interleave, overlap, group, gap."""
    model: str = ""
    """A checkpoint folder or hub id; by default what sft.sh has trained for the variant, in
    code/qwen-vl-finetune/output: qwen2_5vl-pe-<variant>, and for funqa qwen2_5vl-funqa-<variant>."""
    task: str = "description"
    """description, or funqa: six sub-tasks, each row with its own question."""
    data: str = ""
    """A JSONL that mani_data.py has made; by default dataset/test_3_5.jsonl or dataset/funqa_test.jsonl."""
    video_root: str = ""
    """Folder of the videos: a video_path that is neither there as it is nor under the project's root is looked up under
    this, then its file name alone."""
    output_dir: Path = ROOT / "code/evaluation/output"
    """Folder for captions and scores; by default funqa has its own in there."""
    output_file: str = ""
    """Name of the file of captions, by default <variant>_infer.json."""
    schedule: str = ""
    """wait-K; random-K, between 1 and 2K-1 tokens a slot; random, around the checkpoint's K; or a file of counts, JSON
    {video_id: [k_1, ..., k_N]} or JSON Lines such as a result file. By default wait-K with the checkpoint's K."""
    seed: int = 0
    """For random schedules."""
    batch_size: int = 32
    """Videos that a process watches at once, at most; fewer where the memory does not hold them. In float32 captions do
    not depend on it."""
    memory: float | None = None
    """GiB for the keys and values of a process's videos; by default most of what its GPU has free."""
    processes: int = 0
    """Processes on this node. 0: NPROC_PER_NODE, or else one per GPU, or 1 without a GPU."""
    max_new_tokens: int = 300
    """At most this many answer tokens a video."""
    repetition_penalty: float = 1.15
    """1 turns it off."""
    min_pixels_per_frame: int | None = None
    """Smallest frame after resizing; by default this and the next two are as the checkpoint was trained."""
    max_pixels_per_frame: int | None = None
    """Largest frame after resizing."""
    max_pixels_per_video: int | None = None
    """Shared over the sampled frames of a video."""
    budget: str | None = None
    """Which frames share it: those that the video has (video), or always as many as the longest has (stream), so that
    nothing depends on what is to come. By default as the checkpoint was trained."""
    limit: int | None = None
    """Only the first videos of the data."""
    workers: int | None = None
    """Processes that decode videos ahead of each one that watches; by default 2, and with a GPU up to 8."""
    device: str = ""
    """cuda, cuda:N or cpu; by default cuda where there is one."""
    dtype: str = ""
    """float32, bfloat16 or float16; by default bfloat16 on cuda, float32 on the CPU."""
    force: bool = False
    """Evaluate a checkpoint that was trained as another variant or under another position rule."""
    score_only: str = ""
    """Only score the captions in this file: JSON Lines with video_id, annotation and result."""
    bleurt: str = ""
    """Score with BLEURT too: a checkpoint for PyTorch, folder or hub id, such as lucadiliello/BLEURT-20."""
    judge_url: str = ""
    """Have an LLM judge fluency: base address of an OpenAI-compatible endpoint, such as http://localhost:8000/v1. Its
    key, where it wants one, is read from OPENAI_API_KEY."""
    judge_model: str = ""
    """The judge's name at that endpoint."""
    judge_workers: int = 8
    """Captions that are judged at once."""
    judge_options: str = '{"temperature": 0}'
    """Further fields of each request to the judge, a JSON object."""

    def __post_init__(self):
        for name, (least, most) in LIMITS.items():
            if (value := getattr(self, name)) is not None and not least <= value <= most:
                raise InputError(
                    f"--{name.replace('_', '-')} {str(value)[:20]}: give a number from {least:g} to {most:.10g}"
                )
        if self.output_file and not self.output_file.endswith(".json"):
            raise InputError(
                f"--output-file {self.output_file}: give a name that ends in .json, after which what lies beside it is "
                "named"
            )
        if self.memory is not None and not 0 < self.memory <= MOST_GIB:
            raise InputError(f"--memory {self.memory}: give GiB above 0, at most {MOST_GIB}, or leave it out")
        if bool(self.judge_url) != bool(self.judge_model):
            raise InputError("--judge-url and --judge-model go together: give both")
        try:
            options = json.loads(self.judge_options)
        except (ValueError, RecursionError):
            options = None
        if not isinstance(options, dict):
            raise InputError(f"--judge-options {self.judge_options!r}: give a JSON object")
        if self.dtype not in ("", "float32", "bfloat16", "float16"):
            raise InputError(f"--dtype {self.dtype}: choose float32, bfloat16 or float16")
        task = get_task(self.task)
        object.__setattr__(self, "data", self.data or task.data)
        if task.subtasks and self.output_dir == Settings.output_dir:
            object.__setattr__(self, "output_dir", self.output_dir / task.name)
        if not self.model:
            object.__setattr__(self, "model", str(self.trained))

    @property
    def trained(self) -> Path:
        """Where sft.sh leaves the checkpoint of this task and variant."""
        return ROOT / f"code/qwen-vl-finetune/output/qwen2_5vl-{get_task(self.task).trained}-{self.variant}"

    def identity(self, budget: PixelBudget) -> dict:
        """The values that decide the captions, which the batch and the machines do not; a result file is only gone on
        with under the same."""
        deciding = ("task", "seed", "max_new_tokens", "repetition_penalty")
        return {**{name: getattr(self, name) for name in deciding}, **dataclasses.asdict(budget)}


def parse(parser: OneLineParser) -> Settings:
    """Settings from the command line, over those from the environment."""
    lines = _docstrings()
    for field in dataclasses.fields(Settings):
        variable = ENVIRONMENT.get(field.name)
        default = (os.environ.get(variable) if variable else None) or field.default
        if field.name == "variant":
            variable, default = ENVIRONMENT_VARIABLE, chosen_variant(field.default)
        flag = "--" + field.name.replace("_", "-")
        help_text = lines[field.name] + (f" [{variable}]" if variable else "")
        if field.type is bool:
            parser.add_argument(flag, action="store_true", help=help_text)
        else:
            kind = {int: int, float: float, Path: Path, int | None: int, float | None: float}.get(field.type, str)
            default = kind(default) if default is not None else None
            parser.add_argument(flag, type=kind, default=default, help=help_text, metavar=kind.__name__.upper())
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    values = parser.parse_args()
    if values.variant not in VARIANTS:
        raise InputError(f"unknown variant {values.variant!r}: choose one of {', '.join(VARIANTS)}")
    return Settings(**vars(values))


def _docstrings() -> dict[str, str]:
    """The line under each field of Settings, which is its help."""
    body = ast.parse(inspect.getsource(Settings)).body[0].body
    return {
        field.target.id: text.value.value
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
