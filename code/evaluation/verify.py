"""Verify every token of a result file with one teacher-forced forward pass of the stock model.

    python code/evaluation/verify.py code/evaluation/output/group_infer.json

Settings, dtype and the precision of the weights are read from the .args.json beside the file. Positions and mask come
from `explain` and logits from the Qwen2.5-VL in transformers, so none of the streaming code is used. A token is correct
if it is the arg-max after the repetition penalty. A token whose score is lower by no more than the rounding error of
the dtype (1e-4 in float32) is reported as a tie, with its margin, and not counted as an error. The penalty does not
apply to the end-of-slot token of a model that decides when to speak. The caption must also match its tokens, the length
and times of its video and the named schedule, and must be complete. The exit status is 1 if any check fails.
"""

import argparse
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checked_results import load_checked, source_rows
from identity import ARGUMENTS
from qwen_vl_streaming.common.errors import InputError, OneLineParser, run
from qwen_vl_streaming.common.paths import find_model, find_path, find_video, find_video_root
from qwen_vl_streaming.common.progress import Progress, quiet_libraries
from qwen_vl_streaming.common.ties import tie_margin
from qwen_vl_streaming.common.video_part import video_part
from qwen_vl_streaming.devices import DEVICE_HELP, choose_device, look
from qwen_vl_streaming.explain.cli import as_dict
from qwen_vl_streaming.model.checkpoint import of_checkpoint
from qwen_vl_streaming.model.hub import model_folder
from qwen_vl_streaming.model.loading import load_config
from qwen_vl_streaming.model.prompts import QUESTIONS, Template, clip_pixels, load_processor, make_template, spoken
from qwen_vl_streaming.model.quantization import WEIGHTS, check_precision, quantize_model
from qwen_vl_streaming.model.trained import end_of_slot
from qwen_vl_streaming.timeline.positions import RULE
from qwen_vl_streaming.timeline.timeline import (
    SCHEDULE_NAME,
    Timeline,
    make_schedule,
    make_timeline,
    model_schedule_fault,
    model_schedule_most,
)
from qwen_vl_streaming.timeline.variants import Variant, get_variant
from qwen_vl_streaming.video.frames import choose_reader, read_video
from qwen_vl_streaming.video.pixel_budget import PixelBudget
from settings import ROOT
from transformers import Qwen2_5_VLForConditionalGeneration, RepetitionPenaltyLogitsProcessor

DTYPES = ("float32", "bfloat16", "float16")
FIELDS = {
    **ARGUMENTS,
    "dtype": str,
    "video_root": str,
    "min_pixels_per_frame": int,
    "max_pixels_per_frame": int,
    "max_pixels_per_video": int,
    "repetition_penalty": (int, float),
    "max_new_tokens": int,
    "seed": int,
}
"""Arguments that verification needs."""


def stock_logits(model, timeline: Timeline, template: Template, tokens: list[int], pixels, grid) -> torch.Tensor:
    """Logits (A, V) for each answer token, by one pass of the stock model with `explain`'s mask and positions."""
    explained = as_dict(timeline)
    source = {"prompt": template.prompt, "tail": template.tail, "header": template.header, "answer": tokens}
    ids = [template.video if t["part"] == "clip" else source[t["part"]][t["index"]] for t in explained["tokens"]]
    mask = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    for query, keys in enumerate(explained["attends"]):
        mask[query, keys] = True
    merge = model.config.vision_config.spatial_merge_size
    ids = torch.tensor([ids], device=model.device)
    grid_thw = torch.tensor([[len(pixels), grid[0] * merge, grid[1] * merge]], device=model.device)
    visual_tokens = model.get_video_features(pixels.flatten(0, 1).to(model.device), grid_thw).pooler_output
    embeds = model.get_input_embeddings()(ids)
    # Selected by part, not by id: an untrained model may generate the id of the visual placeholder.
    embeds[0, [t["part"] == "clip" for t in explained["tokens"]]] = torch.cat(visual_tokens)
    hidden = model.model.language_model(
        inputs_embeds=embeds,
        position_ids=torch.tensor([t["position"] for t in explained["tokens"]], device=model.device).T[:, None],
        attention_mask={"full_attention": mask[None, None].to(model.device)},
        use_cache=False,
    ).last_hidden_state[0]
    row_of = {answer: row for row, answer in enumerate(explained["produces"]) if answer is not None}
    return model.lm_head(hidden[[row_of[answer] for answer in range(len(tokens))]]).float().cpu()


@dataclass(frozen=True)
class Mismatch:
    """A token that is not the arg-max after the penalty."""

    index: int
    margin: float
    """The arg-max's score minus its own."""
    tie: bool
    """The margin is within the rounding error."""


