"""A copy of the project with its own data and model cache: a small PE-Video in the published layout, and a small model
under the hub ids that the READMEs name."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from program_server import with_server

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct")
MADE_HERE = shutil.ignore_patterns("__pycache__", "*.egg-info", "output")
COMMIT = "0" * 40


class Copy:
    def __init__(self, folder: Path, checkpoint: Path, videos: Path):
        """`videos` is a folder with <id>.mp4 and <id>.json. The first six are for training, the others for testing."""
        self.root, self.cache = folder / "project", folder / "hub"
        self.root.mkdir()
        for name in ("README.md", "demo.sh", "eval.sh", "mani_data.py", "paper.sh", "requirements.txt"):
            shutil.copy(ROOT / name, self.root)
        shutil.copytree(ROOT / "code", self.root / "code", ignore=MADE_HERE)
        (self.root / ".venv").symlink_to(sys.prefix)
        for name in MODELS:
            there = self.cache / f"models--{name.replace('/', '--')}"
            shutil.copytree(checkpoint, there / "snapshots" / COMMIT)
            (there / "refs").mkdir()
            (there / "refs/main").write_text(COMMIT)
        data = self.root / "dataset/PE-Video"
        for number, file in enumerate(sorted(videos.glob("*.json"))):
            split = "train" if number < 6 else "test"
            for source, folder in ((file, data / split), (file.with_suffix(".mp4"), data / "videos" / split)):
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, folder)

    def run(self, script: str, folder: str = "", **environment: str) -> subprocess.CompletedProcess:
        """Run `script` in bash, in `folder` of the project and without access to the hub."""
        mine = {name: value for name, value in os.environ.items() if not name.startswith(("QWEN2_5_VL", "HF_"))}
        mine |= {
            "PATH": f"{self.root / '.venv/bin'}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(str(self.root / "code" / name) for name in ("qwen-vl-utils/src", "data")),
            "HF_HUB_CACHE": str(self.cache),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",  # more threads do not speed up small models
        }
        return subprocess.run(
            ["bash", "-euc", script],
            cwd=self.root / folder,
            env=with_server({**mine, **environment}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
