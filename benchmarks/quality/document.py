"""Writes `docs/quality.md`, its pictures and the record that they are made from.

    python -m benchmarks.quality.document lab lab_50 --record quality_h200.json

A second folder, of runs with more steps, is where combinations and presets are from.
The text follows from the record alone; a test holds the page to it. Without a folder
the page is written anew from the record that is there.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.pages import commits_of
from benchmarks.common.records import ROOT, write_json
from benchmarks.quality import pictures, tables
from benchmarks.quality.likeness import FLOOR_DB
from benchmarks.quality.methods import METHODS
from benchmarks.quality.prompts import REPORTING
from benchmarks.quality.record import RECORD
from benchmarks.quality.summary import (
    WHOLE,
    curves,
    figures,
    summarize,
    whole_runs,
)
from benchmarks.quality.times import Times
from benchmarks.quality.trials import PARTS

WORDS = Path(__file__).parent / "page"
PAGE = ROOT / "docs" / "quality.md"
IMAGES = ROOT / "docs" / "images"
RESULTS = ROOT / "benchmarks" / "results"
# The page is made from the first that is there.
RECORDS = ("quality_h100.json", "quality_h200.json", "quality_cpu.json")


def shipped_record() -> Path:
    """Returns the record that the page is made from."""
    found = [RESULTS / name for name in RECORDS if (RESULTS / name).exists()]
    if not found:
        raise FileNotFoundError(f"none of {RECORDS} is in {RESULTS}")
    return found[0]


def page(record: Mapping[str, Any], name: str) -> str:
    """Returns the page of a record, as Markdown.

    Args:
      record: What a run has measured, with the names of its pictures.
      name: File name of the record.
    """
    sections = (
        written("introduction"),
        provenance(record, name),
        floor(record),
        quality(record),
        equal_time(record),
        layers(record),
        tables.choices(record),
        picture(record, "quality_speed.png", "PSNR over the time of a whole video"),
        use(record),
        written("limits"),
        written("commands"),
    )
    return "\n\n".join(section for section in sections if section) + "\n"


def written(name: str) -> str:
    """Returns words of the page that do not depend on a record."""
    return (WORDS / f"{name}.md").read_text().strip()


def provenance(record: Mapping[str, Any], name: str) -> str:
    """Says what the figures depend on."""
    setup, last = record["setup"], record["environments"][-1]
    sampling = setup["sampling"]
    versions = ", ".join(
        f"{package} {last['versions'][package]}"
        for package in ("python", "jax", "flax", "numpy")
        if package in last["versions"]
    )
    commits = commits_of(record["environments"])
    measured = parts_measured(record)
    missing = [part for part in PARTS if part not in measured]
    whole = whole_runs(record)
    grid, tile = setup["grid"], setup["tile"]
    lines = [
        "## This run",
        "",
        f"`benchmarks/results/{name}`, by these commands:",
        "",
        "```sh",
        *commands_of(record),
        "```",
        "",
        f"- {record['device']}; {versions}; commit {commits}, {last['date'][:10]}.",
        f"- Model: {setup['checkpoint']}. {len(setup['reporting'])} reporting and "
        f"{len(setup['tuning'])} tuning prompts, {sampling['frames']} frames of "
        f"{sampling['height']} x {sampling['width']} pixels, {sampling['num_steps']} "
        f"steps, guidance {sampling['guidance']:g}.",
        f"- {grid[0]} x {grid[1]} x {grid[2]} tokens in {setup['tiles']} tiles of "
        f"{tile[0]} x {tile[1]}.",
    ]
    if whole is not record:
        lines.append(
            f"- Combinations and presets: {whole['setup']['sampling']['num_steps']} "
            f"steps, at most {len(whole['setup']['reporting'])} prompts, commit "
            f"{commits_of(whole['environments'])}."
        )
    if missing:
        lines.append(f"- Not measured in it: {', '.join(missing)}.")
    if not record.get("times"):
        lines.append(
            "- Times of layers were not measured: nothing is said about equal time."
        )
    if len(setup["reporting"]) < len(REPORTING):
        lines.append(
            f"- It is a reduced run, of {len(setup['reporting'])} prompts where a "
            f"whole one has {len(REPORTING)}, and of densities "
            f"{', '.join(f'{density:g}' for density in setup['densities'])}. Its "
            "intervals are wide: a first look, not a verdict."
        )
    return "\n".join(lines)


def commands_of(record: Mapping[str, Any]) -> list[str]:
    """Returns the commands that a record is of, each once."""
    environments = [*record["environments"], *whole_runs(record)["environments"]]
    return list(dict.fromkeys(each["command"] for each in environments))


def parts_measured(record: Mapping[str, Any]) -> set[str]:
    """Returns the parts that a record has results of."""
    trials = [*record["trials"], *whole_runs(record)["trials"]]
    found = {row["part"] for row in trials}
    return found | ({"layers"} if record["layers"] else set())


def floor(record: Mapping[str, Any]) -> str:
    """Says how far two dense kernels are apart."""
    pair = figures(record).get("psnr_floor")
    if pair is None:
        return ""
    kernels = [row["name"] for row in record["trials"] if row["part"] == "floor"]
    if pair[0] >= FLOOR_DB - 0.01:
        said = f"the videos agree to {FLOOR_DB:g} dB and better on this device."
    else:
        said = (
            f"the farthest agrees to {tables.with_interval(*pair)} dB. A method can't "
            "be told from dense attention beyond that."
        )
    return (
        "## The floor\n\nDense attention, against other exact kernels after all steps "
        f"({'; '.join(kernels)}): {said}"
    )


def quality(record: Mapping[str, Any]) -> str:
    """Tables and pictures at equal density."""
    if "methods" not in parts_measured(record):
        return ""
    parts = [
        "## At equal density",
        "PSNR to the dense video, in dB, by density. The oracle ranks blocks by their "
        "true masses and has nothing for the dropped. A row keeps whole blocks, so "
        "rules of equal rows keep somewhat more than is asked for where a video has "
        "few; the next table says what was kept.",
        tables.psnr_by_density(record),
        picture(record, "quality_density.png", "PSNR over work"),
        tables.all_metrics(record),
        tables.by_motion(record),
        tables.first_layer(record),
        picture(record, "quality_strips.jpg", "Frames of two clips at density 0.1"),
        picture(record, "quality_maps.png", "Blocks kept at density 0.1"),
    ]
    return "\n\n".join(part for part in parts if part)


def picture(record: Mapping[str, Any], name: str, caption: str) -> str:
    """Returns a picture's line, if the record has it."""
    return f"![{caption}](images/{name})" if name in record["pictures"] else ""


