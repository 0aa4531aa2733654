"""Scores of tiles from the whole map of parts, in float32: the reference for tests.

It shares no helper with the kernel or the XLA path.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.tile_scores.interfaces import Parts


def tile_scores(
    q: Float[Array, "B M N D"],
    k: Float[Array, "B M N D"],
    parts: Parts,
    *,
    scale: float,
) -> Float[Array, "B N S S"]:
    """Computes the map of parts, and sums it; see `pallas_kernels.tile_scores`."""
    logits = scale * jnp.einsum(
        "bqnd,bknd->bnqk",
        q.astype(jnp.float32),
        k.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    key_weights = jnp.asarray(parts.key_weights, jnp.float32)
    counted = jnp.where(key_weights > 0, logits, -jnp.inf)
    weights = key_weights * jnp.exp(counted - counted.max(-1, keepdims=True))
    probabilities = weights / weights.sum(-1, keepdims=True)
    query_weights = jnp.asarray(parts.query_weights, jnp.float32)
    weighted = query_weights[:, None] * probabilities
    tiles, per_tile = parts.num_tiles, parts.per_tile
    pairs = weighted.reshape(*weighted.shape[:2], tiles, per_tile, tiles, per_tile)
    return pairs.sum((3, 5))
