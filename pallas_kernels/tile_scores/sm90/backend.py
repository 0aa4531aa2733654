"""Scores of tiles by the Hopper kernel."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.common import device
from pallas_kernels.common.batching import fold_mapped_axes
from pallas_kernels.common.validation import why_not_among
from pallas_kernels.tile_scores.interfaces import Parts
from pallas_kernels.tile_scores.sm90.kernel import sum_probabilities
from pallas_kernels.tile_scores.sm90.plan import (
    HEAD_DIMS,
    KEY_GROUP,
    KEYS,
    PARTS_PER_TILE,
    QUERIES,
    QUERY_GROUP,
    Plan,
)

LOG2_E = math.log2(math.e)


def why_unsupported(shape: tuple[int, ...], parts: Parts) -> str | None:
    """Returns why the kernel cannot score such parts on any device, or None.

    Args:
      shape: That of q, [B, M, N, D].
      parts: What would be scored.
    """
    return why_not_among(
        PARTS_PER_TILE, parts.per_tile, "{} parts of a tile"
    ) or why_not_among(HEAD_DIMS, shape[-1], "a head dimension of {}")


def tile_scores(
    q: Float[Array, "B M N D"],
    k: Float[Array, "B M N D"],
    parts: Parts,
    *,
    scale: float | Float[Array, "B N"],
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Float[Array, "B N S S"]:
    """Computes the scores of all tiles; see `pallas_kernels.tile_scores`.

    Args:
      q: Query parts.
      k: Key parts.
      parts: What each counts.
      scale: Factor on the logits, one or one for each head.
      interpret: Run on the CPU in GPU interpret mode.

    Raises:
      ValueError: The kernel cannot take these parts on any device.
    """
    if cause := why_unsupported(q.shape, parts):
        raise ValueError(f"the kernel for scores cannot take these parts: {cause}")
    # One rounding, of a product with the scale that is none of the kernel's then.
    factor = scale[:, None, :, None] if isinstance(scale, jax.Array) else scale
    q = (q.astype(jnp.float32) * (factor * LOG2_E)).astype(jnp.bfloat16)
    run = functools.partial(_run, parts=parts, interpret=interpret)
    return fold_mapped_axes(run)(q, k.astype(jnp.bfloat16))[0]


def _run(q, k, *, parts: Parts, interpret):
    batch, _, num_heads, head_dim = q.shape
    plan = Plan(
        num_parts=parts.num_parts,
        per_tile=parts.per_tile,
        num_maps=batch * num_heads,
        num_heads=num_heads,
        head_dim=head_dim,
        most_ctas=device.num_multiprocessors(),
        has_key_weights=len(set(parts.key_weights)) > 1,
        interpreted=interpret is not None,
    )
    query_weights, key_weights = (
        np.asarray(weights, np.float32)[None, :, None, None]
        for weights in (parts.query_weights, parts.key_weights)
    )
    scores = sum_probabilities(
        _arrange(q, QUERIES, QUERY_GROUP),
        _arrange(k, KEYS, KEY_GROUP),
        jnp.asarray(_arrange(query_weights, QUERIES, QUERY_GROUP).ravel()),
        jnp.asarray(_log2(_arrange(key_weights, KEYS, KEY_GROUP).ravel())),
        plan=plan,
        interpret=interpret,
    )
    return (scores.reshape(batch, num_heads, plan.num_tiles, plan.num_tiles),)


def _arrange(parts, block: int, group: tuple[int, int, int]):
    """Fills up the last block with zeros, and orders parts as products have them.

    XLA fuses it with what makes the parts.
    """
    pad = np.pad if isinstance(parts, np.ndarray) else jnp.pad
    padded = pad(parts, ((0, 0), (0, -parts.shape[1] % block), (0, 0), (0, 0)))
    sizes = dict(zip("abc", group, strict=True))
    return rearrange(padded, "B (G a b c) N D -> B (G b a c) N D", **sizes)


def _log2(weights: np.ndarray) -> np.ndarray:
    """Returns base-2 logarithms; minus infinity for 0."""
    logarithms = np.log2(np.where(weights > 0, weights, 1))
    return np.where(weights > 0, logarithms, -np.inf).astype(np.float32)
