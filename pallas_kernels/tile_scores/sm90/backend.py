"""Scores of tiles by the Hopper kernel."""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.common.batching import fold_mapped_axes
from pallas_kernels.tile_scores.interfaces import Parts
from pallas_kernels.tile_scores.sm90.kernel import sum_probabilities
from pallas_kernels.tile_scores.sm90.plan import (
    ALIGNMENT,
    BLOCK,
    HEAD_DIMS,
    PARTS_PER_TILE,
    Plan,
)

LOG2_E = math.log2(math.e)


def why_unsupported(shape: tuple[int, ...], parts: Parts) -> str | None:
    """Returns why the kernel cannot score such parts on any device, or None.

    Args:
      shape: That of q, [B, M, N, D].
      parts: What would be scored.
    """
    if parts.per_tile not in PARTS_PER_TILE:
        accepted = ", ".join(map(str, PARTS_PER_TILE))
        return f"it takes {accepted} parts of a tile, not {parts.per_tile}"
    if shape[-1] not in HEAD_DIMS:
        accepted = " and ".join(map(str, HEAD_DIMS))
        return f"it takes a head dimension of {accepted}, not {shape[-1]}"
    return None


def tile_scores(
    q: Float[Array, "B M N D"],
    k: Float[Array, "B M N D"],
    parts: Parts,
    *,
    scale: float | Float[Array, ""],
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Float[Array, "B N S S"]:
    """Computes the scores of all tiles; see `pallas_kernels.tile_scores`.

    Args:
      q: Query parts.
      k: Key parts.
      parts: What each counts.
      scale: Factor on the logits.
      interpret: Run on the CPU in GPU interpret mode.

    Raises:
      ValueError: The kernel cannot take these parts on any device.
    """
    if cause := why_unsupported(q.shape, parts):
        raise ValueError(f"the kernel for scores cannot take these parts: {cause}")
    # One rounding, of a product with the scale that is none of the kernel's then.
    q = (q.astype(jnp.float32) * (scale * LOG2_E)).astype(jnp.bfloat16)
    run = functools.partial(_run, parts=parts, interpret=interpret)
    return fold_mapped_axes(run)(q, k.astype(jnp.bfloat16))[0]


def _run(q, k, *, parts: Parts, interpret):
    batch, _, num_heads, head_dim = q.shape
    plan = Plan(
        num_parts=parts.num_parts,
        per_tile=parts.per_tile,
        num_heads=num_heads,
        head_dim=head_dim,
        has_key_weights=len(set(parts.key_weights)) > 1,
        interpreted=interpret is not None,
    )
    # A copy takes a whole block, of an array of whole groups of parts.
    missing = max(BLOCK - parts.num_parts, -parts.num_parts % ALIGNMENT)
    q, k = (jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) for x in (q, k))
    scores = sum_probabilities(
        q,
        k,
        _log2(parts.query_weights, plan),
        _log2(parts.key_weights, plan),
        plan=plan,
        interpret=interpret,
    )
    return (scores.reshape(batch, num_heads, plan.num_tiles, plan.num_tiles),)


def _log2(weights: tuple[float, ...], plan: Plan) -> Array:
    """Returns base-2 logarithms, up to whole blocks; minus infinity for 0."""
    values = np.zeros(plan.num_blocks * BLOCK, np.float32)
    values[: len(weights)] = weights
    logarithms = np.log2(np.where(values > 0, values, 1))
    return jnp.asarray(np.where(values > 0, logarithms, -np.inf), jnp.float32)
