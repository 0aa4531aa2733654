"""Derivatives of block-sparse attention, for any backend's forward pass.

The forward pass gives the output and the log-sum-exp; all else follows from them, block
by block. Reverse mode is FlashAttention's backward pass: dQ walks the lists of the
forward pass, dK and dV the transposed ones. Forward mode walks those of the forward
pass. Means for skipped blocks are further keys of the same softmax: their share of the
tangents is added, and JAX transposes it.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from pallas_kernels.attention.blocks import (
    ChunkConfig,
    block_lengths,
    cut,
    join,
    row_lists,
    transpose,
    valid_only,
)
from pallas_kernels.attention.means import (
    Means,
    MeansByHead,
    added_tangents,
    by_head,
)
from pallas_kernels.attention.pair_sums import Arrays, Walked, dot, sum_over_pairs
from pallas_kernels.common.interfaces import BlockGrid, Order
from pallas_kernels.common.linear_maps import LinearMap, sealed
from pallas_kernels.common.sharding import Axes
from pallas_kernels.common.static import jit_once
from pallas_kernels.common.sub_tiles import SubTiles
from pallas_kernels.common.token_order import reorder_tokens

# Log-sum-exp that derivatives see of a query without a key: its probabilities are zero.
NO_KEY = np.finfo(np.float32).max

# Names of what gradients keep of an attention's forward pass, beside its inputs, for
# `jax.checkpoint_policies.save_only_these_names` and the like.
RESIDUAL_NAMES = ("attention_output", "attention_log_sum_exp")

# What an attention's forward pass takes and returns.
AXES = Axes(
    operation="block_sparse_attention",
    operands=(
        "q: B T N D",
        "k: B T N D",
        "v: B T N D",
        "mask.row_offsets: B N R",
        "mask.block_ids: B N M",
        "text_lengths: B",
    ),
    results=("B T N D", "B N T"),
)
AXES_OF_MEANS = (
    "means.k: B M N D",
    "means.v: B M N D",
    "means.dropped: B N R C",
)
_NUM_ARRAYS = len(AXES.operands)  # of an attention without means


def _axes_of_derivatives(*, has_means: bool) -> Axes:
    """Returns the axes of the residuals, then of the tangents, of either's part."""
    residuals = (*AXES.operands, *(f"output: {axes}" for axes in AXES.results))
    moving = AXES.operands[:3]
    if has_means:
        residuals = (*residuals, *AXES_OF_MEANS)
        moving = (AXES.operands[0], *AXES_OF_MEANS[:2])
    tangents = (f"tangent of {axes}" for axes in moving)
    return dataclasses.replace(AXES, operands=(*residuals, *tangents))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """An attention function and what its derivatives need to know. Static.

    Attributes:
      forward: Takes q, k, v, row_offsets, block_ids and text_lengths, and of means k,
        v and dropped; returns the output and the float32 log-sum-exp.
      grid: Geometry of the blocks.
      order: How the tokens are ordered.
      scale: Factor on the logits.
      config: Amounts that derivatives compute at once.
      sub_tiles: What the means are taken over; None without means.
    """

    forward: Callable[..., tuple[Array, Array]]
    grid: BlockGrid
    order: Order
    scale: float
    config: ChunkConfig
    sub_tiles: SubTiles | None = None


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def attend(attention: Attention, *arrays: Array) -> tuple[Array, Array]:
    """Computes an attention's forward pass, with the derivatives of this module."""
    operands = (*AXES.operands, *AXES_OF_MEANS)[: len(arrays)]
    axes = dataclasses.replace(AXES, operands=operands)
    out, lse = sealed(attention.forward, *arrays, axes=axes)
    return out, lse


@functools.partial(attend.defjvp, symbolic_zeros=True)
def _differentiate(attention, primals, tangents):
    out, lse = attend(attention, *primals)
    # Gradients outside jit hand over what they keep between programs: without minus
    # infinity `jax_debug_infs` finds nothing in it.
    kept_lse = jnp.where(lse == -jnp.inf, NO_KEY, lse)
    out, kept_lse = map(checkpoint_name, (out, kept_lse), RESIDUAL_NAMES)
    # From what is kept, or a policy by names would run the forward pass for it again.
    lse = jnp.where(kept_lse == NO_KEY, -jnp.inf, kept_lse)
    program = LinearMap(
        apply=functools.partial(_tangents, attention),
        transpose=functools.partial(_cotangents, attention),
        axes=_axes_of_derivatives(has_means=False),
    )
    kept = (*primals[:_NUM_ARRAYS], out, kept_lse)
    moved = program(kept, _moving(tangents[:3]))
    if attention.sub_tiles is not None:
        of_means = LinearMap(
            apply=functools.partial(_tangents_of_means, attention),
            transpose=functools.partial(_cotangents_of_means, attention),
            axes=_axes_of_derivatives(has_means=True),
        )
        moving = _moving((tangents[0], *tangents[_NUM_ARRAYS:-1]))
        if any(x is not None for x in moving):
            added = of_means((*kept, *primals[_NUM_ARRAYS:]), moving)
            moved = tuple(x + y for x, y in zip(moved, added, strict=True))
    return (out, lse), moved


