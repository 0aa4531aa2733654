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

Loads run `ahead` tokens before their use; registers are spent on them and on the sums.
ptxas, sm_90a, jax 0.11.2, bfloat16, means, no spills:

heads x head_dim, norm        channels of a thread, ahead    registers  CTAs  in flight
24 x 128 (Hunyuan), per head  24, 2                          141         3    36 KiB
40 x 128 (Wan 14B), all       40, 1                          163         3    30 KiB
12 x 128 (Wan 1.3B), all      12, 4                          113         4    48 KiB

Half of 3.35 TB/s is read; at 1 us of latency a multiprocessor needs 13 KB in flight.
"""

import functools

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
from pallas_kernels.pooling.interfaces import QKNorm, Reduction, Rope, Scales
from pallas_kernels.pooling.sm90 import emulated, registers
from pallas_kernels.pooling.sm90.plan import (
    NormRopePoolPlan,
    make_plan,
    text_units,
    why_unsupported_shape,
)


def norm_rope_pool(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    scales: Scales | None,
    rope: Rope | None,
    tiles: Int[np.ndarray, "S 4"],
    visual_tokens: slice,
    *,
    norm: QKNorm | None,
    reductions: tuple[Reduction, ...] = ("mean",),
    ahead: int | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Float[Array, "B ..."], ...]:
    """Norms and rotates q and k, and pools what it writes.

    Args:
      q: Queries as projected.
      k: Keys as projected.
      scales: Factors of the channels of q and of k after the norm: N * D for a norm
        over all heads, D for one per head. None without a norm.
      rope: Cosine and sine of each channel pair (2i, 2i + 1) for the visual tokens, in
        their order; None for no rotation.
      tiles: First token, tokens between two rows, rows and columns of each tile.
      visual_tokens: The tokens that are not text.
      norm: The norm, or None.
      reductions: What to compute of each tile of what is written.
      ahead: Tokens loaded before their use; None for the default.
      interpret: Run on the CPU in GPU interpret mode.

    Returns:
      q and k in their dtype; float32 reductions of q in the order of `reductions`, then
      those of k, [B, S, N, D].

    Raises:
      ValueError: The kernel cannot take these inputs on any device, or ahead is not
        positive.
    """
    _, num_tokens, num_heads, head_dim = q.shape
    if cause := why_unsupported_shape(q.shape, q.dtype, norm):
        raise ValueError(f"the norm-rope-pool kernel cannot take these inputs: {cause}")
    if ahead is not None and ahead < 1:
        raise ValueError(f"{ahead=} must be at least 1")
    units = np.concatenate([tiles, text_units(num_tokens, visual_tokens)])
    plan = make_plan(
        num_heads,
        head_dim,
        q.dtype,
        norm=norm,
        has_rope=rope is not None,
        reductions=reductions,
        num_tiles=len(tiles),
        num_units=len(units),
        visual_start=visual_tokens.start,
        ahead=ahead,
        ops=registers if interpret is None else emulated,
    )
    shared = (*map(_by_parity, scales or ()), *(rope or ()))
    run = functools.partial(_run, units=units, plan=plan, interpret=interpret)
    return fold_mapped_axes(run, len(shared))(q, k, *shared)


def why_unsupported(
    shape: tuple[int, ...],
    dtype: jax.typing.DTypeLike,
    norm: QKNorm | None,
    device: Device,
) -> str | None:
    """Returns why the kernel cannot take such arrays on a device, or None if it can."""
    return device.why_not_hopper() or why_unsupported_shape(shape, dtype, norm)


def _by_parity(scale: Float[Array, " C"]) -> Float[Array, "2 half"]:
    """Returns the factors of the even channels, then those of the odd ones."""
    return rearrange(scale.astype(jnp.float32), "(half pair) -> pair half", pair=2)


def _run(q, k, *shared, units, plan: NormRopePoolPlan, interpret):
    batch, _, num_heads, head_dim = q.shape
    if plan.norm is not None and plan.norm.over == "heads":
        by_head = (2, num_heads, head_dim // 2)
        shared = (*(s.reshape(by_head) for s in shared[:2]), *shared[2:])
    pooled_shape = (batch, plan.num_tiles, num_heads, head_dim)
    pooled = jax.ShapeDtypeStruct(pooled_shape, jnp.float32)
    written = jax.ShapeDtypeStruct(q.shape, q.dtype)
    return plgpu.kernel(
        functools.partial(_body, plan=plan),
        out_type=(written, written, *(pooled,) * (2 * len(plan.reductions))),
        # The last axis changes fastest: Q and K of a tile share the rotary table.
        grid=(plan.num_units, num_heads // plan.heads, 2 * batch),
        grid_names=("unit", "chunk", "item"),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        kernel_name="norm_rope_pool_sm90",
        interpret=interpret,
    )(q, k, jnp.asarray(units, jnp.int32), *shared)


def _body(q_gmem, k_gmem, units_gmem, *refs, plan: NormRopePoolPlan):
    num_scales = 0 if plan.norm is None else 2
    num_tables = 2 if plan.has_rope else 0
    num_pooled = len(plan.reductions)
    scales, refs = refs[:num_scales] or (None, None), refs[num_scales:]
    tables, refs = refs[:num_tables], refs[num_tables:]
    q_out_gmem, k_out_gmem, *pooled_gmem = refs
    unit, item = lax.axis_index("unit"), lax.axis_index("item")
    batch = lax.div(item, jnp.int32(2))
    is_key = lax.rem(item, jnp.int32(2)) == 1
    heads = pl.ds(lax.axis_index("chunk") * plan.heads, plan.heads)
    walk = tuple(units_gmem[unit, field] for field in range(4))

    def prepare(x_gmem, scale_gmem, out_gmem, pooled):
        tokens = (x_gmem.at[batch, :, heads], out_gmem.at[batch, :, heads])
        scale = scale_gmem
        if plan.norm is not None and plan.norm.over == "heads":
            scale = scale_gmem.at[:, heads]

        @pl.when(unit < plan.num_tiles)
        def _():
            results = _walk_tile(*tokens, scale, tables, walk, plan.reductions, plan)
            for ref, groups in zip(pooled, results, strict=True):
                for own, result in zip(plan.groups, groups, strict=True):
                    plan.ops.store(ref.at[batch, unit, heads].at[own], result, plan)

        if plan.num_units > plan.num_tiles:

            @pl.when(unit >= plan.num_tiles)
            def _():
                _walk_tile(*tokens, scale, (), walk, (), plan)

    pl.when(jnp.logical_not(is_key))(
        lambda: prepare(q_gmem, scales[0], q_out_gmem, pooled_gmem[:num_pooled])
    )
    pl.when(is_key)(
        lambda: prepare(k_gmem, scales[1], k_out_gmem, pooled_gmem[num_pooled:])
    )


def _walk_tile(
    x_gmem, out_gmem, scale_gmem, tables, walk, reductions, plan: NormRopePoolPlan
):
    """Writes the tokens of one tile and returns their reductions, by groups."""
    first, stride, rows, columns = walk
    count = rows * columns

    def fetch(step, token):
        token = jnp.where(step < count, token, first)  # the last ones are not used
        groups = tuple(
            _load(x_gmem.at[token, heads], plan.layout(plan.vec))
            for heads in plan.groups
        )
        row = token - plan.visual_start
        angles = tuple(_load(t.at[row], plan.half_layout.reduce(0)) for t in tables)
        return token, groups, angles

    def advance(token, column):
        ends_row = column + 1 == columns
        return (
            jnp.where(ends_row, token + stride - columns + 1, token + 1),
            jnp.where(ends_row, 0, column + 1),
        )

    def take(step, state):
        fetched, position, sums = state
        fetched = (*fetched, fetch(step + plan.ahead, position[0]))
        (token, groups, angles), *fetched = fetched
        written = _prepare_token(groups, angles, scale_gmem, out_gmem.at[token], plan)
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


def _prepare_token(groups, angles, scale_gmem, out_gmem, plan: NormRopePoolPlan):
    """Norms, rotates and stores one token; returns what was stored, in float32."""
    inverses = _inverse_rms(groups, plan)
    written = []
    for i, heads in enumerate(plan.groups):
        halves = _floats(groups[i], plan)
        if plan.norm is not None:
            scale = _load_scale(scale_gmem, heads, plan)
            halves = tuple(
                x * inverses[i] * s for x, s in zip(halves, scale, strict=True)
            )
        if angles:
            halves = _rotate(halves, *angles)
        halves = tuple(half.astype(out_gmem.dtype) for half in halves)
        out_gmem[heads] = plan.ops.join(halves, plan)
        written.append(tuple(half.astype(jnp.float32) for half in halves))
    return written


def _inverse_rms(groups, plan: NormRopePoolPlan):
    """Returns one over the root mean square, to multiply each group of heads with."""
    if plan.norm is None:
        return ()
    squares = [sum(half * half for half in _floats(x, plan)) for x in groups]
    shape = squares[0].shape
    if plan.norm.over == "heads":
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


def _rotate(halves, cos, sin):
    even, odd = halves
    cos, sin = (lax.broadcast_in_dim(x, even.shape, (1,)) for x in (cos, sin))
    return even * cos - odd * sin, even * sin + odd * cos


def _accumulate(name: Reduction, own, values):
    add = jnp.add if name == "mean" else jnp.maximum
    return tuple(add(old, value) for old, value in zip(own, values, strict=True))


def _load(ref, layout):
    # Tables with the same values for several lanes do not count as optimized.
    return plgpu.load(ref, layout=layout, optimized=False)


def _full(value: float, plan: NormRopePoolPlan):
    shape = (plan.heads_at_once, plan.head_dim // 2)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), plan.half_layout)
