"""GPU time of a denoising step by kernel, as CUPTI reports it.

A kernel is told by its name alone: CUPTI lists launches in no order to rely on. What
XLA makes for a draft (its logits' product, softmax) has no name of its own, so it
counts with the rest of the model.
"""

import dataclasses
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

Launch = tuple[str, float]  # name of a kernel and its milliseconds

WEIGHTS = "weights of a layer"  # copied out of the stack
# The first class that fits counts.
CLASSES = (
    ("collectives", re.compile("nccl", re.I)),
    ("self-attention", re.compile("block_sparse_attention")),
    ("order of work", re.compile("partition_lists")),
    (
        "draft",
        re.compile(
            "count_digits|pack_rows|select_in_rows|write_lists|pool_tiles|pool_video"
        ),
    ),
    ("norm and rotation", re.compile("norm_rope")),
    ("cuDNN attention", re.compile("cudnn|fmha|sdpa|flash", re.I)),
    ("matmul", re.compile("gemm|nvjet|cutlass|cublas|_dot", re.I)),
    # Beside the products, on a stream of their own.
    (WEIGHTS, re.compile("dynamic_slice", re.I)),
    ("copy", re.compile("^(wrapped_)?(copy|transpose|slice|concatenate)|memcpy", re.I)),
    ("reduction", re.compile("reduce|softmax|norm", re.I)),
    ("fusion", re.compile("fusion|loop|wrapped|broadcast|convert", re.I)),
)

ATTENTION = ("self-attention", "order of work", "draft")  # with what goes before it


@dataclasses.dataclass(frozen=True)
class _Once:
    """A step dressed as a compiled function, which CUPTI's wrapper wants.

    The wrapper calls twice, to warm up and to measure. A step gives its state's memory
    away and is warm already, so the first call does nothing.
    """

    run: Callable[[], Any]
    calls: list[None] = dataclasses.field(default_factory=list)

    def __call__(self) -> Any:
        self.calls.append(None)
        return self.run() if len(self.calls) > 1 else None

    def trace(self) -> None:
        raise NotImplementedError

    def lower(self) -> None:
        raise NotImplementedError


def profile(run: Callable[[], Any]) -> tuple[Any, list[Launch]]:
    """Runs a step; returns its result and every GPU kernel in order, by CUPTI."""
    from jax.experimental.mosaic.gpu import profiler

    result, launches = profiler.measure(_Once(run), aggregate=False)()
    return result, list(launches or [])


def classify(name: str) -> str:
    """The class of a kernel of a step whose layers are all sparse."""
    fitting = (kind for kind, pattern in CLASSES if pattern.search(name))
    return next(fitting, "other")


def account(launches: Sequence[Launch], *, num_blocks: int) -> dict[str, Any]:
    """Milliseconds by class, and the costliest kernels.

    Args:
      launches: Of a step whose layers are all sparse.
      num_blocks: Transformer blocks that the step ran: layers times model calls.
    """
    by_class: dict[str, float] = {}
    by_name: dict[str, list[float]] = {}
    for name, time_ms in launches:
        kind = classify(name)
        by_class[kind] = by_class.get(kind, 0.0) + time_ms
        by_name.setdefault(f"{kind}: {name[:90]}", []).append(time_ms)
    costly = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:40]
    return {
        "kernels_ms": sum(time_ms for _, time_ms in launches),
        "num_kernels": len(launches),
        "by_class_ms": {
            kind: round(ms, 3)
            for kind, ms in sorted(by_class.items(), key=lambda item: -item[1])
        },
        "ms_per_block": {
            kind: round(ms / num_blocks, 4) for kind, ms in by_class.items()
        },
        "costliest": [
            {
                "kernel": name,
                "ms": round(sum(times), 3),
                "launches": len(times),
                "median_ms": round(statistics.median(times), 4),
            }
            for name, times in costly
        ],
    }
