"""Every setting of the evaluation, with the paper's values as defaults. Environment variables give the defaults of
the flags that bear their names. Knows nothing about models and metrics."""

import argparse
import ast
import dataclasses
import inspect
import itertools
import os
from pathlib import Path

from qwen_vl_streaming.errors import InputError, OneLineParser
from qwen_vl_streaming.variants import ENVIRONMENT_VARIABLE, VARIANTS, chosen_variant
from qwen_vl_streaming.video import PixelBudget

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
    """A checkpoint folder or hub id; by default what sft.sh has trained for the variant."""
    data: str = "dataset/test_3_5.jsonl"
    """A JSONL that mani_data.py has made."""
    video_root: str = ""
    """Folder that the rows' video_path starts from; by default the project's root."""
    output_dir: Path = ROOT / "code/evaluation/output"
    """Folder for captions and scores."""
    output_file: str = ""
    """Name of the file of captions, by default <variant>_infer.json."""
    schedule: str = ""
    """wait-K or random-K; by default wait-K with the K of the checkpoint."""
    seed: int = 0
    """For random schedules."""
    batch_size: int = 8
    """Videos watched at once."""
    max_new_tokens: int = 300
    """At most this many answer tokens a video."""
    repetition_penalty: float = 1.15
    """1 turns it off."""
    min_pixels_per_frame: int = PixelBudget.min_pixels_per_frame
    """Smallest frame after resizing."""
    max_pixels_per_frame: int = PixelBudget.max_pixels_per_frame
    """Largest frame after resizing."""
    max_pixels_per_video: int = PixelBudget.max_pixels_per_video
    """Shared over the sampled frames of a video."""
    limit: int | None = None
    """Only the first videos of the data."""
    workers: int = 2
    """Processes that decode videos ahead of the model."""
    device: str = ""
    """cuda or cpu; by default cuda where there is one."""
    dtype: str = ""
    """float32, bfloat16 or float16; by default bfloat16 on cuda, float32 on the CPU."""
    force: bool = False
    """Evaluate a checkpoint under another variant than it was trained for."""
    score_only: str = ""
    """Only score the captions in this file: JSON Lines with video_id, annotation and result."""

    def __post_init__(self):
        if self.batch_size < 1 or self.max_new_tokens < 1 or self.repetition_penalty <= 0:
            raise InputError("--batch-size, --max-new-tokens and --repetition-penalty must be above 0")
        if self.dtype not in ("", "float32", "bfloat16", "float16"):
            raise InputError(f"--dtype {self.dtype}: choose float32, bfloat16 or float16")
        if not self.model:
            trained = ROOT / f"code/qwen-vl-finetune/output/qwen2_5vl-pe-{self.variant}"
            object.__setattr__(self, "model", str(trained))

    @property
    def budget(self) -> PixelBudget:
        return PixelBudget(self.min_pixels_per_frame, self.max_pixels_per_frame, self.max_pixels_per_video)

    def identity(self) -> dict:
        """What decides the captions, which the batch does not; a result file is only gone on with under the same."""
        loose = {
            "variant",
            "schedule",
            "batch_size",
            "force",
            "output_dir",
            "output_file",
            "limit",
            "workers",
            "device",
            "score_only",
        }
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in loose}


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
            kind = {int: int, float: float, Path: Path, int | None: int}.get(field.type, str)
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
