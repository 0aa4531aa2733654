"""Block-sparse attention, forward, for Hopper (sm_90): Pallas, Mosaic GPU.

One CTA works on one query block of 128 tokens at a time and walks its list of kept
key blocks. Warpgroups PRODUCER issues TMA copies; the two consumers own 64 query rows
each. K and V blocks share one ring, in the order in which the consumers need them:
K0 K1 V0 K2 V1 ... K(n-1) V(n-2) V(n-1), because the logits of step i + 1 are issued
before step i is multiplied with V, so that softmax runs while the tensor cores do.

Barrier   arrives       waits      count
q_full    TMA           consumers  one for each query block
q_free    consumers     PRODUCER   one for each query block
kv_full   TMA           consumers  two for each kept key block
kv_free   consumers     PRODUCER   two for each kept key block
turn      one consumer  the other  one for each step after a query block's first

PRODUCER waits for the arrivals that no later copy needs before it ends ("drains"), so
that every barrier completion is observed. Consumers call commit_smem before each copy
to global memory.

A short block (edge tile or text) is copied whole: the rows past its end belong to the
next block, or are filled with zeros past the end of the array. As keys they are masked;
as queries they are computed and not stored.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

BLOCK = 128  # tokens of a query block and of a key block
ROWS = 64  # query rows of one consumer: the height of one wgmma
ALIGNMENT = 8  # tokens; swizzled copies start at multiples of it
NUM_CONSUMERS = 2
PRODUCER = 2  # values of the "wg" axis: consumers 0 and 1, then the producer
LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)
# Running maximum of a row that has met no key: far below every real logit, yet finite,
# so that masked logits of -inf become exp2(-inf - finite) = 0 and never NaN.
NO_MAXIMUM = -1e38
MAX_SMEM_BYTES = 227 * 1024

WGMMA = plgpu.Layout.WGMMA
WGMMA_ROW = plgpu.Layout.WGMMA.reduce(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """How it is computed. Changing a field changes only time and rounding."""

    num_slots: int  # K or V blocks in flight
    ping_pong: bool = True  # consumers take turns in issuing matrix products
    overlap: bool = True  # issue the next logits before the product with V
    persistent: bool = True  # one CTA per multiprocessor walks many query blocks
    consumer_registers: int = 232
    producer_registers: int = 40

    def __post_init__(self) -> None:
        if self.num_slots < 3:
            raise ValueError(f"{self.num_slots=} must be at least 3")

    @classmethod
    def for_head_dim(cls, head_dim: int) -> "KernelConfig":
        """As many slots as shared memory holds beside Q and the output."""
        return cls(num_slots=5 if head_dim == 128 else 10)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything static about one launch."""

    config: KernelConfig
    num_blocks: int
    num_heads: int
    head_dim: int
    num_tiles: int  # query blocks of all heads and batch items
    num_ctas: int
    scale: float
    starts_are_multiples: bool  # block r starts at token r * BLOCK
    masks_keys: bool  # some key block has fewer than BLOCK valid tokens
    masks_queries: bool  # some query inside a block is padding
    has_short_blocks: bool
    emulate_wgmma: bool  # interpret mode has no wgmma with registers


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """References to global memory."""

    q: jax.Ref
    k: jax.Ref
    v: jax.Ref
    row_offsets: jax.Ref  # [B * N, R + 1]
    block_ids: jax.Ref  # [B * N, M]
    order: jax.Ref  # [num_tiles], tiles in the order in which CTAs take them
    starts: jax.Ref  # [R], first token of each block over ALIGNMENT
    lengths: jax.Ref  # [R], tokens of each block
    valid: jax.Ref  # [B, R], tokens of each block that are not padding
    out: jax.Ref
    lse: jax.Ref  # [B * N, R, BLOCK]


@dataclasses.dataclass(frozen=True)
class _Tile:
    """One query block and the entries of its list."""

    batch: jax.Array
    head: jax.Array
    list_row: jax.Array  # batch * num_heads + head
    block: jax.Array
    first: jax.Array  # entry in block_ids
    count: jax.Array


