"""A linear map of the query, fitted to exact rows, that corrects sparse attention."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from draft_jax.config import DraftConfig, num_samples
from draft_jax.grid import VideoGrid
from pallas_kernels import unchecked_add_query_map, unchecked_row_attention
from pallas_kernels.common import Order, Scale, jit_once, on_own_shards

LEAST_SHARE = 1e-6  # of the trace of the moments, that a penalty is
GOLDEN = (5**0.5 - 1) / 2  # its multiples fill the unit interval evenly


def sampled_tokens(grid: VideoGrid, count: int, order: Order) -> np.ndarray:
    """Returns the positions of query tokens that are spread over the video.

    One stands in each of `count` equal parts of the tiled sequence, at places within
    them that differ, so that they are not all at one place of a tile.

    Args:
      grid: Geometry of the sequence.
      count: How many, at most half of `grid.num_visual_tokens`.
      order: How the visual tokens are ordered: the tokens are the same in either.
    """
    part = grid.num_visual_tokens / count
    number = np.arange(count)
    places = np.floor((number + (number * GOLDEN) % 1.0) * part).astype(np.int32)
    tiled = grid.visual_tokens.start + np.minimum(places, grid.num_visual_tokens - 1)
    return tiled if order == "tiled" else grid.tile_order[tiled]


def correct(
    out: Float[Array, "B T N D"],
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    *,
    grid: VideoGrid,
    config: DraftConfig,
    scale: Scale,
    text_lengths: Int[Array, " B"] | None,
    order: Order,
) -> Float[Array, "B T N D"]:
    """Adds to sparse attention what a map of the query says that it lacks.

    Gradients flow through the query that is mapped, not through the fit.

    Args:
      out: Sparse attention of q, k and v.
      q: Queries of the whole sequence.
      k: Keys.
      v: Values.
      grid: Geometry of the sequence.
      config: `config.correction` is read.
      scale: Factor of the logits.
      text_lengths: Valid text tokens of each batch item; None means all.
      order: How the visual tokens are ordered.

    Returns:
      The corrected output in the dtype of out; that of text is as it was.
    """
    count = num_samples(grid, config)
    if not count:
        return out
    assert config.correction is not None, "it has samples"
    rows, sparse = _take(q, out, grid, count, order)
    exact = unchecked_row_attention(
        rows,
        k,
        v,
        grid=grid,
        scale=scale,
        text_lengths=text_lengths,
    )
    matrix, offset = _fit_rows(rows, sparse, exact, config.correction.prior)
    video = grid.visual_tokens
    return unchecked_add_query_map(
        out, q, matrix, offset, tokens=(video.start, video.stop)
    )


@functools.partial(jit_once, static_argnums=(2, 3, 4))
def _take(q, out, grid, count, order):
    def run(q, out):
        at = sampled_tokens(grid, count, order)
        return q[:, at], out[:, at]

    on_each = on_own_shards(
        run,
        operation="sampled_rows",
        operands=("q: B T N D", "out: B T N D"),
        results=("B R N D", "B R N D"),
    )
    return on_each(q, out)


@functools.partial(jit_once, static_argnums=3)
def _fit_rows(rows, sparse, exact, prior):
    def run(rows, sparse, exact):
        error = exact.astype(jnp.float32) - sparse.astype(jnp.float32)
        return fit(rows, error, prior)

    on_each = on_own_shards(
        run,
        operation="correct",
        operands=("rows: B R N D", "sparse: B R N D", "exact: B R N D"),
        results=("B N D E", "B N E"),
    )
    return on_each(rows, sparse, exact)


def solve(
    matrices: Float[Array, "*B D D"],
    right_sides: Float[Array, "*B D E"],
    *,
    condition: float,
) -> Float[Array, "*B D E"]:
    """Solves positive definite systems by Newton's iteration for the inverse.

    It is all products of matrices. A factorisation is a call into a library, whose
    threads and XLA's get into each other's way on a CPU: in a layer six systems of 128
    took 22 ms by it, and 1.4 ms alone. An iteration squares the distance from the
    inverse, so that their number follows from the condition.

    Args:
      matrices: Symmetric and positive definite.
      right_sides: Columns to solve for.
      condition: Most that the trace is, over the smallest eigenvalue.

    Source: Ben-Israel and Cohen, On iterative computation of generalized inverses and
    associated projections, SIAM J. Numer. Anal. 3, 1966, for where it starts.
    """
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    # No eigenvalue is above the trace, nor above the largest sum of a row.
    rows, trace = jnp.abs(matrices).sum(-1).max(-1), jnp.trace(matrices, 0, -2, -1)
    identity = jnp.eye(matrices.shape[-1], dtype=matrices.dtype)
    inverse = identity / jnp.minimum(rows, trace)[..., None, None]
    # (1 - 1 / condition) to the power 2^n is below float32's digits then.
    for _ in range(math.ceil(math.log2(16.0 * condition))):
        inverse = product(inverse, 2.0 * identity - product(matrices, inverse))
    found = product(inverse, right_sides)
    return found + product(inverse, right_sides - product(matrices, found))


def fit(
    rows: Float[Array, "B R N D"], error: Float[Array, "B R N D"], prior: float
) -> tuple[Float[Array, "B N D D"], Float[Array, "B N D"]]:
    """Fits an affine map from queries to errors by ridge regression.

    The penalty is that of `prior` samples of independent channels, whose variance is
    the mean of the queries'. The offset has none.

    Args:
      rows: Queries that were sampled.
      error: What is to be added to the output of each.
      prior: See `Correction`.

    Returns:
      Matrix and offset of each batch item and head: error ~ query @ matrix + offset.
    """
    rows = rows.astype(jnp.float32)
    count, head_dim = rows.shape[1], rows.shape[-1]
    query_mean, error_mean = rows.mean(1), error.mean(1)
    queries, errors = rows - query_mean[:, None], error - error_mean[:, None]
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    moments = product("brnd,brne->bnde", queries, queries) / count
    mixed = product("brnd,brne->bnde", queries, errors) / count
    variance = jnp.trace(moments, axis1=-2, axis2=-1) / head_dim
    # Moments are exact to float32's digits of their trace, and may be singular. Queries
    # that are all alike explain nothing: the second floor makes their matrix zero.
    share = max(prior / count, LEAST_SHARE * head_dim)
    penalty = jnp.maximum(share * variance, jnp.finfo(jnp.float32).tiny ** 0.5)
    moments += penalty[..., None, None] * jnp.eye(head_dim, dtype=rows.dtype)
    matrix = solve(moments, mixed, condition=head_dim * (1.0 + 1.0 / share))
    offset = error_mean - product("bnd,bnde->bne", query_mean, matrix)
    return matrix, offset
