"""Scores of tiles as XLA operations, for any device: a few query tiles at a time."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.tile_scores.interfaces import Parts

# Bytes of the float32 logits of the query tiles that are computed together.
MAX_CHUNK_BYTES = 2**27


def tile_scores(
    parts: Parts,
    q: Float[Array, "B M N D"],
    k: Float[Array, "B M N D"],
    scale: float | Float[Array, "B N"],
    *,
    max_bytes: int = MAX_CHUNK_BYTES,
) -> Float[Array, "B N S S"]:
    """Computes the scores of all tiles; see `pallas_kernels.tile_scores`."""
    batch, num_parts, num_heads, head_dim = q.shape
    tiles, per_tile = parts.num_tiles, parts.per_tile
    keys = k.astype(jnp.float32)
    log_weights, counts = _log(parts.key_weights)
    by_tile = q.astype(jnp.float32).reshape(batch, tiles, per_tile, num_heads, head_dim)
    weights = np.asarray(parts.query_weights, np.float32).reshape(tiles, per_tile)

    factor = scale[:, :, None, None, None] if isinstance(scale, jax.Array) else scale

    def score(chunk):
        own, own_weights = chunk
        logits = jnp.einsum(
            "bsjnd,bknd->bnsjk", own, keys, precision=jax.lax.Precision.HIGHEST
        )
        # Apart from what follows, or XLA runs cuBLAS and then copies the whole map.
        logits = jax.lax.optimization_barrier(logits) * factor + log_weights
        probabilities = jax.nn.softmax(jnp.where(counts, logits, -jnp.inf), axis=-1)
        shape = (*probabilities.shape[:-1], tiles, per_tile)
        of_tiles = probabilities.reshape(shape).sum(-1)
        return (of_tiles * own_weights[:, :, None]).sum(3)

    size = batch * num_heads * per_tile * num_parts * 4
    together = max(1, min(tiles, max_bytes // size))
    padding = -tiles % together
    by_tile = jnp.pad(by_tile, ((0, 0), (0, padding), (0, 0), (0, 0), (0, 0)))
    chunks = by_tile.reshape(batch, -1, together, per_tile, num_heads, head_dim)
    own_weights = np.pad(weights, ((0, padding), (0, 0))).reshape(
        -1, together, per_tile
    )
    scores = jax.lax.map(score, (jnp.moveaxis(chunks, 1, 0), own_weights))
    scores = jnp.moveaxis(scores, 0, 2).reshape(batch, num_heads, -1, tiles)
    return scores[:, :, :tiles]


def _log(weights: tuple[float, ...]):
    """Returns logarithms of weights, 0 for those of 0, and which are not."""
    values = np.asarray(weights, np.float32)
    return np.log(np.where(values > 0, values, 1)), values > 0
