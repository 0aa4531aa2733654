"""What a step of a Wan transformer computes, and where a profile says its time goes."""

import dataclasses
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from models.wan.config import WanConfig

Launch = tuple[str, float]  # name of a kernel and its milliseconds

# The kernel that self-attention ends with, and the one that a draft begins with. What
# runs between the two is the draft: pooling, its logits, the selection, the lists. A
# kernel that also normalises and rotates begins it, but has work that is not its own.
SPARSE_KERNEL = re.compile("block_sparse_attention")
DRAFT_START = re.compile("pool")
NORM_AND_ROPE = re.compile("norm_rope")
MATMUL = re.compile("gemm|nvjet|cutlass|cublas|_dot", re.I)
# No GPU here multiplies faster: what took less than this rate allows a projection of
# all tokens is a product of the draft.
MOST_FLOPS_PER_MS = 1e12
WEIGHTS = "weights of a layer"  # copied out of the stack
# Classes of the other kernels; the first that fits counts.
CLASSES = (
    ("cross-attention", re.compile("cudnn|fmha|sdpa|flash", re.I)),
    ("matmul", MATMUL),
    # Beside the products, on a stream of their own.
    (WEIGHTS, re.compile("dynamic_slice", re.I)),
    ("copy", re.compile("^(wrapped_)?(copy|transpose|slice|concatenate)|memcpy", re.I)),
    ("reduction", re.compile("reduce|softmax|norm", re.I)),
    ("fusion", re.compile("fusion|loop|wrapped|broadcast|convert", re.I)),
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


def classify(launches: Sequence[Launch], projection_flops: float = 0.0) -> list[str]:
    """The class of each kernel of a step whose layers are all sparse.

    Args:
      launches: Kernels in the order of their launch.
      projection_flops: Of one square projection of all tokens. The values' may run
        while the draft does, and is told from the draft's products by its duration.
    """
    shortest = 0.5 * projection_flops / MOST_FLOPS_PER_MS
    classes, in_draft = [], False
    for name, time_ms in launches:
        fitting = (kind for kind, pattern in CLASSES if pattern.search(name))
        kind = next(fitting, "other")
        if SPARSE_KERNEL.search(name):
            kind, in_draft = "self-attention", False
        elif NORM_AND_ROPE.search(name):
            kind, in_draft = "norm and rotation", True
        elif DRAFT_START.search(name):
            kind, in_draft = "draft", True
        elif in_draft and kind != WEIGHTS:
            is_projection = kind == "matmul" and time_ms > shortest
            kind = kind if is_projection else "draft"
        classes.append(kind)
    return classes


def account(
    launches: Sequence[Launch], *, num_blocks: int, projection_flops: float
) -> dict[str, Any]:
    """Milliseconds by class, the costliest kernels, and one block in order.

    Args:
      launches: Of a step whose layers are all sparse.
      num_blocks: Transformer blocks that the step ran: layers times model calls.
      projection_flops: See `classify`.
    """
    classes = classify(launches, projection_flops)
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

    Kernels of less than five microseconds are left out.
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
