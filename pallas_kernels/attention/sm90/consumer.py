"""The consumers of the Hopper kernel: matrix products and softmax.

A consumer owns ROWS rows of a query block. In a step it issues two products: the logits
of the next key block, then the last weights times V. While the second one runs it
computes the softmax of the new logits.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.sm90 import softmax as sm90_softmax
from pallas_kernels.attention.sm90.cta import Cta, QueryBlock
from pallas_kernels.attention.sm90.lanes import WGMMA, WGMMA_ROW
from pallas_kernels.attention.sm90.plan import BLOCK, ROWS, Ref, Width
from pallas_kernels.attention.sm90.softmax import RowState

LN_2 = math.log(2.0)


def consume(cta: Cta) -> None:
    """Computes ROWS query rows of each query block of this CTA."""
    signals, wg = cta.signals, cta.wg
    pl.when(wg == 1)(lambda: signals.give_turn(0))  # consumer 0 issues first

    def attend(query_block, index, slot):
        del index
        signals.wait_q_full()
        queries = _queries(cta, query_block)
        state = _empty_rows(cta, slot)
        for width_index, width in enumerate(cta.plan.widths):
            begin, end = cta.steps_of_width(query_block, width_index)
            walk = _Walk(cta, query_block, queries, width, begin, end)
            state = lax.cond(end > begin, walk.run, lambda state: state, state)
        total = cta.instructions.row_sums(state.total)
        cta.instructions.finish_reads()
        _store(cta, query_block, state._replace(total=total))
        signals.free_q()
        return state.slot

    cta.for_each_query_block(attend, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)
    # Observe the last turn, which nobody takes.
    pl.when(wg == 0)(lambda: signals.take_turn(0))


class _Queries(NamedTuple):
    """The rows of one consumer."""

    rows: Ref
    warp_has_rows: jax.Array | None  # of the query block; None: they all have


def _queries(cta: Cta, query_block: QueryBlock) -> _Queries:
    """Finds out what a short query block leaves to do, and zeros its other rows.

    Those are other tokens' queries and not stored either way, but products with zeros
    take less power, which is what limits the kernel.
    """
    plan = cta.plan
    q_rows = cta.instructions.as_matrix(cta.smem.q_smem.at[cta.wg])
    if not plan.has_short_blocks:
        return _Queries(q_rows, None)
    length = cta.gmem.work.lengths[query_block.block]
    row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=WGMMA_ROW)
    is_own = plan.copies.is_row_of_block(row, cta.wg, length)

    @pl.when(length < BLOCK)
    def _clear():
        tokens = plgpu.load(q_rows, layout=WGMMA)
        size = math.prod(tokens.shape[:-1]), tokens.shape[-1]
        keep = lax.broadcast_in_dim(is_own, size, [0]).reshape(tokens.shape)
        q_rows[...] = jnp.where(keep, tokens, 0.0)
        plgpu.commit_smem()

    return _Queries(q_rows, cta.instructions.any_of_warp(is_own) != 0)


def _empty_rows(cta: Cta, slot) -> RowState:
    """Returns the state of rows that have met no block."""
    acc = jnp.zeros((ROWS, cta.plan.head_dim), jnp.float32)
    softmax = sm90_softmax.softmax_of(cta.plan, cta.instructions)
    return RowState(
        acc=plgpu.layout_cast(acc, WGMMA),
        weights=None,
        reference=softmax.no_reference(),
        total=plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), WGMMA_ROW),
        valid=None,
        slot=slot,
    )


@dataclasses.dataclass(frozen=True)
class _Ring:
    """One consumer's view of the K/V ring."""

    cta: Cta
    width: int  # keys of a block that are used

    def wait(self, slot):
        """Waits until a block has landed; once for each."""
        self.cta.signals.wait_kv_full(slot)

    def whole_block(self, slot):
        """Returns a block as a matrix, with rows past the width."""
        return self.cta.instructions.as_matrix(self.cta.smem.kv_smem.at[slot])

    def block(self, slot):
        """Returns the keys of a block that are used, as a matrix."""
        if self.width == BLOCK:
            return self.whole_block(slot)
        copies = self.cta.plan.copies
        used = copies.first_tokens(self.cta.smem.kv_smem, slot, self.width)
        return self.cta.instructions.as_matrix(used)

    def free(self, slot):
        """Lets the producer overwrite a block."""
        self.cta.instructions.finish_reads()
        self.cta.signals.free_kv(slot)

    def after(self, slot):
        """Returns the slot that is filled next.

        Cheaper than a remainder, which every step would wait for.
        """
        return jnp.where(slot == self.cta.plan.config.num_slots - 1, 0, slot + 1)

    def take_turn(self):
        """Waits until this consumer may issue matrix products."""
        self.cta.signals.take_turn(self.cta.wg)

    def pass_turn(self):
        """Lets the other consumer issue matrix products."""
        self.cta.signals.give_turn(1 - self.cta.wg)