def find_mismatches(
    logits: torch.Tensor, template: Template, tokens: list[int], penalty: float, dtype: torch.dtype
) -> list[Mismatch]:
    """The tokens that are not the arg-max of their `logits` (A, V), which were computed in `dtype`."""
    punish = RepetitionPenaltyLogitsProcessor(penalty)
    mismatches = []
    for j, token in enumerate(tokens):
        punished = [*template.penalized, *spoken(tokens[:j], template.end_of_slot)]
        scores = punish(torch.tensor([punished]), logits[j : j + 1].clone())[0]
        if (margin := float(scores.max() - scores[token])) > 0:
            mismatches.append(Mismatch(j, margin, margin <= tie_margin(scores, dtype)))
    return mismatches


def check_caption(row: dict, tokenizer, template: Template, clips: int, most: int) -> list[str]:
    """What is wrong with a row, for a video of `clips` clips and an answer of at `most` so many tokens."""
    tokens, end_of_slot, found = row["tokens"], template.end_of_slot, []
    ends = template.ends(tokens, row["slots"], row["clips"])
    if tokenizer.decode(spoken(tokens, end_of_slot), skip_special_tokens=True).strip() != row["result"].strip():
        found.append("the caption is not the text of its tokens")
    if row.get("end_of_slot") != end_of_slot:
        found.append(f"the row's end-of-slot token is {row.get('end_of_slot')}, the checkpoint's {end_of_slot}")
    if row["clips"] != clips:
        found.append(f"the row has {row['clips']} clips, the video {clips}")
    if (ends and ends[0] < len(tokens) - 1) or len(tokens) > most:
        found.append("the tokens continue after the end of the answer")
    elif len(tokens) < most and not ends:
        found.append("the tokens stop before the end of the answer")
    return found


def most_tokens(made: dict, clips: int) -> int:
    """The most tokens of an answer about a video of `clips` clips. With a model's own schedule, one more for each slot
    before the last, whose end-of-slot token says nothing."""
    own = model_schedule_most(made["schedule"]) is not None
    return made["max_new_tokens"] + (clips - 1 if own else 0)


def check_schedule(row: dict, made: dict, variant: Variant) -> list[str]:
    """What is wrong if `made` names a schedule and the row's differs. Counts from a file are not known here."""
    if (most := model_schedule_most(made["schedule"])) is not None:
        fault = model_schedule_fault(row["tokens"], row["schedule"], most, row.get("end_of_slot"))
        return [f"{made['schedule']}: {fault}"] if fault else []
    if not SCHEDULE_NAME.fullmatch(made["schedule"]):
        return []
    asked = make_schedule(made["schedule"], variant, row["clips"], f"{made['seed']} {row['video_id']}")
    counts = list(asked.counts(len(row["tokens"])))
    return [] if row["schedule"] == counts else [f"{made['schedule']} gives {counts}, the row has {row['schedule']}"]


def check_times(row: dict, source: dict, seconds_per_clip: float) -> list[str]:
    """What is wrong with the times in a row, which its timeliness is computed from: the duration of a clip, and the
    segments, if it has any, of the data's row `source`."""
    found = []
    clip = row.get("seconds_per_clip", seconds_per_clip)
    if not isinstance(clip, float | int) or not math.isclose(clip, seconds_per_clip):
        found.append(f"the row has clips of {str(clip)[:20]} s, the video {seconds_per_clip:g} s")
    if "segments" in row and row["segments"] != source.get("segments"):
        found.append("the segments are not those of the data")
    return found


def check_made(path: Path, made: dict, variant: Variant) -> None:
    """Raise InputError if the result file at `path` was made in a way that cannot be verified."""
    dtype, weights, penalty = made["dtype"], made.get("weights"), made["repetition_penalty"]
    if not 0 < penalty <= sys.float_info.max:
        how = "with a repetition penalty that is not above 0"
    elif variant.after_video and made.get("position_rule") != RULE:
        how = "with another rule for the positions after a video"
    elif dtype not in DTYPES:
        how = f"in {dtype!r}, not one of {', '.join(DTYPES)}"
    elif weights not in (None, *WEIGHTS):
        how = f"with weights in {weights!r}, not {' or '.join(WEIGHTS)}"
    else:
        return
    raise InputError(f"{path} was made {how}: run eval.sh again")


