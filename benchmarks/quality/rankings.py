"""Masks that stand for the ends of selection, true masses and chance, and for top-p."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from benchmarks.quality.patterns import mask_of_map
from draft_jax import BlockMask, DraftConfig, VideoGrid, draft_scores, select_blocks
from draft_jax.config import static_budget
from models.diffusion.inspection import block_masses
from pallas_kernels.common import Order, Scale, register_configuration
from pallas_kernels.tile_scores import Parts, tile_scores

TOKENS_OF_PART = 16  # whose probabilities the kernel for scores adds up


def masses_of_tiles(
    q: Float[Array, "B T N D"], k: Float[Array, "B T N D"], grid: VideoGrid
) -> Float[Array, "B N S S"]:
    """Returns the softmax mass of full attention between the tiles of a video.

    The kernel for scores of sub-tiles takes single tokens for them where tiles are
    alike and there is no text, for which a map of all tokens is never in memory.

    Args:
      q: Queries in tiled order, with the grid's text.
      k: Keys like q.
      grid: Geometry of the tokens.

    Returns:
      float32; row s sums to the tokens of tile s, less their mass on the text.
    """
    rows, columns = grid.tile
    is_even = not (grid.height % rows or grid.width % columns)
    if grid.text_length or not is_even or (rows * columns) % TOKENS_OF_PART:
        visual = grid.visual_blocks
        return block_masses(q, k, grid)[..., visual, visual]
    ones = (1.0,) * grid.num_tokens
    parts = Parts(per_tile=TOKENS_OF_PART, query_weights=ones, key_weights=ones)
    found = tile_scores(q, k, parts)
    size, of_tile = grid.num_visual_blocks, rows * columns // TOKENS_OF_PART
    split = found.reshape(*found.shape[:2], size, of_tile, size, of_tile)
    return split.sum((3, 5))


def true_masses(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"] | None,
    *,
    grid: VideoGrid,
    config: DraftConfig,
    budget: int | Int[Array, ""],
    scale: Scale | None,
    order: Order,
) -> BlockMask:
    """Ranks block pairs by their share of the softmax of full attention.

    It costs as much as dense attention: what no draft can know, not a method. The
    logits' scale is 1 / sqrt(D), and padded text counts. See `draft_jax.MaskMaker`.
    """
    del v
    if scale is not None:
        raise ValueError(f"{scale=} must be None: masses are of 1 / sqrt(D)")
    if order == "raster":
        q, k = (x[:, grid.tile_order] for x in (q, k))
    masses = masses_of_tiles(q, k, grid)
    return select_blocks(masses, grid=grid, config=config, budget=budget)


def chance(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"] | None,
    *,
    grid: VideoGrid,
    config: DraftConfig,
    budget: int | Int[Array, ""],
    scale: Scale | None,
    order: Order,
) -> BlockMask:
    """Ranks block pairs at random: others for each layer, step, item and head.

    The numbers follow from the queries, so that a run can be repeated. See
    `draft_jax.MaskMaker`.
    """
    del k, v, scale, order
    size = grid.num_visual_blocks
    first = q[:, grid.visual_tokens.start].astype(jnp.float32).sum()
    seed = jax.lax.bitcast_convert_type(first, jnp.uint32)
    shape = (q.shape[0], q.shape[2], size, size)
    scores = jax.random.uniform(jax.random.key(seed), shape)
    return select_blocks(scores, grid=grid, config=config, budget=budget)


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class MassPerRow:
    """Keeps the fewest blocks of a row whose draft probabilities reach a mass.

    It is `selection="top_p"` with the mass as what changes between densities: one
    program serves them all, where `DraftConfig.top_p` makes a program for each.

    Attributes:
      densities: Shares of block pairs, ascending; a budget stands for one of them.
      masses: The mass of a row at which each is kept, on average.
    """

    densities: tuple[float, ...]
    masses: tuple[float, ...]

    def __call__(
        self,
        q: Float[Array, "B T N D"],
        k: Float[Array, "B T N D"],
        v: Float[Array, "B T N D"] | None,
        *,
        grid: VideoGrid,
        config: DraftConfig,
        budget: int | Int[Array, ""],
        scale: Scale | None,
        order: Order,
    ) -> BlockMask:
        """Makes the masks; see `draft_jax.MaskMaker`."""
        del v
        budgets = [
            static_budget(round(1.0 - density, 6), grid, config)
            for density in self.densities
        ]
        place = jnp.searchsorted(jnp.asarray(budgets), budget)
        mass = jnp.asarray(self.masses, jnp.float32)[place]
        scores = draft_scores(q, k, grid=grid, config=config, scale=scale, order=order)
        falling, before = masses_before(scores)
        last = jnp.where(before < mass, falling, np.inf).min(-1, keepdims=True)
        return mask_of_map(scores >= last, q, grid, config)


def masses_before(
    scores: Float[Array, "B N S S"],
) -> tuple[Float[Array, "B N S S"], Float[Array, "B N S S"]]:
    """Returns the scores of each row, the largest first, and their sums before each.

    A block is kept if those before it do not reach the mass.
    """
    falling = -jnp.sort(-scores, axis=-1)
    return falling, jnp.cumsum(falling, axis=-1) - falling
