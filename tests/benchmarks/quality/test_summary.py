"""Figures of a record that is made up, so that each is known."""

import dataclasses

import pytest

from benchmarks.quality import document, tables
from benchmarks.quality.summary import best_splits, figures, summarize
from benchmarks.quality.times import Times
from benchmarks.quality.trials import PAPER_90, Combination

CALM_AND_FAST = [["one", "calm"], ["two", "fast"], ["three", "calm"], ["four", "fast"]]


def trial(name, density, psnr, part="methods", work=None):
    return {
        "part": part,
        "name": name,
        "density": density,
        "kept_density": density,
        "work": density if work is None else work,
        "steps_ms": [1.0],
        "steps": {"dense": 2, "sparse": 4, "skipped": 0},
        "clips": {"psnr": psnr, "ssim": psnr, "gmsd": psnr, "flicker": psnr},
    }


def layer(name, density, errors):
    return {
        "name": name,
        "density": density,
        "step": 3,
        "kept_density": density,
        "relative_l2": [0.25, 0.5],
        "kept_mass": [0.5, 0.75],
        "clips": {"relative_l2": errors, "kept_mass": errors},
    }


def record():
    return {
        "setup": {
            "checkpoint": "shipped",
            "reporting": CALM_AND_FAST,
            "tuning": CALM_AND_FAST[:2],
            "sampling": {
                "frames": 8,
                "height": 96,
                "width": 128,
                "num_steps": 6,
                "guidance": 4.0,
            },
            "grid": [4, 12, 16],
            "tile": [4, 8],
            "tiles": 24,
            "densities": [0.25, 0.1, 0.05],
        },
        "device": "cpu",
        "environments": [
            {"command": "c", "commit": "abc", "date": "2026-01-01T", "versions": {}}
        ],
        "pictures": [],
        "trials": [
            trial("paper", 0.25, [20.0, 22.0, 24.0, 26.0]),
            trial("paper", 0.1, [10.0, 12.0, 14.0, 16.0]),
            trial("ours", 0.1, [16.0, 16.0, 20.0, 20.0], work=0.16),
            trial("ours", 0.05, [13.0, 13.0, 13.0, 13.0], work=0.11),
            trial("ours", 0.25, [26.0, 26.0, 30.0, 30.0], work=0.31),
            trial("oracle", 0.1, [99.0] * 4),
            trial("oracle", 0.25, [99.0] * 4),
        ],
        "layers": [
            layer("ours", 0.1, [0.1, 0.3]),
            layer("ours", 0.1, [0.3, 0.5]),
            layer("paper", 0.25, [0.5, 0.5]),
        ],
    }


def times():
    rows = [
        {"name": "dense", "density": 1.0, "median_ms": 100.0},
        {"name": "paper", "density": 0.1, "median_ms": 10.0},
        {"name": "paper", "density": 0.25, "median_ms": 20.0},
        {"name": "ours", "density": 0.05, "median_ms": 8.0},
        {"name": "ours", "density": 0.1, "median_ms": 15.0},
        {"name": "ours", "density": 0.25, "median_ms": 25.0},
    ]
    for row in rows:
        row["kept_density"] = row["density"]
    shape = {"name": "hunyuan", "qkv": [1, 126720, 24, 128]}
    return {"environment": {"device": "a GPU"}, "shape": shape, "rows": rows}


def test_gains_at_equal_density_are_paired():
    found = figures(record())
    mean, half = found["psnr_gain_90_equal_density"]
    assert mean == 5.0  # of 6, 4, 6 and 4
    assert half == pytest.approx(3.1824 * 0.57735, rel=1e-3)
    assert found["psnr_gain_90_equal_density_calm"][0] == 6.0
    assert found["psnr_gain_90_equal_density_fast"][0] == 4.0
    assert found["psnr_gain_75_equal_density"][0] == 5.0
    # At work 0.16 the paper has 14, 16, 18 and 20.
    assert found["psnr_gain_90_equal_work"][0] == pytest.approx(1.0)
    assert "psnr_gain_75_equal_work" not in found  # 0.31 was not measured
    assert found["psnr_default_95"][0] == 13.0
    assert found["psnr_paper_75"][0] == 23.0
    assert found["relative_l2_default_90"][0] == pytest.approx(0.3)
    assert found["relative_l2_paper_75"][0] == 0.5


def test_nothing_is_said_of_what_was_not_measured():
    assert not [name for name in summarize(record()) if "time" in name]
    part = record()
    part["trials"] = [row for row in part["trials"] if row["name"] == "ours"]
    part["layers"] = []
    assert summarize(part) == {}