def _moving(tangents: tuple[Array | SymbolicZero, ...]) -> tuple[Array | None, ...]:
    return tuple(None if isinstance(x, SymbolicZero) else x for x in tangents)


@functools.partial(jit_once, static_argnums=0)
def _tangents_of_means(
    attention: Attention, residuals: Arrays, moved: tuple[Array | None, ...]
) -> Arrays:
    """Returns what the means add to the tangents; `moved` are those of q and means."""
    *kept, mean_k, mean_v, dropped = residuals
    assert attention.sub_tiles is not None, "else there are no means"
    means = Means(mean_k, mean_v, dropped, attention.sub_tiles)
    blocks = _Blocks(attention, tuple(kept))
    upcast = attention.config.upcast
    d_q, d_k, d_v = moved
    d_out, d_lse = added_tangents(
        blocks.q,
        blocks.out,
        blocks.lse,
        MeansByHead.of(means, upcast=upcast),
        d_q=None if d_q is None else valid_only(blocks.cut(d_q), blocks.lengths),
        d_k=None if d_k is None else by_head(d_k, upcast=upcast),
        d_v=None if d_v is None else by_head(d_v, upcast=upcast),
        scale=attention.scale,
    )
    dtype = kept[-2].dtype
    return blocks.join(d_out).astype(dtype), blocks.join(d_lse).swapaxes(1, 2)


def _cotangents_of_means(
    attention: Attention, residuals: Arrays, cotangents: Arrays
) -> Arrays:
    """Returns what the means add to the cotangent of q, and those of their k and v."""
    arrays = (residuals[0], *residuals[-3:-1])  # of the shapes of their tangents
    _, transposed = jax.vjp(
        lambda *moved: _tangents_of_means(attention, residuals, moved), *arrays
    )
    return transposed(tuple(cotangents))


class _Blocks:
    """What the walks of derivatives read, cut into blocks [L, P, ...]."""

    def __init__(self, attention: Attention, residuals: Arrays):
        *qkv, row_offsets, block_ids, text_lengths, out, lse = residuals
        self.attention = attention
        self.batch, _, num_heads, _ = out.shape
        self.lengths = block_lengths(attention.grid, text_lengths, num_heads)
        self.q, self.k, self.v = (valid_only(self.cut(x), self.lengths) for x in qkv)
        self.out = self.cut(out)
        self.lse = self.cut_rows(lse)
        self.has_key = self.lse != NO_KEY
        self.lists = row_lists(row_offsets, block_ids)
        self.walked = Walked(attention.grid.num_blocks, attention.config)

    def cut(self, x: Array) -> Array:
        if self.attention.order == "raster":
            x = reorder_tokens(x, self.attention.grid, to="tiled", axis=1)
        if self.attention.config.upcast:
            x = x.astype(jnp.float32)
        return cut(x, self.attention.grid)

    def cut_rows(self, x: Array) -> Array:
        """Cuts an array [B, N, T] of a number per query."""
        return self.cut(x.swapaxes(1, 2))

    def with_key(self, x: Array) -> Array:
        """Replaces what belongs to rows without a key, which may be NaN, by zeros."""
        has_key = self.has_key.reshape(self.has_key.shape + (1,) * (x.ndim - 2))
        return jnp.where(has_key, x, 0)

    def join(self, x: Array) -> Array:
        x = join(x, self.attention.grid, self.batch)
        if self.attention.order == "raster":
            x = reorder_tokens(x, self.attention.grid, to="raster", axis=1)
        return x


@functools.partial(jit_once, static_argnums=0)
def _tangents(
    attention: Attention, residuals: Arrays, moved: tuple[Array | None, ...]
) -> Arrays:
    """Returns the tangents of the output and the log-sum-exp.

    With ds the tangents of the logits, d_lse = sum(p * ds), and
    d_out = sum(p * (ds * v + dv)) - out * d_lse.
    """
    blocks = _Blocks(attention, residuals)
    names = [n for n, x in zip("qkv", moved, strict=True) if x is not None]
    step = _TangentStep(attention.scale, "".join(names))
    d_q, d_k, d_v = (
        None if x is None else valid_only(blocks.cut(x), blocks.lengths) for x in moved
    )
    d_lse, weighted = sum_over_pairs(
        step,
        blocks.walked,
        blocks.lists,
        blocks.lengths,
        (blocks.q, blocks.lse, *_given(d_q)),
        (blocks.k, blocks.v, *_given(d_k), *_given(d_v)),
    )
    d_out = weighted - blocks.out.astype(jnp.float32) * d_lse[..., None]
    dtype = residuals[-2].dtype
    return blocks.join(d_out).astype(dtype), blocks.join(d_lse).swapaxes(1, 2)


