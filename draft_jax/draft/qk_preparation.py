"""Preparation of queries and keys before attention: norm, rotation, pooling."""

from jaxtyping import Array, Float

from draft_jax.config import DraftConfig
from draft_jax.draft.pooling import PooledTokens, reductions_of, tiling_of
from draft_jax.grid import VideoGrid
from pallas_kernels import pooling
from pallas_kernels.common import AnyArray, Order, to_jax, validation
from pallas_kernels.pooling import QKNorm, Rope, Scales


def norm_rope_pool(
    q: Float[AnyArray, "B T N D"],
    k: Float[AnyArray, "B T N D"],
    *,
    grid: VideoGrid,
    config: DraftConfig | None,
    norm: QKNorm | None = None,
    scales: Scales | None = None,
    rope: Rope | None = None,
    order: Order = "raster",
    pool_anyway: bool = True,
) -> tuple[Float[Array, "B T N D"], Float[Array, "B T N D"], PooledTokens | None]:
    """Norms and rotates projected queries and keys, and pools the results.

    Norm and rotation are float32; values are rounded to the dtype of q once, after
    both, and pooled as rounded. One pass where a kernel can, XLA operations elsewhere.
    Text tokens are neither rotated nor pooled. No gradient flows through the pooled
    values.

    Args:
      q: Queries of the whole sequence as projected, T = `grid.num_tokens`.
      k: Keys, like q.
      grid: Geometry that defines the tiles. Static.
      config: `config.pooling` says what to pool. None pools nothing. Static.
      norm: RMS norm to apply, or None.
      scales: Factors of the channels of q and of k after the norm: N * D for a norm
        over all heads, D for one per head.
      rope: Cosine and sine of each channel pair (2i, 2i + 1) of a head, one row for
        each visual token in their order, D / 2 columns. None does not rotate.
      order: How the visual tokens are ordered.
      pool_anyway: False leaves pooling to the attention (the third result is None)
        where it would take a pass of its own, which attention with a reused mask or
        dense attention does not need.

    Returns:
      q and k in their dtype, and `pooled` of `compute_mask` and `scheduled_attention`.

    Raises:
      ValueError: Shapes do not fit each other or the grid, scales are given without a
        norm or a norm without scales, or order is unknown.
      TypeError: q's dtype is not supported, or k has another.
    """
    q, k = to_jax(q, k)
    validation.check_qk(q, k)
    validation.check_tokens(q, grid)
    validation.check_order(order)
    reductions = () if config is None else reductions_of(config)
    q, k, pooled = pooling.norm_rope_pool(
        q,
        k,
        tiling_of(grid, order),
        norm=norm,
        scales=scales,
        rope=rope,
        reductions=reductions,
        pool_anyway=pool_anyway,
    )
    if pooled is None:
        return q, k, None
    return q, k, PooledTokens.from_reductions(reductions, pooled)