def test_gains_at_equal_time_lie_on_the_others_curve():
    found = summarize(record() | {"times": times()})
    # The default at 0.1 takes 15 ms, where the paper's clips are 15, 17, 19 and 21.
    assert found["psnr_gain_90_equal_time"] == 0.0
    assert found["psnr_lead_90_equal_time"] == 0.0  # the oracle is no rival
    # At 0.25 it takes 25 ms, and the paper was measured up to 20.
    assert "psnr_gain_75_equal_time" not in found
    # 23 dB lie halfway between 18 and 28: 20 ms, as long as the paper's 20.
    assert found["time_for_paper_75"] == pytest.approx(1.0)


def test_a_time_is_that_of_the_share_that_was_kept():
    known = Times(times())
    assert known.at("paper", 0.175) == pytest.approx(15.0)
    assert known.at("paper", 0.055) == pytest.approx(7.0)  # the line goes on
    assert known.at("ours", 0.3) == pytest.approx(25.0 + 10 / 3)
    assert known.at("dense", 1.0) == known.dense == 100.0
    assert known.at("radial", 0.1) is Times(None).dense is None
    made = record()
    made["trials"][1]["kept_density"] = 0.07  # of the 0.1 that it was allowed
    # 8 ms for 10, 12, 14 and 16 dB now: at 15 ms 0.83 less than before.
    found = summarize(made | {"times": times()})
    assert found["psnr_gain_90_equal_time"] == pytest.approx(
        18 - 13 - 10 * 7 / 12, abs=1e-4
    )


def test_gains_of_presets_are_over_the_papers_selection():
    chosen = Combination(method="compensated", sparsity=0.9, cache="easy:0.05")
    whole = {
        "trials": [
            trial(PAPER_90.name, 0.1, [10.0, 12.0], "presets"),
            trial(chosen.name, 0.1, [13.0, 16.0], "presets"),
        ],
        "presets": {"balanced": dataclasses.asdict(chosen)},
    }
    assert summarize(record() | {"whole_runs": whole})["psnr_gain_balanced"] == 3.5


def test_the_best_split_of_a_budget_is_found_for_each_motion():
    made = record()
    made["trials"] = [
        trial("coarse", 0.1, [10.0, 30.0], "front", work=0.1),
        trial("coarse", 0.2, [20.0, 40.0], "front", work=0.2),
        trial("fine", 0.1, [22.0, 32.0], "front", work=0.2),
        trial("fine", 0.2, [32.0, 42.0], "front", work=0.3),
    ]
    found = {(row["budget"], row["motion"]): row for row in best_splits(made, [0.2])}
    assert found[0.2, "calm"]["name"] == "fine"
    assert found[0.2, "fast"]["name"] == "coarse"
    assert found[0.2, "fast"]["psnr"] == 40.0
    assert found[0.2, "fast"]["default"] is None


def test_first_layer_dense_stands_beside_all_layers_sparse():
    known = record()
    known["trials"] += [
        trial("paper", 0.25, [30.0, 30.0, 32.0, 32.0], "first_layer"),
        trial("paper", 0.05, [10.0, 10.0, 10.0, 10.0], "first_layer"),
    ]
    text = tables.first_layer(known)
    assert "| method | 0.25 | 0.05 |" in text
    # 20 to 26 before: differences of 10, 8, 8 and 6, 3.1824 * 1.633 / 2 around 8.
    assert "| DraftAttention | 31.0 ± 1.8 (8.0 ± 2.6) | 10.0 ± 0.0 |" in text


def test_page_says_what_was_measured_and_what_was_not():
    text = document.page(record(), "made_up.json")
    assert (
        "`benchmarks/results/made_up.json`, by these commands:\n\n```sh\nc\n```" in text
    )
    missing = "Not measured in it: floor, first_layer, front, schedules, combinations,"
    assert f"{missing} presets." in text
    assert "With the first layer dense" not in text
    assert "Times of layers were not measured" in text
    assert "## At equal time" not in text
    assert "18.0 ± 3.7" in text  # 16, 16, 20, 20: 3.1824 * 2.3094 / 2
    timed = document.page(record() | {"times": times()}, "made_up.json")
    assert "Dense attention takes 100.00 ms." in timed
    assert "were not measured:" not in timed
    # At 15 ms the paper's has 15, 17, 19 and 21 dB, the default 16, 16, 20 and 20.
    in_our_time = timed.split("All metrics in the 15.00 ms")[1]
    assert "| DraftAttention | 18.0 ± 4.1 |" in in_our_time
    assert "| 0.0 ± 1.8 |" in in_our_time
    # Nothing else was measured at 25 ms.
    assert "- 0.25 of the time of dense: the default: means and a fitted map." in timed