def attend_blocks(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    row_offsets: Int[Array, "L R+1"],
    block_ids: Int[Array, "L M"],
    order: Int[Array, " L*R"],
    starts: Int[Array, " R"],
    lengths: Int[Array, " R"],
    valid: Int[Array, "B R"],
    *,
    plan: Plan,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Float[Array, "B T N D"], Float[Array, "L R 128"]]:
    """Launches the kernel.

    Args:
      q: Queries, bfloat16 or float16, T >= BLOCK.
      k: Keys.
      v: Values.
      row_offsets: Start of each query block's list, L = B * N.
      block_ids: Key blocks of the lists.
      order: Permutation of the query blocks of all lists, numbered row by row.
      starts: First token of each block, divided by ALIGNMENT.
      lengths: Tokens of each block.
      valid: Tokens of each block of each batch item that are not padding.
      plan: Static sizes and choices.
      interpret: Run on the CPU in GPU interpret mode.

    Returns:
      The output, and the natural log-sum-exp of each row of each block; rows past a
      block's length are undefined.
    """
    return plgpu.kernel(
        functools.partial(_body, plan=plan),
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(
                (*row_offsets.shape[:1], plan.num_blocks, BLOCK), jnp.float32
            ),
        ),
        scratch_types=scratch_types(plan, q.dtype),
        grid=(plan.num_ctas,),
        grid_names=("cta",),
        num_threads=NUM_CONSUMERS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
        ),
        kernel_name="block_sparse_attention_sm90",
        **({} if interpret is None else {"interpret": interpret}),
    )(q, k, v, row_offsets, block_ids, order, starts, lengths, valid)


