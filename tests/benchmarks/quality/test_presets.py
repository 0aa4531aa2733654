"""Presets of a record that is made up, so that each is known."""

import dataclasses

import pytest

from benchmarks.quality.presets import StepTimes, choose_presets, combination_of
from benchmarks.quality.trials import PAPER_90, Combination, combinations

SPEED_RECORD = {
    "parts": {
        "cudnn": {"median_ms": 100.0},
        "video": {"median_ms": {"dense": 80.0}},
        "steps": {"median_ms": {"sparse": 20.0, "skipped": 0.0, "last": 36.0}},
        "default": {"modes": {"0.9": {"median_ms": 24.0}, "0.95": {"median_ms": 22.0}}},
        "outside": {"bfloat16": {"modes": {"0.9": {"median_ms": 30.0}}}},
    }
}
OURS = Combination(method="compensated", sparsity=0.9)
OURS_FP8 = Combination(method="compensated", sparsity=0.9, linears="float8")
CACHED = Combination(
    method="compensated", sparsity=0.9, cache="easy:0.05", linears="float8"
)


def row(combination, psnr, *, dense=2, sparse=6, skipped=0):
    return {
        "part": "combinations",
        "name": combination.name,
        "steps": {"dense": dense, "sparse": sparse, "skipped": skipped},
        "clips": {"psnr": psnr},
    }


def test_time_is_that_of_the_steps():
    times = StepTimes.of(SPEED_RECORD, "made up")
    # 2 dense steps of 80, 3 sparse ones of 24 and 3 of nothing; of 8 of 100. The last
    # takes 16 more.
    assert times.share(row(CACHED, [], sparse=3, skipped=3)) == pytest.approx(0.31)
    # Without FP8 dense steps take 100, and sparse ones 10 more.
    assert times.share(row(OURS, [])) == pytest.approx((200 + 6 * 34) / 800)
    assert times.share(row(PAPER_90, [])) == pytest.approx((200 + 6 * 30) / 800)


def test_presets_are_the_fastest_that_are_good_enough():
    times = StepTimes.of(SPEED_RECORD, "made up")
    record = {
        "trials": [
            row(PAPER_90, [10.0, 12.0, 11.0, 13.0]),
            row(OURS, [16.5, 18.2, 17.3, 19.5]),
            row(OURS_FP8, [13.5, 15.2, 14.3, 16.5]),
            row(CACHED, [10.5, 12.2, 11.3, 13.5], sparse=3, skipped=3),
        ]
    }
    found = choose_presets(record, times)
    chosen = {name: Combination(**fields) for name, fields in found.items()}
    assert chosen == {"balanced": OURS, "fast": OURS_FP8, "fastest": CACHED}
    # Ahead in the mean, but not beyond chance.
    record["trials"][3]["clips"]["psnr"] = [9.0, 12.2, 11.3, 17.0]
    assert Combination(**choose_presets(record, times)["fastest"]) == OURS_FP8
    assert choose_presets({"trials": record["trials"][1:]}, times) == {}


def test_of_presets_that_take_about_as_long_the_better_one_is_taken():
    times = StepTimes.of(SPEED_RECORD, "made up")
    other = dataclasses.replace(CACHED, sparsity=0.95)  # steps of 22 for 24
    for sparse, chosen in ((3, CACHED), (6, other)):
        record = {
            "trials": [
                row(PAPER_90, [10.0, 12.0, 11.0, 13.0]),
                row(
                    CACHED, [11.5, 13.2, 12.3, 14.5], sparse=sparse, skipped=6 - sparse
                ),
                row(other, [10.5, 12.2, 11.3, 13.5], sparse=3, skipped=3),
            ]
        }
        assert choose_presets(record, times)["fastest"] == dataclasses.asdict(chosen)


def test_committed_times_have_all_combinations():
    times = StepTimes.shipped()
    for each in combinations():
        assert combination_of(each.name) == each
        assert 0.05 < times.share(row(each, [])) < 1.0
