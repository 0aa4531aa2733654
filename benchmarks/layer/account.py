"""An account of a layer's GPU time by kernel.

`attention_ms` is the sparse kernel's main launch and `beyond_ms` every other kernel of
the same program, its short second launch (the repair) included. Names of XLA's fusions
do not tell what they are for, so the rest is attributed so (`groups_ms`):

  pooling            kernels with pool in their name
  logits             matrix products, and the kernel for drafts of sub-tiles
  order and repair   what follows the main launch, and as much time before it as the
                     `sparse` stage of the same sparsity takes before its own: that
                     stage gets a mask, so there it is the order of work and nothing
                     else. All of `beyond_ms` in a layer that neither pools nor
                     multiplies, because it reuses a mask or is dense.
  selection          the remainder: softmax, threshold, lists
"""

import math
import re
import statistics
from collections.abc import Callable
from typing import Any

ATTENTION = "block_sparse_attention_sm90"
POOLING = re.compile("pool")
LOGITS = re.compile("gemm|dot|cublas|cutlass|nvjet|tile_scores")
GROUPS = ("pooling", "logits", "selection", "order and repair")

Kernels = list[dict[str, Any]]  # name and ms of each, in the order of launch


def kernel_times(program, arguments, iterations: int) -> dict[str, Any]:
    """GPU time by kernel as CUPTI reports it, in the order of launch."""
    from jax.experimental.mosaic.gpu import profiler

    # Its own type leaves out that a single run comes without a list around it.
    measured: Callable[..., Any] = profiler.measure(
        program, aggregate=False, iterations=iterations
    )
    _, runs = measured(*arguments)
    if not runs:
        return {}
    runs = [runs] if iterations == 1 else runs
    names = [name for name, _ in runs[0]]
    medians = [statistics.median(run[i][1] for run in runs) for i in range(len(names))]
    return {
        "kernels_ms": statistics.median(sum(t for _, t in run) for run in runs),
        "num_kernels": len(names),
        "kernels": [
            {"name": name[:60], "ms": round(ms, 5)}
            for name, ms in zip(names, medians, strict=True)
        ],
    }


def around_attention(kernels: Kernels) -> tuple[Kernels, float, Kernels] | None:
    """Splits kernels: before attention's main launch, its time, and the rest."""
    launches = [i for i, k in enumerate(kernels) if k["name"].startswith(ATTENTION)]
    if not launches:
        return None
    main = max(launches, key=lambda i: kernels[i]["ms"])
    return kernels[:main], kernels[main]["ms"], kernels[main + 1 :]


def total(kernels: Kernels, pattern: re.Pattern[str] | None = None) -> float:
    """Milliseconds of the kernels whose names match."""
    return math.fsum(
        k["ms"] for k in kernels if pattern is None or pattern.search(k["name"])
    )


def attention_account(kernels: Kernels) -> dict[str, float]:
    """The sparse kernel and all else; nothing for a program without that kernel."""
    if (parts := around_attention(kernels)) is None:
        return {}
    before, attention, after = parts
    return {"attention_ms": attention, "beyond_ms": total(before) + total(after)}


def groups(kernels: Kernels, sparse: Kernels) -> dict[str, float] | None:
    """Milliseconds beyond the sparse kernel by group, see the module.

    Args:
      kernels: Of a program with the sparse kernel.
      sparse: Of the `sparse` stage of the same sparsity.

    Returns:
      By name. The groups sum to `beyond_ms`; a remainder below zero stays that. None
      where one of the two programs lacks the kernel.
    """
    own, other = around_attention(kernels), around_attention(sparse)
    if own is None or other is None:
        return None
    before, _, after = own
    pooling, logits = total(before, POOLING), total(before, LOGITS)
    drafts = pooling > 0 or logits > 0
    order = total(other[0]) if drafts else total(before)
    return {
        "pooling": pooling,
        "logits": logits,
        "selection": total(before) - pooling - logits - order,
        "order and repair": order + total(after),
    }
