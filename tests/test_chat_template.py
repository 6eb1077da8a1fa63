"""A chat template is a program in the checkpoint: it is rendered with limits, in a temporary process."""

import os
import time

import pytest
from qwen_vl_streaming.common import bounded
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.model.prompts import QUESTIONS, load_processor, make_template
from waiting import SECONDS

LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x"


@pytest.fixture(scope="module")
def processor(made):
    return load_processor(made[0])


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (LOOPS, "more than 1 s"),
        ("{{ 10 ** (10 ** 9) }}", "more than 1 s"),  # one instruction, which no signal interrupts
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}", "more than 1 s"),
        ("{{ 'x' * 3000000000 }}", "1024 MiB"),
        ("{{ '%3000000000d' % 1 }}", "1024 MiB"),
        ("{{ 'x' * 3000000 }}", "too long"),
        ("x" * (2**20 + 1), "characters"),
    ],
)
def test_templates_that_take_too_much(processor, monkeypatch, template, why):
    if "1 s" in why:
        monkeypatch.setattr(bounded, "CPU_SECONDS", 1)
    monkeypatch.setattr(processor, "chat_template", template)
    began = time.monotonic()
    with pytest.raises(InputError, match="copy the template from") as error:
        make_template(processor, QUESTIONS[-1])
    assert why in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 700
    assert time.monotonic() - began < SECONDS


def test_errors_of_a_template(processor, monkeypatch):
    monkeypatch.setattr(processor, "chat_template", "{{ raise_exception('no\nvideo') }}")
    with pytest.raises(ValueError, match="no"):
        make_template(processor, QUESTIONS[-1])


def test_a_template_is_rendered_once(processor, monkeypatch):
    first = make_template(processor, "What happens?")
    monkeypatch.setattr(os, "fork", None)
    assert make_template(processor, "What happens?") == first
    assert make_template(processor, "And then?") != first
