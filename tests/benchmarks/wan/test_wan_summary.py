"""Figures of the Wan benchmark from records that are written out."""

import pytest

from benchmarks.wan.summary import summarise

WIDE = {
    "modes": {"dense": {"median_ms": 20_000.0}, "0.9": {"median_ms": 8_000.0}},
    "cudnn": {"median_ms": 24_000.0},
    "outside": {"outside_ms": 6_000.0},
}
NARROW = {
    "modes": {"dense": {"median_ms": 16_000.0}, "0.9": {"median_ms": 5_000.0}},
    "outside": {"outside_ms": 4_000.0},
}
LINEARS = {
    "projection": {"bfloat16_ms": 6.0, "float8_ms": 3.0, "speedup": 2.0},
    "ffn.linear_1": {"bfloat16_ms": 16.0, "float8_ms": 9.0, "speedup": 16 / 9},
    "ffn.linear_2": {"bfloat16_ms": 16.0, "float8_ms": 10.0, "speedup": 1.6},
}


def test_figures_by_hand():
    """The last size is the largest."""
    float8 = {"load": {"gb": 14.9}, "linears": LINEARS, "cases": [{}, NARROW]}
    assert summarise({"cases": [{}, WIDE], "float8": float8}) == pytest.approx(
        {
            "fp8_linear_alone_speedup": (6 * 6 + 32) / (6 * 3 + 19),
            "outside_attention_speedup": 1.5,
            "float8_gb": 14.9,
            "step_dense_fp8_s": 16.0,
            "step_dense_fp8_speedup": 1.25,
            "step_dense_speedup_over_cudnn": 1.5,
            "step_90_fp8_s": 5.0,
            "step_90_fp8_speedup": 1.6,
            "step_90_speedup_over_cudnn": 4.8,
        }
    )


def test_missing_records_are_left_out():
    assert summarise({"cases": [WIDE]}) == {}
    float8 = {"cases": [NARROW], "linears": {"error": "no memory"}}
    figures = summarise({"cases": [{"error": "no memory"}], "float8": float8})
    assert figures.keys() == {"step_dense_fp8_s", "step_90_fp8_s"}
