"""Figures that follow from a record: curves of methods, gains, and the flat summary.

A figure whose parts were not measured is not there: nothing is extrapolated.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from benchmarks.quality.methods import METHODS
from benchmarks.quality.statistics import (
    first_reaching,
    interpolate,
    mean_and_interval,
)
from benchmarks.quality.times import Times
from benchmarks.quality.trials import DEFAULT_SPLIT, PAPER_90, Combination

MOTIONS = ("calm", "fast")
WHOLE = "whole_runs"  # entry of a record: that of another run, with more steps


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """A method over its densities.

    Attributes:
      densities: As they were asked for, ascending.
      work: Share of the dense products that each really does, those of means and exact
        rows included.
      times: Milliseconds of a layer that keeps what each kept; None where the method
        was not timed.
      clips: Each metric of each density and clip.
    """

    densities: list[float]
    work: list[float]
    times: list[float] | None
    clips: dict[str, Float[np.ndarray, "densities clips"]]

    def at(self, density: float, metric: str = "psnr") -> np.ndarray | None:
        """Returns a metric of each clip at a density; None if it was not measured."""
        if density not in self.densities:
            return None
        return self.clips[metric][self.densities.index(density)]

    def at_time(self, time_ms: float, metric: str = "psnr") -> np.ndarray | None:
        """Returns a metric of each clip at a time between measured ones, or None."""
        if self.times is None:
            return None
        return interpolate(time_ms, self.times, self.clips[metric])

    def at_work(self, work: float, metric: str = "psnr") -> np.ndarray | None:
        """Returns a metric of each clip at work between measured points, or None."""
        return interpolate(work, self.work, self.clips[metric])

    def time(self, density: float) -> float | None:
        """Returns the time of a layer at a density."""
        if self.times is None or density not in self.densities:
            return None
        return self.times[self.densities.index(density)]


def whole_runs(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the record that combinations and presets are in."""
    return record.get(WHOLE, record)


def curves(record: Mapping[str, Any], part: str = "methods") -> dict[str, Curve]:
    """Returns the curve of each method, or variant of one, of a part.

    Methods come in the order of `METHODS`, others as they were measured.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in record["trials"]:
        if row["part"] == part:
            rows.setdefault(row["name"], []).append(row)
    times = Times(record.get("times"))
    found = {}
    ordered = {name: rows[name] for name in METHODS if name in rows} | rows
    for name, own in ordered.items():
        own = sorted(own, key=lambda row: row["density"])
        of_rows = [times.at(name, row["kept_density"]) for row in own]
        known = [time_ms for time_ms in of_rows if time_ms is not None]
        found[name] = Curve(
            densities=[row["density"] for row in own],
            work=[row["work"] for row in own],
            times=known or None,
            clips={
                metric: np.array([row["clips"][metric] for row in own])
                for metric in own[0]["clips"]
            },
        )
    return found


def motion_of_clips(
    record: Mapping[str, Any], prompts: str = "reporting"
) -> dict[str, Bool[np.ndarray, " clips"]]:
    """Returns which clips are of each kind of motion."""
    kinds = np.array([motion for _, motion in record["setup"][prompts]])
    return {motion: kinds == motion for motion in MOTIONS}


def difference(
    first: np.ndarray | None, second: np.ndarray | None
) -> tuple[float, float] | None:
    """Returns the mean of paired differences and its half-width; None without both."""
    if first is None or second is None:
        return None
    return mean_and_interval(first - second)


def figures(record: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Returns all figures of the summary, each with the half-width of its interval."""
    found: dict[str, tuple[float, float] | None] = {}
    by_name = curves(record)
    ours, paper = by_name.get("ours"), by_name.get("paper")
    if ours and paper:
        kinds = motion_of_clips(record)
        for percent, density in ((90, 0.1), (75, 0.25)):
            mine, theirs = ours.at(density), paper.at(density)
            name = f"psnr_gain_{percent}_equal_density"
            found[name] = difference(mine, theirs)
            if mine is not None:
                work = ours.work[ours.densities.index(density)]
                equal = difference(mine, paper.at_work(work))
                found[f"psnr_gain_{percent}_equal_work"] = equal
            for kind, chosen in kinds.items():
                if mine is not None and theirs is not None and chosen.any():
                    pair = mine[chosen], theirs[chosen]
                    found[f"{name}_{kind}"] = difference(*pair)
            if (time_ms := ours.time(density)) is not None:
                equal = difference(mine, paper.at_time(time_ms))
                found[f"psnr_gain_{percent}_equal_time"] = equal
                found[f"psnr_lead_{percent}_equal_time"] = lead(
                    by_name, density, time_ms
                )
        found |= _levels(ours, paper)
    floors = [
        mean_and_interval(row["clips"]["psnr"])
        for row in record["trials"]
        if row["part"] == "floor"
    ]
    found["psnr_floor"] = min(floors, default=None)
    found |= _layer_errors(record)
    found |= _presets(whole_runs(record))
    return {name: pair for name, pair in found.items() if pair is not None}


