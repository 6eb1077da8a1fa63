"""The paper's settings: what it trains and evaluates, and what it adds to the defaults of the programs.

This is the one file to read or change. Recipe, decoding, schedule, questions and data bounds are the defaults of
sft.sh, eval.sh and mani_data.py, and are not repeated here. The paper's figures are in code/evaluation/report/paper.py.
"""

from dataclasses import dataclass
from pathlib import Path

from qwen_vl_streaming.timeline.variants import VARIANTS

PAPER_VARIANTS = ("origin", "batch", "interleave", "overlap", "group", "gap")
"""Those of the paper, whatever others there are."""
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Table:
    """A group of rows that the paper prints."""

    task: str
    """description or funqa, as in eval.sh."""
    schedule: str
    """fixed, as in training, or random."""
    sizes: tuple[str, ...]

    @property
    def variants(self) -> list[str]:
        """Offline variants write after the video, so schedules do not affect them."""
        return [name for name in PAPER_VARIANTS if self.schedule == "fixed" or VARIANTS[name].streams]


@dataclass(frozen=True)
class Settings:
    models: dict[str, str]
    """The checkpoint that training starts from, by size."""
    tables: tuple[Table, ...]
    prepare: dict[str, tuple[str, ...]]
    """Flags of mani_data.py by task, in the order of training."""
    train: tuple[str, ...] = ()
    """Flags of sft.sh."""
    evaluate: tuple[str, ...] = ()
    """Flags of eval.sh."""
    demo: bool = False
    """Whether videos, questions and model are created first."""
    videos: tuple[str, ...] = ()
    """Flags of the demo's make_data.py."""


PAPER = Settings(
    models={"3B": "Qwen/Qwen2.5-VL-3B-Instruct", "7B": "Qwen/Qwen2.5-VL-7B-Instruct"},
    # Each FunQA checkpoint is trained on FunQA from the released model, like those for PE-Video.
    tables=(
        Table("description", "fixed", ("3B", "7B")),
        Table("description", "random", ("3B",)),
        Table("funqa", "fixed", ("3B",)),
    ),
    prepare={
        "description": ("--max-samples", "20000"),
        # The paper does not say how many questions it trains on, nor which wordings it scores: as many as of PE-Video,
        # and the protocol of FunQA's own scorer.
        "funqa": ("--max-samples", "20000", "--max-questions", "1", "--max-references", "1"),
    },
    train=("--save_total_limit", "1"),  # a checkpoint with optimizer states takes 12 bytes per parameter
    evaluate=("--bleurt", "lucadiliello/BLEURT-20"),
)
EVERYWHERE = tuple(Table(table.task, table.schedule, tuple(PAPER.models)) for table in PAPER.tables)
"""The same for all sizes, with cells that the paper does not print."""

SBATCH = (
    "--nodes=1 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64",
    "--time=24:00:00 --signal=TERM@300 --requeue --open-mode=append",
)
"""Lines of the sbatch files of training and evaluation."""
REQUEUES = 20
"""How often a job that has reached its time limit goes back into the queue."""
SBATCH_CPU = ("--nodes=1 --ntasks=1 --cpus-per-task=16", "--time=24:00:00")
"""Those of data preparation and the report."""

DEMO_SIZE = "demo"


def demo(model: Path, steps: int | None, videos: dict[str, int | None], device: str) -> Settings:
    """The same tables with the demo's model and videos. `videos` are flags of make_data.py; None is their default."""
    recipe = (ROOT / "code/demo/recipe.txt").read_text(encoding="utf-8").splitlines()
    cpu = device == "cpu"
    return Settings(
        models={DEMO_SIZE: str(model)},
        tables=tuple(Table(table.task, table.schedule, (DEMO_SIZE,)) for table in PAPER.tables),
        prepare={task: ("--tokenizer-model-id", str(model)) for task in PAPER.prepare},
        train=(
            *(word for line in recipe if not line.startswith("#") for word in line.split()),
            *(("--max_steps", str(steps)) if steps else ()),
            *(("--use_cpu", "True") if cpu else ()),
        ),
        # GiB for keys and values, so that steps side by side share a GPU.
        evaluate=("--batch-size", "8", "--workers", "2", "--memory", "2", *(("--device", "cpu") if cpu else ())),
        videos=tuple(word for flag, value in videos.items() if value for word in (flag, str(value))),
        demo=True,
    )
