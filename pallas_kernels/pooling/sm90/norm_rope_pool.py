"""RMS norm, rotary embedding and tile pooling of Q and K in one pass, for Hopper.

One CTA of one warpgroup takes the tokens of one tile, or up to TEXT_TOKENS text tokens,
of Q or of K, one token at a time: load, norm, rotate, round, store, add what was stored
to the sums of the tile. Everything stays in registers, so each value is read once and
written once. Text is neither rotated nor pooled.

A thread owns `vec` neighbouring channels of every `heads_at_once`-th head, as two
arrays of its even and odd channels: a rotation is then elementwise, and the cosines and
sines of a token serve all heads of a thread. The lanes of a head are in one warp: a
norm per head takes shuffles; one over all heads also goes through shared memory, for
each token. That is about 200 of the 1,400 cycles that the memory needs for a token of
5,120 channels, and the CTAs of a multiprocessor overlap.

Heads that do not divide into such groups, as 10, 5 or 3 of a device of a mesh, overlap:
the last group begins with heads of the one before, and fewer heads than warps are in
several warps. Each of them computes and writes the same, to the last bit: products and
sums are fused by name, not as the compiler likes. A norm over all heads counts a head
once.

Loads run `ahead` tokens before their use; registers are spent on them and on the sums.
ptxas, sm_90a, jax 0.11.2, bfloat16, means, no spills:

heads x head_dim, norm        channels of a thread, ahead    registers  CTAs  in flight
24 x 128 (Hunyuan), per head  24, 2                          141         3    36 KiB
40 x 128 (Wan 14B), all       40, 1                          163         3    30 KiB
12 x 128 (Wan 1.3B), all      12, 4                          113         4    48 KiB

Half of 3.35 TB/s is read; at 1 us of latency a multiprocessor needs 13 KB in flight.

Text may have arrays of its own: its CTAs read those, and all write one joint sequence.
Tokens are counted in that sequence; an array of the video or of the text starts at one
of `source_starts`. Values then have CTAs too, which copy them. That takes no registers
beyond those of text in the same arrays: 147 for Hunyuan, as many CTAs as without text.
"""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.common.batching import fold_mapped_axes
from pallas_kernels.common.device import Device
from pallas_kernels.pooling.interfaces import (
    MeanSquares,
    QKNorm,
    Reduction,
    Rope,
    Scales,
)
from pallas_kernels.pooling.sm90 import emulated, registers
from pallas_kernels.pooling.sm90.plan import (
    NormRopePoolPlan,
    make_plan,
    text_units,
    why_unsupported_shape,
)


