"""The consumers of the Hopper kernel: matrix products and softmax.

A consumer owns 64 rows of a query block. In a step it issues the logits of the next key
block, then the last weights times V, and computes the softmax of the new logits while
the second product runs.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.sm90 import copies as sm90_rows
from pallas_kernels.attention.sm90 import softmax
from pallas_kernels.attention.sm90 import wgmma as sm90_wgmma
from pallas_kernels.attention.sm90.plan import (
    ALIGNMENT,
    BLOCK,
    ROWS,
    Boxes,
    Plan,
    Runs,
    Signals,
    SingleRows,
    Tile,
    Width,
    as_rows,
    block_of,
    bounds_of_width,
    box_of,
    for_each_tile,
    token_of_row,
)
from pallas_kernels.attention.sm90.softmax import WGMMA, WGMMA_ROW

LN_2 = math.log(2.0)


def consume(
    gmem,
    plan: Plan,
    signals: Signals,
    wg,
    *,
    q_smem,
    kv_smem,
    lse_smem,
    q_full,
    kv_full,
):
    """Attention of ROWS query rows of each query block of this CTA."""
    ping_pong = plan.config.ping_pong

    if ping_pong:  # consumer 0 issues first
        pl.when(wg == 1)(lambda: signals.give_turn(0))

    def attend_tile(tile, index, slot):
        del index
        plgpu.barrier_wait(q_full)
        queries = _queries(gmem, plan, tile, wg, as_rows(plan, q_smem.at[wg]))
        state = (_zero_acc(plan), softmax.no_reference(plan), _zero_rows(), slot)
        for number, width in enumerate(plan.widths):
            begin, end = bounds_of_width(gmem, plan, tile, number)
            ring = _Ring(plan, wg, width.tokens, kv_smem, kv_full, signals)
            state = lax.cond(
                end > begin,
                functools.partial(
                    _attend_width,
                    gmem,
                    plan,
                    tile,
                    width,
                    begin,
                    end,
                    queries,
                    ring,
                ),
                lambda *state: state,
                *state,
            )
        acc, reference, total, slot = state
        total = softmax.row_sums(plan, total)
        _commit_emulated_reads(plan)
        _store_tile(
            gmem, plan, tile, wg, acc, reference, total, q_smem.at[wg], lse_smem.at[wg]
        )
        signals.free_q()
        return slot

    for_each_tile(gmem, plan, attend_tile, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)
    if ping_pong:  # observe the last turn, which nobody takes
        pl.when(wg == 0)(lambda: signals.take_turn(0))


@dataclasses.dataclass(frozen=True)
class _Ring:
    """One consumer's view of the K/V ring."""

    plan: Plan
    wg: jax.Array
    width: int  # keys of a block that are used
    kv_smem: jax.Ref
    kv_full: jax.Ref
    signals: Signals

    def wait(self, slot):
        """Waits until a block has landed; once for each."""
        plgpu.barrier_wait(self.kv_full.at[slot])

    def whole_block(self, slot):
        return as_rows(self.plan, self.kv_smem.at[slot])

    def block(self, slot):
        if self.width == BLOCK:
            return self.whole_block(slot)
        in_boxes = isinstance(self.plan.copies, Boxes)
        size = self.width // ALIGNMENT if in_boxes else self.width
        return as_rows(self.plan, self.kv_smem.at[slot, pl.ds(0, size)])

    def free(self, slot):
        _commit_emulated_reads(self.plan)
        self.signals.free_kv(slot)

    def after(self, slot):
        """The slot filled next. Cheaper than a remainder, which every step would
        wait for."""
        return jnp.where(slot == self.plan.config.num_slots - 1, 0, slot + 1)

    def take_turn(self):
        if self.plan.config.ping_pong:
            self.signals.take_turn(self.wg)

    def pass_turn(self):
        if self.plan.config.ping_pong:
            self.signals.give_turn(1 - self.wg)


class _Queries(NamedTuple):
    """The rows of one consumer."""

    rows: jax.Ref
    warp_has_rows: jax.Array | None  # of the query block; None: they all have


def _queries(gmem, plan: Plan, tile: Tile, wg, q_rows) -> _Queries:
    """Finds out what a short query block leaves to do, and zeros its other rows.

    Those are other tokens' queries and not stored either way, but products with zeros
    take less power, which is what limits the kernel.
    """
    if not (plan.has_short_blocks and plan.config.skip_rows):
        return _Queries(q_rows, None)
    length = gmem.lengths[tile.block]
    row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=WGMMA_ROW)
    if isinstance(boxes := plan.copies, Boxes):
        is_own = row % boxes.tokens < lax.div(length, jnp.int32(boxes.number))
    else:
        is_own = row + wg * ROWS < length

    @pl.when(length < BLOCK)
    def _clear():
        tokens = plgpu.load(q_rows, layout=WGMMA)
        size = math.prod(tokens.shape[:-1]), tokens.shape[-1]
        keep = lax.broadcast_in_dim(is_own, size, [0]).reshape(tokens.shape)
        q_rows[...] = jnp.where(keep, tokens, 0.0)
        plgpu.commit_smem()

    return _Queries(q_rows, softmax.any_of_warp(plan, is_own) != 0)


