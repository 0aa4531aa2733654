"""What records of steps say, and a run whose parts fail or come too late."""

import json

import numpy as np
import pytest

from benchmarks.scaling import run
from benchmarks.scaling.steps import compare_masks, figures


def test_masks_are_compared_by_head_and_by_pair():
    """Of two heads one is equal; the other shares one of its two pairs."""
    offsets = np.array(
        [[[[0, 1, 2], [0, 1, 2]]]]
    )  # layers, rows, heads, rows of blocks
    ids = np.array([[[[0, 1, 9], [0, 1, 9]]]])  # the last entry is room
    other = np.array([[[[0, 1, 7], [0, 0, 7]]]])
    assert compare_masks((offsets, other), (offsets, ids)) == {
        "equal_heads": 0.5,
        "common_pairs": 0.75,
    }
    assert compare_masks(None, None) == {}


def test_figures_follow_from_medians():
    two = "sequence=2,guidance=1"
    records = {
        "one device": {"mesh": None, "median_ms": 8.0, "weights_gb": 4.0},
        "step_sequence_2": {"mesh": two, "median_ms": 5.0, "weights_gb": 4.0},
        "step_guidance_2": {"mesh": "sequence=1,guidance=2", "error": "no"},
        "weights": {"mesh": two, "median_ms": 5.5, "weights_gb": 2.0},
    }
    assert figures(records) == {
        "step_sequence_2": 1.6,
        "weights_memory_ratio": 0.5,
        "weights_time_ratio": 1.1,
    }


def test_parts_that_fail_or_come_too_late_are_recorded(tmp_path, monkeypatch):
    """The second begins when the limit has passed; the third fails before."""

    class Part:
        def __init__(self, bench, error):
            self.bench, self.error = bench, error

        def measure(self):
            if self.error:
                raise RuntimeError(self.error)
            self.bench.keep("layer", "done", {"ms": 1.0}, {})

    def refuse(bench, made):
        raise ValueError("cannot be made")

    make = {
        "layer": lambda bench, made: Part(bench, ""),
        "links": lambda bench, made: Part(bench, "lost"),
        "smoke": refuse,
    }
    monkeypatch.setattr(run, "MAKE", make)
    output = tmp_path / "scaling.json"
    options = run.parse(["--parts", *make, "--shape", "tiny", "--output", str(output)])
    run.measure(options)
    found = json.loads(output.read_text())
    assert found["layer"] == {"done": {"ms": 1.0}}
    assert found["links"] == {"failure": {"error": "RuntimeError: lost"}}
    assert found["smoke"] == {"preparation": {"error": "ValueError: cannot be made"}}
    options.limit = 0.0
    late = run.measure(options)
    assert "the limit was 0.0 s" in late["layer"]["failure"]["error"]


def test_parts_of_wan_need_its_steps(capsys):
    with pytest.raises(SystemExit):
        run.parse(["--parts", "short", "links"])
    assert "need the part wan, too" in capsys.readouterr().err
