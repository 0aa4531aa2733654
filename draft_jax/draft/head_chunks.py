"""Maps of many heads a few heads at a time, so that they never exist together."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from pallas_kernels.common import fold_mapped_axes

# Bytes of a chunk's maps, one float32 map for each head; the logits, the softmax and
# the keys of a chunk are two or three times as much. A head of 8,192 draft tokens is as
# large. Hunyuan's 24 heads of 990 take 94 MB: cutting that would only add launches.
MAX_CHUNK_BYTES = 2**28


def map_heads(
    function: Callable[..., Any],
    arrays: Any,
    *shared: Any,
    map_size: int,
    itemsize: int = 4,
    max_bytes: int,
) -> Any:
    """Applies a function to arrays of heads, to few heads at a time if maps are large.

    The choice is static. Chunks run one after another; each has the same number of
    heads, the largest that divides all of them and whose maps fit `max_bytes`, but at
    least one head. Under vmap the mapped axis joins the batch, so that it does not
    multiply the memory of a chunk.

    Args:
      function: Takes `arrays` with any batch and heads, and `shared`; treats heads
        independently. Its results start with the same two axes.
      arrays: Arrays [B, N, ...].
      *shared: Arrays without these axes, such as a budget. Where vmap maps one of them,
        its values are taken one after another.
      map_size: Elements of the map of one head.
      itemsize: Bytes of an element.
      max_bytes: Bytes of the maps of a chunk, such as `MAX_CHUNK_BYTES`. Whoever
        calls this under jit passes it as a static argument.

    Returns:
      What the function returns for all heads.
    """
    leaves, tree = jax.tree.flatten(arrays)
    shared_leaves, shared_tree = jax.tree.flatten(shared)
    result_tree = None
    # `run` is kept with the program, so it closes over no array.
    num_own, head_bytes = len(leaves), map_size * itemsize

    def run(*flat: Array) -> tuple[Array, ...]:
        nonlocal result_tree
        own = jax.tree.unflatten(tree, flat[:num_own])
        also = jax.tree.unflatten(shared_tree, flat[num_own:])
        results = _map_chunks(
            lambda own: function(own, *also), own, head_bytes, max_bytes
        )
        results, result_tree = jax.tree.flatten(results)
        return tuple(results)

    results = fold_mapped_axes(run, len(shared_leaves))(*leaves, *shared_leaves)
    return jax.tree.unflatten(result_tree, results)


def _map_chunks(
    function: Callable[[Any], Any], arrays: Any, head_bytes: int, max_bytes: int
) -> Any:
    batch, num_heads = jax.tree.leaves(arrays)[0].shape[:2]
    total = batch * num_heads
    heads = _heads_of_chunk(total, head_bytes, max_bytes)
    if heads == total:
        return function(arrays)

    def split(x: Array) -> Array:
        return x.reshape(total // heads, 1, heads, *x.shape[2:])

    def join(x: Array) -> Array:
        return x.reshape(batch, num_heads, *x.shape[3:])

    return jax.tree.map(join, jax.lax.map(function, jax.tree.map(split, arrays)))


def _heads_of_chunk(total: int, head_bytes: int, max_bytes: int) -> int:
    """Returns the largest divisor of `total` whose heads fit, or 1 if none does."""
    fitting = max(1, max_bytes // head_bytes)
    divisors = (d for d in range(1, math.isqrt(total) + 1) if total % d == 0)
    both = {d for small in divisors for d in (small, total // small)}
    return max((d for d in both if d <= fitting), default=1)
