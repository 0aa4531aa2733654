"""Softmax of the Hopper kernel: weights of one block of logits after another.

A row's weights are exp2(logit - reference), in base 2. Any reference gives the same
output; it only must be close enough to the logits for float32. There are two ways:

`FirstBlockSoftmax`, the usual one. The reference is the maximum of the row's first
block, and later blocks are not searched for theirs. Bfloat16 has float32's range, so
the reference just stays: weights may become as large as 2**64. A weight of float16
holds 2**15. There a row grows its reference where its sum of weights shows that logits
have grown by more than GROWTH powers of two. Either way a row whose sum ends outside
what float32 adds safely gets an infinite log-sum-exp, and `repair` computes its query
block again, exactly.

`RunningSoftmax`, exact: the running maximum of online softmax (Milakov and Gimelshein,
arXiv 1805.02867) in each step, as FlashAttention does.

Sums stay spread over the four threads that hold a row until its end: adding them up
takes shuffles, for which every step would have to wait.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.sm90.instructions import Instructions
from pallas_kernels.attention.sm90.plan import ROWS, Plan
from pallas_kernels.common.lanes import WGMMA_ROW

LOG2_E = math.log2(math.e)
GROWTH = 8.0  # powers of two; a float16 weight holds up to 2**15
# Sums of a row that are trusted. Above, products with values could overflow; below,
# weights were too small to add up, as after a first block without a key.
LEAST_SUM, MOST_SUM = 2.0**-64, 2.0**64
# Running maximum of a row that has met no key: far below every real logit, yet finite,
# so that masked logits of -inf become exp2(-inf - finite) = 0 and never NaN.
NO_MAXIMUM = -1e38


class RowState(NamedTuple):
    """State that a consumer carries from key block to key block for each row.

    Attributes:
      acc: Accumulator: float32 weights times values, [ROWS, D].
      weights: Of the newest block, not yet multiplied with its values, [ROWS, keys];
        None between two widths.
      reference: What the weights refer to, in base 2, [ROWS].
      total: Partial sums of the weights, [ROWS].
      valid: Valid tokens of the next key block, or None where all are full; of a block
        of means the logarithms of what was dropped.
      slot: Slot of the ring whose block is used next.
    """

    acc: Any
    weights: Any
    reference: Any
    total: Any
    valid: Any
    slot: Any


class Weights(NamedTuple):
    """Weights of a block, what they change, and what `correct` needs to know."""

    weights: Any
    reference: Any
    total: Any
    correction: Any


@dataclasses.dataclass(frozen=True)
class FirstBlockSoftmax:
    """References are the maxima of a list's first block: see the module."""

    plan: Plan
    instructions: Instructions

    def no_reference(self):
        """Returns the reference of rows that have met no block."""
        return _rows_of(0.0)

    def first_reference(self, logits, reference, is_first, log_counts=None):
        """Returns the reference to begin a list with, or the present one later on."""
        logits, scale = _base_2(self.plan, logits, log_counts)
        maximum = logits.max(axis=1) * scale
        # A first block without a key says nothing about the others.
        maximum = jnp.where(maximum < NO_MAXIMUM, 0.0, maximum)
        return lax.cond(is_first, lambda: maximum, lambda: reference)

    def next_weights(
        self, logits, state: RowState, warp_has_rows=None, log_counts=None
    ) -> Weights:
        """Returns the weights of another block.

        A key counts as many times as `log_counts` of its column says, once where that
        is None. A warp without a row of the query block skips the work. Nobody stores
        its output: its weights are its logits, for zeros would take registers, and its
        sums are ones, which need no repair.
        """
        logits, scale = _base_2(self.plan, logits)

        def weigh():
            weights = _weights(logits, scale, state.reference, log_counts)
            return weights, None if is_later else self._sums(weights)

        def skip():
            return logits, None if is_later else _no_sums(state)

        is_later = self.plan.config.sums_last
        weights, sums = _where_rows(warp_has_rows, weigh, skip)
        if is_later:
            return Weights(weights, state.reference, state.total, None)
        total = state.total + sums
        return Weights(weights, state.reference, total, self._has_grown(sums))

    def correct(self, state: RowState, has_grown, warp_has_rows=None) -> RowState:
        """Makes all that was summed before, and new weights, refer to one reference."""
        if self.plan.config.sums_last:
            # Here the loop that waits for a block is between them and the exponentials;
            # a barrier of the compiler before does not keep ptxas from mixing both.
            sums = _where_rows(
                warp_has_rows,
                lambda: self._sums(state.weights),
                lambda: _no_sums(state),
            )
            state = state._replace(total=state.total + sums)
            has_grown = self._has_grown(sums)
        if not self.plan.grows:
            return state
        acc, weights, reference, total, *_ = state

        def grow():
            sums = self.instructions.row_sums(self.instructions.partial_sums(weights))
            grown = jnp.where(sums > 2.0**GROWTH, reference + jnp.log2(sums), reference)
            # From the rounded references, which later weights will refer to.
            factor = jnp.exp2(reference - grown)
            rows = _along_rows(factor, acc)
            return (
                acc * rows,
                weights * _along_rows(factor, weights),
                grown,
                total * factor,
            )

        acc, weights, reference, total = lax.cond(
            has_grown != 0, grow, lambda: (acc, weights, reference, total)
        )
        return RowState(acc, weights, reference, total, state.valid, state.slot)

    def _sums(self, weights):
        return self.instructions.partial_sums(weights)

    def _has_grown(self, sums):
        if not self.plan.grows:
            return jnp.int32(0)
        return self.instructions.any_of_warp(sums > 2.0**GROWTH)

    def needs_repair(self, total, num_blocks):
        """Returns the rows that must be computed again."""
        is_trusted = (total >= LEAST_SUM) & (total <= MOST_SUM)  # false for NaN
        return jnp.where(is_trusted, 0, num_blocks) > 0


