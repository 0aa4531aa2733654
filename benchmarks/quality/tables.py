"""Tables of `docs/quality.md`, as Markdown."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.common import pages
from benchmarks.quality.methods import METHODS
from benchmarks.quality.presets import NEAR, PRESET_GAINS, StepTimes
from benchmarks.quality.prompts import TUNING
from benchmarks.quality.statistics import mean_and_interval
from benchmarks.quality.summary import (
    MOTIONS,
    Curve,
    best_splits,
    curves,
    layer_values,
    motion_of_clips,
    whole_runs,
)
from benchmarks.quality.times import Times
from benchmarks.quality.trials import CONSTANT, DEFAULT_SPLIT, PAPER_90, Combination

SHOWN_DENSITY = 0.1
SPLIT_BUDGETS = (0.15, 0.2, 0.25, 0.3)
SCALES = {"flicker": 1000.0}
METRICS = (("PSNR", 1), ("SSIM", 3), ("GMSD", 3), ("flicker", 1))  # and digits


def with_interval(mean: float, half: float, digits: int = 1) -> str:
    """Returns a mean and the half-width of its interval, where it is known."""
    text = f"{mean:.{digits}f}"
    return text if math.isnan(half) else f"{text} ± {half:.{digits}f}"


def paired(first: Any, second: Any) -> tuple[float, float]:
    """Returns the mean of paired differences and its half-width."""
    return mean_and_interval(np.asarray(first) - np.asarray(second))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table, without the end of its last line."""
    return pages.table(head, rows).removesuffix("\n")


def densities_of(by_name: Mapping[str, Curve]) -> list[float]:
    """Returns all densities of some curves, the largest first."""
    found = {density for curve in by_name.values() for density in curve.densities}
    return sorted(found, reverse=True)


def cell_at(curve: Curve, density: float) -> str:
    """Returns the mean PSNR at a density; nothing where it was not measured."""
    values = curve.at(density)
    return "" if values is None else with_interval(*mean_and_interval(values))


def psnr_by_density(record: Mapping[str, Any]) -> str:
    """Methods by rows, densities by columns."""
    by_name = curves(record)
    densities = densities_of(by_name)
    return table(
        ["method", "source", *(f"{density:g}" for density in densities)],
        [
            [METHODS[n].title, METHODS[n].source, *(cell_at(c, d) for d in densities)]
            for n, c in by_name.items()
        ],
    )


def first_layer(record: Mapping[str, Any]) -> str:
    """Methods with the first layer dense beside the same with all layers sparse."""
    dense, sparse = curves(record, "first_layer"), curves(record)
    densities = densities_of(dense)
    if not densities:
        return ""

    def cell(name: str, density: float) -> str:
        text, own = cell_at(dense[name], density), dense[name].at(density)
        other = sparse[name].at(density) if name in sparse else None
        if own is None or other is None:
            return text
        return f"{text} ({with_interval(*paired(own, other))})"

    head = ["method", *(f"{density:g}" for density in densities)]
    rows = [[METHODS[n].title, *(cell(n, d) for d in densities)] for n in dense]
    return (
        "With the first layer dense, by the density of the others: PSNR, and in "
        "brackets what that is over all layers sparse:\n\n" + table(head, rows)
    )


def metric_cells(values: Mapping[str, np.ndarray | None]) -> list[str]:
    """Returns every metric with its interval, of the values of each clip."""
    cells = []
    for name, digits in METRICS:
        own = values[name.lower()]
        assert own is not None, "all metrics are measured together"
        mean, half = mean_and_interval(SCALES.get(name, 1.0) * own)
        cells.append(with_interval(mean, half, digits))
    return cells


def under_default(
    values: np.ndarray | None, default: np.ndarray | None, name: str
) -> str:
    """Returns how many decibels a method is under the default, of the same clips."""
    if values is None or default is None or name == "ours":
        return ""
    return with_interval(*paired(default, values))


def all_metrics(record: Mapping[str, Any]) -> str:
    """Every metric at the density that is shown."""
    by_name = curves(record)
    default = by_name["ours"].at(SHOWN_DENSITY) if "ours" in by_name else None
    rows = []
    kept = {
        row["name"]: row["kept_density"]
        for row in record["trials"]
        if row["part"] == "methods" and row["density"] == SHOWN_DENSITY
    }
    for name, curve in by_name.items():
        if SHOWN_DENSITY not in curve.densities:
            continue
        place = curve.densities.index(SHOWN_DENSITY)
        values = {metric: own[place] for metric, own in curve.clips.items()}
        cells = metric_cells(values)
        shares = [f"{kept[name]:.3f}", f"{curve.work[place]:.3f}"]
        less = under_default(values["psnr"], default, name)
        rows.append([METHODS[name].title, *shares, *cells, less])
    if not rows:
        return ""
    head = ["method", "density kept", "work", *(name for name, _ in METRICS)]
    return f"All metrics at density {SHOWN_DENSITY:g}:\n\n" + table(
        [*head, "dB under the default"], rows
    )