def equal_time(record: Mapping[str, Any]) -> str:
    """Table and picture at equal time of the layer."""
    if not record.get("times"):
        return ""
    times = record["times"]
    parts = [
        "## At equal time",
        f"Times of a layer of {times['shape']['qkv'][1]:,} tokens and "
        f"{times['shape']['qkv'][2]} heads on {times['environment']['device']}, all "
        "but the projections. PSNR between measured densities is interpolated along "
        'straight lines; nothing is extrapolated. The oracle and "top_p" have the '
        "times of the draft with equal rows.",
        tables.times(record),
        tables.all_metrics_at_time(record),
        picture(record, "quality_time.png", "PSNR over the time of a layer"),
    ]
    return "\n\n".join(part for part in parts if part)


def layers(record: Mapping[str, Any]) -> str:
    """Tables of single layers."""
    if not record["layers"]:
        return ""
    steps = sorted({row["step"] + 1 for row in record["layers"]})
    return "\n\n".join(
        [
            "## In single layers",
            f"Mean over clips, layers and the steps {', '.join(map(str, steps))}.",
            tables.layer_errors(record),
        ]
    )


def use(record: Mapping[str, Any]) -> str:
    """Says what to use when, as far as this record tells."""
    lines = ["## What to use when", ""]
    by_name = curves(record)
    real = {n: c for n, c in by_name.items() if not METHODS[n].is_bound}
    densities = {density for curve in real.values() for density in curve.densities}
    for density in sorted(densities, reverse=True):
        said = verdict({name: curve.at(density) for name, curve in real.items()})
        lines.append(f"- Density {density:g}: {said}")
    dense = Times(record.get("times")).dense
    for share in tables.SPLIT_BUDGETS if dense is not None else ():
        assert dense is not None, "there are shares of it"
        at_time = {name: curve.at_time(share * dense) for name, curve in real.items()}
        if any(values is not None for values in at_time.values()):
            lines.append(f"- {share:g} of the time of dense: {verdict(at_time)}")
    lines += tables.recommended(record)
    lines += [
        "- Where speed must compare with published figures: `DraftConfig.paper()`.",
        "- Exact attention: dense. What a density below 1 costs stands above.",
    ]
    found = figures(record)
    lines += [
        "",
        "The flat `summary` of the record, with half-widths of intervals:",
        "",
        tables.table(
            ["figure", "value"],
            [
                [f"`{name}`", tables.with_interval(*pair, digits=2)]
                for name, pair in found.items()
            ],
        ),
    ]
    return "\n".join(lines)


def verdict(values: Mapping[str, np.ndarray | None]) -> str:
    """Says which method is ahead, and if that can be told.

    Args:
      values: PSNR of each clip by method; None where it was not measured.
    """
    known = {name: clips for name, clips in values.items() if clips is not None}
    ranked = sorted(known, key=lambda name: -float(known[name].mean()))
    title = METHODS[ranked[0]].title
    if len(ranked) < 2:
        return f"{title}."
    mean, half = tables.paired(known[ranked[0]], known[ranked[1]])
    told = "ahead of" if mean > half else "not to be told apart from"
    gain = tables.with_interval(mean, half)
    return f"{title}, {told} {METHODS[ranked[1]].title} ({gain} dB)."


def publish(folder: Path, target: Path, whole: Path | None = None) -> dict[str, Any]:
    """Puts the record and the pictures of a run where they are committed.

    Args:
      folder: Of the run.
      target: Where the record goes.
      whole: Folder of a run of combinations and presets, with more steps.
    """
    record = json.loads((folder / RECORD).read_text())
    if whole is not None:
        record[WHOLE] = json.loads((whole / RECORD).read_text())
        record["summary"] = summarize(record)
    record["pictures"] = pictures.draw_all(record, folder, IMAGES)
    write_json(target, record)
    return record


def main(arguments: list[str] | None = None) -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="of a run")
    parser.add_argument("whole", nargs="?", type=Path, help="of combinations")
    parser.add_argument("--record", help="file name, in benchmarks/results")
    options = parser.parse_args(arguments)
    target = RESULTS / options.record if options.record else shipped_record()
    if options.folder is None:
        record = json.loads(target.read_text())
    else:
        record = publish(options.folder, target, options.whole)
    PAGE.write_text(page(record, target.name))


if __name__ == "__main__":
    main()
