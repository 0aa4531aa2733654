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

What is read may be a `Product`: scales of rows and columns and the bias are applied in
float32, and a token is rounded as it would be without the kernel. It then waits in
shared memory, where each thread reads what it wrote. In registers it would be kept in
float32, and ptxas would load factors of all groups before it finishes one, which ends
at 230 registers for 40 heads: a store keeps it from that. 168 registers, three CTAs.
"""

import dataclasses
import functools
import itertools
from typing import Any

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
from pallas_kernels.common.products import Product, filled_alike
from pallas_kernels.pooling.interfaces import (
    MeanSquares,
    QKNorm,
    Reduction,
    Rope,
    Scales,
)
from pallas_kernels.pooling.sm90 import emulated, registers
from pallas_kernels.pooling.sm90.one_token import (
    Work,
    finish_token,
    load,
    prepare_token,
)
from pallas_kernels.pooling.sm90.plan import (
    NormRopePoolPlan,
    make_plan,
    shares_heads,
    text_units,
    why_unsupported_shape,
)


def norm_rope_pool(
    arrays: tuple[Float[Array, "B _ N D"] | Product, ...],
    text: tuple[Float[Array, "B _ N D"] | Product, ...] | None,
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
    """Finishes, norms and rotates q and k, and pools what it writes; copies v.

    Args:
      arrays: q and k as projected, and v if it shall be finished and copied. They hold
        the whole sequence, or the video where the text has its own.
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
    sources = (*map(Product.of, arrays), *map(Product.of, text or ()))
    _, num_tokens, num_heads, head_dim = sources[0].shape
    dtype = sources[0].dtype
    has_squares = mean_squares is not None
    if cause := why_unsupported_shape(sources[0].shape, dtype, norm, has_squares):
        raise ValueError(f"the norm-rope-pool kernel cannot take these inputs: {cause}")
    if ahead is not None and ahead < 1:
        raise ValueError(f"{ahead=} must be at least 1")
    if shares_heads(num_heads, head_dim, dtype):
        # In shared memory warps would write what others have not yet read.
        sources = tuple(Product(x.finished()) for x in sources)
    sources = filled_alike(sources, num_rows=2)
    if norm is not None and num_heads == 1:
        # The same norm; JAX finds no layouts for a sum over an axis of one head.
        norm = dataclasses.replace(norm, over="head")
    text_start = None
    if text is not None:
        text_start = 0 if visual_tokens.start else num_tokens
        num_tokens += sources[-1].shape[1]
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
        has_parts=tuple(part is not None for part in sources[0][1:]),
        text_start=text_start,
        ahead=ahead,
        ops=registers if interpret is None else emulated,
    )
    values, *parts = zip(*sources, strict=True)
    rows, columns, biases = (() if x[0] is None else x for x in parts)
    factors = (*columns, *biases, *(scales or ()), *(text_scales or ()))
    shared = (*map(_by_parity, factors), *(rope or ()))
    run = functools.partial(
        _run, num_tokens=num_tokens, units=units, plan=plan, interpret=interpret
    )
    wide_rows = (x.astype(jnp.float32) for x in rows)
    batched = (*values, *wide_rows, *(mean_squares or ()))
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


def _by_parity(scale: Float[Array, "*N C"]) -> Float[Array, "2 *N half"]:
    """Returns the factors of the even channels, then those of the odd ones."""
    scale = scale.astype(jnp.float32)
    return rearrange(scale, "... (half pair) -> pair ... half", pair=2)


