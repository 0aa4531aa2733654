"""Selection by sorting, in float32: the reference for tests.

It shares no helper with the kernels or the XLA path. A device may take numbers too
small to be normal for 0 here, which the kernels do not.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def select_in_maps(
    scores: Float[Array, "B N R C"],
    count: Int[Array, ""],
    *,
    forced: Bool[np.ndarray, "R C"],
) -> Bool[Array, "B N R C"]:
    """Keeps the best scores of each map, and the best one of each row without any."""
    batch, heads, num_rows, columns = scores.shape
    flat = scores.reshape(batch, heads, num_rows * columns)
    kept = _first(_ranks(flat, forced.reshape(-1)), count).reshape(scores.shape)
    best = _first(_ranks(scores, forced), jnp.ones(num_rows, jnp.int32))
    return kept | (best & ~kept.any(-1, keepdims=True))


def select_in_rows(
    scores: Float[Array, "B N R C"],
    count: Int[Array, " R"],
    *,
    forced: Bool[np.ndarray, "R C"],
) -> Bool[Array, "B N R C"]:
    """Keeps the best scores of each row."""
    return _first(_ranks(scores, forced), count)


def select_to_mass(
    probabilities: Float[Array, "B N R C"],
    least: Int[Array, " R"],
    most: Int[Array, " R"],
    *,
    forced: Bool[np.ndarray, "R C"],
    mass: float,
) -> Bool[Array, "B N R C"]:
    """Keeps the fewest best probabilities of each row that hold a mass.

    Sums are integers of 2^-30, and stop at 1.
    """
    units = jnp.nan_to_num(probabilities.astype(jnp.float32)) * 2**30
    units = jnp.round(jnp.clip(units, 0, 2**30)).astype(jnp.uint32)
    ranks = _ranks(probabilities, forced)
    order = jnp.argsort(ranks, axis=-1)
    held = jax.lax.associative_scan(
        lambda a, b: jnp.minimum(a + b, jnp.uint32(2**30)),
        jnp.take_along_axis(units, order, axis=-1),
        axis=-1,
    )
    # One more than the prefixes that do not hold the mass yet.
    count = (held < round(mass * 2**30)).sum(-1) + 1
    return _first(ranks, jnp.clip(count, least, most))


def _ranks(scores, forced) -> Int[Array, "*maps C"]:
    """Returns the rank of each score in the last axis, from 0; the first of ties wins.

    NaN counts as minus infinity, and forced scores come before all others.
    """
    scores = scores.astype(jnp.float32)
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    is_free = jnp.broadcast_to(jnp.asarray(~forced), scores.shape)
    order = jnp.lexsort((-scores, is_free), axis=-1)
    return jnp.argsort(order, axis=-1)


def _first(ranks, count) -> Bool[Array, "*maps C"]:
    return ranks < jnp.asarray(count)[..., None]
