"""Renders the chat template of a checkpoint. Independent of tokens.

A chat template is a program that comes with the checkpoint. Jinja's sandbox denies it access to files, and limits on
time and memory stop it if it does not end.
"""

import json

from ..common.bounded import OutOfBounds, bounded_text
from ..common.errors import InputError

LONGEST = 1 << 20  # maximum length of a template, in characters
FIX = "copy the template from the original Qwen2.5-VL checkpoint"
_rendered: dict[str, str] = {}  # by template, special tokens and messages


def render(processor, messages: list[dict]) -> str:
    """Renders `messages` and the start of an answer with the processor's chat template, and caches the text.

    Raises InputError if the template is too long or exceeds the limits on time, memory or text, and ValueError if
    rendering fails.
    """
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
            raise InputError(f"the chat template cannot be rendered: {error}; {FIX}") from error
    return _rendered[key]
