"""Scores that stand for the two ends of selection: true masses, and chance."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from draft_jax import BlockMask, DraftConfig, VideoGrid, select_blocks
from models.diffusion.inspection import block_masses
from pallas_kernels.common import Order, Scale, register_configuration


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrueMasses:
    """Ranks block pairs by their share of the softmax of full attention.

    It costs more than dense attention: what no draft can know, not a method. The
    logits' scale is 1 / sqrt(D), and padded text counts.
    """

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
        if scale is not None:
            raise ValueError(f"{scale=} must be None: masses are of 1 / sqrt(D)")
        if order == "raster":
            q, k = (x[:, grid.tile_order] for x in (q, k))
        visual = grid.visual_blocks
        masses = block_masses(q, k, grid)[..., visual, visual]
        return select_blocks(masses, grid=grid, config=config, budget=budget)


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class Chance:
    """Ranks block pairs at random: others for each layer, step, item and head.

    The numbers follow from the queries, so that a run can be repeated.
    """

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
        size = grid.num_visual_blocks
        first = q[:, grid.visual_tokens.start].astype(jnp.float32).sum()
        seed = jax.lax.bitcast_convert_type(first, jnp.uint32)
        key = jax.random.key(seed)
        scores = jax.random.uniform(key, (q.shape[0], q.shape[2], size, size))
        return select_blocks(scores, grid=grid, config=config, budget=budget)
