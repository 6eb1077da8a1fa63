"""Writes released_positions.json: positions as transformers computed them when Qwen2.5-VL was released.

    python tests/released_positions.py 4.49.0 5.2.0

Runs each version of transformers in a new environment of its own, so it needs pip's access to a package index. From
4.50 to 5.23 transformers rounds the seconds of a clip down to a whole number before it multiplies them
(huggingface/transformers#48669), so only 4.49.0 has cases with fractional seconds.
"""

import json
import random
import subprocess
import sys
import tempfile
import venv
from importlib.metadata import version
from pathlib import Path

FIXTURE = Path(__file__).with_suffix(".json")
VISION_START, VISION_END, VIDEO = 188, 187, 190
SECONDS = (1.0, 2.0, 3.0)
FRACTIONS = (0.5, 1.3333334, 2 / 1.87)


def cases() -> list[dict]:
    """The positions that the transformers of this environment computes, for videos of random size and length."""
    import torch
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as stock

    config = Qwen2_5_VLConfig(
        video_token_id=VIDEO, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END, image_token_id=189
    )
    config.vision_config.tokens_per_second = 2
    released = version("transformers") == "4.49.0"
    owner = stock.Qwen2_5_VLForConditionalGeneration if released else stock.Qwen2_5_VLModel
    rotary = object.__new__(owner)
    torch.nn.Module.__init__(rotary)
    rotary.config = config
    draw, found = random.Random(1), []
    for seconds in (*SECONDS, *FRACTIONS) if released else SECONDS:
        for clips in (1, 2, draw.randint(3, 12), 30):
            prompt, text = draw.randint(2, 6), draw.randint(4, 8)
            grid = draw.randint(1, 3), draw.randint(1, 4)
            ids = [1] * (prompt - 1) + [VISION_START] + [VIDEO] * (clips * grid[0] * grid[1]) + [VISION_END] * text
            positions, _ = rotary.get_rope_index(
                torch.tensor([ids]),
                video_grid_thw=torch.tensor([[clips, grid[0] * 2, grid[1] * 2]]),
                second_per_grid_ts=torch.tensor([seconds]),
            )
            sizes = {"prompt": prompt, "clips": clips, "grid": grid, "seconds": seconds, "text": text}
            found.append({"transformers": version("transformers"), **sizes, "positions": positions[:, 0].tolist()})
    return found


def main() -> None:
    if sys.argv[1:] == ["here"]:
        json.dump(cases(), sys.stdout)
        return
    found = []
    for wanted in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            venv.create(folder, with_pip=True)
            python = str(Path(folder, "bin/python"))
            install = [python, "-m", "pip", "install", "-q", "torch", "torchvision", f"transformers=={wanted}"]
            subprocess.run(install, check=True)
            made = subprocess.run([python, __file__, "here"], check=True, capture_output=True, text=True).stdout
            found += json.loads(made)
    FIXTURE.write_text("[\n" + ",\n".join(json.dumps(case, separators=(",", ":")) for case in found) + "\n]\n")


if __name__ == "__main__":
    main()
