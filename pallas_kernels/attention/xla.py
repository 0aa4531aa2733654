"""Block-sparse attention in plain XLA: any platform, memory linear in tokens.

Each step of a walk over the kept key blocks updates a running softmax. `blocks` has the
walk, `derivatives` what follows from the forward pass.
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.blocks import (
    ChunkConfig,
    block_lengths,
    cut,
    join,
    row_lists,
    valid_only,
    walk,
)
from pallas_kernels.attention.derivatives import Attention, attend
from pallas_kernels.attention.means import Means, MeansByHead, start_softmax
from pallas_kernels.attention.pair_sums import dot
from pallas_kernels.common.device import Device, current_device
from pallas_kernels.common.interfaces import Backend, BlockGrid, BlockLists, Problem
from pallas_kernels.common.static import jit_once


def xla_attention(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    mask: BlockLists,
    *,
    grid: BlockGrid,
    scale: float | Float[Array, ""],
    text_lengths: Int[Array, " B"] | None,
    means: Means | None = None,
    config: ChunkConfig | None = None,
) -> tuple[Float[Array, "B T N D"], Float[Array, "B N T"]]:
    """Computes attention over kept blocks only; differentiable in both modes.

    Args:
      q: Queries in tiled order.
      k: Keys.
      v: Values.
      mask: Kept block pairs.
      grid: Geometry of the blocks.
      scale: Factor on the logits, also a traced one.
      text_lengths: Valid text tokens of each batch item; None means all.
      means: What stands for the blocks that each query block skips, or None.
      config: Group and step sizes; chosen by platform when None.

    Returns:
      The output in q's dtype and the float32 log-sum-exp [B, N, T]; zeros and -inf
      for queries without a valid key.
    """
    if config is None:
        config = ChunkConfig.for_platform(current_device(q).platform)
    if text_lengths is None:
        text_lengths = jnp.full(q.shape[0], grid.text_length, jnp.int32)
    if not isinstance(scale, float):
        # Exact: products of a float32 array are float32.
        q, scale = q.astype(jnp.float32) * scale, 1.0
    sub_tiles = None if means is None else means.sub_tiles
    attention = Attention(
        forward=functools.partial(_forward, (grid, scale, config, sub_tiles)),
        grid=grid,
        order="tiled",
        scale=scale,
        config=config,
        sub_tiles=sub_tiles,
    )
    arrays = (q, k, v, mask.row_offsets, mask.block_ids, text_lengths)
    return attend(attention, *arrays, *(() if means is None else means[:3]))


@functools.partial(jit_once, static_argnums=0)
def _forward(static, q, k, v, row_offsets, block_ids, text_lengths, *means):
    grid, scale, config, sub_tiles = static
    batch, _, num_heads, _ = q.shape
    lengths = block_lengths(grid, text_lengths, num_heads)

    def blocks(x):
        if config.upcast:
            x = x.astype(jnp.float32)
        return valid_only(cut(x, grid), lengths)

    own = blocks(q)
    started: tuple[Array, ...] = ()
    if sub_tiles is not None:
        mean_k, mean_v, dropped = means
        of_blocks = Means(mean_k, mean_v, dropped, sub_tiles)
        by_head = MeansByHead.of(of_blocks, upcast=config.upcast)
        started = start_softmax(own, by_head, scale=scale)
    out, lse = walk(
        row_lists(row_offsets, block_ids),
        own=(own, *started, lengths),
        others=(blocks(k), blocks(v), lengths),
        init=_forward_init,
        step=functools.partial(_forward_step, scale=scale),
        finish=_forward_finish,
        num_blocks=grid.num_blocks,
        config=config,
    )
    out = join(out, grid, batch).astype(v.dtype)
    return out, join(lse, grid, batch).swapaxes(1, 2)


def _forward_init(own):
    q, *started, _ = own
    if started:
        return tuple(started)
    return (
        jnp.full(q.shape[:-1], -jnp.inf, jnp.float32),
        jnp.zeros(q.shape[:-1], jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )


def _forward_step(own, others, valid, carry, *, scale):
    """Adds the gathered keys to the running maximum, sum and weighted values."""
    (q, *_), (k, v) = own, others
    maximum, total, weighted = carry
    logits = scale * dot("gpd,gkd->gpk", q, k)
    logits = jnp.where(valid[:, None], logits, -jnp.inf)
    new_maximum = jnp.maximum(maximum, logits.max(-1))
    # A row that has met no valid key yet must not compute -inf - -inf.
    finite_maximum = jnp.where(new_maximum == -jnp.inf, 0.0, new_maximum)
    decay = jnp.exp(maximum - finite_maximum)
    weights = jnp.exp(logits - finite_maximum[..., None])
    total = total * decay + weights.sum(-1)
    added = dot("gpk,gkd->gpd", weights.astype(v.dtype), v)
    return new_maximum, total, weighted * decay[..., None] + added


def _forward_finish(own, carry):
    length = own[-1]
    maximum, total, weighted = carry
    is_query = jnp.arange(total.shape[-1]) < length[:, None]
    has_key = (total != 0) & is_query  # true for NaN, which must not become zero
    total = jnp.where(has_key, total, 1.0)
    out = jnp.where(has_key[..., None], weighted / total[..., None], 0.0)
    return out, jnp.where(has_key, maximum + jnp.log(total), -jnp.inf)


def _why_slow(problem: Problem) -> str | None:
    if problem.device.platform == "gpu":
        return (
            f"it gathers K and V blocks through the memory of {problem.device.kind}, "
            "which a fused kernel does not"
        )
    return None


def _attention_on(*arrays, device: Device, **options):
    config = ChunkConfig.for_platform(device.platform)
    return xla_attention(*arrays, config=config, **options)


BACKEND = Backend(
    name="xla",
    function=_attention_on,
    why_unsupported=lambda problem: None,
    why_slow=_why_slow,
)
