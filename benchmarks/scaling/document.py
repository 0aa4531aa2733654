"""Writes what runs have measured, and what follows for 1 to 64 GPUs, into a page.

    python -m benchmarks.scaling.document                      # docs/scaling.md
    python -m benchmarks.scaling.document RECORD... --print    # of other records

Of several records the last that has a step counts, beside one device of its own run.
The text between the marks of the page follows from them; a test holds it to them.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import pages
from benchmarks.common.pages import paragraph
from benchmarks.common.records import ROOT
from benchmarks.scaling import models
from benchmarks.scaling.model import (
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
RESULTS = ROOT / "benchmarks" / "results"
# All parts, then what was measured again after a change.
RECORDS = (RESULTS / "scaling_h200.json", RESULTS / "scaling_sequence_h200.json")
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


def merged(records: Sequence[Record]) -> Record:
    """Returns one record with the last figure of every step, transfer and layer."""
    result: Record = {}
    for record in records:
        for part, found in record.items():
            if isinstance(found, dict):
                result[part] = result.get(part, {}) | found
            else:
                result[part] = found
    return result


def section(records: Sequence[Record]) -> str:
    """Returns the text between the marks; what it says without a record is so, too."""
    if not records:
        return paragraph(
            "No run on several GPUs is recorded yet: `python -m "
            "benchmarks.scaling.document RECORD --print` makes tables of one."
        )
    record, wan, hunyuan = merged(records), wan_video(), hunyuan_video()
    parts = parts_of(record, wan)
    weights = record["hunyuan"].get(ONE, {}), record["wan"][ONE]
    scale = weights[0].get("weights_gb", 0.0) / weights[1]["weights_gb"] / wan.rows
    of_hunyuan = parts_of_hunyuan(record, parts, scale)
    blocks = [measured(records), layer(record), overlap(record), sources(parts)]
    blocks = [block for block in blocks if block]
    blocks.append(table(parts, wan, NAMES["wan"]))
    if of_hunyuan is not None:
        blocks.append(table(of_hunyuan, hunyuan, NAMES["hunyuan"]))
    blocks.append(differences(record, parts, of_hunyuan, wan, hunyuan))
    return "\n".join(blocks)


def measured(records: Sequence[Record]) -> str:
    """Returns the table of steps that were measured."""
    environment = records[0]["environment"]
    commands = (record["environment"]["command"] for record in records)
    where = pages.where_measured(record["environment"] for record in records)
    lines = [
        paragraph(
            f"Measured on {len(environment['gpus'])} {environment['device']} "
            f"({where}), bfloat16, the paper's "
            f"selection at {records[0]['sparsity']:.0%}. Masks and estimates are those "
            "of the first step, beside those of one GPU: products of fewer rows round "
            "otherwise. Each step is compared with one GPU of its own run."
        ),
        "```",
        *(command.split(" --limit")[0] for command in commands),
        "```",
        "",
    ]
    head = ["Step", "mesh", "commit", "seconds", "times as fast", "pairs kept by both"]
    rows = (
        row(records, part, name, title)
        for part, title in NAMES.items()
        for name in merged(records).get(part, {})
    )
    head.append("relative difference")
    return "\n".join([*lines, pages.table(head, filter(None, rows))])


def row(records: Sequence[Record], part: str, name: str, title: str) -> list[str]:
    """Returns the cells of the last run that timed a step; none if there is none."""
    for record in reversed(records):
        ms, one = median_ms(record, part, name), median_ms(record, part, ONE)
        if ms is None or one is None:
            continue
        step = record[part][name]
        mesh = f"`{step['mesh']}`" if step["mesh"] else "one GPU"
        if name == "weights":
            mesh += ", spread weights"
        return [
            *(title, mesh, record["environment"]["commit"]),
            *(f"{ms / 1e3:.2f}", f"{one / ms:.2f}"),
            *(f"{step['masks']['common_pairs']:.2%}", f"{step['relative_error']:.1e}"),
        ]
    return []


def layer(record: Record) -> str:
    """Returns sentences on the attention layer and on spread weights."""
    figures, said = record["summary"], []
    for name, value in figures.items():
        count = name.removeprefix("layer_")
        if name.startswith("layer_") and count.isdigit():
            one, many = (
                statistics.median(record["layer"][way]["ms"])
                for way in (ONE, f"plain jit, {count}")
            )
            said.append(
                f"An attention layer of HunyuanVideo takes {one:.1f} ms on one GPU and "
                f"{many:.1f} ms sharded by heads over {count}: {value:.2f} times as "
                "fast."
            )
    if "weights_time_ratio" in figures:
        said.append(
            f"Spread weights take {figures['weights_memory_ratio']:.0%} of the memory "
            f"and {figures['weights_time_ratio'] - 1:.1%} more time for a step."
        )
    return paragraph(" ".join(said))


def overlap(record: Record) -> str:
    """Returns what a profile says of transfers and work at once; empty without."""
    found = [
        (name, step)
        for name, step in record.get("profile", {}).items()
        if step.get("devices", 1) > 1 and "costliest" in step
    ]
    if not found:
        return ""
    (name, step), *_ = found
    devices = step["devices"]
    nccl = [k for k in step["costliest"] if "nccl" in k["kernel"].lower()]
    sent_ms = sum(kernel["ms"] for kernel in nccl) / devices
    both_ms = max(step["kernels_ms"] / devices - step["step_ms"], 0.0)
    share = record["wan"][name]["sent"]["all-to-all"]["overlapped"]
    one_ms = record["links"][f"all-to-all, {devices}"]["ms"]
    return paragraph(
        "Overlap: XLA's schedule has a product or a kernel beside "
        f"{share:.0%} of the exchanged bytes of `{name}`. In a profile of it NCCL's "
        f"kernels run {sent_ms:.0f} ms on each GPU, at least {both_ms:.0f} ms of them "
        f"beside others. One takes {nccl[0]['median_ms']:.2f} ms in the step (median) "
        f"and {one_ms:.2f} ms by itself: both GPUs must have begun, and work meanwhile "
        "shares the GPU's units."
    )


def sources(parts: Parts) -> str:
    """Returns the sentences that name the model's parts."""
    links = " ".join(
        f"An all-to-all among {count} GPUs starts in {link.latency_ms:.2f} ms and "
        f"sends {link.gb_per_s:.0f} GB/s; copies around it take "
        f"{link.reordered_gb_per_s:.0f} GB/s."
        for count, link in parts.links.items()
    )
    return paragraph(
        f"The model's parts: a step of Wan takes {parts.step_ms / 1e3:.2f} s on one "
        f"GPU, {parts.fixed_ms / 1e3:.3f} s of it fixed. {links} Exchanges add "
        f"{parts.added:.2f} times their own time to a step. Between hosts of {HOST} "
        f"GPUs {INFINIBAND_GB_PER_S:.0f} GB/s for each are assumed, not measured."
    )


