"""The consumers of the Hopper kernel: matrix products and softmax.

A consumer owns ROWS rows of a query block. In a step it issues two products: the logits
of the next key block, then the last weights times V. While the second one runs it
computes the softmax of the new logits.
"""

import abc
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
from pallas_kernels.attention.sm90.plan import BLOCK, ROWS, MeanPlan, Ref, Width
from pallas_kernels.attention.sm90.softmax import RowState
from pallas_kernels.common.lanes import WGMMA, WGMMA_COLUMN, WGMMA_ROW

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
            walk = _TokenWalk(cta, query_block, queries, begin, end, width)
            state = lax.cond(end > begin, walk.run, lambda state: state, state)
        if cta.plan.means is not None:
            mean_walk = _MeanWalk(
                cta, query_block, queries, jnp.int32(0), query_block.num_means
            )
            has_means = query_block.num_means > 0
            state = lax.cond(has_means, mean_walk.run, lambda state: state, state)
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
class _Walk(abc.ABC):
    """A consumer's walk over key blocks."""

    cta: Cta
    query_block: QueryBlock
    queries: _Queries
    begin: jax.Array
    end: jax.Array

    @property
    @abc.abstractmethod
    def ring(self) -> _Ring:
        """The blocks, cut to what is used of them."""

    @property
    @abc.abstractmethod
    def is_first(self):
        """Whether the query block has met no key block before."""

    @abc.abstractmethod
    def facts(self, step):
        """Returns what must be known of a step's keys; they are read a step ahead."""

    @abc.abstractmethod
    def prepare(self, logits, step, facts):
        """Returns logits with masked keys at -inf, and the counts of the keys.

        Counts are base-2 logarithms for each column; None where each key is one.
        """

    @property
    def softmax(self):
        """The softmax of this launch."""
        return sm90_softmax.softmax_of(self.cta.plan, self.cta.instructions)

    def run(self, state: RowState) -> RowState:
        """Walks at least one block; the first K is, or will be, in `state.slot`."""
        ring, dtype = self.ring, self.queries.rows.dtype
        valid, next_valid = (
            self.facts(self.begin),
            self.facts(self.begin + 1),
        )

        ring.wait(state.slot)
        logits = self.cta.instructions.logits(self.queries.rows, ring.block(state.slot))
        ring.free(state.slot)
        logits, log_counts = self.prepare(logits, self.begin, valid)
        reference = self.softmax.first_reference(
            logits, state.reference, self.is_first, log_counts
        )
        state = self._weigh(state._replace(reference=reference), logits, log_counts)
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

    def _weigh(self, state: RowState, logits, log_counts) -> RowState:
        """Turns the first logits of a width into weights."""
        *new, correction = self.softmax.next_weights(
            logits, state, self.queries.warp_has_rows, log_counts
        )
        weights, reference, total = new
        state = state._replace(weights=weights, reference=reference, total=total)
        return self.softmax.correct(state, correction, self.queries.warp_has_rows)

    def _step(self, step, state: RowState) -> RowState:
        """Computes logits of a step and, overlapped, the product of the one before.

        The step's K has landed before, in `state.slot`, and so has the next one's
        afterwards. The V of the step before is between them.
        """
        ring, dtype = self.ring, self.queries.rows.dtype
        next_valid = self.facts(step + 1)
        k_slot, v_slot = state.slot, ring.after(state.slot)

        def use_logits(logits):
            ring.free(k_slot)
            logits, log_counts = self.prepare(logits, step, state.valid)
            weights = self.softmax.next_weights(
                logits, state, self.queries.warp_has_rows, log_counts
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
        state = self.softmax.correct(state, correction, self.queries.warp_has_rows)
        # Not before the product with the last weights is done: ptxas would take
        # them for the same registers and wait for every single wgmma.
        return state._replace(weights=state.weights.astype(dtype))


@dataclasses.dataclass(frozen=True)
class _TokenWalk(_Walk):
    """A walk over the key blocks of one width of a list."""

    width: Width

    @property
    def ring(self) -> _Ring:
        """The blocks, cut to the width."""
        return _Ring(self.cta, self.width.tokens)

    @property
    def is_first(self):
        """Whether the list begins with this width."""
        return self.begin == 0

    def facts(self, step):
        """Returns the valid tokens of a step's key block; None where all are full."""
        if not self.width.masks:
            return None
        block = self.cta.key_block(self.query_block, step)
        return self.cta.gmem.work.valid[self.query_block.batch, block]

    def prepare(self, logits, step, facts):
        """Masks the keys past the valid ones."""
        del step
        return _mask_keys(logits, facts), None


@dataclasses.dataclass(frozen=True)
class _MeanWalk(_Walk):
    """A walk over the blocks of means behind a list: block `step` in each step."""

    @property
    def plan(self) -> MeanPlan:
        """What is static about the means."""
        assert self.cta.plan.means is not None
        return self.cta.plan.means

    @property
    def ring(self) -> _Ring:
        """Whole blocks: means past the last one count as none."""
        return _Ring(self.cta, BLOCK)

    @property
    def is_first(self):
        """Whether the query block keeps no token at all."""
        return self.query_block.count == 0

    def facts(self, step):
        """Returns the logarithms of what was dropped of the columns of a block."""
        columns = BLOCK // self.plan.per_column
        first = jnp.minimum(step, self.plan.num_blocks - 1) * columns
        place = self.query_block.list_row, self.query_block.block
        dropped = self.cta.means.log_dropped
        return tuple(dropped[*place, first + i] for i in range(columns))

    def prepare(self, logits, step, facts):
        """Returns the logarithms of the tokens that each mean stands for."""
        log_counts = self.cta.instructions.in_columns(facts, self.plan.per_column)
        if self.plan.has_log_tokens:
            log_tokens: Ref = self.cta.means.log_tokens
            own = log_tokens.at[pl.ds(step * BLOCK, BLOCK)]
            # From global memory, where no layout is better than another.
            log_counts += plgpu.load(own, layout=WGMMA_COLUMN, optimized=False)
        return logits, log_counts


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
    num_blocks = query_block.count
    if plan.means is not None:
        num_blocks += query_block.num_means
    needs_repair = softmax.needs_repair(state.total, num_blocks)
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
