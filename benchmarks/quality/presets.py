"""Presets of speed: which combination of sparsity, cache and precision is the fastest.

Quality is that of the lab's model. Time is that of a video of Wan2.1 14B, summed from
steps that were measured on a GPU: the lab's model has narrow linear layers, in which
FP8 gains nothing, and its steps would say nothing of a published model's.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.common.records import ROOT
from benchmarks.quality.statistics import mean_and_interval
from benchmarks.quality.trials import PAPER_90, SMALL, Combination, combinations

STEP_RECORD = "wan_14b_speed_h200.json"
# Decibels over the paper's selection at 90 % without a cache.
PRESET_GAINS = {"balanced": 6.0, "fast": 3.0, "fastest": 0.0}
NEAR = 1.05  # times that differ by less are alike: the better video counts then


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Milliseconds of a step of Wan2.1 14B, 768 x 1280 pixels, 81 frames.

    Attributes:
      source: File that they are from.
      dense: Dense steps by the precision of linear layers.
      sparse: Sparse steps by method and sparsity, in FP8.
      saved: What FP8 saves in a sparse step.
      last: What the last computed step takes longer in FP8 than others of its kind: its
        activations are not rounded.
      skipped: A step that a cache skips.
    """

    source: str
    dense: Mapping[str, float]
    sparse: Mapping[tuple[str, float], float]
    saved: float
    last: float
    skipped: float

    @classmethod
    def shipped(cls) -> "StepTimes":
        """Returns the times of the committed record."""
        name = f"benchmarks/results/{STEP_RECORD}"
        return cls.of(json.loads((ROOT / name).read_text()), name)

    @classmethod
    def of(cls, record: Mapping[str, Any], source: str) -> "StepTimes":
        """Reads a record of `benchmarks.wan.speed`.

        The default with bfloat16 was not timed: it is its time with FP8 and what FP8
        saves with the paper's method.
        """
        parts = record["parts"]
        steps, default = parts["steps"]["median_ms"], parts["default"]["modes"]
        wide = parts["outside"]["bfloat16"]["modes"]["0.9"]["median_ms"]
        return cls(
            source=source,
            dense={
                "bfloat16": parts["cudnn"]["median_ms"],
                "float8": parts["video"]["median_ms"]["dense"],
            },
            sparse={
                ("paper", 0.9): steps["sparse"],
                **{
                    ("compensated", sparsity): default[f"{sparsity:g}"]["median_ms"]
                    for sparsity in (0.9, 0.95)
                },
            },
            saved=wide - steps["sparse"],
            last=steps["last"] - steps["sparse"],
            skipped=steps["skipped"],
        )

    def share(self, row: Mapping[str, Any]) -> float:
        """Returns the time of a trial's steps over that of as many dense ones."""
        chosen, steps = combination_of(row["name"]), row["steps"]
        time_ms = steps["dense"] * self.dense[chosen.linears]
        time_ms += steps["skipped"] * self.skipped
        time_ms += self.last if chosen.linears == "float8" else 0.0
        if chosen.method is not None and chosen.sparsity is not None:
            one = self.sparse[chosen.method, chosen.sparsity]
            one += self.saved if chosen.linears == "bfloat16" else 0.0
            time_ms += steps["sparse"] * one
        return time_ms / (sum(steps.values()) * self.dense["bfloat16"])

    def share_of(self, record: Mapping[str, Any], name: str) -> float:
        """Returns the share of a combination that a record has measured."""
        (row,) = (
            row
            for row in record["trials"]
            if row["part"] == "combinations" and row["name"] == name
        )
        return self.share(row)


def combination_of(name: str) -> Combination:
    """Returns the combination of a trial's name."""
    known = {each.name: each for each in (*combinations(), *combinations(SMALL))}
    return known[name]


def choose_presets(record: Mapping[str, Any], times: StepTimes) -> dict[str, Any]:
    """Returns the fastest combination for each gain over the paper's selection.

    A gain counts if the 95 % interval of the paired difference lies above it: the
    fastest of many that reach it in the mean would owe that to the few tuning prompts.
    Of those that take about as long as the fastest, the one with the largest gain.

    Args:
      record: What was measured.
      times: What steps take.

    Returns:
      Fields of `Combination` by the name of the preset, as `--speed` has them; none
      where the paper's selection was not measured, or nothing reaches the gain.
    """
    rows = {
        row["name"]: row for row in record["trials"] if row["part"] == "combinations"
    }
    if PAPER_90.name not in rows:
        return {}
    paper = np.asarray(rows[PAPER_90.name]["clips"]["psnr"])
    gains = {
        name: mean_and_interval(np.asarray(row["clips"]["psnr"]) - paper)
        for name, row in rows.items()
    }
    found = {}
    for preset, gain in PRESET_GAINS.items():
        enough = {
            name: times.share(rows[name])
            for name, (mean, half) in gains.items()
            if mean - half >= gain
        }
        if enough:
            near = [n for n, x in enough.items() if x <= NEAR * min(enough.values())]
            best = max(near, key=lambda name: gains[name][0])
            found[preset] = dataclasses.asdict(combination_of(best))
    return found
