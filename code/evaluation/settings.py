"""The settings of the evaluation, with the paper's values as defaults. Environment variables set the defaults of some
flags. Knows nothing about models and metrics."""

import argparse
import ast
import dataclasses
import inspect
import itertools
import json
import os
from pathlib import Path

from qwen_vl_streaming.common.errors import InputError, OneLineParser
from qwen_vl_streaming.model.quantization import WEIGHTS
from qwen_vl_streaming.timeline.variants import ENVIRONMENT_VARIABLE, VARIANTS, chosen_variant
from qwen_vl_streaming.video.pixel_budget import PixelBudget
from tasks import get_task

MAX_GIB = 100_000
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
"""Smallest and largest value of numeric settings."""

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
    """Checkpoint folder or hub id. By default the checkpoint that sft.sh trained for the variant, in
    code/qwen-vl-finetune/output: qwen2_5vl-pe-<variant>, or qwen2_5vl-funqa-<variant> for funqa."""
    task: str = "description"
    """description, or funqa, which has six sub-tasks and a question for each row."""
    data: str = ""
    """JSON Lines, as mani_data.py writes them or your own (docs/data.md), a Parquet file or pattern, a folder of
    Dataset.save_to_disk, or hf://datasets/OWNER/NAME[:SPLIT]. By default dataset/test_3_5.jsonl or
    dataset/funqa_test.jsonl."""
    video_root: str = ""
    """Folder of the videos. A video_path that exists neither as given nor under the project's root is looked up in this
    folder, first the path, then the file name alone."""
    output_dir: Path = ROOT / "code/evaluation/output"
    """Folder for captions and scores. By default funqa uses a subfolder."""
    output_file: str = ""
    """Name of the file of captions. By default <variant>_infer.json."""
    schedule: str = ""
    """How many tokens are written per clip (about a second of video). wait-K: K. random-K: 1 to 2K-1, drawn at random.
    random: random-K with the checkpoint's K. model: the model decides, if it was trained to; model-M: with at most M
    tokens per clip. Or a file of counts: JSON {video_id: [k_1, ..., k_N]}, or JSON Lines such as a result file. By
    default as the checkpoint was trained."""
    seed: int = 0
    """Random seed of random schedules."""
    batch_size: int = 32
    """Largest number of videos that a process captions at a time; fewer if they do not fit in memory. In float32 the
    captions do not depend on it."""
    memory: float | None = None
    """GiB for the KV cache of a process. By default most of the free memory of its GPU."""
    processes: int = 0
    """Processes on this node. 0: NPROC_PER_NODE, or else one per GPU, or 1 without a GPU."""
    max_new_tokens: int = 300
    """Largest number of tokens per caption. If the model decides when to speak, end-of-slot tokens do not count: one
    more for each clip but the last."""
    repetition_penalty: float = 1.15
    """Penalty on tokens that occurred before; 1 for none."""
    min_pixels_per_frame: int | None = None
    """Smallest frame after resizing. The defaults of this and the next two are the values used in training."""
    max_pixels_per_frame: int | None = None
    """Largest frame after resizing."""
    max_pixels_per_video: int | None = None
    """Pixels of all sampled frames of a video together."""
    budget: str | None = None
    """How --max-pixels-per-video is divided: by the number of frames of the video (video), or by that of the longest
    supported video (stream), so that frame sizes do not depend on future frames. By default as in training."""
    limit: int | None = None
    """Evaluate only the first N rows of the data."""
    workers: int | None = None
    """Processes per rank that decode videos in advance. By default 2, and up to 8 with a GPU."""
    device: str = ""
    """cuda, cuda:N or cpu. By default cuda if a GPU is available."""
    dtype: str = ""
    """float32, bfloat16 or float16. By default bfloat16 on cuda and float32 on the CPU."""
    weights: str = ""
    """int8 or fp8: quantize the linear layers of the language model when it is loaded, to half their memory. By default
    as in the checkpoint."""
    force: bool = False
    """Evaluate a checkpoint that was trained as another variant or with another position rule."""
    score_only: str = ""
    """Only score the captions in this file, JSON Lines with video_id, annotation and result."""
    times: str = ""
    """Measure when captions say what happens, with the references with times in this file: JSON Lines of video_id and
    segments or events (docs/evaluation.md). By default with the segments of the data's rows, if they have any."""
    bleurt: str = ""
    """Compute BLEURT with this PyTorch checkpoint, a folder or hub id such as lucadiliello/BLEURT-20."""
    judge_url: str = ""
    """Compute Fluency with an LLM judge at this base URL of an OpenAI-compatible endpoint, such as
    http://localhost:8000/v1. If it needs a key, set OPENAI_API_KEY."""
    judge_model: str = ""
    """Model name of the judge at that endpoint."""
    judge_workers: int = 8
    """Parallel requests to the judge."""
    judge_options: str = '{"temperature": 0}'
    """Additional fields of each request to the judge, as a JSON object."""

    def __post_init__(self):
        for name in LIMITS:
            check_limit(name, getattr(self, name))
        if self.output_file and not self.output_file.endswith(".json"):
            raise InputError(
                f"--output-file {self.output_file}: give a name that ends in .json; the other files are named after it"
            )
        if self.memory is not None and not 0 < self.memory <= MAX_GIB:
            raise InputError(f"--memory {self.memory}: give a value in GiB above 0 and up to {MAX_GIB}")
        if bool(self.judge_url) != bool(self.judge_model):
            raise InputError("--judge-url and --judge-model go together: give both")
        read_judge_options(self.judge_options)
        if self.dtype not in ("", "float32", "bfloat16", "float16"):
            raise InputError(f"--dtype {self.dtype}: choose float32, bfloat16 or float16")
        if self.weights and self.weights not in WEIGHTS:
            raise InputError(f"--weights {self.weights}: choose {' or '.join(WEIGHTS)}")
        task = get_task(self.task)
        object.__setattr__(self, "data", self.data or task.data)
        if task.subtasks and self.output_dir == Settings.output_dir:
            object.__setattr__(self, "output_dir", self.output_dir / task.name)
        if not self.model:
            object.__setattr__(self, "model", str(self.trained))

    @property
    def trained(self) -> Path:
        """The folder in which sft.sh saves the checkpoint of this task and variant."""
        return ROOT / f"code/qwen-vl-finetune/output/qwen2_5vl-{get_task(self.task).trained}-{self.variant}"

    def identity(self, budget: PixelBudget) -> dict:
        """The values that decide the captions. A result file is only resumed with the same ones. Batch size and number
        of processes are not among them."""
        deciding = ("task", "seed", "max_new_tokens", "repetition_penalty")
        return {**{name: getattr(self, name) for name in deciding}, **dataclasses.asdict(budget)}


def check_limit(name: str, value: float | None) -> None:
    """Raise InputError if the `value` of a numeric setting is not within LIMITS."""
    least, most = LIMITS[name]
    if value is not None and not least <= value <= most:
        raise InputError(f"--{name.replace('_', '-')} {str(value)[:20]}: give a number from {least:g} to {most:.10g}")


def read_judge_options(text: str) -> dict:
    """The value of --judge-options. Raises InputError."""
    try:
        options = json.loads(text)
    except (ValueError, RecursionError):
        options = None
    if not isinstance(options, dict):
        raise InputError(f"--judge-options {text!r}: give a JSON object")
    return options


def parse(parser: OneLineParser) -> Settings:
    """Settings from the command line; environment variables set the defaults."""
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
    """The docstring of each field of Settings, which is the help of its flag."""
    body = ast.parse(inspect.getsource(Settings)).body[0].body
    return {
        field.target.id: text.value.value
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
