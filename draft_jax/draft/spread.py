"""How badly means stand for a key tile: what ranking by spread multiplies masses by.

A query q gives the tokens of a skipped tile the logits of their means. The root mean
square of q . (k - mean of k) over its tokens is how far these are off. The query is the
mean of a query tile. Its exact form is a product of all tiles with all keys; with the
channels of k - mean of k taken as uncorrelated, one number for each channel will do.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from draft_jax.config import DraftConfig, sub_tiles_of
from draft_jax.draft.pooling import visual_tokens
from draft_jax.grid import VideoGrid
from pallas_kernels.common import (
    Axes,
    Order,
    jit_once,
    with_derivatives_on_own_shards,
)
from pallas_kernels.pooling import deviations_of_tiles, reduce_sub_tiles


@functools.partial(jit_once, static_argnames=("grid", "config", "order"))
def key_differences(
    k: Float[Array, "B T N D"], grid: VideoGrid, config: DraftConfig, order: Order
) -> Float[Array, "B S P N D"]:
    """Returns how far each key is from the mean that would stand for it, in float32.

    Args:
      k: Keys of the whole sequence.
      grid: Geometry that defines the tiles. Static.
      config: `config.compensation` is read. Static.
      order: How the visual tokens are ordered. Static.
    """
    assert config.compensation is not None, "see DraftConfig"
    cells = sub_tiles_of(grid, config.compensation.sub_tile, config.compensation.frames)
    axes = Axes(
        operation="key_differences",
        operands=("k: B T N D",),
        results=("B S P N D",),
    )

    def run(k):
        tokens, known_order = visual_tokens(k, grid, order)
        means = reduce_sub_tiles(tokens, cells, order=known_order)
        return (deviations_of_tiles(tokens, means, cells, order=known_order),)

    (differences,) = with_derivatives_on_own_shards(run, axes)(k)
    return differences


def weigh_by_spread(
    mass: Float[Array, "B N S S"],
    q_mean: Float[Array, "B S N D"],
    spread: Float[Array, "B S *P N D"],
    *,
    grid: VideoGrid,
    config: DraftConfig,
) -> Float[Array, "B N S S"]:
    """Multiplies masses by how badly means stand for the key tile.

    Args:
      mass: Draft map.
      q_mean: Mean query of each tile.
      spread: See `Draft`.
      grid: Geometry that defines the tiles.
      config: `config.ranking` and `config.selection` are read.

    Returns:
      The products; for "top_p" divided by their sum in each row, where it is not zero.
      Ranked by "spread" they are exact to 2^-10 on a GPU, which multiplies in TF32:
      no term is negative, so that none cancels another, and the root halves the error.
    """
    if config.ranking == "spread":
        squares = jnp.einsum(
            "bqnd,bknd->bnqk",
            jnp.square(q_mean),
            spread,
            precision=jax.lax.Precision.DEFAULT,
        )
    else:
        squares = _exact_squares(q_mean, spread, grid)
    scores = mass * jnp.sqrt(squares)
    if config.selection != "top_p":
        return scores
    total = scores.sum(-1, keepdims=True)
    return jnp.where(total > 0, scores / jnp.where(total > 0, total, 1.0), mass)


def _exact_squares(
    q_mean: Float[Array, "B S N D"],
    differences: Float[Array, "B S P N D"],
    grid: VideoGrid,
) -> Float[Array, "B N S S"]:
    """Returns mean squares of q . (k - mean of k), a frame of keys at a time."""

    def of_frame(own: Float[Array, "B K P N D"]) -> Float[Array, "B N S K"]:
        products = jnp.einsum(
            "bqnd,bkpnd->bnqkp", q_mean, own, precision=jax.lax.Precision.HIGHEST
        )
        return jnp.square(products).sum(-1)

    frames = rearrange(differences, "B (F K) P N D -> F B K P N D", F=grid.frames)
    sums = rearrange(jax.lax.map(of_frame, frames), "F B N S K -> B N S (F K)")
    tokens = grid.block_lengths[grid.visual_blocks].astype(np.float32)
    return sums / tokens