@dataclasses.dataclass(frozen=True)
class RunningSoftmax:
    """References are running maxima of all blocks: exact."""

    plan: Plan
    instructions: Instructions

    def no_reference(self):
        """Returns the reference of rows that have met no block."""
        return _rows_of(NO_MAXIMUM)

    def first_reference(self, logits, reference, is_first, log_counts=None):
        """Returns the present reference: every block is searched later."""
        del logits, is_first, log_counts
        return reference

    def next_weights(
        self, logits, state: RowState, warp_has_rows=None, log_counts=None
    ) -> Weights:
        """Returns the weights of another block; the correction is the sums' decay."""
        del warp_has_rows
        logits, scale = _base_2(self.plan, logits, log_counts)
        maximum = jnp.maximum(state.reference, logits.max(axis=1) * scale)
        decay = jnp.exp2(state.reference - maximum)
        weights = _weights(logits, scale, maximum)
        total = state.total * decay + self.instructions.partial_sums(weights)
        return Weights(weights, maximum, total, decay)

    def correct(self, state: RowState, decay, warp_has_rows=None) -> RowState:
        """Makes the accumulator refer to the newest maximum."""
        del warp_has_rows
        return state._replace(acc=state.acc * _along_rows(decay, state.acc))

    def needs_repair(self, total, num_blocks):
        """Returns None: all rows are exact."""
        del total, num_blocks


def softmax_of(
    plan: Plan, instructions: Instructions
) -> FirstBlockSoftmax | RunningSoftmax:
    """Returns the softmax that a launch computes."""
    kind = RunningSoftmax if plan.config.exact_softmax else FirstBlockSoftmax
    return kind(plan, instructions)


def _where_rows(warp_has_rows, compute, skip):
    """Computes unless the warp has no row of the query block; None says it has."""
    if warp_has_rows is None:
        return compute()
    return lax.cond(warp_has_rows, compute, skip)


def _no_sums(state: RowState):
    """Returns the sums of rows that nobody stores: they need no repair."""
    return plgpu.layout_cast(jnp.ones_like(state.total), WGMMA_ROW)


def _rows_of(value: float):
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), WGMMA_ROW)


def _base_2(plan: Plan, logits, log_counts=None):
    """Returns logits and a positive factor that makes them exponents of two.

    Logarithms of the counts of columns are added to them.
    """
    scale = plan.scale * LOG2_E
    if log_counts is not None:
        return logits * scale + _along_columns(log_counts, logits), 1.0
    if scale > 0.0:
        return logits, scale
    return logits * scale, 1.0  # the largest product is not the largest logit


def _weights(logits, scale, reference, log_counts=None):
    offset = _along_rows(reference, logits)
    if log_counts is not None:
        # The counts first: a group of columns has one, and so one offset.
        offset = offset - _along_columns(log_counts, logits)
    return jnp.exp2(logits * scale - offset)


def _along_rows(values, like):
    return lax.broadcast_in_dim(values, like.shape, [0])


def _along_columns(values, like):
    return lax.broadcast_in_dim(values, like.shape, [1])