def scratch_types(plan: Plan, dtype: jax.typing.DTypeLike) -> dict[str, object]:
    """Shared memory and barriers of one CTA."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    slots, dim = plan.config.num_slots, plan.head_dim
    rows = (NUM_CONSUMERS, ROWS)
    return {
        "q_smem": plgpu.SMEM((*rows, dim), dtype, transforms=transforms),
        "kv_smem": plgpu.SMEM((slots, BLOCK, dim), dtype, transforms=transforms),
        # Short blocks leave row by row, which a swizzled buffer does not allow. Bank
        # conflicts of the plain one are paid once for each query block.
        "o_smem": plgpu.SMEM(
            (*rows, dim), dtype, transforms=() if plan.has_short_blocks else transforms
        ),
        "lse_smem": plgpu.SMEM(rows, jnp.float32),
        "q_full": plgpu.Barrier(num_arrivals=NUM_CONSUMERS),
        "q_free": plgpu.Barrier(num_arrivals=NUM_CONSUMERS),
        "kv_full": plgpu.Barrier(num_barriers=slots),
        "kv_free": plgpu.Barrier(num_arrivals=NUM_CONSUMERS, num_barriers=slots),
        "turn": plgpu.Barrier(num_barriers=NUM_CONSUMERS),
    }


def smem_bytes(plan: Plan, dtype: jax.typing.DTypeLike) -> int:
    """Shared memory of one CTA, barriers included."""
    itemsize = jnp.dtype(dtype).itemsize
    blocks = plan.config.num_slots + 2  # K and V, Q, output
    barriers = 2 * plan.config.num_slots + 2 + NUM_CONSUMERS
    return blocks * BLOCK * plan.head_dim * itemsize + BLOCK * 4 + 8 * barriers


def _body(*refs, plan: Plan, **scratch):
    gmem = _Inputs(*refs)
    wg = lax.axis_index("wg")

    @pl.when(wg == PRODUCER)
    def _():
        plgpu.set_max_registers(plan.config.producer_registers, action="decrease")
        _produce(
            gmem,
            plan,
            **_select(scratch, "q_smem kv_smem q_full q_free kv_full kv_free"),
        )

    @pl.when(wg != PRODUCER)
    def _():
        plgpu.set_max_registers(plan.config.consumer_registers, action="increase")
        _consume(gmem, plan, wg, **scratch)


def _select(scratch, names):
    return {name: scratch[name] for name in names.split()}


def _for_each_tile(gmem: _Inputs, plan: Plan, body, fill):
    """Calls `fill = body(tile, index, fill)` for the query blocks of this CTA."""
    cta = lax.axis_index("cta")

    def step(index, fill):
        return body(_tile(gmem, plan, cta + index * plan.num_ctas), index, fill)

    if plan.num_ctas == plan.num_tiles:
        return step(jnp.int32(0), fill)
    return lax.fori_loop(0, _num_own_tiles(plan), step, fill)


def _num_own_tiles(plan: Plan):
    if plan.num_ctas == plan.num_tiles:
        return jnp.int32(1)
    cta = lax.axis_index("cta")
    return lax.div(plan.num_tiles - cta + (plan.num_ctas - 1), jnp.int32(plan.num_ctas))


def _tile(gmem: _Inputs, plan: Plan, position) -> _Tile:
    number = gmem.order[position]
    list_row = lax.div(number, jnp.int32(plan.num_blocks))
    block = lax.rem(number, jnp.int32(plan.num_blocks))
    first = gmem.row_offsets[list_row, block]
    return _Tile(
        batch=lax.div(list_row, jnp.int32(plan.num_heads)),
        head=lax.rem(list_row, jnp.int32(plan.num_heads)),
        list_row=list_row,
        block=block,
        first=first,
        count=gmem.row_offsets[list_row, block + 1] - first,
    )


def _start(gmem: _Inputs, plan: Plan, block):
    """First token of a block, in units of `_unit`."""
    return block if plan.starts_are_multiples else gmem.starts[block]


def _unit(plan: Plan) -> int:
    """Multiplied in where a copy begins: Mosaic must see that it is aligned."""
    return BLOCK if plan.starts_are_multiples else ALIGNMENT


def _slot(plan: Plan, fill):
    return lax.rem(fill, jnp.int32(plan.config.num_slots))


# ------------------------------------------------------------------------ producer


def _produce(gmem, plan: Plan, *, q_smem, kv_smem, q_full, q_free, kv_full, kv_free):
    """Copies Q, then K and V of every kept block, as far ahead as the ring allows."""
    num_slots = plan.config.num_slots

    unit = _unit(plan)

    def copy(source, tile, start, fill):
        @pl.when(fill >= num_slots)
        def _():
            plgpu.barrier_wait(kv_free.at[_slot(plan, fill)])

        slot = _slot(plan, fill)
        rows = source.at[tile.batch, pl.ds(start * unit, BLOCK), tile.head]
        plgpu.copy_gmem_to_smem(rows, kv_smem.at[slot], kv_full.at[slot])

    def load_tile(tile, index, fill):
        @pl.when(index > 0)
        def _():
            plgpu.barrier_wait(q_free)

        token = _start(gmem, plan, tile.block) * unit
        for wg in range(NUM_CONSUMERS):
            rows = gmem.q.at[tile.batch, pl.ds(token + wg * ROWS, ROWS), tile.head]
            plgpu.copy_gmem_to_smem(rows, q_smem.at[wg], q_full)

        def start_of(step):
            # The last step looks ahead to an entry that does not exist.
            entry = tile.first + jnp.minimum(step, tile.count - 1)
            return _start(gmem, plan, gmem.block_ids[tile.list_row, entry])

        def load_step(step, starts):
            # K of this step, then V of the one before. The next start is read before
            # the copies wait for a free slot.
            start_v, start_k = starts
            next_start = start_of(step + 1)
            copy(gmem.k, tile, start_k, fill + 2 * step - jnp.minimum(step, 1))

            @pl.when(step > 0)
            def _():
                copy(gmem.v, tile, start_v, fill + 2 * step)

            return start_k, next_start

        @pl.when(tile.count > 0)
        def _():
            first = start_of(jnp.int32(0))
            last, _ = lax.fori_loop(0, tile.count, load_step, (first, first))
            copy(gmem.v, tile, last, fill + 2 * tile.count - 1)

        return fill + 2 * tile.count

    fill = _for_each_tile(gmem, plan, load_tile, jnp.int32(0))

    plgpu.barrier_wait(q_free)

    @pl.loop(jnp.maximum(fill - num_slots, 0), fill)
    def _drain(last_fill):
        plgpu.barrier_wait(kv_free.at[_slot(plan, last_fill)])


# ----------------------------------------------------------------------- consumers


def _consume(
    gmem,
    plan: Plan,
    wg,
    *,
    q_smem,
    kv_smem,
    o_smem,
    lse_smem,
    q_full,
    q_free,
    kv_full,
    kv_free,
    turn,
):
    """Attention of ROWS query rows of each query block of this CTA."""
    ping_pong = plan.config.ping_pong

    if ping_pong:  # consumer 0 issues first
        pl.when(wg == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))

    def attend_tile(tile, index, fill):
        del index
        plgpu.barrier_wait(q_full)
        q_rows = q_smem.at[wg]
        ring = _Ring(plan, wg, kv_smem, kv_full, kv_free, turn)
        acc, maximum, total = lax.cond(
            tile.count > 0,
            lambda: _attend_list(gmem, plan, tile, q_rows, q_free, ring, fill),
            lambda: _attend_nothing(plan, q_free),
        )
        _store_tile(gmem, plan, tile, wg, acc, maximum, total, o_smem, lse_smem)
        return fill + 2 * tile.count

    _for_each_tile(gmem, plan, attend_tile, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)
    if ping_pong:  # observe the last turn, which nobody takes
        pl.when(wg == 0)(lambda: plgpu.barrier_wait(turn.at[0]))


@dataclasses.dataclass(frozen=True)
class _Ring:
    """One consumer's view of the K/V ring."""

    plan: Plan
    wg: jax.Array
    kv_smem: jax.Ref
    kv_full: jax.Ref
    kv_free: jax.Ref
    turn: jax.Ref

    def wait(self, fill):
        """Waits until the block of a fill has landed and returns it."""
        slot = _slot(self.plan, fill)
        plgpu.barrier_wait(self.kv_full.at[slot])
        return self.kv_smem.at[slot]

    def free(self, fill):
        _commit_emulated_reads(self.plan)
        plgpu.barrier_arrive(self.kv_free.at[_slot(self.plan, fill)])

    def take_turn(self):
        if self.plan.config.ping_pong:
            plgpu.barrier_wait(self.turn.at[self.wg])

    def pass_turn(self):
        if self.plan.config.ping_pong:
            plgpu.barrier_arrive(self.turn.at[1 - self.wg])