def _run(*arrays, num_tokens: int, units, plan: NormRopePoolPlan, interpret):
    num_batched = plan.num_sources * (1 + plan.has_parts[0]) + plan.num_squares
    batched, shared = arrays[:num_batched], arrays[num_batched:]
    batch, _, num_heads, head_dim = batched[0].shape
    if plan.norm is not None and plan.norm.over == "heads":
        by_head = (2, num_heads, head_dim // 2)
        start = plan.num_sources * sum(plan.has_parts[1:])
        stop = start + plan.num_scales
        scales = (s.reshape(by_head) for s in shared[start:stop])
        shared = (*shared[:start], *scales, *shared[stop:])
    pooled_shape = (batch, plan.num_tiles, num_heads, head_dim)
    pooled = jax.ShapeDtypeStruct(pooled_shape, jnp.float32)
    written_shape = (batch, num_tokens, num_heads, head_dim)
    dtype = batched[0].dtype
    written = jax.ShapeDtypeStruct(written_shape, dtype)
    scratch = {}
    if any(plan.has_parts):
        shape = (len(plan.groups), plan.heads_at_once, head_dim)
        scratch["finished_smem"] = plgpu.SMEM(shape, dtype)
    return plgpu.kernel(
        functools.partial(_body, plan=plan),
        out_type=(
            *(written,) * plan.num_arrays,
            *(pooled,) * (2 * len(plan.reductions)),
        ),
        scratch_types=scratch,
        # The last axis changes fastest: Q and K of a tile share the rotary table.
        grid=(plan.num_units, num_heads // plan.heads, plan.num_arrays * batch),
        grid_names=("unit", "chunk", "item"),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        kernel_name="norm_rope_pool_sm90",
        interpret=interpret,
    )(*batched, jnp.asarray(units, jnp.int32), *shared)


def _body(*refs, plan: NormRopePoolPlan, finished_smem=None):
    given = iter(refs)

    def take(count: int) -> tuple[Any, ...]:
        return tuple(itertools.islice(given, count))

    def take_parts(i: int) -> tuple[Any, ...]:
        count = plan.num_sources
        return take(count) if plan.has_parts[i] else (None,) * count

    sources, rows = take(plan.num_sources), take_parts(0)
    squares, (units_gmem,) = take(plan.num_squares), take(1)
    columns, biases = take_parts(1), take_parts(2)
    scales = take(plan.num_scales)
    tables, outs_gmem = take(2 if plan.has_rope else 0), take(plan.num_arrays)
    pooled_gmem, num_pooled = tuple(given), len(plan.reductions)
    unit, item = lax.axis_index("unit"), lax.axis_index("item")
    batch = lax.div(item, jnp.int32(plan.num_arrays))
    heads = pl.ds(lax.axis_index("chunk") * plan.heads, plan.heads)
    walk = tuple(units_gmem[unit, field] for field in range(4))

    def work_of(index: int, *, is_text: bool) -> Work:
        has_own = is_text and plan.text_start is not None
        source = index + (plan.num_arrays if has_own else 0)
        row, *of_channels = (x[source] for x in (rows, columns, biases))
        column, bias = (None if x is None else x.at[:, heads] for x in of_channels)
        work = Work(
            source_gmem=sources[source].at[batch, :, heads],
            parts_gmem=(None if row is None else row.at[batch], column, bias),
            source_start=plan.source_starts[is_text],
            out_gmem=outs_gmem[index].at[batch, :, heads],
            finished_smem=finished_smem,
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


def _walk_tile(work: Work, walk, plan: NormRopePoolPlan):
    """Writes the tokens of one tile and returns their reductions, by groups."""
    first, stride, rows, columns = walk
    count = rows * columns
    reductions = work.reductions

    def fetch(step, token):
        token = jnp.where(step < count, token, first)  # the last ones are not used
        own = token - work.source_start if work.source_start else token
        groups = tuple(
            load(work.source_gmem.at[own, heads], plan.layout(plan.vec))
            for heads in plan.groups
        )
        row = token - plan.visual_start
        layout = plan.half_layout.reduce(0)
        angles = tuple(load(table.at[row], layout) for table in work.tables)
        square = None if work.squares_gmem is None else work.squares_gmem[token]
        row_gmem, *_ = work.parts_gmem
        scale = None if row_gmem is None else row_gmem[own]
        return token, groups, scale, angles, square

    def advance(token, column):
        ends_row = column + 1 == columns
        return (
            jnp.where(ends_row, token + stride - columns + 1, token + 1),
            jnp.where(ends_row, 0, column + 1),
        )

    def take(step, state):
        fetched, position, sums = state
        fetched = (*fetched, fetch(step + plan.ahead, position[0]))
        (token, groups, row, angles, square), *fetched = fetched
        if any(plan.has_parts) and not work.is_copied:
            groups = finish_token(groups, row, work, plan)
        written = prepare_token(groups, row, angles, square, token, work, plan)
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


def _accumulate(name: Reduction, own, values):
    add = jnp.add if name == "mean" else jnp.maximum
    return tuple(add(old, value) for old, value in zip(own, values, strict=True))


def _full(value: float, plan: NormRopePoolPlan):
    shape = (plan.heads_at_once, plan.head_dim // 2)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), plan.half_layout)