def lead(
    by_name: Mapping[str, Curve], density: float, time_ms: float
) -> tuple[float, float] | None:
    """Returns what ours has over the best other method at its own time.

    The oracle is none. A method that has no such time is left out.
    """
    mine = by_name["ours"].at(density)
    others = [
        values
        for name, curve in by_name.items()
        if name != "ours" and not METHODS[name].is_bound
        if (values := curve.at_time(time_ms)) is not None
    ]
    if mine is None or not others:
        return None
    return difference(mine, max(others, key=lambda values: values.mean()))


def _levels(ours: Curve, paper: Curve) -> dict[str, tuple[float, float] | None]:
    """Returns levels of both, and the time in which ours reaches the paper's 75 %."""
    found: dict[str, tuple[float, float] | None] = {}
    if (values := ours.at(0.05)) is not None:
        found["psnr_default_95"] = mean_and_interval(values)
    level = paper.at(0.25)
    if level is None:
        return found
    found["psnr_paper_75"] = mean_and_interval(level)
    paper_time = paper.time(0.25)
    if ours.times is not None and paper_time is not None:
        means = ours.clips["psnr"].mean(1).tolist()
        reached = first_reaching(float(level.mean()), ours.times, means)
        if reached is not None:
            found["time_for_paper_75"] = reached / paper_time, float("nan")
    return found


def layer_values(
    record: Mapping[str, Any], name: str, density: float, metric: str
) -> np.ndarray | None:
    """Returns a metric of layers of each clip, the mean over the steps looked at."""
    rows = [
        row["clips"][metric]
        for row in record["layers"]
        if row["name"] == name and row["density"] == density
    ]
    return np.mean(rows, axis=0) if rows else None


def _layer_errors(
    record: Mapping[str, Any],
) -> dict[str, tuple[float, float] | None]:
    found: dict[str, tuple[float, float] | None] = {}
    for figure, name, density in (
        ("relative_l2_default_90", "ours", 0.1),
        ("relative_l2_paper_75", "paper", 0.25),
    ):
        values = layer_values(record, name, density, "relative_l2")
        found[figure] = None if values is None else mean_and_interval(values)
    return found


def _presets(record: Mapping[str, Any]) -> dict[str, tuple[float, float] | None]:
    """Returns what presets have over the paper's selection at 90 %, without a cache."""
    by_name = {
        row["name"]: np.asarray(row["clips"]["psnr"])
        for row in record["trials"]
        if row["part"] == "presets"
    }
    return {
        f"psnr_gain_{preset}": difference(
            by_name.get(Combination(**fields).name), by_name.get(PAPER_90.name)
        )
        for preset, fields in record.get("presets", {}).items()
    }


def summarize(record: Mapping[str, Any]) -> dict[str, float]:
    """Returns the flat summary."""
    return {name: round(mean, 4) for name, (mean, _) in figures(record).items()}


def best_splits(
    record: Mapping[str, Any], budgets: Sequence[float]
) -> list[dict[str, Any]]:
    """Returns the best split of each budget between exact blocks and means.

    The budget is time where times were measured, else work. Within a budget each size
    of means has as many exact blocks as fit; the size with the best mean PSNR is taken,
    for each kind of motion apart. Beside it stands what the default's means have, and
    the mean of paired differences from them with its half-width.

    Args:
      record: The record of a run.
      budgets: Shares of the dense layer's time, or of its work.
    """
    by_name = curves(record, "front")
    dense = Times(record.get("times")).dense
    kinds = motion_of_clips(record, "tuning")
    found = []
    for budget in budgets:
        for kind, chosen in kinds.items():
            options: dict[str, np.ndarray] = {}
            for name, curve in by_name.items():
                if dense is not None and curve.times is not None:
                    values = curve.at_time(budget * dense)
                else:
                    values = interpolate(budget, curve.work, curve.clips["psnr"])
                if values is not None and chosen.any():
                    options[name] = values[chosen]
            if options:
                name = max(options, key=lambda name: options[name].mean())
                default = options.get(DEFAULT_SPLIT)
                row = {"budget": budget, "motion": kind, "name": name}
                row["psnr"] = float(options[name].mean())
                row["default"] = None if default is None else float(default.mean())
                row["gain"] = difference(options[name], default)
                found.append(row)
    return found