def _zero_acc(plan: Plan):
    return plgpu.layout_cast(jnp.zeros((ROWS, plan.head_dim), jnp.float32), WGMMA)


def _zero_rows():
    return plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), WGMMA_ROW)


def _attend_width(
    gmem,
    plan: Plan,
    tile: Tile,
    width: Width,
    begin,
    end,
    queries: _Queries,
    ring: _Ring,
    acc,
    reference,
    total,
    slot,
):
    """Walks the key blocks of one width, at least one, whose first K is in `slot`.

    Takes and returns the weighted values, the reference of the weights and their
    partial sums for every row, and the slot of the next block.
    """
    valid_of = functools.partial(_valid_keys, gmem, plan, tile, width)
    valid, next_valid = valid_of(begin), valid_of(begin + 1)
    q_rows, warp_has_rows = queries
    dtype = q_rows.dtype

    ring.wait(slot)
    logits = _logits(plan, q_rows, ring.block(slot))
    ring.free(slot)
    logits = _mask_keys(logits, valid)
    reference = softmax.first_reference(plan, logits, reference, begin == 0)
    weights, reference, total, correction = softmax.next_weights(
        plan, logits, reference, total, warp_has_rows
    )
    acc, weights, reference, total = softmax.correct(
        plan, correction, acc, weights, reference, total
    )
    next_slot = ring.after(slot)
    ring.wait(next_slot)

    def step(i, carry):
        """Logits of step i and, overlapped, the product of step i - 1 with V."""
        acc, weights, reference, total, valid, k_slot = carry
        next_valid = valid_of(i + 1)
        v_slot = ring.after(k_slot)

        def weigh(logits):
            logits = _mask_keys(logits, valid)
            return softmax.next_weights(plan, logits, reference, total, warp_has_rows)

        acc, weights, reference, total, correction = _overlapped_step(
            plan, q_rows, acc, weights, weigh, ring, k_slot, v_slot
        )
        acc, weights, reference, total = softmax.correct(
            plan, correction, acc, weights, reference, total
        )
        # Not before the product with the last weights is done: ptxas would take
        # them for the same registers and wait for every single wgmma.
        weights = weights.astype(dtype)
        return acc, weights, reference, total, next_valid, ring.after(v_slot)

    weights = weights.astype(dtype)
    carry = (acc, weights, reference, total, next_valid, next_slot)
    acc, weights, reference, total, _, last = lax.fori_loop(begin + 1, end, step, carry)
    acc = _add_values(plan, acc, weights, ring, last)
    ring.free(last)
    return acc, reference, total, ring.after(last)


def _valid_keys(gmem, plan: Plan, tile: Tile, width: Width, step):
    """Valid tokens of the key block of a step, or None where all are full."""
    if not width.masks:
        return None
    return gmem.valid[tile.batch, block_of(gmem, plan, tile, step)]


def _mask_keys(logits, valid):
    if valid is None:
        return logits

    def mask():
        column = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=WGMMA)
        return jnp.where(column < valid, logits, -jnp.inf)

    return lax.cond(valid < logits.shape[1], mask, lambda: logits)


def _store_tile(gmem, plan: Plan, tile, wg, acc, reference, total, o_smem, lse_smem):
    """Normalises ROWS rows and copies those that belong to the block to memory.

    They go through the shared memory of their queries, which nobody reads any more.
    """
    has_key = total != 0.0  # true for NaN, which must not become zero
    needs_repair = softmax.needs_repair(plan, total, tile.count)
    if plan.masks_queries:
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=WGMMA_ROW)
        has_key &= row + wg * ROWS < gmem.valid[tile.batch, tile.block]
    safe_total = jnp.where(has_key, total, 1.0)
    lse = jnp.where(has_key, reference * LN_2 + jnp.log(safe_total), -jnp.inf)
    if needs_repair is not None:
        lse = jnp.where(needs_repair, jnp.inf, lse)
    factor = jnp.where(has_key, 1.0 / safe_total, 0.0)
    out = acc * lax.broadcast_in_dim(factor, acc.shape, [0])
    lse_smem[...] = lse
    o_rows = as_rows(plan, o_smem)
    o_rows[...] = out.astype(o_smem.dtype).reshape(o_rows.shape)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(
        lse_smem,
        gmem.lse.at[tile.list_row, tile.block, pl.ds(wg * ROWS, ROWS)],
        commit_group=False,
    )

    match plan.copies:
        case SingleRows():
            sm90_rows.store(
                o_smem,
                sm90_rows.rows_of_block(gmem, tile.block, wg * ROWS),
                gmem.out.at[tile.batch, :, tile.head],
                emulate=plan.emulate_wgmma,
            )
        case Runs() as runs:
            _store_runs(gmem, plan, runs, tile, wg, o_smem)
        case Boxes() as boxes:
            _store_boxes(gmem, plan, boxes, tile, wg, o_smem)
    plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _store_runs(gmem, plan: Plan, runs: Runs, tile: Tile, wg, o_smem):
    def store(row, num_rows):
        token = token_of_row(gmem, runs, tile.block, wg * ROWS + row)
        target = gmem.out.at[tile.batch, pl.ds(token, num_rows), tile.head]
        source = o_smem.at[pl.ds(row, num_rows)]
        plgpu.copy_smem_to_gmem(source, target, commit_group=False)

    def store_all():
        run = min(runs.tokens, ROWS)
        for row in range(0, ROWS, run):
            store(row, run)

    def store_short(length):
        # A swizzled buffer can be cut at multiples of ALIGNMENT rows, and so are the
        # short blocks of the sequences that are read in place.
        @pl.loop(0, lax.div(jnp.maximum(length, 0), jnp.int32(ALIGNMENT)))
        def _(step):
            store(step * ALIGNMENT, ALIGNMENT)

    if plan.has_short_blocks:
        length = gmem.lengths[tile.block] - wg * ROWS
        lax.cond(length >= ROWS, store_all, lambda: store_short(length))
    else:
        store_all()


