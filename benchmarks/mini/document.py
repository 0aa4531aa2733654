"""Writes what was measured of the small model into the site, with its pictures.

    python -m benchmarks.mini.document

The text between the marks of both pages follows from the records that
`benchmarks.mini.record` has written; a test holds the pages to them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import pages
from benchmarks.common.options import make_parser
from benchmarks.common.pages import paragraph, table
from benchmarks.common.records import ROOT
from benchmarks.mini import pictures
from benchmarks.mini.record import MEANS, TRAINING, read, size_of
from draft_jax import DraftConfig
from models.mini.evaluate import ATTENTION_PROMPTS
from models.mini.sources import Sources

Record = Mapping[str, Any]

DOCS = ROOT / "docs"
PIXELS = (2, 8, 8)  # frames, rows and columns behind a token
LABELS = {
    "percentile": "the paper's (`DraftConfig.paper()`)",
    "row_topk": "`row_topk`",
    "sub_tiles": "`row_topk`, drafts of {draft}",
    "mass": "mass, {means}",
    "spread": "spread, {means}",
    "default": "spread, {means}, correction",
    "exact_spread": "exact spread, {means}",
}


def training_section(record: Record) -> str:
    """Returns what stands between the marks of the page of the small model."""
    blocks = (
        length(record),
        stage_table(record["training"]["stages"]),
        "![Loss](images/mini_loss.png)\n",
        commands(record["commands"]),
        codec(record["codec"]),
        faithfulness(record["faithfulness"]),
        attention(record["attention"]),
    )
    return "\n" + "\n".join(blocks) + "\n"


def length(record: Record) -> str:
    """Returns how long the transformer was trained, on what."""
    done = record["training"]
    last = "; ".join(
        f"{each['loss']:.4f} for {each['size'][0]} frames of "
        f"{each['size'][1]} x {each['size'][2]}"
        for each in done["last_loss"]
    )
    count, runs = done["devices"], len(record["commands"])
    devices = f"{count} {record['device']}" if count > 1 else f"one {record['device']}"
    parts = f"{runs} runs" if runs > 1 else "one run"
    again = ", ".join(f"{step:,}" for step in done["optimizer_started_at_steps"][1:])
    skipped = done["steps_skipped"]
    return paragraph(
        f"The transformer was trained on {devices} ({pages.where_measured([record])}; "
        f"`{TRAINING.name}` has every number): "
        f"{done['steps']:,} steps, {done['videos']:,} videos, "
        f"{done['seconds_of_stepping'] / 60:.1f} minutes of stepping, which are "
        f"{count * done['seconds_of_stepping'] / 60:.1f} GPU minutes, in {parts}. "
        + optimizer(done["config"]["optimizer"])
        + (f" It started afresh at step {again}." if again else "")
        + f" {skipped or 'No'} step{'s' if skipped > 1 else ''} "
        + f"{'were' if skipped > 1 else 'was'} skipped for a gradient that is not "
        + f"finite. The mean loss of the last 500 steps is {last}."
    )


def optimizer(config: Record) -> str:
    """Returns what moved the parameters, at which rate."""
    kind = {
        "adamw": "The optimizer was AdamW",
        "muon": "The optimizer was Muon for kernels of blocks and AdamW for all else",
    }[config["kind"]]
    return (
        f"{kind}, with a rate of {config['learning_rate']:g} at its peak after "
        f"{config['warmup_steps']} steps."
    )


def stage_table(stages: Iterable[Record]) -> str:
    """Returns the table of a training's stages."""
    rows = []
    for stage in stages:
        sizes = [size_of(turn) for turn in stage["turns"]]
        shown = []
        for size in dict.fromkeys(sizes):
            frames, height, width = size
            (batch,) = {t["batch"] for t in stage["turns"] if size_of(t) == size}
            turns = f"{sizes.count(size)} of {len(sizes)}: " if len(sizes) > 1 else ""
            shown.append(
                f"{turns}{batch} videos of {frames} x {height} x {width}, "
                f"{tokens(size):,} tokens"
            )
        mean_ms = 1e3 * stage["seconds"] / stage["steps"] if stage["steps"] else 0.0
        rows.append(["; ".join(shown), f"{stage['steps']:,}", f"{mean_ms:.0f} ms"])
    return table(["each step has", "steps", "time per step"], rows)


