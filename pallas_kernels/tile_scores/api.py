"""Scores of pairs of tiles: the attention between the parts that tiles are cut into.

One kernel for Hopper GPUs, in which the map of parts by parts never exists in memory,
and XLA operations for the rest. On a GPU where the kernel cannot run, a warning says
why, once.
"""

import dataclasses
import functools
import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.common.arrays import AnyArray, Scale, to_jax
from pallas_kernels.common.device import Device, current_device
from pallas_kernels.common.linear_maps import (
    kernel_on_own_shards,
    with_derivatives_on_own_shards,
)
from pallas_kernels.common.sharding import Axes
from pallas_kernels.common.slow_paths import warn_once
from pallas_kernels.common.static import jit_once, split_scale
from pallas_kernels.tile_scores import sm90, xla
from pallas_kernels.tile_scores.interfaces import Parts


def tile_scores(
    q: Float[AnyArray, "B M N D"],
    k: Float[AnyArray, "B M N D"],
    parts: Parts,
    *,
    scale: Scale | Float[AnyArray, "B N"] | None = None,
    max_bytes: int = xla.MAX_CHUNK_BYTES,
) -> Float[Array, "B N S S"]:
    """Sums attention probabilities between parts over the parts of each pair of tiles.

    Part `i` attends to all parts: to part `j` with a probability that is proportional
    to `parts.key_weights[j] * exp(scale * q[i] @ k[j])`. The score of tiles s and t is
    the sum of these over the parts j of t, times `parts.query_weights[i]`, over the
    parts i of s.

    The kernel rounds scaled queries and keys to bfloat16 before they are multiplied;
    sums are float32. XLA multiplies in float32. Derivatives are those of XLA.

    Args:
      q: Queries of the parts of all tiles, such as means, M = S * J. Finite also where
        a part has no token.
      k: Keys of the parts, like q.
      parts: How many parts a tile has, and what each counts. Static.
      scale: Factor on the logits: a number, a scalar array, or an array of one for
        each head; 1 / sqrt(D) by default.
      max_bytes: Most bytes of logits that XLA holds at once. Static.

    Returns:
      float32 scores. Where the query weights of a tile add up to 1, so do its scores.

    Raises:
      ValueError: q or k has another number of parts than `parts`, or their shapes
        differ.
    """
    q, k = to_jax(q, k)
    for name, x in (("q", q), ("k", k)):
        if x.ndim != 4 or x.shape != q.shape or x.shape[1] != parts.num_parts:
            raise ValueError(
                f"{name} has shape {x.shape}; expected [B, M, N, D] with "
                f"M = {parts.num_parts} parts, the same for q and k"
            )
    device = current_device(q)
    cause = why_not_in_kernel(q.shape, parts, device)
    if cause is not None and device.platform == "gpu":
        warn_once(f"scores of tiles run on XLA instead of their kernel: {cause}")
    known, array = split_scale(1.0 / math.sqrt(q.shape[-1]) if scale is None else scale)
    limit = None if cause is None else max_bytes
    return _scores(q, k, array, parts=parts, scale=known, max_bytes=limit)


def why_not_in_kernel(
    shape: tuple[int, ...], parts: Parts, device: Device
) -> str | None:
    """Returns why the kernel does not score such parts on a device, or None if it does.

    Args:
      shape: That of q.
      parts: What would be scored.
      device: Device that it would run on.
    """
    return device.why_not_hopper() or sm90.backend.why_unsupported(shape, parts)


@functools.partial(jit_once, static_argnames=("parts", "scale", "max_bytes"))
def _scores(
    q, k, scale_array, *, parts: Parts, scale: float | None, max_bytes: int | None
):
    arrays: tuple[Array, ...] = (q, k)
    if scale is None:  # once for each head: gradients are added up where all are seen
        arrays = (q, k, jnp.broadcast_to(scale_array, q.shape[::2]))
    axes = dataclasses.replace(_AXES, operands=_AXES.operands[: len(arrays)])
    limit = xla.MAX_CHUNK_BYTES if max_bytes is None else max_bytes

    def by_xla(q, k, scale=scale):
        return (xla.tile_scores(parts, q, k, scale, max_bytes=limit),)

    def in_kernel(q, k, scale=scale):
        return (sm90.backend.tile_scores(q, k, parts, scale=scale),)

    if max_bytes is None:
        run = kernel_on_own_shards(in_kernel, by_xla, axes)
    else:
        run = with_derivatives_on_own_shards(by_xla, axes)
    (scores,) = run(*arrays)
    return scores


_AXES = Axes(
    operation="tile_scores",
    operands=("q: B M N D", "k: B M N D", "scale: B N"),
    results=("B N S S",),
)