def _store_boxes(gmem, plan: Plan, boxes: Boxes, tile: Tile, wg, o_smem):
    own = ROWS // boxes.tokens

    def store(width: Width):
        rows = width.longest // (ALIGNMENT * boxes.number)
        for number in range(own):
            source = o_smem.at[pl.ds(number * boxes.rows, rows)]
            target = box_of(gmem, gmem.out, tile, tile.block, wg * own + number, rows)
            plgpu.copy_smem_to_gmem(source, target, commit_group=False)

    widest, *others = plan.widths
    if not others:
        store(widest)
    else:
        is_short = gmem.lengths[tile.block] < widest.longest
        lax.cond(is_short, lambda: store(others[0]), lambda: store(widest))


def _logits(plan: Plan, q_rows, k_block):
    """q @ k.T, waited for."""
    if plan.emulate_wgmma:
        return _emulated_dot(_matrix(q_rows), _matrix(k_block).T)

    def product(logits_ref):
        plgpu.wgmma(logits_ref, q_rows, k_block.T)
        return logits_ref[...]

    return pl.run_scoped(product, plgpu.ACC((ROWS, k_block.shape[0]), jnp.float32))


def _add_values(plan: Plan, acc, weights, ring: _Ring, slot):
    """acc + weights @ v, waited for."""
    if plan.emulate_wgmma:
        return acc + _emulated_dot(weights, _matrix(ring.block(slot)))
    acc = sm90_wgmma.issue(acc, weights, ring.whole_block(slot))
    plgpu.wgmma_wait(0)
    return sm90_wgmma.settle(acc)


def _overlapped_step(
    plan: Plan, q_rows, acc, weights, weigh, ring: _Ring, k_slot, v_slot
):
    """One step: new logits, the last weights times V, and weights of the new logits.

    The block in `k_slot` has landed before; so has the one after `v_slot` afterwards.

    Returns the new acc and what `weigh(logits)` returns.
    """
    if plan.emulate_wgmma or not plan.config.overlap:
        ring.take_turn()
        logits = _logits(plan, q_rows, ring.block(k_slot))
        ring.free(k_slot)
        ring.wait(v_slot)
        acc = _add_values(plan, acc, weights, ring, v_slot)
        ring.pass_turn()
        ring.free(v_slot)
        ring.wait(ring.after(v_slot))
        return acc, *weigh(logits)

    def products(logits_ref):
        plgpu.wgmma(logits_ref, q_rows, ring.block(k_slot).T)
        ring.wait(v_slot)
        new_acc = sm90_wgmma.issue(acc, weights, ring.whole_block(v_slot))
        ring.pass_turn()
        logits = plgpu.wgmma_accumulator_load(logits_ref, wait_n=1)
        # Keeps the compiler from using the logits before the wait.
        logits = lax.optimization_barrier(logits)
        ring.free(k_slot)
        results = lax.optimization_barrier(weigh(logits))
        # Looking for the next block here also keeps the compiler from putting the
        # softmax off until the second product is done: it moves arithmetic past the
        # wait for a product, but not past this loop.
        ring.wait(ring.after(v_slot))
        plgpu.wgmma_wait(0)
        return sm90_wgmma.settle(new_acc), *results

    # The accumulator is made right before its first product: only then does ptxas
    # drop the 64 zeros that the product would be added to.
    ring.take_turn()
    logits_type = plgpu.ACC((ROWS, ring.width), jnp.float32)
    acc, *results = pl.run_scoped(products, logits_type)
    ring.free(v_slot)
    return acc, *results


def _commit_emulated_reads(plan: Plan):
    """Orders an emulated product's ordinary reads before the copies that follow.

    wgmma reads shared memory as the copies write it and needs nothing.
    """
    if plan.emulate_wgmma:
        plgpu.commit_smem()


def _matrix(tokens):
    return tokens[...].reshape(-1, tokens.shape[-1])


def _emulated_dot(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