def table(parts: Parts, video: Video, title: str) -> str:
    """Returns the model's steps on 1 to 64 GPUs, by the fastest mesh of each."""
    rows, one_ms = [], step_ms(parts, video, 1, 1)
    for devices in COUNTS:
        mesh = fastest(parts, video, devices)
        if mesh is None:
            continue
        sequence, guidance = mesh
        ms = step_ms(parts, video, sequence, guidance)
        name = f"`sequence={sequence},guidance={guidance}`" if devices > 1 else "-"
        sent = f"{video.sent_gb(sequence, guidance):.1f}"
        rows.append([str(devices), name, f"{ms / 1e3:.3f}", f"{one_ms / ms:.2f}", sent])
    head = ["GPUs", "mesh", "seconds", "times as fast", "GB sent by each"]
    text = f"{title}, by the model:\n\n" + pages.table(head, rows)
    missing = [str(n) for n in COUNTS if fastest(parts, video, n) is None]
    if missing:
        text += f"\nNo mesh of {', '.join(missing)} divides {video.heads} heads.\n"
    return text


def differences(
    record: Record,
    parts: Parts,
    of_hunyuan: Parts | None,
    wan: Video,
    hunyuan: Video,
) -> str:
    """Returns how far the model is from steps that were measured."""
    found = errors(record, parts, wan, "wan")
    if of_hunyuan is not None:
        found |= errors(record, of_hunyuan, hunyuan, "hunyuan")
    listed = ", ".join(f"`{name}` {error:+.1%}" for name, error in found.items())
    return paragraph(
        f"The model's time over the measured one: {listed}. The first is what it is "
        "fitted to."
    )


def written(text: str, records: Sequence[Record]) -> str:
    """Returns a page with the section in it."""
    return pages.written(text, section(records))


def read(files: Sequence[Path]) -> list[Record]:
    """Reads the records that there are."""
    return [json.loads(file.read_text()) for file in files if file.exists()]


def main() -> None:
    """Writes the page, or prints the section."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("records", type=Path, nargs="*", default=RECORDS)
    parser.add_argument("--print", action="store_true", help="leave the page as it is")
    options = parser.parse_args()
    records = read(options.records)
    if options.print:
        print(section(records))
    else:
        PAGE.write_text(written(PAGE.read_text(), records))


if __name__ == "__main__":
    main()
