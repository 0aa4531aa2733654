"""Times of linear layers in both precisions, on any machine."""

import pytest

from benchmarks.common import linear_times as under_test
from benchmarks.common.linear_times import linear_times, weighted_speedup


def test_records_say_times_and_errors(monkeypatch):
    monkeypatch.setattr(under_test, "SECONDS", 0.01)
    record = linear_times({"a": (64, 48, 32)})["a"]
    assert record["shape"] == [64, 48, 32]
    assert record["speedup"] == record["bfloat16_ms"] / record["float8_ms"]
    # Both operands err by some 2.6 %.
    assert 0.01 < record["error"] < 0.06
    # By half a step, at most 1 / 254 of the largest number of a row.
    assert 0.003 < record["int8_error"] < 0.02
    assert record["accumulation_error"] == 0.0  # a CPU has one way to sum
    assert record["has_float8"] is False


def test_speedups_weigh_layers_by_their_times():
    times = {
        "a": {"bfloat16_ms": 4.0, "float8_ms": 2.0, "speedup": 2.0},
        "b": {"bfloat16_ms": 3.0, "float8_ms": 3.0, "speedup": 1.0},
    }
    assert weighted_speedup(times, {"a": 2, "b": 1}) == pytest.approx(11 / 7)
    assert weighted_speedup(times, {"a": 2, "c": 1}) is None
    assert weighted_speedup({"error": "no memory"}, {"a": 2}) is None
