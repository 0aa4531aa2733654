"""Pictures of `docs/quality.md`: fronts, strips of frames, and maps of kept blocks."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.quality.methods import METHODS
from benchmarks.quality.presets import StepTimes, combination_of
from benchmarks.quality.summary import Curve, curves, whole_runs
from benchmarks.quality.trials import Combination

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STRIPS = ("dense", "ours", "paper", "sliding_tile", "spatial_temporal")
MARKERS = "osv^D<>Ph*Xp"  # one for each method
DOTS_PER_INCH = 80
JPEG_QUALITY = 60
FRAME_COLUMNS = 112  # pixels of a frame in the strips


def draw_all(record: Mapping[str, Any], run: Path, images: Path) -> list[str]:
    """Draws what a run has, and returns the names of the pictures.

    Args:
      record: What was measured.
      run: Folder of the run, with frames and maps.
      images: Folder of the pictures.
    """
    found = []
    by_name = curves(record)
    if by_name:
        draw_front(images / "quality_density.png", by_name, over_time=False)
        found.append("quality_density.png")
    if any(curve.times for curve in by_name.values()):
        draw_front(images / "quality_time.png", by_name, over_time=True)
        found.append("quality_time.png")
    if any(row["part"] == "combinations" for row in whole_runs(record)["trials"]):
        draw_combinations(images / "quality_speed.png", whole_runs(record))
        found.append("quality_speed.png")
    frames = {name: run / f"frames_{name}.npy" for name in STRIPS}
    frames = {name: path for name, path in frames.items() if path.exists()}
    if len(frames) > 1:
        arrays = {name: np.load(path) for name, path in frames.items()}
        draw_strips(images / "quality_strips.jpg", arrays, record)
        found.append("quality_strips.jpg")
    maps = {name: run / f"maps_{name}.npy" for name in METHODS}
    maps = {name: path for name, path in maps.items() if path.exists()}
    if maps:
        arrays = {name: np.load(path) for name, path in maps.items()}
        draw_maps(images / "quality_maps.png", arrays, record["setup"])
        found.append("quality_maps.png")
    return found


def draw_front(path: Path, by_name: Mapping[str, Curve], *, over_time: bool) -> None:
    """Draws PSNR over work, or over the time of a layer.

    Args:
      path: PNG to write.
      by_name: Curves of methods.
      over_time: Whether the axis is time; a method without times is left out.
    """
    from matplotlib import colormaps

    figure = _figure(7.0, 4.5)
    axes = figure.add_subplot()
    points: list[tuple[float, float]] = []  # of what can be used
    for name, curve in by_name.items():
        number = list(METHODS).index(name)
        places: Sequence[float] | None = curve.times if over_time else curve.work
        if places is None:
            continue
        style = "--" if METHODS[name].is_bound or name == "random" else "-"
        order = np.argsort(places)
        means = curve.clips["psnr"].mean(1)
        if not METHODS[name].is_bound:
            points += zip(places, means.tolist(), strict=True)
        axes.plot(
            np.asarray(places)[order],
            means[order],
            style,
            color=colormaps["tab20"](number),
            marker=MARKERS[number],
            markersize=4,
            label=METHODS[name].title,
        )
    front = pareto_front(points)
    axes.step(
        [place for place, _ in front],
        [level for _, level in front],
        where="post",
        color="0.8",
        linewidth=5,
        zorder=0,
        label="Pareto front without the oracle",
    )
    axes.set_xlabel(
        "time of a layer, ms" if over_time else "work of a sparse layer, share of dense"
    )
    axes.set_ylabel("PSNR to the dense video, dB")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the points that none is ahead of: less of the first, more of the second.

    Args:
      points: Time or work, and PSNR.

    Returns:
      Those for which no other one has as much in as little, both ascending.
    """
    front: list[tuple[float, float]] = []
    for place, level in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or level > front[-1][1]:
            front.append((place, level))
    return front


