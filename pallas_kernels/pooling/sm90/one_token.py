"""What the norm-rope-pool kernel does to one token: finish, norm, rotate, store."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.pooling.interfaces import Reduction
from pallas_kernels.pooling.sm90.plan import NormRopePoolPlan


class Work(NamedTuple):
    """What a CTA does to the tokens of its unit.

    Attributes:
      source_gmem: Tokens to read, without scales and bias if they are a product.
      parts_gmem: The scale of each row, those of columns, and the bias; None for each
        that there is not.
      source_start: Token of the sequence that is the first to read.
      out_gmem: Tokens of the sequence, to write.
      scale_gmem: Factors after the norm; None without a norm.
      squares_gmem: Mean squares of the tokens of the sequence, if they are known.
      tables: Cosines and sines, or nothing.
      reductions: What to compute of what is written.
      finished_smem: Takes a token of a product, finished, by groups of heads.
      is_copied: Whether tokens are only copied.
    """

    source_gmem: Any
    parts_gmem: tuple[Any, Any, Any]
    source_start: int
    out_gmem: Any
    scale_gmem: Any = None
    squares_gmem: Any = None
    tables: tuple[Any, ...] = ()
    reductions: tuple[Reduction, ...] = ()
    finished_smem: Any = None
    is_copied: bool = False


def finish_token(groups, row, work: Work, plan: NormRopePoolPlan):
    """Finishes one token; returns where its groups of heads are in shared memory."""
    finished = [work.finished_smem.at[i] for i in range(len(groups))]
    for values, heads, ref in zip(groups, plan.groups, finished, strict=True):
        plan.ops.store(ref, _finish(values, heads, row, work, plan), plan)
    plan.ops.keep_order()
    return finished


def _finish(values, heads, row, work: Work, plan: NormRopePoolPlan):
    """Applies scales and bias to some heads of one token, and rounds the results."""
    _, column_gmem, bias_gmem = work.parts_gmem
    halves = _floats(values, plan)
    if row is not None:
        halves = tuple(x * row for x in halves)
    columns, bias = (
        None if ref is None else _load_halves(ref, heads, plan)
        for ref in (column_gmem, bias_gmem)
    )
    if columns is not None and bias is not None:
        fused = functools.partial(plan.ops.multiply_add, plan=plan)
        halves = tuple(map(fused, halves, columns, bias))
    elif columns is not None:
        halves = tuple(x * y for x, y in zip(halves, columns, strict=True))
    elif bias is not None:
        halves = tuple(x + y for x, y in zip(halves, bias, strict=True))
    return plan.ops.round_halves(halves, work.out_gmem.dtype, plan)


def prepare_token(
    groups, row, angles, square, token, work: Work, plan: NormRopePoolPlan
):
    """Norms, rotates and stores one token; returns what was stored, in float32."""
    out_gmem = work.out_gmem.at[token]
    if work.is_copied:
        for heads, values in zip(plan.groups, groups, strict=True):
            if any(plan.has_parts):
                values = _finish(values, heads, row, work, plan)
            out_gmem[heads] = values
        return ((),) * len(groups)
    inverses = _inverse_rms(groups, square, plan)
    written = []
    for i, heads in enumerate(plan.groups):
        halves = _floats(groups[i], plan)
        if plan.norm is not None:
            scale = _load_scale(work.scale_gmem, heads, plan)
            halves = tuple(
                x * inverses[i] * s for x, s in zip(halves, scale, strict=True)
            )
        if angles:
            halves = _rotate(halves, angles, plan)
        if any(plan.has_parts):
            rounded = plan.ops.round_halves(halves, out_gmem.dtype, plan)
            out_gmem[heads] = rounded
            written.append(_floats(rounded, plan))
            continue
        halves = tuple(half.astype(out_gmem.dtype) for half in halves)
        out_gmem[heads] = plan.ops.join(halves, plan)
        written.append(tuple(half.astype(jnp.float32) for half in halves))
    return written


def _inverse_rms(groups, square, plan: NormRopePoolPlan):
    """Returns one over the root mean square, to multiply each group of heads with."""
    if plan.norm is None:
        return ()
    if square is not None:
        return [lax.rsqrt(square + plan.norm.eps)] * len(groups)
    squares = [_sum_of_squares(_floats(x, plan), plan) for x in groups]
    shape = squares[0].shape
    if plan.norm.over == "heads":
        if plan.repeated_heads:
            squares[-1] = _without_repeated(squares[-1], plan)
        total = jnp.sum(jnp.sum(sum(squares), axis=1))
        inverse = lax.rsqrt(total / (plan.heads * plan.head_dim) + plan.norm.eps)
        inverses = [inverse] * len(groups)
    else:
        means = [jnp.sum(x, axis=1) / plan.head_dim for x in squares]
        inverses = [
            lax.broadcast_in_dim(lax.rsqrt(mean + plan.norm.eps), shape, (0,))
            for mean in means
        ]
    return inverses


def _without_repeated(squares, plan: NormRopePoolPlan):
    """Returns squares of the last group of heads, zero for those of the one before."""
    head = plgpu.broadcasted_iota(jnp.int32, squares.shape, 0, layout=plan.half_layout)
    return jnp.where(head < plan.repeated_heads, 0.0, squares)


def _load_scale(scale_gmem, heads, plan: NormRopePoolPlan):
    assert plan.norm is not None, "else there are no scales"
    layout = plan.half_layout
    if plan.norm.over == "heads":
        return _load_halves(scale_gmem, heads, plan)
    shape = (plan.heads_at_once, plan.head_dim // 2)
    return [
        lax.broadcast_in_dim(load(scale_gmem.at[parity], layout.reduce(0)), shape, (1,))
        for parity in range(2)
    ]


def _load_halves(ref, heads, plan: NormRopePoolPlan):
    """Loads the even and the odd channels of some heads."""
    return [load(ref.at[parity, heads], plan.half_layout) for parity in range(2)]


def _floats(x, plan: NormRopePoolPlan):
    """Returns the even and the odd channels of what is in registers or in a buffer."""
    if not isinstance(x, jax.Array):
        x = load(x, plan.layout(plan.vec))
    return tuple(half.astype(jnp.float32) for half in plan.ops.split(x, plan))


def _sum_of_squares(halves, plan: NormRopePoolPlan):
    even, odd = halves
    return plan.ops.multiply_add(even, even, odd * odd, plan)


def _rotate(halves, angles, plan: NormRopePoolPlan):
    even, odd = halves
    cos, sin = (lax.broadcast_in_dim(x, even.shape, (1,)) for x in angles)
    fused = functools.partial(plan.ops.multiply_add, plan=plan)
    return fused(even, cos, -(odd * sin)), fused(odd, cos, even * sin)


def load(ref, layout):
    """Loads a part of an array into registers."""
    # Tables with the same values for several lanes do not count as optimized.
    return plgpu.load(ref, layout=layout, optimized=False)
