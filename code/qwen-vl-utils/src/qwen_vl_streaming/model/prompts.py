"""Converts text and frames to token ids and pixel values, with the chat template, the questions and the processor.

Independent of variants, positions, masks and training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor

from ..common.data_rows import SURROGATE
from ..common.errors import InputError, first_line
from ..common.numbers import shown
from ..timeline.segments import TimedText, join_segments, slot_tokens, token_times, words_late
from ..timeline.timeline import ANSWER, HEADER, PROMPT, TAIL, Layout, Rows
from .chat_template import render
from .checks import check_processor
from .hub import model_folder

QUESTIONS = (
    "Summarize the actions and events in the video.",
    "What actions can be observed in the video?",
    "Describe the key objects and movements in this video.",
    "What is the scene and activity shown in this video?",
)
"""Default questions. For a row without a question, training draws one of these at random; evaluation uses the last."""
END_OF_SLOT = "<|box_end|>"
"""Default end-of-slot token: one special token of Qwen2.5-VL's vocabulary. Captions are tokenized without special
tokens, so that none contains it. The chat template does not use it, no program pads with it or stops at it, and
Qwen2.5-VL writes boxes as JSON, without it."""
QUESTION_HERE = "\ue000"
"""A private-use character that marks the place of the question in the chat template."""


@dataclass(frozen=True)
class Template:
    """The token ids around a video, from the processor's chat template. The question comes before the video."""

    prompt: tuple[int, ...]
    """System text and question, up to and including `<|vision_start|>`."""
    tail: tuple[int, ...]
    """`<|vision_end|>`, the end of the turn and a newline."""
    header: tuple[int, ...]
    """The start of the answer's turn."""
    video: int
    """The placeholder id for every visual token."""
    end: int
    """Ends a turn, and therefore an answer: `<|im_end|>`."""
    end_of_slot: int | None = None
    """Ends a slot, if the model was trained to decide when to speak: it is silent until the next clip. In the last slot
    no clip follows, so that it ends the answer. It is written and fed like any other token of the answer, but is not
    part of the text, and the repetition penalty does not apply to it."""

    def ends(self, tokens: Sequence[int], slots: Sequence[int], last: int | None) -> list[int]:
        """The indices of those answer `tokens`, written in `slots`, that end an answer. `last` is the last slot N;
        None: it has not begun."""
        return [
            index
            for index, (token, slot) in enumerate(zip(tokens, slots, strict=True))
            if token == self.end or (token == self.end_of_slot and slot == last)
        ]

    @property
    def penalized(self) -> list[int]:
        """The ids that the repetition penalty weakens before any is written: all of the template's own."""
        return [*{*self.prompt, self.video, *self.tail, *self.header} - {self.end_of_slot}]

    def ids(self, rows: Rows, answer: Sequence[int] = ()) -> Tensor:
        """The token ids of `rows`, (L,), in which `answer` was written."""
        ids = torch.full((len(rows),), self.video)
        for part, source in ((PROMPT, self.prompt), (TAIL, self.tail), (HEADER, self.header), (ANSWER, answer)):
            mine = rows.part == part
            ids[mine] = torch.tensor(source, dtype=torch.long)[rows.index[mine]]
        return ids

    def layout(self, grid: tuple[int, int], steps_per_clip: float) -> Layout:
        return Layout(len(self.prompt), len(self.tail), len(self.header), grid, steps_per_clip)


def load_processor(path: str | Path):
    """Loads the processor of a checkpoint in a folder or on the Hub. Raises InputError if it is missing, incomplete or
    incompatible."""
    folder = model_folder(path, weights=False)
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        make_template(processor, QUESTIONS[-1])  # fails without a chat template or a vocabulary
    except Exception as error:  # transformers and Jinja raise many types, and the Rust tokenizers raise Exception
        first = first_line(error)
        if "trust_remote_code" in str(error):
            raise InputError(
                f"the processor in {str(path)!r} requires its own code (auto_map), but code from checkpoints is not "
                "run: copy the processor's files from the original Qwen2.5-VL checkpoint"
            ) from error
        raise InputError(
            f"no processor could be loaded from {str(path)!r} ({first}): "
            "save one there with processor.save_pretrained, or give a complete Qwen2.5-VL checkpoint"
        ) from error
    check_processor(processor, f"the processor in {str(path)!r}")
    return processor


def make_template(processor, question: str, end_of_slot: str | None = None) -> Template:
    """Returns the token ids around a video for `question`, in which text that looks like a special token stays text,
    and the id of the token `end_of_slot`, if the model has one.

    Raises InputError if the chat template does not contain a question followed by a video, if the question is not valid
    Unicode, and as `token_id` does.
    """
    if not isinstance(question, str):
        raise InputError(f"question {shown(question)} must be a string")
    if SURROGATE.search(question):
        raise InputError(f"question {question!a:.200} is not valid Unicode: type it in UTF-8")
    messages = [{"role": "user", "content": [{"type": "text", "text": QUESTION_HERE}, {"type": "video"}]}]
    text = render(processor, messages)
    before, video, after = text.partition(processor.video_token)
    left, question_here, right = before.partition(QUESTION_HERE)
    end_of_tail = after.find("\n") + 1
    if not question_here or not video or end_of_tail == 0 or end_of_tail == len(after):
        raise InputError(
            f"the processor's chat template does not place a video as that of Qwen2.5-VL does: {text!r:.500}; "
            "copy the template from the original Qwen2.5-VL checkpoint"
        )
    tokenizer = processor.tokenizer

    def ids(piece: str, **how) -> tuple[int, ...]:
        return tuple(tokenizer(piece, add_special_tokens=False, **how).input_ids)

    # Tokenize the question together with the text around it, up to the special tokens on both sides: tokens may span
    # the boundaries.
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    start = max((left.rfind(token) + len(token) for token in special if token in left), default=0)
    stop = min((right.find(token) for token in special if token in right), default=len(right))
    asked = ids(left[start:] + question + right[:stop], split_special_tokens=True)
    tail = ids(after[:end_of_tail])
    return Template(
        prompt=(*ids(left[:start]), *asked, *ids(right[stop:])),
        tail=tail,
        header=ids(after[end_of_tail:]),
        video=tokenizer.convert_tokens_to_ids(processor.video_token),
        end=tail[1],  # after <|vision_end|>, the tail ends the turn
        end_of_slot=None if end_of_slot is None else token_id(tokenizer, end_of_slot, text),
    )