def all_metrics_at_time(record: Mapping[str, Any]) -> str:
    """Every metric in the time that the default takes at the density that is shown."""
    by_name = curves(record)
    ours = by_name.get("ours")
    time_ms = None if ours is None else ours.time(SHOWN_DENSITY)
    if ours is None or time_ms is None:
        return ""
    default, rows = ours.at(SHOWN_DENSITY), []
    for name, curve in by_name.items():
        values = {metric: curve.at_time(time_ms, metric) for metric in curve.clips}
        if values["psnr"] is not None:
            less = under_default(values["psnr"], default, name)
            rows.append([METHODS[name].title, *metric_cells(values), less])
    head = ["method", *(name for name, _ in METRICS), "dB under the default"]
    return (
        f"All metrics in the {time_ms:.2f} ms that the default takes at density "
        f"{SHOWN_DENSITY:g}, of methods that were measured on both sides of it:\n\n"
        + table(head, rows)
    )


def by_motion(record: Mapping[str, Any]) -> str:
    """PSNR of calm and of fast clips at the density that is shown."""
    kinds = motion_of_clips(record)
    rows = []
    for name, curve in curves(record).items():
        values = curve.at(SHOWN_DENSITY)
        if values is not None and all(chosen.any() for chosen in kinds.values()):
            cells = [
                with_interval(*mean_and_interval(values[kinds[kind]]))
                for kind in MOTIONS
            ]
            rows.append([METHODS[name].title, *cells])
    if not rows:
        return ""
    head = ["method", *(f"{kind}, PSNR" for kind in MOTIONS)]
    return f"By motion, at density {SHOWN_DENSITY:g}:\n\n" + table(head, rows)


def times(record: Mapping[str, Any]) -> str:
    """Time of the layer, and PSNR at the times of our default."""
    by_name, dense = curves(record), Times(record["times"]).dense
    ours = by_name.get("ours")
    densities = densities_of(by_name)
    at = [d for d in (0.25, 0.1, 0.05) if ours and ours.time(d) is not None]
    rows = []
    for name, curve in by_name.items():
        own = [curve.time(density) for density in densities]
        cells = ["" if time_ms is None else f"{time_ms:.2f}" for time_ms in own]
        for density in at:
            time_ms = ours.time(density) if ours else None
            values = None if time_ms is None else curve.at_time(time_ms)
            cells.append(
                "" if values is None else with_interval(*mean_and_interval(values))
            )
        rows.append([METHODS[name].title, *cells])
    head = ["method", *(f"ms at {d:g}" for d in densities)]
    head += [f"PSNR in our time at {d:g}" for d in at]
    said = "" if dense is None else f"Dense attention takes {dense:.2f} ms.\n\n"
    return said + table(head, rows)


def layer_errors(record: Mapping[str, Any]) -> str:
    """Relative L2 and kept mass of methods, at each density."""
    names = list(dict.fromkeys(row["name"] for row in record["layers"]))
    densities = sorted({row["density"] for row in record["layers"]}, reverse=True)

    def cell(name: str, density: float, metric: str) -> str:
        values = layer_values(record, name, density, metric)
        if values is None:
            return ""
        return with_interval(*mean_and_interval(values), digits=3)

    head = ["method"]
    head += [f"relative L2 at {d:g}" for d in densities]
    head += [f"mass kept at {d:g}" for d in densities]
    rows = [
        [
            METHODS[name].title,
            *(cell(name, d, "relative_l2") for d in densities),
            *(cell(name, d, "kept_mass") for d in densities),
        ]
        for name in names
    ]
    text = table(head, rows)
    by_layer = _by_layer(record, names)
    return text + (f"\n\n{by_layer}" if by_layer else "")


def _by_layer(record: Mapping[str, Any], names: Sequence[str]) -> str:
    """Relative L2 of each layer at the density that is shown."""
    rows = []
    for name in names:
        found = [
            row["relative_l2"]
            for row in record["layers"]
            if row["name"] == name and row["density"] == SHOWN_DENSITY
        ]
        if found:
            cells = [f"{value:.2f}" for value in np.mean(found, axis=0)]
            rows.append([METHODS[name].title, *cells])
    if not rows:
        return ""
    head = ["method", *(f"layer {n}" for n in range(len(rows[0]) - 1))]
    return f"Relative L2 by layer, at density {SHOWN_DENSITY:g}:\n\n" + table(
        head, rows
    )


def choices(record: Mapping[str, Any]) -> str:
    """Tables of what is chosen: splits of a budget, schedules, combinations."""
    sections = [_splits(record), _schedules(record), _combinations(record)]
    return "\n\n".join(section for section in sections if section)


def _splits(record: Mapping[str, Any]) -> str:
    found = best_splits(record, SPLIT_BUDGETS)
    if not found:
        return ""
    what = "time" if record.get("times") else "work"
    default = f"{DEFAULT_SPLIT}, the default"
    rows = [
        [
            f"{row['budget']:g}",
            row["motion"],
            row["name"],
            f"{row['psnr']:.1f}",
            "" if row["default"] is None else f"{row['default']:.1f}",
            "" if gain is None else with_interval(gain[0], gain[1], 2),
        ]
        for row in found
        for gain in [row["gain"]]
    ]
    head = [f"share of dense {what}", "motion", "best", "PSNR", default, "gain"]
    return (
        "## Exact blocks or means\n\nThe best split of a budget, on the tuning "
        "prompts: which means, with as many exact blocks as then fit.\n\n"
        + table(head, rows)
    )