def draw_combinations(path: Path, record: Mapping[str, Any]) -> None:
    """Draws PSNR over time of combinations, and which of them are presets.

    Colours tell attention, shapes the cache, and hollow marks are of FP8.

    Args:
      path: PNG to write.
      record: What was measured.
    """
    times = StepTimes.shipped()
    points = {
        combination_of(row["name"]): (
            times.share(row),
            float(np.mean(row["clips"]["psnr"])),
        )
        for row in record["trials"]
        if row["part"] == "combinations"
    }
    names = dict.fromkeys(each.attention_name for each in points)
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    shapes = dict(
        zip(dict.fromkeys(each.cache for each in points), "osD^v", strict=False)
    )
    figure = _figure(7.0, 4.5)
    axes = figure.add_subplot()
    front = pareto_front(list(points.values()))
    axes.plot(*zip(*front, strict=True), "-", color="0.7", zorder=1)
    for each, point in points.items():
        colour = colours[each.attention_name]
        face = colour if each.linears == "bfloat16" else "white"
        axes.scatter(
            *point, s=26, marker=shapes[each.cache], facecolor=face, edgecolor=colour
        )
    for name, colour in colours.items():
        axes.scatter([], [], marker="o", color=colour, label=name)
    for cache, shape in shapes.items():
        axes.scatter([], [], marker=shape, color="0.4", label=cache or "no cache")
    axes.scatter([], [], facecolor="white", edgecolor="0.4", label="FP8")
    for preset, fields in record.get("presets", {}).items():
        point = points[Combination(**fields)]
        axes.annotate(
            preset,
            point,
            xytext=(-6, 8),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            weight="bold",
        )
    axes.margins(x=0.12)
    axes.legend(fontsize=7, loc="upper right")
    axes.set_xlabel("time of the steps of Wan2.1 14B, share of dense bfloat16")
    axes.set_ylabel("PSNR to the dense video, dB")
    axes.grid(alpha=0.3)
    figure.savefig(path)


def draw_strips(
    path: Path, frames: Mapping[str, np.ndarray], record: Mapping[str, Any]
) -> None:
    """Draws frames of two clips, a method below another.

    Args:
      path: JPEG to write.
      frames: Of each method, [clips, frames, rows, columns, 3] in bytes.
      record: Says the prompts.
    """
    from PIL import Image, ImageDraw

    first = next(iter(frames.values()))
    clips, count, rows, columns, _ = first.shape
    rows, columns = round(rows * FRAME_COLUMNS / columns), FRAME_COLUMNS
    caption, gap = 14, 4
    width = clips * (count * columns + gap)
    height = caption + len(frames) * (rows + caption)
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    for clip in range(clips):
        left = clip * (count * columns + gap)
        pen.text((left, 0), record["setup"]["reporting"][clip][0], fill="black")
        for place, (name, videos) in enumerate(frames.items()):
            top = caption + place * (rows + caption)
            title = "dense" if name == "dense" else METHODS[name].title
            pen.text((left, top), title, fill="black")
            for number, frame in enumerate(videos[clip]):
                small = Image.fromarray(frame).resize((columns, rows))
                sheet.paste(small, (left + number * columns, top + caption))
    sheet.save(path, quality=JPEG_QUALITY, optimize=True)


def draw_maps(
    path: Path, maps: Mapping[str, np.ndarray], setup: Mapping[str, Any]
) -> None:
    """Draws the blocks that each method keeps in the middle layer, of its first head.

    Args:
      path: PNG to write.
      maps: Of each method, [layers, S, S].
      setup: Says the tiles of a frame.
    """
    columns = 5
    rows = -(-len(maps) // columns)
    figure = _figure(2.0 * columns, 2.2 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    per_frame = setup["tiles"] // setup["grid"][0]
    for axes in panels:
        axes.set_axis_off()
    for axes, (name, kept) in zip(panels, maps.items(), strict=False):
        axes.set_axis_on()
        layer = kept[len(kept) // 2]
        axes.imshow(layer, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        edges = np.arange(0, len(layer), per_frame) - 0.5
        axes.set_xticks(edges, [""] * len(edges))
        axes.set_yticks(edges, [""] * len(edges))
        axes.grid(color="tab:blue", linewidth=0.3)
        title = textwrap.fill(f"{METHODS[name].title}: {layer.mean():.3f}", 26)
        axes.set_title(title, fontsize=7)
    figure.savefig(path)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
