"""Writes what `benchmarks.wan.wan22` has measured into the page of Wan2.2.

    python -m benchmarks.wan.wan22_document

The text between the marks of the page follows from the record; a test holds it to it.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.common import pages
from benchmarks.common.options import make_parser
from benchmarks.common.pages import paragraph, table
from benchmarks.common.records import ROOT
from benchmarks.wan.wan22_summary import cases_of

Record = dict[str, Any]

PAGE = ROOT / "docs" / "wan2_2.md"
RECORD = ROOT / "benchmarks" / "results" / "wan22_h200.json"


def section(record: Record) -> str:
    """Returns the text between the marks."""
    parts = record["parts"]
    blocks = (
        source(parts.values()),
        expert(cases_of(parts.get("expert", {}))),
        pair(parts.get("fp8_pair", {}), parts.get("streamed", {})),
        ti2v(cases_of(parts.get("ti2v", {}))),
        held(cases_of(parts.get("held", {}))),
        decoder(cases_of(parts.get("vae", {}))),
        *(paragraph(part["note"]) for part in parts.values() if "note" in part),
    )
    return "\n".join(block for block in blocks if block)


def source(parts: Iterable[Record]) -> str:
    """Returns what the figures are of."""
    found = [part["environment"] for part in parts if part.get("environment")]
    return paragraph(
        f"One {found[0]['device']} ({pages.where_measured(found)}), "
        f"`python -m benchmarks.wan.wan22` (`{RECORD.name}`): random weights, guided "
        "steps of two calls, the paper's selection. In brackets how many times as fast "
        "as the dense bfloat16 step with cuDNN's attention in the same process."
    )


def expert(cases: Mapping[str, Record]) -> str:
    """Returns the table of an expert's steps, and those of the other."""
    columns = [("float8", mode) for mode in ("0.75", "0.9")]
    columns += [("bfloat16", mode) for mode in ("0.75", "0.9")]
    columns += [("default", "0.9")]
    rows, others = [], []
    for size in dict.fromkeys(name.split(", ")[0] for name in cases):
        dense = cases.get(f"{size}, cudnn", {})
        steps = (
            time_of(cases.get(f"{size}, {name}", {}), mode, dense)
            for name, mode in columns
        )
        rows.append([f"{size}, 81 frames", seconds(dense), *steps])
        other = cases.get(f"{size}, float8", {}).get("other_expert_ms")
        if other is not None:
            others.append(f"{other / 1e3:.2f} s at {size}")
    if not rows:
        return ""
    head = ["a step of an A14B transformer, seconds", "dense", "FP8, 75 %", "FP8, 90 %"]
    head += ["75 %", "90 %", "FP8, default at 90 %"]
    text = table(head, rows)
    if others:
        text += "\n" + paragraph(
            "A step of the other transformer by the same program, in FP8 at 90 %: "
            f"{' and '.join(others)}."
        )
    return text


def pair(resident: Record, streamed: Record) -> str:
    """Returns the memory of both transformers, and the time of the switch."""
    said = []
    if "peak_gb" in resident:
        said.append(
            f"Both on the GPU in FP8 take {resident['peak_gb']:.1f} GB at most."
        )
    if "peak_gb" in streamed:
        said.append(
            f"In bfloat16 in each other's place {streamed['peak_gb']:.1f} GB are taken."
        )
    if "switch_s" in streamed:
        said.append(
            f"The switch before step {streamed['switch_before_step'] + 1} of 40 takes "
            f"{streamed['switch_s']:.2f} s, with what the step before it pays for the "
            "first pieces."
        )
    if "to_pinned_memory_s" in streamed:
        said.append(
            "Copying both to memory that the GPU reads directly takes "
            f"{streamed['to_pinned_memory_s']:.0f} s once."
        )
    return paragraph(" ".join(said)) if said else ""


def ti2v(cases: Mapping[str, Record]) -> str:
    """Returns the table of the 5B model's steps by tile, its own first."""
    if not cases:
        return ""
    names = [name.rpartition("tile ")[2] for name in cases if "tile " in name]
    rows = [tile_row(cases, "", tile_of(cases["bfloat16"]))]
    rows += [
        tile_row(cases, f"tile {name}", name.replace("x", " x "))
        for name in dict.fromkeys(names)
    ]
    head = ["a step of TI2V-5B, 704x1280, 121 frames, seconds: tile", "pairs of tokens"]
    head += ["dense", "85 %", "FP8, 85 %", "FP8, default at 85 %"]
    return table(head, rows)


def held(cases: Mapping[str, Record]) -> str:
    """Returns the times with a first frame that is held."""
    found = {name: case for name, case in cases.items() if "modes" in case}
    if not found:
        return ""
    said = [
        f"{time_of(case, '0.85', cases.get('cudnn', {}))} in "
        f"{name.partition(',')[0].replace('float8', 'FP8')}"
        for name, case in found.items()
    ]
    tiles = dict.fromkeys(map(tile_of, found.values()))
    return paragraph(
        f"With an image as the first frame and tiles of {', '.join(tiles)}: "
        f"{', '.join(said)}."
    )


def tile_of(case: Record) -> str:
    """Returns the tile of a case in words."""
    return " x ".join(map(str, case["tile"]))


def tile_row(cases: Mapping[str, Record], what: str, title: str) -> list[str]:
    """Returns the line of a tile."""
    dense, ending = cases.get("cudnn", {}), f", {what}" if what else ""
    names = (
        f"bfloat16{ending}",
        f"float8{ending}",
        f"float8, {' '.join(filter(None, ('default', what)))}",
    )
    steps = [time_of(cases.get(name, {}), "0.85", dense) for name in names]
    kept = cases.get(names[0], {}).get("modes", {}).get("0.85", {}).get("kept_density")
    share = "-" if kept is None else f"{kept:.1%}"
    return [title, share, seconds(dense), *steps]


def decoder(cases: Mapping[str, Record]) -> str:
    """Returns the table of the 5B model's decoder."""
    rows = []
    for name, case in cases.items():
        if "seconds" not in case:
            continue
        dtype, form = name.split(", ")
        peak = f"{case['peak_gb']:.1f}" if "peak_gb" in case else "-"
        rows.append([dtype, form.upper(), f"{case['seconds']:.1f}", peak])
    head = ("decoding 121 frames of 704x1280", "convolutions", "seconds", "peak, GB")
    return table(head, sorted(rows, reverse=True)) if rows else ""


def seconds(case: Record) -> str:
    """Returns the time of a dense step."""
    return f"{case['median_ms'] / 1e3:.2f}" if "median_ms" in case else "-"


def time_of(case: Record, mode: str, dense: Record) -> str:
    """Returns the time of a step, and how many times as fast as the dense one it is."""
    ms = case.get("modes", {}).get(mode, {}).get("median_ms")
    if ms is None:
        return "-"
    if "median_ms" not in dense:
        return f"{ms / 1e3:.2f}"
    return f"{ms / 1e3:.2f} ({dense['median_ms'] / ms:.2f})"


def read() -> Record:
    """Returns the record."""
    return json.loads(RECORD.read_text())


def written(text: str, record: Record) -> str:
    """Returns a page with what a record says."""
    return pages.written(text, section(record))


def main(arguments: list[str] | None = None) -> None:
    """Writes the page."""
    make_parser(__doc__).parse_args(arguments)
    PAGE.write_text(written(PAGE.read_text(), read()))


if __name__ == "__main__":
    main()