def _initial_state(plan: Plan):
    acc = plgpu.layout_cast(jnp.zeros((ROWS, plan.head_dim), jnp.float32), WGMMA)
    maximum = plgpu.layout_cast(jnp.full((ROWS,), NO_MAXIMUM, jnp.float32), WGMMA_ROW)
    total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), WGMMA_ROW)
    return acc, maximum, total


def _attend_nothing(plan: Plan, q_free):
    plgpu.barrier_arrive(q_free)
    return _initial_state(plan)


def _attend_list(gmem, plan: Plan, tile: _Tile, q_rows, q_free, ring: _Ring, fill):
    """Walks a list of at least one key block.

    Returns the weighted values, the maximum of the base-2 logits and the sum of
    weights of every row.
    """
    valid_of = functools.partial(_valid_keys, gmem, plan, tile)
    acc, maximum, total = _initial_state(plan)
    valid, next_valid = valid_of(0), valid_of(1)

    logits = _logits(plan, q_rows, ring.wait(fill))
    ring.free(fill)
    logits = _mask_keys(logits, valid)
    maximum, total, _, weights = _softmax(plan, logits, maximum, total)
    dtype = q_rows.dtype

    def step(i, carry):
        """Logits of step i and, overlapped, the product of step i - 1 with V."""
        acc, weights, maximum, total, valid = carry
        next_valid = valid_of(i + 1)
        k_fill, v_fill = fill + 2 * i - 1, fill + 2 * i

        def softmax(logits):
            return _softmax(plan, _mask_keys(logits, valid), maximum, total)

        acc, maximum, total, decay, new_weights = _overlapped_step(
            plan, q_rows, acc, weights, softmax, ring, k_fill, v_fill
        )
        acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
        return acc, new_weights.astype(dtype), maximum, total, next_valid

    carry = (acc, weights.astype(dtype), maximum, total, next_valid)
    acc, weights, maximum, total, _ = lax.fori_loop(1, tile.count, step, carry)
    _commit_emulated_reads(plan)
    plgpu.barrier_arrive(q_free)
    last = fill + 2 * tile.count - 1
    acc = _add_values(plan, acc, weights, ring.wait(last))
    ring.free(last)
    return acc, maximum, total


def _valid_keys(gmem, plan: Plan, tile: _Tile, step):
    """Valid tokens of the key block of a step, or None where all are full."""
    if not plan.masks_keys:
        return None
    entry = tile.first + jnp.minimum(step, tile.count - 1)
    return gmem.valid[tile.batch, gmem.block_ids[tile.list_row, entry]]


def _mask_keys(logits, valid):
    if valid is None:
        return logits

    def mask():
        column = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=WGMMA)
        return jnp.where(column < valid, logits, -jnp.inf)

    return lax.cond(valid < BLOCK, mask, lambda: logits)


def _softmax(plan: Plan, logits, maximum, total):
    """Online softmax in base 2.

    Returns the new maximum and sum, the factor on what was summed before, and the
    weights of these logits.
    """
    scale = plan.scale * LOG2_E
    if scale <= 0.0:  # the largest product is not the largest logit
        logits, scale = logits * scale, 1.0
    new_maximum = jnp.maximum(maximum, logits.max(axis=1) * scale)
    decay = jnp.exp2(maximum - new_maximum)
    weights = jnp.exp2(
        logits * scale - lax.broadcast_in_dim(new_maximum, logits.shape, [0])
    )
    total = total * decay + weights.sum(axis=1)
    return new_maximum, total, decay, weights