def _schedules(record: Mapping[str, Any]) -> str:
    measured = [row for row in record["trials"] if row["part"] == "schedules"]
    by_name = {row["name"]: np.asarray(row["clips"]["psnr"]) for row in measured}
    kept = {row["name"]: row["kept_density"] for row in measured}
    if CONSTANT not in by_name:
        return ""
    constant = by_name[CONSTANT]
    rows = []
    for name, values in by_name.items():
        level = with_interval(*mean_and_interval(values))
        cells = [name, f"{kept[name]:.3f}", level, ""]
        if name != CONSTANT:
            cells[3] = with_interval(*paired(values, constant), digits=2)
        rows.append(cells)
    better = [
        name
        for name, values in by_name.items()
        if name != CONSTANT and np.greater(*paired(values, constant))
    ]
    said = (
        f"Ahead of the constant one beyond chance: {', '.join(better)}."
        if better
        else "None is ahead of the constant one beyond chance, so the default has it."
    )
    return (
        "## Reused masks and schedules\n\nThe default at a mean density of 0.1 over "
        f"the sparse steps, on the tuning prompts. {said}\n\n"
        + table(["schedule", "density kept", "PSNR", "over the constant one"], rows)
    )


def _combinations(record: Mapping[str, Any]) -> str:
    record = whole_runs(record)
    rows = [row for row in record["trials"] if row["part"] == "combinations"]
    if not rows:
        return ""
    times, here = StepTimes.shipped(), record.get("dense_steps_ms", {}).get("tuning")
    if record["device"] == "cpu":  # whose other work is in its times
        here = None
    cells = []
    for row in sorted(rows, key=lambda row: times.share(row)):
        steps = row["steps"]
        cells.append(
            [
                row["name"],
                with_interval(*mean_and_interval(row["clips"]["psnr"])),
                *(str(steps[work]) for work in ("dense", "sparse", "skipped")),
                f"{times.share(row):.3f}",
                *([f"{sum(row['steps_ms']) / sum(here):.3f}"] if here else []),
            ]
        )
    head = ["attention + cache + linears", "PSNR", "dense", "sparse", "skipped", "time"]
    own_time = ""
    if here:
        head.append("time here")
        own_time = f"*Time here* is that of its own steps on {record['device']}. "
    return (
        "## With step caches and FP8\n\nWhole runs on the tuning prompts, against the "
        "dense bfloat16 video. Time is that of the steps over those of the dense run, "
        f"with steps of Wan2.1 14B as they were measured (`{times.source}`): the small "
        f"model spends little in linear layers. {own_time}A cache decides for all "
        "clips of a batch together.\n\n" + table(head, cells) + _presets(record)
    )


def recommended(record: Mapping[str, Any]) -> list[str]:
    """Returns a line for each preset that was chosen: what it is, and its time.

    A few prompts and steps are no ground to recommend one.
    """
    whole, times = whole_runs(record), StepTimes.shipped()
    setup, lines = whole["setup"], []
    if whole.get("presets") and len(setup["tuning"]) < len(TUNING):
        return [
            f"- Whole videos: {len(setup['tuning'])} tuning prompts and "
            f"{setup['sampling']['num_steps']} steps recommend no preset of speed."
        ]
    for preset, fields in whole.get("presets", {}).items():
        name = Combination(**fields).name
        share = times.share_of(whole, name)
        lines.append(f"- A whole video, {preset}: {name}, {share:.3f} of the time.")
    return lines


def _presets(record: Mapping[str, Any]) -> str:
    """Says what was chosen, and how it does on prompts it was not chosen on."""
    chosen = record.get("presets")
    if not chosen:
        return ""
    by_name = {
        row["name"]: np.asarray(row["clips"]["psnr"])
        for row in record["trials"]
        if row["part"] == "presets"
    }
    paper, times = by_name.get(PAPER_90.name), StepTimes.shipped()
    rows = []
    for preset, fields in chosen.items():
        name = Combination(**fields).name
        cells = [preset, name, f"{times.share_of(record, name):.3f}", "not measured"]
        if paper is not None and name in by_name:
            cells[3] = with_interval(*paired(by_name[name], paper))
        rows.append(cells)
    gains = ", ".join(f"{name} {gain:g}" for name, gain in PRESET_GAINS.items())
    return (
        "\n\nOf these the presets are the fastest that lead the paper's selection at "
        f"90 % without a cache by as many decibels ({gains}), the 95 % interval of the "
        "paired difference included, on the tuning prompts; of those that take up to "
        f"{100 * (NEAR - 1):.0f} % longer than the fastest, the best. What they have "
        "over it on the reporting prompts, of which they saw none:\n\n"
        + table(["preset", "what it is", "time", "PSNR over the paper's 90 %"], rows)
    )