@dataclasses.dataclass(frozen=True)
class _Walk:
    """A consumer's walk over the key blocks of one width of a list."""

    cta: Cta
    query_block: QueryBlock
    queries: _Queries
    width: Width
    begin: jax.Array
    end: jax.Array

    @property
    def softmax(self):
        """The softmax of this launch."""
        return sm90_softmax.softmax_of(self.cta.plan, self.cta.instructions)

    @property
    def ring(self) -> _Ring:
        """The blocks, cut to the width."""
        return _Ring(self.cta, self.width.tokens)

    def run(self, state: RowState) -> RowState:
        """Walks at least one block; the first K is, or will be, in `state.slot`."""
        ring, dtype = self.ring, self.queries.rows.dtype
        valid, next_valid = (
            self._valid_keys(self.begin),
            self._valid_keys(self.begin + 1),
        )

        ring.wait(state.slot)
        logits = self.cta.instructions.logits(self.queries.rows, ring.block(state.slot))
        ring.free(state.slot)
        logits = _mask_keys(logits, valid)
        reference = self.softmax.first_reference(
            logits, state.reference, self.begin == 0
        )
        state = self._weigh(state._replace(reference=reference), logits)
        next_slot = ring.after(state.slot)
        ring.wait(next_slot)
        state = state._replace(
            weights=state.weights.astype(dtype), valid=next_valid, slot=next_slot
        )
        state = lax.fori_loop(self.begin + 1, self.end, self._step, state)
        last = state.slot
        acc = self.cta.instructions.add_values(
            state.acc, state.weights, ring.whole_block(last)
        )
        ring.free(last)
        slot = ring.after(last)
        return state._replace(acc=acc, weights=None, valid=None, slot=slot)

    def _weigh(self, state: RowState, logits) -> RowState:
        """Turns the first logits of a width into weights."""
        *new, correction = self.softmax.next_weights(
            logits, state, self.queries.warp_has_rows
        )
        weights, reference, total = new
        state = state._replace(weights=weights, reference=reference, total=total)
        return self.softmax.correct(state, correction)

    def _step(self, step, state: RowState) -> RowState:
        """Computes logits of a step and, overlapped, the product of the one before.

        The step's K has landed before, in `state.slot`, and so has the next one's
        afterwards. The V of the step before is between them.
        """
        ring, dtype = self.ring, self.queries.rows.dtype
        next_valid = self._valid_keys(step + 1)
        k_slot, v_slot = state.slot, ring.after(state.slot)

        def use_logits(logits):
            ring.free(k_slot)
            logits = _mask_keys(logits, state.valid)
            weights = self.softmax.next_weights(
                logits, state, self.queries.warp_has_rows
            )
            results = lax.optimization_barrier(tuple(weights))
            # Looking for the next block here also keeps the compiler from putting the
            # softmax off until the second product is done: it moves arithmetic past
            # the wait for a product, but not past this loop.
            ring.wait(ring.after(v_slot))
            return results

        ring.take_turn()
        acc, weights, reference, total, correction = (
            self.cta.instructions.overlapped_products(
                self.queries.rows,
                ring.block(k_slot),
                state.acc,
                state.weights,
                ring.whole_block(v_slot),
                wait_for_values=lambda: ring.wait(v_slot),
                after_issue=ring.pass_turn,
                use_logits=use_logits,
            )
        )
        ring.free(v_slot)
        state = RowState(acc, weights, reference, total, next_valid, ring.after(v_slot))
        state = self.softmax.correct(state, correction)
        # Not before the product with the last weights is done: ptxas would take
        # them for the same registers and wait for every single wgmma.
        return state._replace(weights=state.weights.astype(dtype))

    def _valid_keys(self, step):
        """Returns the valid tokens of a step's key block; None where all are full."""
        if not self.width.masks:
            return None
        block = self.cta.key_block(self.query_block, step)
        return self.cta.gmem.work.valid[self.query_block.batch, block]


def _mask_keys(logits, valid):
    """Sets the logits of keys past the valid ones to -inf."""
    if valid is None:
        return logits

    def mask():
        column = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=WGMMA)
        return jnp.where(column < valid, logits, -jnp.inf)

    return lax.cond(valid < logits.shape[1], mask, lambda: logits)


def _store(cta: Cta, query_block: QueryBlock, state: RowState) -> None:
    """Normalises ROWS rows and copies those that belong to the block to memory.

    They go through the shared memory of their queries, which nobody reads any more.
    """
    plan, gmem, wg = cta.plan, cta.gmem, cta.wg
    o_smem, lse_smem = cta.smem.q_smem.at[wg], cta.smem.lse_smem.at[wg]
    softmax = sm90_softmax.softmax_of(plan, cta.instructions)
    has_key = state.total != 0.0  # true for NaN, which must not become zero
    needs_repair = softmax.needs_repair(state.total, query_block.count)
    if plan.masks_queries:
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=WGMMA_ROW)
        place = query_block.batch, query_block.block
        has_key &= row + wg * ROWS < gmem.work.valid[place]
    safe_total = jnp.where(has_key, state.total, 1.0)
    lse = state.reference * LN_2 + jnp.log(safe_total)
    lse = jnp.where(has_key, lse, -jnp.inf)
    if needs_repair is not None:
        lse = jnp.where(needs_repair, jnp.inf, lse)
    factor = jnp.where(has_key, 1.0 / safe_total, 0.0)
    out = state.acc * lax.broadcast_in_dim(factor, state.acc.shape, [0])
    lse_smem[...] = lse
    o_rows = cta.instructions.as_matrix(o_smem)
    o_rows[...] = out.astype(o_smem.dtype).reshape(o_rows.shape)
    plgpu.commit_smem()
    rows = pl.ds(wg * ROWS, ROWS)
    plgpu.copy_smem_to_gmem(
        lse_smem,
        gmem.lse.at[query_block.list_row, query_block.block, rows],
        commit_group=False,
    )
    plan.copies.store(cta, query_block, o_smem)
    plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
