"""Turns and losses of `benchmarks.attention.edges`."""

import numpy as np
import pytest

from benchmarks.attention import edges
from benchmarks.common import timing
from benchmarks.common.inputs import random_mask
from benchmarks.common.shapes import SHAPES


def test_programs_take_turns(monkeypatch):
    calls, seconds = [], []

    def run_for(call, duration):
        call()
        seconds.append(duration)
        return 4, 2.0

    monkeypatch.setattr(timing, "run_for", run_for)
    programs = {name: lambda name=name: calls.append(name) for name in "ab"}
    turns = timing.take_turns(programs, rounds=2, settle_s=0.5, block_s=1.0)
    assert calls == ["a", "a", "b", "b"] * 2
    assert seconds == [0.5, 1.0] * 4
    assert turns["a"]["ms"] == turns["b"]["ms"] == [500.0, 500.0]


def test_losses_are_per_useful_flop():
    """Hand-worked: twice the work in twice and in four times the time."""
    grids = {name: SHAPES[name].grid for name in ("hunyuan", "hunyuan-edges")}
    masks = {name: random_mask(grid, 1, 1, 0.1) for name, grid in grids.items()}
    work = {
        name: grid.num_tokens**2 * float(np.mean(masks[name].density))
        for name, grid in grids.items()
    }
    times = {"divisible": work["hunyuan"], "edges": work["hunyuan-edges"]}
    turns = {
        "divisible": {"ms": [times["divisible"]] * 3},
        "edges": {"ms": [times["edges"], 2 * times["edges"], times["edges"]]},
        "edges, all rows": {"ms": [2 * times["edges"]] * 3},
    }
    first, own, slow = edges.summaries("random", 0.1, SHAPES, masks, turns)
    assert first["losses"] == [0.0] * 3
    assert own["losses"] == pytest.approx([0.0, 0.5, 0.0], abs=1e-4)
    assert own["loss"] == pytest.approx(0.0, abs=1e-4)
    assert slow["loss"] == pytest.approx(0.5)
    assert own["effective_tflops"] == pytest.approx(first["effective_tflops"])