def tokens(size: Sequence[int]) -> int:
    """Returns the tokens of a video: the first latent frame is of one frame."""
    frames, height, width = size
    step, rows, columns = PIXELS
    return ((frames - 1) // step + 1) * (height // rows) * (width // columns)


def commands(lines: Iterable[str]) -> str:
    """Returns the commands as they were given."""
    return "```sh\n" + "\n".join(lines) + "\n```\n"


def codec(record: Record) -> str:
    """Returns how the codec was trained, and what it loses."""
    found = record["held_out"]
    kinds = {"procedural": "scenes", "pictures": "pictures", "clips": "footage"}
    by_kind = ", ".join(
        f"{value:.1f} for {kinds[kind]}" for kind, value in found["psnr_db"].items()
    )
    return paragraph(
        f"The codec was trained before, on one {record['device']} (commit "
        f"{record['commit']}): "
        f"{record['steps']:,} steps in {record['seconds_of_stepping']:.0f} s, "
        f"{record['videos']:,} videos. It restores {found['videos']} held-out videos "
        f"to {found['psnr_db_mean']:.1f} dB in the mean ({by_kind}) and to "
        f"{found['psnr_db_min']:.1f} dB at worst, which bounds every sample."
    )


def faithfulness(report: Record) -> str:
    """Returns how many prompts are followed, dense and sparse."""
    rows = []
    for name, found in report.items():
        if not isinstance(found, Mapping) or "colour" not in found:
            continue
        title = name.replace("sparse_", "the default at sparsity ")
        names = ("colour", "motion", "motion_of_calm_prompts", "direction")
        rows.append([title, *(percent(found[each]) for each in names)])
    dense = report["dense"]
    head = ["attention", "colour", "motion", "motion, calm prompts"]
    head += [f"direction ({dense['prompts_with_direction']} prompts)"]
    return (
        "## Prompts that are followed\n\n"
        + paragraph(
            f"Of {dense['prompts']} held-out prompts, {report['device']}, "
            f"{report['sampling']['num_steps']} steps, "
            f"{report['sampling']['frames']} frames, sparse after the first "
            f"{100 * report['dense_fraction']:.0f} % of the steps, "
            "`python -m models.mini.prompt_scores`:"
        )
        + "\n"
        + table(head, rows)
    )


def percent(share: float | None) -> str:
    """Returns a share as text."""
    return "-" if share is None else f"{100 * share:.1f} %"


def attention(found: Iterable[Record]) -> str:
    """Returns how concentrated attention is at each size that was measured."""
    text = "## Attention\n\n" + paragraph(
        "Share of the softmax mass that the strongest 10 % of tile pairs carry, of "
        "full attention in dense generations, in percent: mean over prompts and heads. "
        "Uniform attention would give 10. The last columns are the shares that the "
        "paper's draft keeps, mean over layers."
    )
    for size in found:
        prompts = size["prompts"][:ATTENTION_PROMPTS]
        text += "\n" + above_table(size, prompts, "{}")
        text += "\n" + attention_table(size["attention"])
    return text + "\n![Mass in the top 10 % of tile pairs](images/mini_attention.png)\n"


def above_table(size: Record, prompts: Sequence[str], pixels: str) -> str:
    """Returns the line above the table of a size.

    Args:
      size: Its videos and tiles.
      prompts: What the table is of.
      pixels: How the size is set.
    """
    width, height = size["size"]
    rows, columns = size["tile"]
    return paragraph(
        f"{pixels.format(f'{height} x {width} pixels')}, tiles of {rows} x {columns} "
        f"tokens, {len(prompts)} prompt{'s' if len(prompts) > 1 else ''}:"
    )


def attention_table(steps: Sequence[Record]) -> str:
    """Returns the shares by step and layer."""
    layers = len(steps[0]["top_10_percent"])
    head = ["step", "timestep", *(f"layer {layer}" for layer in range(layers))]
    head += ["mean", "kept at 0.75", "at 0.9"]
    rows = []
    for step in steps:
        shares = [*step["top_10_percent"], np.mean(step["top_10_percent"])]
        kept = [np.mean(step[f"kept_at_sparsity_{each}"]) for each in (0.75, 0.9)]
        rows.append(
            [str(step["step"]), f"{step['timestep']:.0f}"]
            + [f"{100 * share:.0f}" for share in (*shares, *kept)]
        )
    return table(head, rows)


def means_section(record: Record) -> str:
    """Returns what stands between the marks of the page of figures."""
    sizes = record["sizes"].values()
    first = next(iter(sizes))
    has_default = any(is_default(row["trial"]) for s in sizes for row in s["quality"])
    text = paragraph(
        f"The model that ships, {first['num_steps']} steps of which the first "
        f"{100 * first['dense_fraction']:.0f} % are dense, against the dense video of "
        f"the same noise, one {first['device']}, jax {first['jax']}, driver "
        f"{pages.driver_of(record['gpus'])}, commit {record['commit']}, "
        f"`python -m models.mini.evaluate` (`{MEANS.name}`, which has every prompt). "
        "*Work* is that of a sparse layer's attention over a dense one's: the density, "
        "and what means and exact rows add. A mean is taken over rows x columns of "
        "tokens and so many latent frames. Work: mean PSNR in dB (worst prompt), mean "
        "SSIM." + (" The default is in bold." if has_default else "")
    )
    for size in sizes:
        text += "\n" + above_table(size, size["prompts"], "**{}**")
        text += "\n" + means_table(size["quality"])
    return "\n" + text + "\n"


def means_table(quality: Iterable[Record]) -> str:
    """Returns the likeness of sparse videos by method and sparsity."""
    cells: dict[str, dict[float, str]] = {}
    ordered = sorted(
        quality, key=lambda row: list(LABELS).index(row["trial"]["method"])
    )
    for row in ordered:
        cells.setdefault(label(row["trial"]), {})[row["trial"]["sparsity"]] = (
            f"{row['work_of_sparse_steps']:.2f}: {row['psnr_db_mean']:.1f} "
            f"({row['psnr_db_min']:.1f}), {row['ssim_mean']:.3f}"
        )
    sparsities = sorted({each for row in cells.values() for each in row}, reverse=True)
    rows = (
        [name, *(row.get(each, "-") for each in sparsities)]
        for name, row in cells.items()
    )
    return table(["method", *(f"sparsity {each}" for each in sparsities)], rows)


def label(trial: Record) -> str:
    """Returns the words for a method."""
    draft, means, frames = trial["draft_tile"], trial["sub_tile"], trial["mean_frames"]
    text = LABELS[trial["method"]].format(
        draft=" x ".join(map(str, draft or ())),
        means=f"means of {' x '.join(map(str, means or ()))} over {frames} frames",
    )
    return f"**{text}**" if is_default(trial) else text


def is_default(trial: Record) -> bool:
    """Returns whether a trial is of the library's default, with the means it has."""
    means = tuple(trial["sub_tile"] or ())
    return (trial["method"], means, trial["mean_frames"]) == default_method()


def default_method() -> tuple[str, tuple[int, int], int]:
    """Returns method, sub-tile and frames of the library's default."""
    means = DraftConfig().compensation
    assert means is not None, "the default has means"
    return "default", means.sub_tile, means.frames


PAGES: dict[Path, tuple[Path, Callable[[Record], str]]] = {
    DOCS / "mini_model.md": (TRAINING, training_section),
    DOCS / "measured.md": (MEANS, means_section),
}


def written(page: Path) -> str:
    """Returns a page with what its record says."""
    record, section = PAGES[page]
    return pages.written(page.read_text(), section(read(record)))


def main(arguments: list[str] | None = None) -> None:
    """Writes the pages and the pictures."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--sources", type=Path, help="also draw training data, of models.mini.sources"
    )
    options = parser.parse_args(arguments)
    for page in PAGES:
        page.write_text(written(page))
    record = read(TRAINING)
    pictures.draw_losses(DOCS / "images" / "mini_loss.png", record["training"])
    pictures.draw_attention(DOCS / "images" / "mini_attention.png", record["attention"])
    if options.sources:
        pictures.draw_training_data(
            DOCS / "images" / "mini_training_data.jpg", Sources.load(options.sources)
        )


if __name__ == "__main__":
    main()
