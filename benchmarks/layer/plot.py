"""Draws where the time of a layer goes, for `benchmarks.layer.run plot`."""

import json
import pathlib

from benchmarks.layer.account import GROUPS

BARS = {
    "tiled, 90 %": "layer/tiled/0.9",
    "raster, 90 %": "layer/raster/0.9",
    "tiled, 75 %": "layer/tiled/0.75",
    "raster, 75 %": "layer/raster/0.75",
    "mask reused, 90 %": "scheduled/reuse",
}
LABELS = {
    "attention": "sparse attention kernel",
    "pooling": "pooling of Q and K",
    "logits": "draft logits",
    "selection": "softmax, selection, lists",
    "order and repair": "order of work, repair",
}
COLORS = dict(zip(LABELS, ("C1", "C2", "C3", "C4", "C5"), strict=True))


def plot(results: pathlib.Path, output: pathlib.Path) -> None:
    """Two stacked bars of each layer: all of it, and all but the sparse kernel.

    Parts are GPU time of the layer's own kernels, see `layer_account`. The wall time of
    a call is told on the left, beside them: it is of another run, and the GPU's clock
    moves by more than the gaps between kernels are.
    """
    from matplotlib.figure import Figure

    document = json.loads(results.read_text())
    stages = document["results"]
    missing = [
        name for name in BARS.values() if "groups_ms" not in stages.get(name, {})
    ]
    if missing:
        raise SystemExit(f"{results} has no account of GPU time for {missing}")
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    whole, beyond = figure.subplots(1, 2)
    dense = stages["dense"]["median_ms"]
    whole.barh("cuDNN dense", dense, color="C0", label="dense attention")
    whole.text(dense, "cuDNN dense", f" {dense:.1f} ms", va="center")
    for label, name in BARS.items():
        _bar(whole, label, stages[name], with_attention=True)
        _bar(beyond, label, stages[name], with_attention=False)
    whole.set_title("whole layer", fontsize="medium")
    beyond.set_title("all but the sparse kernel", fontsize="medium")
    for axis in (whole, beyond):
        axis.invert_yaxis()
        axis.set_xlabel("ms")
        axis.set_xlim(right=axis.get_xlim()[1] * 1.2)  # room for the labels
    handles, labels = whole.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(
        unique.values(), unique, loc="outside lower center", ncols=4, fontsize="small"
    )
    shape, where = document["shape"], document["environment"]
    figure.suptitle(
        f"{shape['tokens']:,} tokens x {shape['heads']} heads x {shape['head_dim']}, "
        f"{shape['dtype']}, {where['device']}, jax {where['versions']['jax']}"
    )
    figure.savefig(output, dpi=120)


def _bar(axis, label: str, stage: dict, *, with_attention: bool) -> None:
    parts = {name: stage["groups_ms"][name] for name in GROUPS}
    if with_attention:
        parts = {"attention": stage["attention_ms"]} | parts
    left = 0.0
    for part, width in parts.items():
        style = {"color": COLORS[part], "label": LABELS[part]}
        axis.barh(label, width, left=left, **style)
        left += width
    if with_attention:
        text = f" {left:.1f} ms GPU, {stage['median_ms']:.1f} ms wall"
    else:
        text = f" {left:.2f} ms"
    axis.text(left, label, text, va="center", fontsize="small")
