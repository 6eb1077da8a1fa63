"""A record identifies its model by all of its weights."""

import copy

import pytest
import torch
from qwen_vl_streaming.sessions import record
from qwen_vl_streaming.sessions.record import identity
from tiny import tiny_model


def fingerprint(model) -> str:
    return identity(model)["fingerprint"]


@pytest.fixture
def model():
    return tiny_model().to(torch.bfloat16)


def test_one_number_anywhere_changes_it(model, monkeypatch):
    monkeypatch.setattr(record, "PIECE", 64)
    known = fingerprint(model)
    weights = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        at = int(torch.randint(weight.numel(), (), generator=generator))
        before = weight.data.flatten()[at].clone()
        weight.data.view(-1)[at] = torch.nextafter(before, before + 1)
        assert fingerprint(model) != known, (name, at)
        weight.data.view(-1)[at] = before
        assert fingerprint(model) == known


def test_numbers_that_change_places_change_it(model):
    known, weight = fingerprint(model), model.lm_head.weight.data
    for one, other in ((17, 18), (17, 21), (40, 40 + weight.shape[1]), (0, weight.numel() - 1)):
        flat = weight.view(-1)
        first, second = flat[one].clone(), flat[other].clone()
        flat[one], flat[other] = second, first
        assert first == second or fingerprint(model) != known
        flat[one], flat[other] = first, second
    assert fingerprint(model) == known


def test_the_type_does_not_change_it(model):
    known = fingerprint(model)
    assert fingerprint(copy.deepcopy(model).float()) == known


@pytest.mark.gpu
def test_the_device_does_not_change_it(model):
    known = fingerprint(model)
    assert fingerprint(copy.deepcopy(model).cuda()) == known
    assert fingerprint(copy.deepcopy(model).float().cuda()) == known
