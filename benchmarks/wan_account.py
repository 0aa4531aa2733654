"""What a step of a Wan transformer computes, and where a profile says its time goes."""

import dataclasses
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from models.wan.config import WanConfig

Launch = tuple[str, float]  # name of a kernel and its milliseconds

# The kernel that self-attention ends with, and the one that a draft begins with. What
# runs between the two is the draft: pooling, its logits, the selection, the lists.
SPARSE_KERNEL = re.compile("block_sparse_attention")
DRAFT_START = re.compile("pool_tiles")
# Classes of the other kernels; the first that fits counts.
CLASSES = (
    ("cross-attention", re.compile("cudnn|fmha|sdpa|flash", re.I)),
    ("matmul", re.compile("gemm|nvjet|cutlass|cublas|_dot", re.I)),
    ("copy", re.compile("^(wrapped_)?(copy|transpose|slice|concatenate)|memcpy", re.I)),
    ("reduction", re.compile("reduce|softmax|norm", re.I)),
    ("elementwise", re.compile("fusion|loop|wrapped|broadcast|convert", re.I)),
)


def flops_outside_attention(config: WanConfig, num_tokens: int) -> dict[str, float]:
    """Arithmetic of one model call on one item, without self-attention's products.

    Matrix products only, two operations for each multiplication and addition: norms,
    gates and rotations do not count, nor the time embedding, which has one row.

    Args:
      config: Sizes of a text-to-video model.
      num_tokens: Video tokens.

    Returns:
      By part; their sum is the whole.
    """
    dim, text = config.dim, config.text_length
    patch = dim * config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
    layers = config.num_layers
    return {
        "self-attention's projections": layers * 8.0 * num_tokens * dim**2,
        "cross-attention's projections": layers
        * (4.0 * num_tokens * dim**2 + 4.0 * text * dim**2),
        "cross-attention": layers * 4.0 * num_tokens * text * dim,
        "feed-forward": layers * 4.0 * num_tokens * dim * config.ffn_dim,
        "patches, head and text": 2.0
        * (
            num_tokens * patch * (config.in_channels + config.out_channels)
            + text * dim * (config.text_dim + dim)
        ),
    }


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
    """What `run` returns, and every GPU kernel it launched, in order, by CUPTI."""
    from jax.experimental.mosaic.gpu import profiler

    result, launches = profiler.measure(_Once(run), aggregate=False)()
    return result, list(launches or [])


def classify(launches: Sequence[Launch]) -> list[str]:
    """The class of each kernel of a step whose layers are all sparse."""
    classes, in_draft = [], False
    for name, _ in launches:
        if SPARSE_KERNEL.search(name):
            in_draft = False
            classes.append("self-attention")
        elif in_draft or DRAFT_START.search(name):
            in_draft = True
            classes.append("draft")
        else:
            fitting = (kind for kind, pattern in CLASSES if pattern.search(name))
            classes.append(next(fitting, "other"))
    return classes


def account(launches: Sequence[Launch], num_blocks: int) -> dict[str, Any]:
    """Milliseconds by class, the costliest kernels, and one block in order.

    Args:
      launches: Of a step whose layers are all sparse.
      num_blocks: Transformer blocks that the step ran: layers times model calls.
    """
    classes = classify(launches)
    by_class: dict[str, float] = {}
    by_name: dict[str, list[float]] = {}
    for kind, (name, time_ms) in zip(classes, launches, strict=True):
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
        "one_block": one_block(launches, classes),
    }


def one_block(
    launches: Sequence[Launch], classes: Sequence[str]
) -> list[dict[str, Any]]:
    """Kernels from one self-attention to the next, in the middle of the step.

    Kernels below a microsecond times five are left out: they are the schedule's.
    """
    # The same name may run again for a few microseconds, to merge parts.
    large = max(
        (
            ms
            for (_, ms), kind in zip(launches, classes, strict=True)
            if kind == "self-attention"
        ),
        default=0.0,
    )
    ends = [
        index
        for index, kind in enumerate(classes)
        if kind == "self-attention" and launches[index][1] > 0.1 * large
    ]
    if len(ends) < 4:
        return []
    middle = len(ends) // 4  # of the first of two calls
    start, stop = ends[middle - 1] + 1, ends[middle] + 1
    return [
        {"kernel": name[:90], "class": kind, "ms": round(ms, 4)}
        for (name, ms), kind in zip(
            launches[start:stop], classes[start:stop], strict=True
        )
        if ms >= 5e-3
    ]