def load_stock(checkpoint: str, dtype: torch.dtype, weights: str | None, device: str):
    """The model of transformers, with its linear layers in `weights`, if not None."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        model_folder(checkpoint), dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
    )
    if weights is not None:
        quantize_model(model, weights, device)
    return model.to(device).eval()


@dataclass(frozen=True)
class Verifier:
    """The stock model, and how the result file was made."""

    made: dict
    variant: Variant
    budget: PixelBudget
    video_root: Path | None
    processor: Any
    model: Any

    def verify(self, row: dict, source: dict) -> tuple[list[str], list[Mismatch] | None]:
        """What is wrong with a row, made from the data's row `source`, and with its tokens; None if these cannot be
        verified. Raises InputError if the video cannot be read."""
        question = source.get("question") or QUESTIONS[-1]
        template = make_template(self.processor, question, end_of_slot(self.model.config))
        path = find_video(source["video_path"], ROOT, self.video_root)
        video = read_video(path, part=video_part(source), budget=self.budget, reader=choose_reader(os.environ))
        pixels, grid = clip_pixels(self.processor, video.frames)
        most = most_tokens(self.made, len(pixels))
        faults = check_caption(row, self.processor.tokenizer, template, len(pixels), most)
        faults += check_schedule(row, self.made, self.variant)
        faults += check_times(row, source, video.seconds_per_clip)
        if len(pixels) != row["clips"] or not row["tokens"]:
            return faults, None
        steps = self.model.config.vision_config.tokens_per_second * video.seconds_per_clip
        timeline = make_timeline(self.variant, template.layout(grid, steps), row["schedule"])
        with torch.no_grad():
            logits = stock_logits(self.model, timeline, template, row["tokens"], pixels, grid)
        penalty, dtype = self.made["repetition_penalty"], getattr(torch, self.made["dtype"])
        return faults, find_mismatches(logits, template, row["tokens"], penalty, dtype)


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="a result file, <variant>_infer.json")
    parser.add_argument("--limit", type=int, help="verify only the first N rows")
    parser.add_argument("--device", default="", help=DEVICE_HELP)
    arguments = parser.parse_args()
    quiet_libraries()
    device, line = choose_device(arguments.device, look(os.environ))
    path = find_path(arguments.file, ROOT, "the result file")
    if arguments.limit is not None and arguments.limit < 1:
        raise InputError(f"--limit {arguments.limit}: give at least 1")
    made, found = load_checked(path, FIELDS)
    rows = list(found.values())[: arguments.limit]
    asked = source_rows(path, made, [row["video_id"] for row in rows])
    video_root = find_video_root(made["video_root"], ROOT)
    pixels = made["min_pixels_per_frame"], made["max_pixels_per_frame"], made["max_pixels_per_video"]
    budget = PixelBudget(*pixels, made.get("budget", "video"))

    checkpoint, variant = find_model(made["model"], ROOT), get_variant(made["variant"])
    check_made(path, made, variant)
    if made.get("model_sha256") not in (None, of_checkpoint(checkpoint)):
        raise InputError(
            f"{checkpoint} has changed since {path} was written: put the checkpoint that wrote it back, or run eval.sh "
            "again"
        )
    name, weights = made["dtype"], made.get("weights")
    processor, dtype = load_processor(checkpoint), getattr(torch, name)
    check_precision(weights, device, dtype)
    load_config(checkpoint)  # refuses what eval.sh refuses
    if line:
        print(line, file=sys.stderr)
    model = load_stock(checkpoint, dtype, weights, device)
    vocabulary = model.config.text_config.vocab_size
    if unknown := [row["video_id"] for row in rows if max(row["tokens"], default=0) >= vocabulary]:
        raise InputError(
            f"{path}, video {unknown[0]!r}: {checkpoint} does not have one of its tokens: run eval.sh again"
        )
    verifier = Verifier(made, variant, budget, video_root, processor, model)
    total = faulty = 0
    mismatches: list[Mismatch] = []
    for row in Progress(rows, unit="video", desc="verifying"):
        faults, wrong = verifier.verify(row, asked[row["video_id"]])
        for fault in faults:
            print(f"video {row['video_id']}: {fault}")
        faulty += bool(faults)
        if wrong is None:
            continue
        for each in wrong:
            how = f", a tie in {name}" if each.tie else ""
            print(f"video {row['video_id']}, token {each.index}: {each.margin:.2g} below the arg-max{how}")
        mismatches, total = mismatches + wrong, total + len(row["tokens"])
    right, ties = total - len(mismatches), [each.margin for each in mismatches if each.tie]
    errors = len(mismatches) - len(ties)
    where = f"the arg-max of the stock model in {name}{f' with {weights} weights' if weights else ''}, {variant.name}"
    print(f"{right} of {total} tokens of {len(rows)} videos are {where}")
    if ties:
        print(f"{len(ties)} more are ties in {name}, at most {max(ties):.2g} below the arg-max")
    if errors:
        print(f"{errors} are wrong")
    if faulty:
        print(f"{faulty} of {len(rows)} captions do not match their tokens, videos or schedules")
    sys.exit(1 if errors or faulty else 0)


if __name__ == "__main__":
    run(main)
