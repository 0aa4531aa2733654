"""Pictures of what sparse attention does."""

import dataclasses
import io
import textwrap
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from models.files import write_whole
from models.media.video import check_video_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH = 130
PANEL_INCHES = 2.6
# Scores fall over orders of magnitude; below this share of a panel's largest score
# the colour no longer changes.
DRAFT_MAP_RANGE = 1e-3
TEXT_COLOUR = "tab:orange"
TEXT_SIDE = 0.06  # width of the text's rows and columns, as a share of a panel
TITLE_COLUMNS, TITLE_LINES = 90, 5
# A prompt is text: "$" starts no formula, whatever the user's own settings say.
_TITLE: dict[str, Any] = {"fontsize": 9, "parse_math": False, "usetex": False}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TextShares:
    """How much of the attention lies on the text of a sequence.

    Attributes:
      share: Share of each tile's attention that lies on the text.
      masses: Mass of the text's own attention on each tile.
      is_first: Whether the text stands before the video.
    """

    share: Float[np.ndarray, "layers N S"]
    masses: Float[np.ndarray, "layers N S"]
    is_first: bool


def plot_kept_share(
    path: Path,
    kept_density: Float[np.ndarray, "steps layers"],
    timesteps: Float[np.ndarray, " steps"],
    *,
    title: str,
    skipped: Bool[np.ndarray, " steps"] | None = None,
    extra_work: float = 0.0,
) -> None:
    """Draws the share of token pairs computed as a heat map, layer by step.

    Args:
      path: PNG to write.
      kept_density: 1.0 where a step and layer ran dense.
      timesteps: Model timestep of each step, for the axis.
      title: Printed above, as text.
      skipped: Steps that a cache skipped, drawn as hatched columns; None for none.
      extra_work: Work of means and exact rows in a sparse layer, as a share of a
        dense one's.

    Raises:
      MissingExtraError: matplotlib is not installed.
    """
    figure = _new_figure(width=2.5 + 0.42 * len(timesteps), height=4.0)
    axes = figure.add_subplot()
    image = axes.imshow(
        kept_density.T, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto"
    )
    is_skipped = np.zeros(len(timesteps), bool) if skipped is None else skipped
    for step, layer in np.ndindex(kept_density.shape):
        if is_skipped[step]:
            continue
        share = kept_density[step, layer]
        colour = "black" if share > 0.6 else "white"
        label = axes.text(step, layer, f"{100 * share:.0f}", color=colour, fontsize=7)
        label.set(ha="center", va="center")
    for step in map(float, np.flatnonzero(is_skipped)):
        axes.axvspan(
            step - 0.5, step + 0.5, facecolor="white", edgecolor="grey", hatch="///"
        )
        label = axes.text(step, (kept_density.shape[1] - 1) / 2, "skipped", fontsize=7)
        label.set(ha="center", va="center", rotation=90)
    axes.set_xticks(
        range(len(timesteps)), [f"{t:.0f}" for t in timesteps], rotation=90, fontsize=7
    )
    axes.set_yticks(range(kept_density.shape[1]))
    axes.set_xlabel("step, by its timestep")
    axes.set_ylabel("layer")
    what = "token pairs computed, %"
    if extra_work:
        what += f"; means and exact rows add {100 * extra_work:.1f} % where sparse"
    axes.set_title(f"{_as_title(title)}\n{what}", **_TITLE)
    figure.colorbar(image, label="share computed")
    _save(figure, path)


