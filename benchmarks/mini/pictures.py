"""Pictures of the small model's page: losses, attention, and training data."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from models.mini.renderer import SceneBatch, device_sources, render_scenes
from models.mini.samples import draw_sheet
from models.mini.scenes import Mix, sample_batch
from models.mini.sources import Sources
from models.mini.stages import VideoSize

DOTS_PER_INCH = 110
SHOWN = Mix(procedural=12, pictures=4, clips=2)
SEED = (2026, 11)  # of training data that is shown


def draw_losses(path: Path, training: Mapping[str, Any]) -> None:
    """Draws the loss over the steps, for each size, and where an optimizer started."""
    curves: dict[tuple[int, ...], list[tuple[int, float]]] = {}
    for entry in training["losses"]:
        point = entry["step"], entry["loss"]
        curves.setdefault(tuple(entry["size"]), []).append(point)
    figure = Figure(figsize=(7, 3), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot()
    for (frames, height, width), points in curves.items():
        axes.plot(
            *zip(*points, strict=True),
            label=f"{frames} frames of {height} x {width}",
            linewidth=1,
        )
    for step in training["optimizer_started_at_steps"][1:]:
        axes.axvline(step, color="grey", linestyle=":", linewidth=1)
    axes.set(yscale="log", xlabel="step", ylabel="flow-matching loss")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path)


def draw_attention(path: Path, sizes: Sequence[Mapping[str, Any]]) -> None:
    """Draws the mass in the strongest tile pairs by layer, a size beside another."""
    figure = Figure(figsize=(7, 3), dpi=DOTS_PER_INCH, layout="constrained")
    grid = figure.subplots(1, len(sizes), sharey=True, squeeze=False)
    for axes, size in zip(grid[0], sizes, strict=True):
        for step in size["attention"]:
            shares = 100 * np.asarray(step["top_10_percent"])
            axes.plot(shares, marker=".", label=f"t = {step['timestep']:.0f}")
        axes.axhline(10, color="grey", linestyle="--", linewidth=1, label="uniform")
        width, height = size["size"]
        axes.set(title=f"{height} x {width} pixels", xlabel="layer", ylim=(0, 100))
        axes.grid(alpha=0.3)
    grid[0][0].set_ylabel("mass in the top 10 %\nof tile pairs, %")
    grid[0][-1].legend(ncols=2, fontsize=7)
    figure.savefig(path)


def draw_training_data(path: Path, sources: Sources) -> None:
    """Draws videos of each kind as a training sees them, under their captions."""
    size = VideoSize(frames=25, height=96, width=128, batch=1)
    captions, *scenes = sample_batch(SEED, SHOWN, size.frames, size.aspect)
    videos = render_scenes(SceneBatch(*scenes), device_sources(sources), size)
    draw_sheet(path, captions, np.asarray(videos) / 2 + 0.5)