def _given(x: Array | None) -> tuple[Array, ...]:
    return () if x is None else (x,)


@functools.partial(jit_once, static_argnums=0)
def _cotangents(attention: Attention, residuals: Arrays, cotangents: Arrays) -> Arrays:
    """Runs FlashAttention's backward pass over the kept blocks.

    ds = p * (dp - delta), where delta = sum(out * dout) - dlse holds for both
    outputs.
    """
    blocks = _Blocks(attention, residuals)
    d_out = blocks.with_key(blocks.cut(cotangents[0]))
    d_lse = blocks.with_key(blocks.cut_rows(cotangents[1]))
    products = blocks.out.astype(jnp.float32) * d_out.astype(jnp.float32)
    delta = products.sum(-1) - d_lse
    rows = (blocks.q, d_out, blocks.lse, delta)
    keys = (blocks.k, blocks.v)
    (d_q,) = sum_over_pairs(
        _QueryStep(attention.scale),
        blocks.walked,
        blocks.lists,
        blocks.lengths,
        rows,
        keys,
    )
    d_k, d_v = sum_over_pairs(
        _KeyStep(attention.scale),
        blocks.walked,
        transpose(blocks.lists, attention.grid.num_blocks),
        blocks.lengths,
        keys,
        rows,
    )
    pairs = zip((d_q, d_k, d_v), residuals[:3], strict=True)
    return tuple(blocks.join(x).astype(like.dtype) for x, like in pairs)


@dataclasses.dataclass(frozen=True)
class _TangentStep:
    """Adds p * ds and p * (ds * v + dv) for the inputs that move, in float32."""

    scale: float
    moving: str  # of "qkv"

    def __call__(self, own: Arrays, others: Arrays, pairs: Array) -> Arrays:
        own, others = (tuple(x.astype(jnp.float32) for x in xs) for xs in (own, others))
        (q, lse, *d_q), (k, v, *rest) = own, others
        weights = _weights(
            self.scale * dot("gpd,gsd->gps", q, k), lse[..., None], pairs
        )
        d_logits = jnp.zeros_like(weights)
        added = jnp.zeros(v.shape[:1] + q.shape[1:], jnp.float32)
        if "q" in self.moving:
            d_logits += dot("gpd,gsd->gps", d_q[0], k)
        if "k" in self.moving:
            d_logits += dot("gpd,gsd->gps", q, rest[0])
        if "v" in self.moving:
            added += dot("gps,gsd->gpd", weights, rest[-1])
        weighted = weights * (self.scale * d_logits)
        return weighted.sum(-1), added + dot("gps,gsd->gpd", weighted, v)


@dataclasses.dataclass(frozen=True)
class _QueryStep:
    """Adds dQ."""

    scale: float

    def __call__(self, own: Arrays, others: Arrays, pairs: Array) -> Arrays:
        (q, d_out, lse, delta), (k, v) = own, others
        weights = _weights(
            self.scale * dot("gpd,gkd->gpk", q, k), lse[..., None], pairs
        )
        d_weights = dot("gpd,gkd->gpk", d_out, v)
        d_logits = self.scale * weights * (d_weights - delta[..., None])
        return (dot("gpk,gkd->gpd", d_logits.astype(k.dtype), k),)


@dataclasses.dataclass(frozen=True)
class _KeyStep:
    """Adds dK and dV: a row owns keys and walks the queries that keep it."""

    scale: float

    def __call__(self, own: Arrays, others: Arrays, pairs: Array) -> Arrays:
        (k, v), (q, d_out, lse, delta) = own, others
        logits = self.scale * dot("gkd,gpd->gkp", k, q)
        weights = _weights(logits, lse[:, None], pairs)
        d_v = dot("gkp,gpd->gkd", weights.astype(d_out.dtype), d_out)
        d_weights = dot("gkd,gpd->gkp", v, d_out)
        d_logits = self.scale * weights * (d_weights - delta[:, None])
        return dot("gkp,gpd->gkd", d_logits.astype(q.dtype), q), d_v


def _weights(logits: Array, lse: Array, pairs: Array) -> Array:
    return jnp.exp(jnp.where(pairs, logits, -jnp.inf) - lse)