def norm_rope_pool(
    arrays: tuple[Float[Array, "B _ N D"], ...],
    text: tuple[Float[Array, "B _ N D"], ...] | None,
    scales: Scales | None,
    text_scales: Scales | None,
    rope: Rope | None,
    tiles: Int[np.ndarray, "S 4"],
    visual_tokens: slice,
    *,
    norm: QKNorm | None,
    mean_squares: MeanSquares | None = None,
    reductions: tuple[Reduction, ...] = ("mean",),
    ahead: int | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[tuple[Float[Array, "B T N D"], ...], tuple[Float[Array, "B S N D"], ...]]:
    """Norms and rotates q and k, and pools what it writes; copies v.

    Args:
      arrays: q and k as projected, and v if it shall be copied. They hold the whole
        sequence, or the video where the text has its own.
      text: Such arrays of the text, which stands before or after the video, or None.
      scales: Factors of the channels of q and of k after the norm: N * D for a norm
        over all heads, D for one per head. None without a norm.
      text_scales: Factors for the text, or None for the same ones.
      rope: Cosine and sine of each channel pair (2i, 2i + 1) for the visual tokens, in
        their order; None for no rotation.
      tiles: First token, tokens between two rows, rows and columns of each tile.
      visual_tokens: The tokens that are not text, in the whole sequence.
      norm: The norm, or None.
      mean_squares: What a norm over all heads needs of each token of the sequence, if
        the arrays have some of the heads only.
      reductions: What to compute of each tile of what is written.
      ahead: Tokens loaded before their use; None for the default.
      interpret: Run on the CPU in GPU interpret mode.

    Returns:
      The arrays of the whole sequence in their dtype; float32 reductions of q in the
      order of `reductions`, then those of k.

    Raises:
      ValueError: The kernel cannot take these inputs on any device, or ahead is not
        positive.
    """
    _, num_tokens, num_heads, head_dim = arrays[0].shape
    dtype = arrays[0].dtype
    has_squares = mean_squares is not None
    if cause := why_unsupported_shape(arrays[0].shape, dtype, norm, has_squares):
        raise ValueError(f"the norm-rope-pool kernel cannot take these inputs: {cause}")
    if ahead is not None and ahead < 1:
        raise ValueError(f"{ahead=} must be at least 1")
    if norm is not None and num_heads == 1:
        # The same norm; JAX finds no layouts for a sum over an axis of one head.
        norm = dataclasses.replace(norm, over="head")
    text_start = None
    if text is not None:
        text_start = 0 if visual_tokens.start else num_tokens
        num_tokens += text[0].shape[1]
    units = np.concatenate([tiles, text_units(num_tokens, visual_tokens)])
    plan = make_plan(
        num_heads,
        head_dim,
        dtype,
        norm=norm,
        has_mean_squares=has_squares,
        has_text_scales=text_scales is not None,
        has_rope=rope is not None,
        reductions=reductions,
        num_tiles=len(tiles),
        num_units=len(units),
        visual_start=visual_tokens.start,
        num_arrays=len(arrays),
        text_start=text_start,
        ahead=ahead,
        ops=registers if interpret is None else emulated,
    )
    factors = map(_by_parity, (*(scales or ()), *(text_scales or ())))
    shared = (*factors, *(rope or ()))
    run = functools.partial(
        _run, num_tokens=num_tokens, units=units, plan=plan, interpret=interpret
    )
    batched = (*arrays, *(text or ()), *(mean_squares or ()))
    outs = fold_mapped_axes(run, len(shared))(*batched, *shared)
    return outs[: len(arrays)], outs[len(arrays) :]


def why_unsupported(
    shape: tuple[int, ...],
    dtype: jax.typing.DTypeLike,
    norm: QKNorm | None,
    device: Device,
    *,
    has_mean_squares: bool = False,
) -> str | None:
    """Returns why the kernel cannot take such arrays on a device, or None if it can."""
    return device.why_not_hopper() or why_unsupported_shape(
        shape, dtype, norm, has_mean_squares
    )


def _by_parity(scale: Float[Array, " C"]) -> Float[Array, "2 half"]:
    """Returns the factors of the even channels, then those of the odd ones."""
    return rearrange(scale.astype(jnp.float32), "(half pair) -> pair half", pair=2)


def _run(*arrays, num_tokens: int, units, plan: NormRopePoolPlan, interpret):
    num_sources = plan.num_arrays * (1 if plan.text_start is None else 2)
    num_batched = num_sources + plan.num_squares
    sources, shared = arrays[:num_sources], arrays[num_batched:]
    squares = arrays[num_sources:num_batched]
    batch, _, num_heads, head_dim = sources[0].shape
    if plan.norm is not None and plan.norm.over == "heads":
        by_head = (2, num_heads, head_dim // 2)
        count = plan.num_scales
        shared = (*(s.reshape(by_head) for s in shared[:count]), *shared[count:])
    pooled_shape = (batch, plan.num_tiles, num_heads, head_dim)
    pooled = jax.ShapeDtypeStruct(pooled_shape, jnp.float32)
    written_shape = (batch, num_tokens, num_heads, head_dim)
    written = jax.ShapeDtypeStruct(written_shape, sources[0].dtype)
    return plgpu.kernel(
        functools.partial(_body, plan=plan),
        out_type=(
            *(written,) * plan.num_arrays,
            *(pooled,) * (2 * len(plan.reductions)),
        ),
        # The last axis changes fastest: Q and K of a tile share the rotary table.
        grid=(plan.num_units, num_heads // plan.heads, plan.num_arrays * batch),
        grid_names=("unit", "chunk", "item"),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        kernel_name="norm_rope_pool_sm90",
        interpret=interpret,
    )(*sources, *squares, jnp.asarray(units, jnp.int32), *shared)


class _Work(NamedTuple):
    """What a CTA does to the tokens of its unit.

    Attributes:
      source_gmem: Tokens to read.
      source_start: Token of the sequence that is the first to read.
      out_gmem: Tokens of the sequence, to write.
      scale_gmem: Factors after the norm; None without a norm.
      squares_gmem: Mean squares of the tokens of the sequence, if they are known.
      tables: Cosines and sines, or nothing.
      reductions: What to compute of what is written.
      is_copied: Whether tokens are only copied.
    """

    source_gmem: Any
    source_start: int
    out_gmem: Any
    scale_gmem: Any = None
    squares_gmem: Any = None
    tables: tuple[Any, ...] = ()
    reductions: tuple[Reduction, ...] = ()
    is_copied: bool = False


def _body(*refs, plan: NormRopePoolPlan):
    given = iter(refs)

    def take(count: int) -> tuple[Any, ...]:
        return tuple(itertools.islice(given, count))

    sources = take(plan.num_arrays)
    of_text = sources if plan.text_start is None else take(plan.num_arrays)
    squares, (units_gmem,) = take(plan.num_squares), take(1)
    scales = take(plan.num_scales)
    tables, outs_gmem = take(2 if plan.has_rope else 0), take(plan.num_arrays)
    pooled_gmem, num_pooled = tuple(given), len(plan.reductions)
    unit, item = lax.axis_index("unit"), lax.axis_index("item")
    batch = lax.div(item, jnp.int32(plan.num_arrays))
    heads = pl.ds(lax.axis_index("chunk") * plan.heads, plan.heads)
    walk = tuple(units_gmem[unit, field] for field in range(4))

    def work_of(index: int, *, is_text: bool) -> _Work:
        source_gmem = (of_text if is_text else sources)[index]
        work = _Work(
            source_gmem=source_gmem.at[batch, :, heads],
            source_start=plan.source_starts[is_text],
            out_gmem=outs_gmem[index].at[batch, :, heads],
            is_copied=index == 2,  # the values
        )
        if work.is_copied:
            return work
        if squares:
            work = work._replace(squares_gmem=squares[index].at[batch])
        if plan.norm is not None:
            own = scales[-2:] if is_text else scales[:2]
            scale = own[index]
            scale = scale.at[:, heads] if plan.norm.over == "heads" else scale
            work = work._replace(scale_gmem=scale)
        if is_text:
            return work
        return work._replace(tables=tables, reductions=plan.reductions)

    def prepare(index: int) -> None:
        @pl.when(unit < plan.num_tiles)
        def _():
            results = _walk_tile(work_of(index, is_text=False), walk, plan)
            pooled = pooled_gmem[index * num_pooled : (index + 1) * num_pooled]
            for ref, groups in zip(pooled, results, strict=True):
                for own, result in zip(plan.groups, groups, strict=True):
                    plan.ops.store(ref.at[batch, unit, heads].at[own], result, plan)

        if plan.num_units > plan.num_tiles:

            @pl.when(unit >= plan.num_tiles)
            def _():
                _walk_tile(work_of(index, is_text=True), walk, plan)

    index = lax.rem(item, jnp.int32(plan.num_arrays))
    is_other = [index == i for i in range(1, plan.num_arrays)]
    is_query = jnp.logical_not(functools.reduce(jnp.logical_or, is_other))
    for i, is_own in enumerate((is_query, *is_other)):
        pl.when(is_own)(functools.partial(prepare, i))


def _walk_tile(work: _Work, walk, plan: NormRopePoolPlan):
    """Writes the tokens of one tile and returns their reductions, by groups."""
    first, stride, rows, columns = walk
    count = rows * columns
    reductions = work.reductions

    def fetch(step, token):
        token = jnp.where(step < count, token, first)  # the last ones are not used
        own = token - work.source_start if work.source_start else token
        groups = tuple(
            _load(work.source_gmem.at[own, heads], plan.layout(plan.vec))
            for heads in plan.groups
        )
        row = token - plan.visual_start
        layout = plan.half_layout.reduce(0)
        angles = tuple(_load(table.at[row], layout) for table in work.tables)
        square = None if work.squares_gmem is None else work.squares_gmem[token]
        return token, groups, angles, square

    def advance(token, column):
        ends_row = column + 1 == columns
        return (
            jnp.where(ends_row, token + stride - columns + 1, token + 1),
            jnp.where(ends_row, 0, column + 1),
        )

    def take(step, state):
        fetched, position, sums = state
        fetched = (*fetched, fetch(step + plan.ahead, position[0]))
        (token, groups, angles, square), *fetched = fetched
        written = _prepare_token(groups, angles, square, token, work, plan)
        sums = tuple(
            tuple(
                _accumulate(name, own, values)
                for name, own in zip(reductions, sums_of_group, strict=True)
            )
            for sums_of_group, values in zip(sums, written, strict=True)
        )
        return tuple(fetched), advance(*position), sums

    position, fetched = (first, jnp.int32(0)), []
    for step in range(plan.ahead):
        fetched.append(fetch(step, position[0]))
        position = advance(*position)
    start = tuple(
        (_full(0.0 if name == "mean" else -jnp.inf, plan),) * 2 for name in reductions
    )
    sums = (start,) * len(plan.groups)
    *_, sums = lax.fori_loop(0, count, take, (tuple(fetched), position, sums))
    share = 1.0 / count.astype(jnp.float32)
    return [
        [
            plan.ops.join(
                tuple(x * share for x in own[j]) if name == "mean" else own[j], plan
            )
            for own in sums
        ]
        for j, name in enumerate(reductions)
    ]


def _prepare_token(groups, angles, square, token, work: _Work, plan: NormRopePoolPlan):
    """Norms, rotates and stores one token; returns what was stored, in float32."""
    out_gmem = work.out_gmem.at[token]
    if work.is_copied:
        for heads, values in zip(plan.groups, groups, strict=True):
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
            halves = _rotate(halves, *angles, plan)
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
    squares = [_sum_of_squares(*_floats(x, plan), plan) for x in groups]
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
        return [_load(scale_gmem.at[parity, heads], layout) for parity in range(2)]
    shape = (plan.heads_at_once, plan.head_dim // 2)
    return [
        lax.broadcast_in_dim(
            _load(scale_gmem.at[parity], layout.reduce(0)), shape, (1,)
        )
        for parity in range(2)
    ]


def _floats(x, plan: NormRopePoolPlan):
    return tuple(half.astype(jnp.float32) for half in plan.ops.split(x, plan))


def _sum_of_squares(even, odd, plan: NormRopePoolPlan):
    return plan.ops.multiply_add(even, even, odd * odd, plan)


def _rotate(halves, cos, sin, plan: NormRopePoolPlan):
    even, odd = halves
    cos, sin = (lax.broadcast_in_dim(x, even.shape, (1,)) for x in (cos, sin))
    fused = functools.partial(plan.ops.multiply_add, plan=plan)
    return fused(even, cos, -(odd * sin)), fused(odd, cos, even * sin)


def _accumulate(name: Reduction, own, values):
    add = jnp.add if name == "mean" else jnp.maximum
    return tuple(add(old, value) for old, value in zip(own, values, strict=True))


def _load(ref, layout):
    # Tables with the same values for several lanes do not count as optimized.
    return plgpu.load(ref, layout=layout, optimized=False)


def _full(value: float, plan: NormRopePoolPlan):
    shape = (plan.heads_at_once, plan.head_dim // 2)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), plan.half_layout)