def _store_tile(gmem, plan: Plan, tile, wg, acc, maximum, total, o_smem, lse_smem):
    """Normalises ROWS rows and copies those that belong to the block to memory."""
    has_key = total > 0.0
    if plan.masks_queries:
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=WGMMA_ROW)
        has_key &= row + wg * ROWS < gmem.valid[tile.batch, tile.block]
    safe_total = jnp.where(has_key, total, 1.0)
    lse = jnp.where(has_key, maximum * LN_2 + jnp.log(safe_total), -jnp.inf)
    factor = jnp.where(has_key, 1.0 / safe_total, 0.0)
    out = acc * lax.broadcast_in_dim(factor, acc.shape, [0])
    # The copies of the previous query block must have left shared memory.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    lse_smem[wg] = lse
    o_smem[wg] = out.astype(o_smem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(
        lse_smem.at[wg],
        gmem.lse.at[tile.list_row, tile.block, pl.ds(wg * ROWS, ROWS)],
        commit_group=False,
    )
    token = _start(gmem, plan, tile.block) * _unit(plan) + wg * ROWS

    def store_full():
        rows = gmem.out.at[tile.batch, pl.ds(token, ROWS), tile.head]
        plgpu.copy_smem_to_gmem(o_smem.at[wg], rows)

    if not plan.has_short_blocks:
        return store_full()
    length = gmem.lengths[tile.block] - wg * ROWS

    def store_short():
        @pl.loop(0, jnp.maximum(length, 0))
        def _(row):
            target = gmem.out.at[tile.batch, pl.ds(token + row, 1), tile.head]
            source = o_smem.at[wg, pl.ds(row, 1)]
            plgpu.copy_smem_to_gmem(source, target, commit_group=False)

        plgpu.commit_smem_to_gmem_group()

    lax.cond(length >= ROWS, store_full, store_short)


# ----------------------------------------------------------------- matrix products


def _logits(plan: Plan, q_rows, k_block):
    """q @ k.T, waited for."""
    if plan.emulate_wgmma:
        return _emulated_dot(q_rows[...], k_block[...].T)

    def product(logits_ref):
        plgpu.wgmma(logits_ref, q_rows, k_block.T)
        return logits_ref[...]

    return pl.run_scoped(product, plgpu.ACC((ROWS, BLOCK), jnp.float32))


def _add_values(plan: Plan, acc, weights, v_block):
    """acc + weights @ v, waited for."""
    if plan.emulate_wgmma:
        return acc + _emulated_dot(weights, v_block[...])

    def product(acc_ref):
        plgpu.wgmma(acc_ref, weights, v_block)

    return pl.run_state(product)(plgpu.ACC.init(acc))


def _overlapped_step(
    plan: Plan, q_rows, acc, weights, softmax, ring: _Ring, k_fill, v_fill
):
    """One step: new logits, the last weights times V, and softmax of the new logits.

    Returns the new acc and what `softmax(logits)` returns.
    """
    if plan.emulate_wgmma or not plan.config.overlap:
        ring.take_turn()
        logits = _logits(plan, q_rows, ring.wait(k_fill))
        ring.free(k_fill)
        acc = _add_values(plan, acc, weights, ring.wait(v_fill))
        ring.pass_turn()
        ring.free(v_fill)
        return acc, *softmax(logits)

    def products(logits_ref):
        def with_acc(refs):
            acc_ref, *result_refs = refs
            k_block = ring.wait(k_fill)
            ring.take_turn()
            plgpu.wgmma(logits_ref, q_rows, k_block.T)
            v_block = ring.wait(v_fill)
            plgpu.wgmma(acc_ref, weights, v_block)
            ring.pass_turn()
            logits = plgpu.wgmma_accumulator_load(logits_ref, wait_n=1)
            # Keeps the compiler from using the logits before the wait.
            logits = lax.optimization_barrier(logits)
            ring.free(k_fill)
            results = softmax(logits)
            for ref, value in zip(result_refs, results, strict=True):
                ref[...] = value
            plgpu.wgmma_wait(0)

        row = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), WGMMA_ROW)
        block = plgpu.layout_cast(jnp.zeros((ROWS, BLOCK), jnp.float32), WGMMA)
        return pl.run_state(with_acc)((plgpu.ACC.init(acc), row, row, row, block))

    acc, *results = pl.run_scoped(products, plgpu.ACC((ROWS, BLOCK), jnp.float32))
    ring.free(v_fill)
    return acc, *results


def _commit_emulated_reads(plan: Plan):
    """Orders an emulated product's ordinary reads before the copies that follow.

    wgmma reads shared memory as the copies write it and needs nothing.
    """
    if plan.emulate_wgmma:
        plgpu.commit_smem()


def _emulated_dot(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