def plot_attention(
    path: Path,
    draft_maps: Float[np.ndarray, "layers N S S"],
    masks: Bool[np.ndarray, "layers N S S"],
    *,
    layers: tuple[int, ...],
    heads: tuple[int, ...],
    blocks_per_frame: int,
    title: str,
    text: TextShares | None = None,
) -> None:
    """Draws draft maps and, below each, the block mask that follows from it.

    Text is always kept: beside a mask its columns and rows are marked off by a line,
    and darker where more of the attention lies.

    Args:
      path: PNG to write.
      draft_maps: Softmax probabilities between tiles, of all layers and heads.
      masks: Kept pairs, like draft_maps.
      layers: Layers to draw, two rows of panels each.
      heads: Heads to draw, one column each.
      blocks_per_frame: Tiles of a frame; lines separate the frames.
      title: Printed above, as text.
      text: What lies on the text of the sequence, or None without text.

    Raises:
      ValueError: A layer or head does not exist, or none is asked for.
      MissingExtraError: matplotlib is not installed.
    """
    check_indices("layers", layers, draft_maps.shape[0])
    check_indices("heads", heads, draft_maps.shape[1])
    figure = _new_figure(
        width=PANEL_INCHES * len(heads) + 0.6,
        height=2 * PANEL_INCHES * len(layers) + 1.0,
    )
    figure.suptitle(_as_title(title), **_TITLE)
    panels = figure.subplots(2 * len(layers), len(heads), squeeze=False)
    for row, layer in enumerate(layers):
        for column, head in enumerate(heads):
            draft_map, mask = draft_maps[layer, head], masks[layer, head]
            above, below = panels[2 * row, column], panels[2 * row + 1, column]
            floor = max(draft_map.max() * DRAFT_MAP_RANGE, np.finfo(np.float32).tiny)
            above.imshow(np.log10(np.maximum(draft_map, floor)), cmap="magma")
            above.set_title(f"layer {layer}, head {head}: draft map", fontsize=7)
            below.imshow(mask, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
            kept = f"mask: {100 * mask.mean():.1f} % of pairs"
            for axes in (above, below):
                _mark_frames(axes, len(draft_map), blocks_per_frame)
            if text is not None:
                share, tiles = text.share[layer, head], text.masses[layer, head]
                kept += f", {100 * share.mean():.0f} % on text"
                _draw_text(below, share, tiles, is_first=text.is_first)
            below.set_title(kept, fontsize=7)
    _save(figure, path)


def _draw_text(axes, share, masses, *, is_first: bool) -> None:
    """Draws the text's column, by each tile's share, and its row, by its masses."""
    size = len(share)
    side = max(1.0, TEXT_SIDE * size)
    near, far = (-0.5, -0.5 - side) if is_first else (size - 0.5, size - 0.5 + side)
    start, stop = sorted((near, far))
    row = masses / max(masses.max(), np.finfo(np.float32).tiny)
    shown = {"cmap": "Oranges", "vmin": 0.0, "vmax": 1.0, "interpolation": "nearest"}
    axes.imshow(share[:, None], extent=(start, stop, size - 0.5, -0.5), **shown)
    axes.imshow(row[None], extent=(-0.5, size - 0.5, stop, start), **shown)
    axes.axvline(near, color=TEXT_COLOUR, linewidth=0.8)
    axes.axhline(near, color=TEXT_COLOUR, linewidth=0.8)
    limits = sorted((far, size - 0.5 if is_first else -0.5))
    axes.set(xlim=limits, ylim=limits[::-1])


def _mark_frames(axes, num_blocks: int, blocks_per_frame: int) -> None:
    edges = np.arange(0, num_blocks, blocks_per_frame) - 0.5
    axes.set_xticks(edges, [""] * len(edges))
    axes.set_yticks(edges, [""] * len(edges))
    axes.grid(color="tab:blue", linewidth=0.3)
    axes.set_xlabel("key tile", fontsize=6)
    axes.set_ylabel("query tile", fontsize=6)


def check_indices(name: str, indices: tuple[int, ...], size: int) -> None:
    """Raises ValueError unless each index exists and there is at least one."""
    if not indices or not all(0 <= index < size for index in indices):
        accepted = f"at least one of 0 .. {size - 1}"
        raise ValueError(
            f"{name}={indices} must be {accepted}, as the model has {size}"
        )


def _new_figure(*, width: float, height: float) -> "Figure":
    """Makes a figure without global pyplot state and without a display."""
    check_video_extra()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")


def _as_title(text: str) -> str:
    """Returns a text in a few lines, without characters that have no picture."""
    lines: list[str] = []
    for line in text.splitlines():
        shown = "".join(c if c.isprintable() else " " for c in line)
        lines += textwrap.wrap(shown, TITLE_COLUMNS)
    if len(lines) > TITLE_LINES:
        lines = [*lines[: TITLE_LINES - 2], "[...]", lines[-1]]
    return "\n".join(lines)


def _save(figure: "Figure", path: Path) -> None:
    # In memory first: Pillow's errors of writing do not say that a disk is full.
    picture = io.BytesIO()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(picture, format="png")
    lacking = [one for one in caught if "missing from font" in str(one.message)]
    for other in caught:
        if other not in lacking:
            warnings.warn_explicit(
                other.message, other.category, other.filename, other.lineno
            )
    if lacking:  # one warning, not one for each letter
        warnings.warn(
            f"{path} shows boxes for {len(lacking)} letters of its title, which "
            "matplotlib's font lacks",
            stacklevel=3,
        )
    write_whole(path, picture.getvalue())
