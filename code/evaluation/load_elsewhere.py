"""Check that a checkpoint loads with other versions of transformers and gives the same results.

    python code/evaluation/load_elsewhere.py CHECKPOINT --python /path/to/other/venv/bin/python [...]

In this environment and in each of the others, stock transformers loads the model, processor and tokenizer and computes
the logits for one question about a picture, given as an image and as a video clip. Texts, token ids and settings must
be equal, and pixels and logits in float32 must agree within --tolerance. The exit status is 1 if they do not. The other
environments need torch, transformers 4.49 or newer, and pillow.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
import torch
import transformers

ANSWER = "--answer"
QUESTION = "What actions can be observed in the video?"


@torch.no_grad()
def answers(checkpoint: str) -> tuple[dict, dict[str, numpy.ndarray]]:
    """The results of this environment for `checkpoint`: values that must be equal, and arrays that must be close."""
    from PIL import Image

    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    processor = transformers.AutoProcessor.from_pretrained(checkpoint, trust_remote_code=False)
    model, report = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        checkpoint, output_loading_info=True, trust_remote_code=False
    )
    loaded_as, model = str(model.dtype), model.float().eval()
    # The smallest size that is not resized: the slow and the fast image processor resize differently.
    pixels = numpy.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=numpy.uint8)
    content = [{"type": "text", "text": QUESTION}, {"type": "image"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text], images=[Image.fromarray(pixels)], return_tensors="pt")
    ids, patches, grid = inputs["input_ids"], inputs["pixel_values"], inputs["image_grid_thw"]
    image = model(**inputs)
    # A clip of two equal frames has the same patches as the picture. Positions are passed in: after a video,
    # transformers 5.3 to 5.23 number them differently from other versions.
    clip = torch.where(ids == model.config.image_token_id, model.config.video_token_id, ids)
    positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
    video = model(
        input_ids=clip,
        pixel_values_videos=patches,
        video_grid_thw=grid,
        position_ids=positions,
        attention_mask=torch.ones_like(ids),
    )
    equal = {
        "missing weights": sorted(report["missing_keys"]),
        "unexpected weights": sorted(report["unexpected_keys"]),
        "chat text": text,
        "token ids": ids.tolist(),
        "tokenizer's ids": tokenizer(text + " Été 2024 🙂").input_ids,
        "vocabulary": len(tokenizer),
        "end of turn": [tokenizer.eos_token, tokenizer.pad_token],
        "generation end ids": model.generation_config.eos_token_id,
        "grid": grid.tolist(),
        "tied": model.config.tie_word_embeddings,
        "streaming_variant": getattr(model.config, "streaming_variant", None),
    }
    close = {"pixels": patches.numpy(), "image logits": image.logits.numpy(), "video logits": video.logits.numpy()}
    return {"transformers": transformers.__version__, "dtype": loaded_as, "equal": equal}, close


def elsewhere(checkpoint: str, python: str) -> tuple[dict, dict[str, numpy.ndarray]]:
    """`answers` of another environment. Raises RuntimeError with the last line of its stderr if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [python, __file__, ANSWER, checkpoint, folder]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise RuntimeError(f"cannot be run ({error.strerror})") from error
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no output")
        equal = json.loads((Path(folder) / "equal.json").read_text())
        with numpy.load(Path(folder) / "close.npz") as arrays:
            return equal, dict(arrays)


def differences(ours: tuple[dict, dict], theirs: tuple[dict, dict], tolerance: float) -> list[str]:
    """A line for each difference between two environments."""
    found = [
        f"{name}: {theirs[0]['equal'].get(name)!r:.80}, here {value!r:.80}"
        for name, value in ours[0]["equal"].items()
        if theirs[0]["equal"].get(name) != value
    ]
    for name, array in ours[1].items():
        other = theirs[1][name]
        if array.shape != other.shape:
            found.append(f"{name}: shape {other.shape}, here {array.shape}")
        elif (apart := float(abs(array - other).max())) > tolerance:
            found.append(f"{name}: differ by {apart:.2g}")
    return found


def main() -> None:
    """Runs in this environment. The others lack the library and only compute their `answers`."""
    from qwen_vl_streaming.common.errors import InputError, OneLineParser, first_line
    from qwen_vl_streaming.common.paths import PROJECT, find_model
    from qwen_vl_streaming.common.progress import quiet_libraries
    from qwen_vl_streaming.model.hub import model_folder

    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="checkpoint folder written by sft.sh or qwenvl.merge")
    parser.add_argument("--python", nargs="+", default=[], help="Python interpreters of the other environments")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest difference (default 1e-3)")
    arguments = parser.parse_args()
    quiet_libraries()
    checkpoint = str(model_folder(find_model(arguments.checkpoint, PROJECT)))
    try:
        values, arrays = answers(checkpoint)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        first = first_line(error)
        raise InputError(f"{checkpoint} cannot be loaded here ({first}): give a complete checkpoint") from error
    print(f"here, transformers {values['transformers']}: {len(arrays['image logits'][0])} tokens")
    failed = 0
    for python in arguments.python:
        try:
            theirs = elsewhere(checkpoint, python)
        except RuntimeError as error:
            print(f"{python}: FAILED: {error}")
            failed += 1
            continue
        if wrong := differences((values, arrays), theirs, arguments.tolerance):
            result = f"DIFFERS: {'; '.join(wrong)}"
        else:
            apart = max(float(abs(arrays[name] - theirs[1][name]).max()) for name in ("image logits", "video logits"))
            result = f"same results, logits differ by at most {apart:.1e}"
        print(f"transformers {theirs[0]['transformers']}: {result}")
        failed += bool(wrong)
    sys.exit(1 if failed else 0)


def answer(checkpoint: str, folder: str) -> None:
    """Write this environment's `answers` to `folder`."""
    values, arrays = answers(checkpoint)
    (Path(folder) / "equal.json").write_text(json.dumps(values))
    numpy.savez(Path(folder) / "close.npz", **arrays)


if __name__ == "__main__":
    if sys.argv[1:2] == [ANSWER]:
        answer(*sys.argv[2:])
    else:
        from qwen_vl_streaming.common.errors import run

        run(main)
