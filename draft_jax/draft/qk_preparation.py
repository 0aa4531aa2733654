"""What a DiT does to queries and keys before attention: norm, rotation, pooling."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from draft_jax.config import DraftConfig
from draft_jax.draft.pooling import (
    PooledTokens,
    pool_queries_and_keys,
    reductions_of,
    tile_table,
)
from draft_jax.grid import VideoGrid
from pallas_kernels.common import validation
from pallas_kernels.common.device import current_device
from pallas_kernels.common.interfaces import Order
from pallas_kernels.common.slow_paths import warn_once
from pallas_kernels.pooling.sm90 import norm_rope_pool as norm_rope_pool_sm90
from pallas_kernels.pooling.sm90.norm_rope_pool import QKNorm
from pallas_kernels.pooling.sm90.pool_tiles import Reduction

Scales = tuple[Float[Array, " C"], Float[Array, " C"]]
Rope = tuple[Float[Array, "V half"], Float[Array, "V half"]]


def norm_rope_pool(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
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
      q and k in their dtype, and what `draft_attention` and `scheduled_attention` take
      as `pooled`.

    Raises:
      ValueError: Shapes do not fit each other or the grid, scales are given without a
        norm or a norm without scales, or order is unknown.
      TypeError: q's dtype is not supported, or k has another.
    """
    _check(q, k, grid, norm, scales, rope)
    validation.check_order(order)
    reductions = () if config is None else reductions_of(config)
    device = current_device(q)
    cause = norm_rope_pool_sm90.why_unsupported(q.shape, q.dtype, norm, device)
    if cause is None:
        task = _Task(grid=grid, order=order, norm=norm, reductions=reductions)
        q, k, *values = _fused(task, q, k, scales, rope)
        if not reductions:
            return q, k, None
        return q, k, PooledTokens.from_reductions(reductions, tuple(values))
    if device.is_hopper:
        warn_once(f"norm_rope_pool runs as XLA operations: {cause}")
    q, k = _with_xla(q, k, scales, rope, grid=grid, norm=norm)
    if not (reductions and pool_anyway):
        return q, k, None
    fixed = jax.lax.stop_gradient((q, k))
    return q, k, pool_queries_and_keys(*fixed, grid, order=order, reductions=reductions)


def rotate_pairs(
    x: Float[Array, "B T N D"],
    cos: Float[Array, "T half"],
    sin: Float[Array, "T half"],
) -> Float[Array, "B T N D"]:
    """Rotates the channel pairs (2i, 2i + 1) of each token.

    Args:
      x: Queries or keys; float32 keeps the rotation in float32.
      cos: Cosines in the token order of x.
      sin: Sines in the token order of x.

    Returns:
      The rotated x, in its dtype.
    """
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Task:
    """The static arguments of the kernel."""

    grid: VideoGrid
    order: Order
    norm: QKNorm | None
    reductions: tuple[Reduction, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(task: _Task, q, k, scales, rope):
    return norm_rope_pool_sm90.norm_rope_pool(
        q,
        k,
        scales,
        rope,
        tile_table(task.grid, task.order),
        task.grid.visual_tokens,
        norm=task.norm,
        reductions=task.reductions,
    )


def _fused_forward(task: _Task, *arrays):
    return _fused(task, *arrays), arrays


def _fused_backward(task: _Task, arrays, cotangents):
    run = functools.partial(_with_xla, grid=task.grid, norm=task.norm)
    _, transposed = jax.vjp(run, *arrays)
    return transposed(tuple(cotangents[:2]))


_fused.defvjp(_fused_forward, _fused_backward)


def _with_xla(q, k, scales, rope, *, grid: VideoGrid, norm: QKNorm | None):
    outs = []
    for x, scale in zip((q, k), scales or (None, None), strict=True):
        y = x.astype(jnp.float32)
        if norm is not None:
            axes = (-2, -1) if norm.over == "heads" else (-1,)
            mean_square = jnp.square(y).mean(axes, keepdims=True)
            shape = x.shape[2:] if norm.over == "heads" else x.shape[3:]
            factor = scale.astype(jnp.float32).reshape(shape)
            y = y * jax.lax.rsqrt(mean_square + norm.eps) * factor
        if rope is not None:
            y = _rotate_visual(y, rope, grid.visual_tokens)
        outs.append(y.astype(x.dtype))
    return tuple(outs)


def _rotate_visual(y, rope: Rope, visual: slice):
    rotated = rotate_pairs(y[:, visual], *rope)
    if rotated.shape == y.shape:
        return rotated
    return jnp.concatenate([y[:, : visual.start], rotated, y[:, visual.stop :]], axis=1)


def _check(q, k, grid: VideoGrid, norm: QKNorm | None, scales, rope) -> None:
    validation.check_qk(q, k)
    validation.check_tokens(q, grid)
    _, _, num_heads, head_dim = q.shape
    if (norm is None) != (scales is None):
        given = "None" if scales is None else "given"
        raise ValueError(f"{norm=}, but scales are {given}; give both or neither")
    if norm is not None:
        width = num_heads * head_dim if norm.over == "heads" else head_dim
        for name, scale in zip(("q", "k"), scales, strict=True):
            if scale.shape != (width,):
                raise ValueError(
                    f"the scale of {name} has shape {scale.shape}; {norm} needs "
                    f"({width},)"
                )
    if rope is None:
        return
    expected = (grid.num_visual_tokens, head_dim // 2)
    for name, table in zip(("cosines", "sines"), rope, strict=True):
        if table.shape != expected or head_dim % 2:
            raise ValueError(
                f"the {name} of rope have shape {table.shape}; expected {expected}, a "
                f"row for each visual token and a column for each of {head_dim=} / 2 "
                "pairs"
            )
