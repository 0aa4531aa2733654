"""Writes what a run has measured, and what follows for 1 to 64 GPUs, into a page.

    python -m benchmarks.scaling.document                    # docs/scaling.md
    python -m benchmarks.scaling.document RECORD --print     # of another record

The text between the page's marks follows from the record alone; a test holds it to it.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.common.records import ROOT
from benchmarks.scaling import models
from benchmarks.scaling.model import (
    EXCHANGES,
    HOST,
    INFINIBAND_GB_PER_S,
    ONE,
    Parts,
    Video,
    errors,
    fastest,
    median_ms,
    parts_of,
    parts_of_hunyuan,
    step_ms,
)

Record = dict[str, Any]

PAGE = ROOT / "docs" / "scaling.md"
RECORD = ROOT / "benchmarks" / "results" / "scaling_h200.json"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
COUNTS = (1, 2, 4, 8, 16, 24, 32, 40, 48, 64)
NAMES = {"wan": "Wan 14B, 768x1280, 81 frames", "hunyuan": "HunyuanVideo, 129 frames"}


def wan_video() -> Video:
    """Returns what Wan's step exchanges, two rows of it."""
    config = models.WAN["14b"][0]
    tokens, heads, head_dim = models.layer_of("14b")
    return Video(
        tokens=tokens,
        channels=heads * head_dim,
        heads=heads,
        layers=config.num_layers,
        rows=2,
    )


def hunyuan_video() -> Video:
    """Returns what HunyuanVideo's step exchanges."""
    config = models.hunyuan.MODELS["13b"]
    frames, height, width, _ = models.hunyuan_latents("13b")
    return Video(
        tokens=frames * height * width // 4,
        channels=config.dim,
        heads=config.num_heads,
        layers=config.num_double_blocks + config.num_single_blocks,
        rows=1,
    )


def section(record: Record | None) -> str:
    """Returns the text between the marks; what it says without a record is so, too."""
    if record is None:
        return (
            "No run on several GPUs is recorded yet: `python -m\n"
            "benchmarks.scaling.document RECORD --print` makes tables of one.\n"
        )
    wan, hunyuan = wan_video(), hunyuan_video()
    parts = parts_of(record, wan)
    weights = record["hunyuan"].get(ONE, {}), record["wan"][ONE]
    scale = weights[0].get("weights_gb", 0.0) / weights[1]["weights_gb"] / wan.rows
    of_hunyuan = parts_of_hunyuan(record, parts, scale)
    blocks = [measured(record), sources(record, parts), table(parts, wan, NAMES["wan"])]
    if of_hunyuan is not None:
        blocks.append(table(of_hunyuan, hunyuan, NAMES["hunyuan"]))
    blocks.append(differences(record, parts, of_hunyuan, wan, hunyuan))
    return "\n".join(blocks)


def measured(record: Record) -> str:
    """Returns the table of steps that were measured."""
    environment = record["environment"]
    lines = [
        f"Measured on {len(environment['gpus'])} {environment['device']} "
        f"({environment['date'][:10]}, commit {environment['commit']}), bfloat16, the",
        f"paper's selection at {record['sparsity']:.0%}. Masks and estimates are those "
        "of the first step,",
        "beside those of one GPU.",
        "",
        "| Step | mesh | seconds | times as fast | pairs kept by both | "
        "relative difference |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for part, title in NAMES.items():
        one = median_ms(record, part, ONE)
        for name, step in record.get(part, {}).items():
            ms = median_ms(record, part, name)
            if ms is None or one is None:
                continue
            mesh = f"`{step['mesh']}`" if step["mesh"] else ONE
            if name == "weights":
                mesh += ", spread weights"
            lines.append(
                f"| {title} | {mesh} | {ms / 1e3:.2f} | {one / ms:.2f} | "
                f"{step['masks']['common_pairs']:.2%} | {step['relative_error']:.1e} |"
            )
    return "\n".join(lines) + "\n"


def sources(record: Record, parts: Parts) -> str:
    """Returns the sentence that names the model's parts."""
    rates = ", ".join(
        f"{link.gb_per_s:.0f} GB/s after {link.latency_ms:.2f} ms among {count}"
        for count, link in parts.links.items()
    )
    hidden = record["wan"].get(f"step_sequence_{min(parts.links)}", {}).get("sent", {})
    share = hidden.get("all-to-all", {}).get("overlapped")
    beside = "" if share is None else f" ({share:.0%} run beside products or kernels)"
    return (
        f"The parts: {parts.step_ms / 1e3:.2f} s on one GPU, "
        f"{parts.fixed_ms / 1e3:.3f} s of them fixed; all-to-alls at {rates}; devices\n"
        f"wait during {parts.exposed:.0%} of them{beside}. Between hosts of {HOST}\n"
        f"GPUs {INFINIBAND_GB_PER_S:.0f} GB/s for each is assumed, not measured.\n"
    )


def table(parts: Parts, video: Video, title: str) -> str:
    """Returns the model's steps on 1 to 64 GPUs, by the fastest mesh of each."""
    lines = [
        f"{title}, by the model:",
        "",
        "| GPUs | mesh | seconds | times as fast | GB sent by each |",
        "| --- | --- | --- | --- | --- |",
    ]
    one_ms = step_ms(parts, video, 1, 1)
    for devices in COUNTS:
        mesh = fastest(parts, video, devices)
        if mesh is None:
            continue
        sequence, guidance = mesh
        ms = step_ms(parts, video, sequence, guidance)
        name = f"`sequence={sequence},guidance={guidance}`" if devices > 1 else "-"
        lines.append(
            f"| {devices} | {name} | {ms / 1e3:.3f} | {one_ms / ms:.2f} | "
            f"{video.sent_gb(sequence, guidance):.1f} |"
        )
    missing = [str(n) for n in COUNTS if fastest(parts, video, n) is None]
    if missing:
        lines += ["", f"No mesh of {', '.join(missing)} divides {video.heads} heads."]
    return "\n".join(lines) + "\n"


def differences(
    record: Record,
    parts: Parts,
    of_hunyuan: Parts | None,
    wan: Video,
    hunyuan: Video,
) -> str:
    """Returns how far the model is from steps that were measured."""
    found = errors(record, parts, wan, "wan")
    found |= errors(record, parts, wan, "variants")
    if of_hunyuan is not None:
        found |= errors(record, of_hunyuan, hunyuan, "hunyuan")
    listed = ", ".join(f"`{name}` {error:+.1%}" for name, error in found.items())
    return (
        f"The model's time over the measured one: {listed}. The first is what the\n"
        "share of waiting is fitted to; in a step that waits it is all of "
        f"{EXCHANGES} transfers of a layer.\n"
    )


def written(text: str, record: Record | None) -> str:
    """Returns a page with the section in it."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + section(record) + END + rest.split(END)[1]


def main() -> None:
    """Writes the page, or prints the section."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("record", type=Path, nargs="?", default=RECORD)
    parser.add_argument("--print", action="store_true", help="leave the page as it is")
    options = parser.parse_args()
    record = json.loads(options.record.read_text()) if options.record.exists() else None
    if options.print:
        print(section(record))
    else:
        PAGE.write_text(written(PAGE.read_text(), record))


if __name__ == "__main__":
    main()
