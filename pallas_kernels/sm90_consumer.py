"""The consumers of the Hopper kernel: matrix products and softmax.

A consumer owns 64 rows of a query block. In a step it issues the logits of the next key
block, then the last weights times V, and computes the softmax of the new logits while
the second product runs.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm, vector

from pallas_kernels.sm90_plan import (
    BLOCK,
    ROWS,
    Plan,
    Signals,
    Tile,
    for_each_tile,
    slot_of,
    start_of,
    unit_of,
)

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)
# Running maximum of a row that has met no key: far below every real logit, yet finite,
# so that masked logits of -inf become exp2(-inf - finite) = 0 and never NaN.
NO_MAXIMUM = -1e38

WGMMA = plgpu.Layout.WGMMA
WGMMA_ROW = plgpu.Layout.WGMMA.reduce(1)


def consume(
    gmem,
    plan: Plan,
    signals: Signals,
    wg,
    *,
    q_smem,
    kv_smem,
    o_smem,
    lse_smem,
    q_full,
    kv_full,
):
    """Attention of ROWS query rows of each query block of this CTA."""
    ping_pong = plan.config.ping_pong

    if ping_pong:  # consumer 0 issues first
        pl.when(wg == 1)(lambda: signals.give_turn(0))

    def attend_tile(tile, index, fill):
        del index
        plgpu.barrier_wait(q_full)
        q_rows = q_smem.at[wg]
        ring = _Ring(plan, wg, kv_smem, kv_full, signals)
        acc, maximum, total = lax.cond(
            tile.count > 0,
            lambda: _attend_list(gmem, plan, tile, q_rows, ring, fill),
            lambda: _attend_nothing(plan, ring),
        )
        _store_tile(gmem, plan, tile, wg, acc, maximum, total, o_smem, lse_smem)
        return fill + 2 * tile.count

    for_each_tile(gmem, plan, attend_tile, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)
    if ping_pong:  # observe the last turn, which nobody takes
        pl.when(wg == 0)(lambda: signals.take_turn(0))


@dataclasses.dataclass(frozen=True)
class _Ring:
    """One consumer's view of the K/V ring."""

    plan: Plan
    wg: jax.Array
    kv_smem: jax.Ref
    kv_full: jax.Ref
    signals: Signals

    def wait(self, fill):
        """Waits until the block of a fill has landed and returns it."""
        slot = slot_of(self.plan, fill)
        plgpu.barrier_wait(self.kv_full.at[slot])
        return self.kv_smem.at[slot]

    def free(self, fill):
        _commit_emulated_reads(self.plan)
        self.signals.free_kv(slot_of(self.plan, fill))

    def free_q(self):
        _commit_emulated_reads(self.plan)
        self.signals.free_q()

    def take_turn(self):
        if self.plan.config.ping_pong:
            self.signals.take_turn(self.wg)

    def pass_turn(self):
        if self.plan.config.ping_pong:
            self.signals.give_turn(1 - self.wg)


def _initial_state(plan: Plan):
    acc = plgpu.layout_cast(jnp.zeros((ROWS, plan.head_dim), jnp.float32), WGMMA)
    maximum = plgpu.layout_cast(jnp.full((ROWS,), NO_MAXIMUM, jnp.float32), WGMMA_ROW)
    total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), WGMMA_ROW)
    return acc, maximum, total


def _attend_nothing(plan: Plan, ring: _Ring):
    ring.free_q()
    return _initial_state(plan)


def _attend_list(gmem, plan: Plan, tile: Tile, q_rows, ring: _Ring, fill):
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
    maximum, total, _, weights = _softmax(plan, logits, maximum, total, q_rows.dtype)

    def step(i, carry):
        """Logits of step i and, overlapped, the product of step i - 1 with V."""
        acc, weights, maximum, total, valid = carry
        next_valid = valid_of(i + 1)
        k_fill, v_fill = fill + 2 * i - 1, fill + 2 * i

        def softmax(logits):
            logits = _mask_keys(logits, valid)
            return _softmax(plan, logits, maximum, total, weights.dtype)

        acc, maximum, total, decay, weights = _overlapped_step(
            plan, q_rows, acc, weights, softmax, ring, k_fill, v_fill
        )
        acc = _rescale(plan, acc, decay)
        return acc, weights, maximum, total, next_valid

    carry = (acc, weights, maximum, total, next_valid)
    acc, weights, maximum, total, _ = lax.fori_loop(1, tile.count, step, carry)
    ring.free_q()
    last = fill + 2 * tile.count - 1
    acc = _add_values(plan, acc, weights, ring.wait(last))
    ring.free(last)
    return acc, maximum, total


def _valid_keys(gmem, plan: Plan, tile: Tile, step):
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


def _softmax(plan: Plan, logits, maximum, total, dtype):
    """Online softmax in base 2.

    The maximum is the one that weights refer to, which is a row's real one or, with
    `rescale_above`, a little less. Results do not depend on it.

    Returns the new maximum and sum, the factor on what was summed before, and the
    weights of these logits.
    """
    scale = plan.scale * LOG2_E
    if scale <= 0.0:  # the largest product is not the largest logit
        logits, scale = logits * scale, 1.0
    new_maximum = jnp.maximum(maximum, logits.max(axis=1) * scale)
    if (threshold := plan.config.rescale_above) is not None:
        new_maximum = jnp.where(new_maximum - maximum > threshold, new_maximum, maximum)
    decay = jnp.exp2(maximum - new_maximum)
    weights = jnp.exp2(
        logits * scale - lax.broadcast_in_dim(new_maximum, logits.shape, [0])
    )
    total = total * decay + weights.sum(axis=1)
    return new_maximum, total, decay, weights.astype(dtype)


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
    token = start_of(gmem, plan, tile.block) * unit_of(plan) + wg * ROWS

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
        block = plgpu.layout_cast(jnp.zeros((ROWS, BLOCK), weights.dtype), WGMMA)
        return pl.run_state(with_acc)((plgpu.ACC.init(acc), row, row, row, block))

    acc, *results = pl.run_scoped(products, plgpu.ACC((ROWS, BLOCK), jnp.float32))
    ring.free(v_fill)
    return acc, *results


def _rescale(plan: Plan, acc, decay):
    """acc * decay, which a warp leaves out where none of its rows decays."""

    def multiply():
        return acc * lax.broadcast_in_dim(decay, acc.shape, [0])

    if plan.config.rescale_above is None:
        return multiply()
    any_decays = jnp.any if plan.emulate_wgmma else _any_in_warp
    return lax.cond(any_decays(decay < 1.0), multiply, lambda: acc)


@plgpu.inline_mgpu(
    arg_types=(WGMMA_ROW,),
    return_type=plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.bool_), plgpu.Layout.WG_SPLAT),
)
def _any_in_warp(_, rows):
    """Whether any row is true: a scalar of each warp, not of the warpgroup.

    What depends on it must not contain an operation of the whole warpgroup.
    """
    own = functools.reduce(arith.ori, rows.registers.flat)
    own = vector.extract(own, [], [0]) if isinstance(own.type, ir.VectorType) else own
    everyone = mgpu.c(-1, ir.IntegerType.get_signless(32))
    result = nvvm.vote_sync(everyone, own, "any")
    return mgpu.FragmentedArray.splat(result, (), is_signed=False)


def _commit_emulated_reads(plan: Plan):
    """Orders an emulated product's ordinary reads before the copies that follow.

    wgmma reads shared memory as the copies write it and needs nothing.
    """
    if plan.emulate_wgmma:
        plgpu.commit_smem()


def _emulated_dot(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
