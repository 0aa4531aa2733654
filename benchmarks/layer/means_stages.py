"""Stages of `benchmarks.layer.run` with means for skipped blocks, and their summary.

`sparse-means` is the sparse kernel on a given mask and given means, beside `sparse`
without; `layer-means` is a whole layer, with a draft of sub-tiles and ranking by
spread. The others are its parts: `pool-layer` is all that it pools, `means` the means
alone, which is what a step pools that reuses a mask. `16th` and `32nd` say how many
means there are for a key.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.common.shapes import Shape
from draft_jax import (
    Compensation,
    DraftConfig,
    draft_attention,
    draft_scores,
    make_means,
)
from draft_jax.draft.one_pass import pool_layer
from draft_jax.draft.pooling import pool_queries_and_keys
from pallas_kernels import BackendName, block_sparse_attention

COMPENSATIONS = {
    "32nd": Compensation(),
    "16th": Compensation(sub_tile=(2, 2), frames=4),
}
SPARSITY = 0.9
Entry = tuple[Callable, tuple[str, ...]]  # function, inputs


def config_of(compensation: Compensation) -> DraftConfig:
    """Returns what a layer with such means computes."""
    return DraftConfig.paper(
        sparsity=SPARSITY,
        selection="row_topk",
        draft_tile=(4, 4),
        compensation=compensation,
        ranking="spread",
    )


def entries(shape: Shape, backend: BackendName) -> dict[str, Entry]:
    """Function and names of inputs of each stage."""
    grid, half = shape.grid, functools.partial
    options: dict[str, Any] = {"grid": grid, "order": "tiled", "backend": backend}
    mask, qkv = f"mask_{SPARSITY}", ("q", "k", "v")

    def attend(q, k, v, mask, means):
        return block_sparse_attention(q, k, v, mask, means=means, **options)

    table: dict[str, Entry] = {}
    for name, compensation in COMPENSATIONS.items():
        config = config_of(compensation)
        layer = half(draft_attention, config=config, **options)
        table[f"layer-means/{name}"] = (layer, qkv)
        table[f"sparse-means/{name}"] = (attend, (*qkv, mask, f"means_{name}"))
        means = half(make_means, compensation=compensation, order="tiled")
        table[f"means/{name}"] = (means, ("k", "v", mask))
        together = half(pool_layer, grid=grid, config=config, order="tiled")
        table[f"pool-layer/{name}"] = (together, qkv)
    config = DraftConfig.paper(draft_tile=(4, 4))
    pool = half(pool_queries_and_keys, grid=grid, config=config, order="tiled")
    table["pool/sub-tiles"] = (pool, ("q", "k"))
    scores = half(draft_scores, grid=grid, config=config, order="tiled")
    table["scores/sub-tiles"] = (scores, ("q", "k"))
    return table


def make_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """Makes the means that stages take, from the arrays that there are."""
    made = {}
    for name, compensation in COMPENSATIONS.items():
        means = jax.jit(
            functools.partial(make_means, compensation=compensation, order="tiled")
        )
        mask = inputs[f"mask_{SPARSITY}"]
        made[f"means_{name}"] = means(inputs["k"], inputs["v"], mask)
    return made


def summary(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Returns what the means cost, by CUPTI's times of one run.

    Args:
      results: By stage.

    Returns:
      `overhead_ms`, all of a layer but the sparse kernel, for the larger number of
      means; for each number the time of the sparse kernel over that without. What was
      not measured is left out.
    """
    found = {}
    overhead = [
        results[f"layer-means/{name}"]["beyond_ms"]
        for name in COMPENSATIONS
        if "beyond_ms" in results.get(f"layer-means/{name}", {})
    ]
    if overhead:
        found["overhead_ms"] = max(overhead)
    without = results.get(f"sparse/{SPARSITY}", {}).get("attention_ms")
    for name in COMPENSATIONS:
        own = results.get(f"sparse-means/{name}", {}).get("attention_ms")
        if own is not None and without is not None:
            found[f"kernel_ratio_{name}"] = own / without
    return found
