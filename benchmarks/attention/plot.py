r"""Draws what `benchmarks.attention.run` stored: time against density.

    python -m benchmarks.attention.plot benchmarks/results/attention_h100.json \
        docs/images/attention_h100.png

The name of the picture says its format.
"""

import json
import pathlib

from matplotlib.figure import Figure

from benchmarks.common.options import make_parser

LABELS = {
    ("ours", "random"): "draft_jax, random masks",
    ("ours", "draft"): "draft_jax, draft-selected masks",
    ("flex_attention", "random"): "PyTorch FlexAttention, random masks",
    ("fa4_sparse", "random"): "FlashAttention-4, random masks",
    ("cudnn", "dense"): "cuDNN, dense",
    ("attention_mgpu", "dense"): "JAX attention_mgpu, dense (fp16)",
    ("fa3", "dense"): "FlashAttention-3, dense",
    ("fa4", "dense"): "FlashAttention-4, dense",
}


def draw(document: dict, shape: str, axes) -> None:
    """Times of one shape; the ideal is cuDNN's time by the share of work."""
    rows = [r for r in document["results"] if r["shape"] == shape and "median_ms" in r]
    for (contender, mask), label in LABELS.items():
        own = [r for r in rows if (r["contender"], r["mask"]) == (contender, mask)]
        if own:
            own.sort(key=lambda r: r["density"])
            x, y = ([r[key] for r in own] for key in ("density", "median_ms"))
            axes.plot(x, y, "o" if mask == "dense" else "o-", label=label)
    dense = next(r["median_ms"] for r in rows if r["contender"] == "cudnn")
    ideal = [0.08, 1.0]
    axes.plot(ideal, [dense * x for x in ideal], "k:", label="cuDNN's time x density")
    tokens, heads, dim = (rows[0][key] for key in ("tokens", "heads", "head_dim"))
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="density: share of token pairs computed",
        ylabel="ms",
        title=f"{tokens:,} tokens, {heads} heads, head dimension {dim}",
    )
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3, which="both")


def main() -> None:
    """Draws one shape of a JSON file."""
    parser = make_parser(__doc__)
    parser.add_argument("results", type=pathlib.Path)
    parser.add_argument("picture", type=pathlib.Path)
    parser.add_argument("--shape", default="hunyuan")
    options = parser.parse_args()
    document = json.loads(options.results.read_text())
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    draw(document, options.shape, axes)
    axes.annotate(
        document["environment"]["device"],
        (0.99, 0.01),
        xycoords="figure fraction",
        ha="right",
        fontsize="small",
    )
    figure.savefig(options.picture, dpi=120)


if __name__ == "__main__":
    main()
