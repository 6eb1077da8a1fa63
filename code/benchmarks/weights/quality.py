"""How captions change with 8-bit weights: metrics, tokens, and how close the scores are where tokens differ.

Captions are written and scored by eval.sh, once for each precision. With other weights a caption goes its own way after
the first token that differs, so the models are also compared over the same tokens, those of the model as it is, in one
full pass (teacher forcing).
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.paths import find_video
from qwen_vl_streaming.model.loading import load_model
from qwen_vl_streaming.model.prompts import QUESTIONS, Template, clip_pixels, load_processor, make_template
from qwen_vl_streaming.model.trained import end_of_slot
from qwen_vl_streaming.stream import PENALTY, penalize
from qwen_vl_streaming.timeline.attention import dense_mask
from qwen_vl_streaming.timeline.positions import timeline_positions
from qwen_vl_streaming.timeline.timeline import CLIP, NOTHING, Timeline, make_timeline
from qwen_vl_streaming.timeline.variants import VARIANTS
from qwen_vl_streaming.video.frames import read_video
from qwen_vl_streaming.video.pixel_budget import PixelBudget
from torch import Tensor

ROOT = Path(__file__).resolve().parents[3]
METRICS = ("CIDEr", "BLEU-1", "BLEU-4", "METEOR", "ROUGE-L")
FORCED = 30
"""Videos of each model that are compared over the same tokens."""


@dataclass(frozen=True)
class Forced:
    """A video and the tokens that the model as it is wrote for it."""

    timeline: Timeline
    template: Template
    tokens: list[int]
    pixels: Tensor


@torch.no_grad()
def forced_scores(model, case: Forced) -> Tensor:
    """(A, V) scores of the tokens, after the penalty, in one full pass."""
    rows, template, device = case.timeline.rows, case.template, model.device
    clip = (rows.part == CLIP)[None].to(device)
    logits = model(
        input_ids=template.ids(rows, case.tokens)[None].to(device),
        position_ids=timeline_positions(case.timeline)[:, None].to(device),
        attention_mask=dense_mask(rows.visual[None], rows.text[None], case.timeline.variant.parallel).to(device),
        visual_tokens=model.perceive(case.pixels, case.timeline.layout.grid).flatten(0, 1),
        visual_rows=clip,
        score=(case.timeline.produces != NOTHING)[None].to(device),
    ).logits.float()
    produced = case.timeline.produces[case.timeline.produces != NOTHING]
    logits = logits[produced.argsort().to(device)]
    seen = torch.zeros_like(logits, dtype=torch.bool)
    seen[:, template.penalized] = True
    for index, token in enumerate(case.tokens[:-1], 1):
        seen[index:, token] = True
    if template.end_of_slot is not None:
        seen[:, template.end_of_slot] = False
    return penalize(logits, seen, PENALTY)


def compare_forced(plain: Sequence[Tensor], other: Sequence[Tensor]) -> dict:
    """Over the same tokens: the share for which both models choose the same, and by how much the scores of the model as
    it is differ between the two choices where they do not, beside its usual lead over the second best."""
    same, margins, leads = 0, [], []
    for a, b in zip(plain, other, strict=True):
        mine, theirs = a.argmax(-1), b.argmax(-1)
        same += int((mine == theirs).sum())
        best = a.topk(2).values
        leads += (best[:, 0] - best[:, 1]).tolist()
        margins += (best[:, 0] - a.gather(1, theirs[:, None])[:, 0])[mine != theirs].tolist()
    return {
        "tokens": len(leads),
        "same": same / max(len(leads), 1),
        "margins": margins,
        "largest_margin": max(margins, default=0.0),
        "median_lead": median(leads) if leads else 0.0,
    }


def compare_written(plain: dict[str, list[int]], other: dict[str, list[int]]) -> dict:
    """Over whole captions: the share of equal ones, and of tokens that are equal at their place."""
    pairs = [(plain[key], other[key]) for key in plain.keys() & other.keys()]
    longest = sum(max(len(a), len(b)) for a, b in pairs)
    equal = sum(x == y for a, b in pairs for x, y in zip(a, b, strict=False))
    return {
        "videos": len(pairs),
        "captions_same": sum(a == b for a, b in pairs) / max(len(pairs), 1),
        "tokens_same": equal / max(longest, 1),
    }


def evaluate(model: Path, variant: str, kind: str | None, data: Path, folder: Path, flags: Sequence[str]) -> dict:
    """Scores and rows of an evaluation with weights of `kind`. Rows that exist are kept."""
    command = [sys.executable, ROOT / "code/evaluation/eval.py", "--model", model, "--variant", variant, "--data", data]
    command += ["--output-dir", folder, *flags, *(["--weights", kind] if kind else [])]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it failed"])[-1]
        raise InputError(f"evaluation of {model} with weights {kind or 'as they are'}: {last.removeprefix('error: ')}")
    scores = json.loads((folder / f"{variant}_scores.json").read_text())
    rows = [json.loads(line) for line in (folder / f"{variant}_infer.json").read_text().splitlines()]
    return {"scores": scores, "rows": {row["video_id"]: row for row in rows}}


def forced_cases(path: Path, model, variant: str, rows: dict[str, dict], data: Path, root: Path | None) -> list[Forced]:
    """The first FORCED videos that were captioned."""
    processor, cases = load_processor(str(path)), []
    asked = {row["video_id"]: row for row in map(json.loads, data.read_text().splitlines())}
    budget = PixelBudget.trained(model.config)
    for video_id, row in list(rows.items())[:FORCED]:
        video = read_video(find_video(asked[video_id]["video_path"], ROOT, root), budget=budget)
        pixels, grid = clip_pixels(processor, video.frames)
        template = make_template(processor, asked[video_id].get("question") or QUESTIONS[-1], end_of_slot(model.config))
        steps = model.config.vision_config.tokens_per_second * video.seconds_per_clip
        timeline = make_timeline(VARIANTS[variant], template.layout(grid, steps), row["schedule"])
        cases.append(Forced(timeline, template, row["tokens"], pixels))
    return cases


def measure_quality(
    models: list[Path], data: Path, root: Path | None, kinds: list[str], device: str, output: Path, flags: Sequence[str]
) -> list[dict]:
    """A row for each model and kind, printed as they are measured. `root` is a folder of the videos, `flags` are those
    of eval.sh."""
    flags = [*flags, "--device", device, *(["--video-root", str(root)] if root else [])]
    table, dtype = [], torch.bfloat16 if device.startswith("cuda") else torch.float32
    print(
        f"{'variant':<11}{'weights':<9}" + "".join(f"{name:>9}" for name in METRICS) + f"{'largest change':>16}"
        f"{'captions =':>12}{'tokens =':>10}{'forced =':>10}{'margin':>8}{'lead':>7}",
        flush=True,
    )
    for path in models:
        variant = json.loads((path / "config.json").read_text()).get("streaming_variant", "group")
        results, forced = {}, {}
        for kind in (None, *kinds):
            name = kind or "as-is"
            results[kind] = evaluate(path, variant, kind, data, output / path.name / name, flags)
            model = load_model(path, "sdpa", dtype, kind, device).to(device).eval()
            if kind is None:
                cases = forced_cases(path, model, variant, results[None]["rows"], data, root)
            forced[kind] = [forced_scores(model, case).cpu() for case in cases]
            scores = results[kind]["scores"]
            line = f"{variant:<11}{name:<9}" + "".join(f"{scores[metric]:>9.2f}" for metric in METRICS)
            row = {"model": path.name, "variant": variant, "weights": kind, "scores": scores}
            if kind is not None:
                base = results[None]["scores"]
                row["change"] = max((abs(scores[m] / base[m] - 1) for m in METRICS if base[m]), default=0.0)
                tokens = [{key: each["tokens"] for key, each in results[of]["rows"].items()} for of in (None, kind)]
                row |= compare_written(*tokens) | {"forced": (found := compare_forced(forced[None], forced[kind]))}
                line += (
                    f"{row['change']:>16.2%}{row['captions_same']:>12.1%}{row['tokens_same']:>10.1%}"
                    f"{found['same']:>10.2%}{found['largest_margin']:>8.3f}{found['median_lead']:>7.2f}"
                )
            table.append(row)
            print(line, flush=True)
    return table


def measure_agreement(load, kinds: list[str], cases: list[Forced]) -> list[dict]:
    """Of a model with random weights, which `load` makes with weights of a kind: scores over the same tokens, and their
    largest error relative to their spread."""
    plain = [forced_scores(load(None), case).cpu() for case in cases]
    table = []
    for kind in kinds:
        model = load(kind)
        scores = [forced_scores(model, case).cpu() for case in cases]
        found = compare_forced(plain, scores)
        a, b = torch.cat(plain), torch.cat(scores)
        found["error"] = float(((a - b).norm(dim=-1) / a.std(-1, keepdim=False) / a.shape[-1] ** 0.5).mean())
        table.append({"weights": kind, **found})
        print(
            f"{kind}: {found['tokens']} tokens, {found['same']:.2%} the same, largest margin "
            f"{found['largest_margin']:.3f} (median lead {found['median_lead']:.3f}), error of a score "
            f"{found['error']:.4f} of their spread",
            flush=True,
        )
        del model
    return table
