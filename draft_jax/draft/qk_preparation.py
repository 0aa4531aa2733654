"""Preparation of queries and keys before attention: norm, rotation, pooling."""

import jax
from jaxtyping import Array, Float

from draft_jax.config import DraftConfig
from draft_jax.draft.pooling import (
    PooledTokens,
    pool_queries_and_keys,
    reductions_of,
    tiling_of,
)
from draft_jax.grid import VideoGrid
from draft_jax.pytree import register_named_tuple
from pallas_kernels import pooling
from pallas_kernels.common import Order, Product, validation
from pallas_kernels.pooling import (
    QKV,
    MeanSquares,
    Projected,
    QKNorm,
    Reduction,
    Rope,
    Scales,
)

register_named_tuple(QKV)
register_named_tuple(Product)


def norm_rope_pool(
    q: Projected,
    k: Projected,
    *,
    grid: VideoGrid,
    config: DraftConfig | None,
    norm: QKNorm | None = None,
    scales: Scales | None = None,
    text_scales: Scales | None = None,
    rope: Rope | None = None,
    mean_squares: MeanSquares | None = None,
    order: Order = "raster",
    pool_anyway: bool = True,
) -> tuple[Float[Array, "B T N D"], Float[Array, "B T N D"], PooledTokens | None]:
    """Norms and rotates projected queries and keys, and pools the results.

    Norm and rotation are float32; values are rounded to the dtype of q once, after
    both, and pooled as rounded. One pass where a kernel can, XLA operations elsewhere.
    Text tokens are neither rotated nor pooled. No gradient flows through the pooled
    values.

    Args:
      q: Queries of the whole sequence as projected, T = `grid.num_tokens`. A `Product`
        has scales and a bias of its own; the kernel applies them as it reads.
      k: Keys, like q.
      grid: Geometry that defines the tiles. Static.
      config: `config.pooling` and `config.draft_tile` say what to pool. None pools
        nothing. Static.
      norm: RMS norm to apply, or None.
      scales: Factors of the channels of q and of k after the norm: N * D for a norm
        over all heads, D for one per head.
      text_scales: Factors for the text tokens, like scales. None takes scales for
        them too.
      rope: Cosine and sine of each channel pair (2i, 2i + 1) of a head, one row for
        each visual token in their order, D / 2 columns. None does not rotate.
      mean_squares: Mean squares of each token of q and of k over all heads of the
        model, where q and k have some of them; for a norm over heads. None computes
        them of q and k.
      order: How the visual tokens are ordered.
      pool_anyway: False leaves pooling to the attention (the third result is None)
        where it would take a pass of its own, which attention with a reused mask or
        dense attention does not need.

    Returns:
      q and k in their dtype, and `pooled` of `compute_mask` and `scheduled_attention`.

    Raises:
      ValueError: Shapes do not fit each other or the grid, scales are given without a
        norm or a norm without scales, text_scales without text, mean_squares without a
        norm over heads, or order is unknown.
      TypeError: q's dtype is not supported, or k has another.
    """
    q, k = Product.of(q), Product.of(k)
    validation.check_qk(q.values, k.values)
    validation.check_tokens(q.values, grid)
    validation.check_order(order)
    if text_scales is not None and grid.text_length == 0:
        raise ValueError(
            f"text_scales were given, but {grid} has no text: leave them out"
        )
    reductions = _fused_reductions(config)
    q, k, pooled = pooling.norm_rope_pool(
        q,
        k,
        tiling_of(grid, order),
        norm=norm,
        scales=scales,
        text_scales=text_scales,
        rope=rope,
        mean_squares=mean_squares,
        reductions=reductions,
        pool_anyway=pool_anyway,
    )
    named = _named(reductions, pooled)
    return q, k, _with_sub_tiles(named, q, k, grid, config, order, pool_anyway)


def joint_norm_rope_pool(
    video: QKV,
    text: QKV,
    *,
    grid: VideoGrid,
    config: DraftConfig | None,
    norm: QKNorm | None = None,
    scales: Scales | None = None,
    text_scales: Scales | None = None,
    rope: Rope | None = None,
    order: Order = "raster",
    pool_anyway: bool = True,
) -> tuple[
    Float[Array, "B T N D"],
    Float[Array, "B T N D"],
    Float[Array, "B T N D"],
    PooledTokens | None,
]:
    """Makes queries, keys and values of the joint sequence of a video and its text.

    They are those of `norm_rope_pool` for concatenated arrays. Where a kernel can, it
    reads both parts and writes the joint arrays: no other copy is made.

    Args:
      video: Queries, keys and values of the visual tokens, as projected.
      text: Those of the text, of `grid.text_length` tokens with the padding.
      grid: Geometry that defines the tiles and where the text stands. Static.
      config: See `norm_rope_pool`, like all arguments below.
      norm: RMS norm of queries and keys, or None.
      scales: Factors of the channels of q and of k after the norm.
      text_scales: Factors for the text. None takes scales for it too.
      rope: Cosine and sine of each channel pair of the visual tokens.
      order: How the visual tokens are ordered.
      pool_anyway: False leaves pooling to the attention where it would take a pass of
        its own.

    Returns:
      q, k and v of the joint sequence in their dtype; v is only copied. Then `pooled`
      of `compute_mask` and `scheduled_attention`.

    Raises:
      ValueError: As `norm_rope_pool`; or the grid has no text.
      TypeError: A dtype is not supported or differs from that of video.q, or video or
        text is no QKV.
    """
    for name, part in (("video", video), ("text", text)):
        if not isinstance(part, QKV):
            raise TypeError(f"{name} is {type(part).__name__}; expected QKV(q, k, v)")
    video, text = (QKV(*map(Product.of, part)) for part in (video, text))
    of_video, of_text = (tuple(x.values for x in part) for part in (video, text))
    validation.check_joint(of_video, of_text, grid)
    validation.check_order(order)
    reductions = _fused_reductions(config)
    q, k, v, pooled = pooling.joint_norm_rope_pool(
        video,
        text,
        tiling_of(grid, order),
        norm=norm,
        scales=scales,
        text_scales=text_scales,
        rope=rope,
        reductions=reductions,
        pool_anyway=pool_anyway,
    )
    named = _named(reductions, pooled)
    return q, k, v, _with_sub_tiles(named, q, k, grid, config, order, pool_anyway)


def _fused_reductions(config: DraftConfig | None) -> tuple[Reduction, ...]:
    """Returns what is pooled in the pass of norm and rotation: whole tiles only."""
    if config is None or config.draft_tile is not None:
        return ()
    return reductions_of(config)


def _with_sub_tiles(
    pooled: PooledTokens | None,
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    grid: VideoGrid,
    config: DraftConfig | None,
    order: Order,
    pool_anyway: bool,
) -> PooledTokens | None:
    """Pools sub-tiles, in a pass of their own, where the config has them."""
    if config is None or config.draft_tile is None or not pool_anyway:
        return pooled
    q, k = jax.lax.stop_gradient((q, k))
    return pool_queries_and_keys(q, k, grid, config=config, order=order)


def _named(
    reductions: tuple[Reduction, ...], pooled: tuple[Array, ...] | None
) -> PooledTokens | None:
    return None if pooled is None else PooledTokens.from_reductions(reductions, pooled)
