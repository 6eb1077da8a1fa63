"""A checkpoint's chat template, rendered. It is a program of the checkpoint: Jinja's sandbox keeps it from this
machine's files, and bounds on time and memory from going on for ever. Knows nothing of tokens."""

import json

from ..common.bounded import OutOfBounds, bounded_text
from ..common.errors import InputError

LONGEST = 1 << 20  # characters
FIX = "copy the template from the Qwen2.5-VL that the checkpoint was made from"
_rendered: dict[str, str] = {}  # by template and special tokens


def render(processor, messages: list[dict]) -> str:
    """The text that the processor's chat template makes of `messages` and an answer to come, the same ones rendered
    only once. Raises InputError for a template that takes too long or too much, and ValueError for what it raises."""
    template = processor.chat_template
    if len(str(template)) > LONGEST:
        raise InputError(f"the chat template has more than {LONGEST} characters: {FIX}")
    key = json.dumps([template, processor.tokenizer.special_tokens_map, messages], default=str, sort_keys=True)
    if key not in _rendered:
        try:
            _rendered[key] = bounded_text(
                lambda: processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            )
        except OutOfBounds as error:
            raise InputError(f"the chat template is not rendered, for {error}: {FIX}") from error
    return _rendered[key]