def token_id(tokenizer, text: str, around: str) -> int:
    """The id of `text`, which is to end slots. Raises InputError if it is not one token of the vocabulary, or one that
    ends a text or is part of the rendered chat template `around`."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if len(ids) != 1 or tokenizer.decode(ids) != text:
        raise InputError(
            f"the end-of-slot token {text[:80]!r} is not one token of the vocabulary, but {len(ids)}: give another, "
            f"such as {END_OF_SLOT}"
        )
    used = {*tokenizer(around, add_special_tokens=False).input_ids, tokenizer.eos_token_id, tokenizer.pad_token_id}
    if ids[0] in used:
        raise InputError(
            f"the end-of-slot token {text[:80]!r} is part of the chat template or ends a text: give another, such as "
            f"{END_OF_SLOT}"
        )
    return ids[0]


def spoken(tokens: Sequence[int], end_of_slot: int | None) -> list[int]:
    """The tokens that are text: those of an answer without the end-of-slot tokens."""
    return [token for token in tokens if token != end_of_slot]


def answer_ids(processor, template: Template, caption: str) -> list[int]:
    """Returns the tokens of `caption` and the end of the turn. Raises InputError if the caption is empty or contains
    the end-of-slot token."""
    # With `split_special_tokens`, text that looks like a special token stays text.
    tokens = processor.tokenizer(caption.strip(), add_special_tokens=False, split_special_tokens=True).input_ids
    if not tokens:
        raise InputError("the caption has no tokens: remove the sample")
    check_answer(tokens, template.end_of_slot)
    return [*tokens, template.end]


def check_answer(tokens: Sequence[int], end_of_slot: int | None) -> None:
    """Raises InputError if the `tokens` of a caption contain the one that is to end slots."""
    if end_of_slot in tokens:
        raise InputError(
            "the caption contains the end-of-slot token: remove the sample, or give another --end_of_slot, such as "
            f"{END_OF_SLOT}"
        )


def timed_answer(processor, segments: Sequence[Mapping[str, Any]], when: str = "end") -> tuple[list[int], list[float]]:
    """Returns the tokens of the joined text of `segments`, without the end of the turn, and the time in seconds from
    which each may be written, as `timeline.segments` describes. They are the tokens of `answer_ids` for that text.
    Raises InputError if the text has no tokens."""
    timed, tokens, offsets = _tokenize_segments(processor, segments, when)
    return tokens, token_times(timed, offsets)


def answer_slots(
    processor,
    template: Template,
    segments: Sequence[Mapping[str, Any]],
    arrivals: Sequence[float],
    most: int,
    when: str = "end",
    end_of_slot: int | None = None,
) -> list[list[int]]:
    """Returns the answer's tokens of each slot, from a row's `segments` and the times in seconds at which the clips
    arrive. The last slot ends with the end of the turn. See `timeline.segments.slot_tokens` for `most` and
    `end_of_slot`, and `common.data_rows.SEGMENT_TIMES` for `when`. Raises InputError if the text has no tokens or
    contains the end-of-slot token."""
    tokens, times = timed_answer(processor, segments, when)
    check_answer(tokens, end_of_slot)
    return slot_tokens(tokens, times, arrivals, most, template.end, end_of_slot)


def seconds_late(
    processor, segments: Sequence[Mapping[str, Any]], arrivals: Sequence[float], most: int, when: str = "end"
) -> list[float]:
    """Returns by how many seconds `answer_slots` writes each word late because earlier text has filled the slots."""
    timed, _, offsets = _tokenize_segments(processor, segments, when)
    return words_late(timed, offsets, arrivals, most)


def _tokenize_segments(
    processor, segments: Sequence[Mapping[str, Any]], when: str
) -> tuple[TimedText, list[int], list[tuple[int, int]]]:
    """The joined text, its tokens, and the characters (first, one past the last) of each."""
    timed = join_segments(segments, when)
    found = processor.tokenizer(
        timed.text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    )
    if not found.input_ids:
        raise InputError("the segments have no tokens: remove the sample")
    return timed, found.input_ids, found.offset_mapping


def clip_pixels(processor, frames: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Converts frames to the input format of the vision tower.

    `frames` (2 N, 3, height, width) are uint8 and already resized. Returns pixel values (N, patches, pixels of a patch)
    in float32, and the grid of one clip after merging, rows × columns.
    """
    video_processor = processor.video_processor
    inputs = video_processor(
        videos=[frames], do_resize=False, do_sample_frames=False, cap_pixels_per_frame=False, return_tensors="pt"
    )
    clips, height, width = inputs["video_grid_thw"][0].tolist()
    merge = video_processor.merge_size
    return inputs["pixel_values_videos"].view(clips, height * width, -1), (height // merge, width // merge)
