"""The profile of sft.py: kernels are counted by kind, and communication that computation hides is not waited for."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "code/benchmarks"


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import kernels

    return kernels


def test_a_step_is_divided_among_kinds(kernels):
    spans = [
        ("ncclDevKernel_AllGather_RING_LL", 0.0, 3000.0),
        ("nvjet_tst_256x128_64x4", 1000.0, 2000.0),
        ("triton_tem_fused_flex_attention_0", 1500.0, 2500.0),
        ("triton_poi_fused_add_0", 6000.0, 7000.0),
        ("Memcpy DtoD (Device -> Device)", 7000.0, 7500.0),
    ]
    found = kernels.table(spans)
    assert found == pytest.approx(
        {
            "communication": 3.0,
            "matrix products": 1.0,
            "attention": 1.0,
            "compiled": 1.0,
            "copies": 0.5,
            "communicates only": 1.5,
            "idle": 3.0,
            "step": 7.5,
        }
    )


def test_time_is_covered_once(kernels):
    assert kernels.covered([(2, 3), (0, 4), (1, 2), (5, 6)]) == 5
    assert kernels.covered([]) == 0
