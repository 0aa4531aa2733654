"""Softmax of the Hopper kernel: weights of one block of logits after another.

A row's weights are exp2(logit - reference), in base 2. Any reference gives the same
output; it only must be close enough to the logits for float32. There are two ways:

Lazy, the usual one. The reference is the maximum of the row's first block, and later
blocks are not searched for theirs. Bfloat16 has float32's range, so the reference just
stays: weights may become as large as 2**64. A weight of float16 holds 2**15, so there a
row grows its reference where its sum of weights shows that logits have grown by more
than GROWTH powers of two. Either way a row whose sum ends outside what float32 adds
safely tells so by an infinite log-sum-exp, and `hopper.py` has its query block computed
again, exactly.

Exact: the running maximum of online softmax (Milakov and Gimelshein, arXiv 1805.02867)
in each step, as FlashAttention does.

Sums stay spread over the four threads that hold a row until its end: adding them up
takes shuffles, for which every step would have to wait.
"""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm, vector

from pallas_kernels.attention.sm90.plan import ROWS, Plan

LOG2_E = math.log2(math.e)
GROWTH = 8.0  # powers of two; a float16 weight holds up to 2**15
# Sums of a row that are trusted. Above, products with values could overflow; below,
# weights were too small to add up, as after a first block without a key.
LEAST_SUM, MOST_SUM = 2.0**-64, 2.0**64
# Running maximum of a row that has met no key: far below every real logit, yet finite,
# so that masked logits of -inf become exp2(-inf - finite) = 0 and never NaN.
NO_MAXIMUM = -1e38

WGMMA = plgpu.Layout.WGMMA
WGMMA_ROW = plgpu.Layout.WGMMA.reduce(1)


def no_reference(plan: Plan):
    """The reference of rows that have met no block."""
    start = 0.0 if plan.config.lazy else NO_MAXIMUM
    return plgpu.layout_cast(jnp.full((ROWS,), start, jnp.float32), WGMMA_ROW)


def first_reference(plan: Plan, logits, reference, is_first):
    """The reference to begin a list with, or the present one where it has begun."""
    if not plan.config.lazy:
        return reference
    logits, scale = _base_2(plan, logits)
    maximum = logits.max(axis=1) * scale
    # A first block without a key says nothing about the others.
    maximum = jnp.where(maximum < NO_MAXIMUM, 0.0, maximum)
    return lax.cond(is_first, lambda: maximum, lambda: reference)


def next_weights(plan: Plan, logits, reference, total, warp_has_rows=None):
    """Weights of another block.

    A warp without a row of the query block skips the work. Nobody stores its output:
    its weights are its logits, for zeros would take registers, and its sums are ones,
    which need no repair.

    Returns weights, reference and partial sums, and what `correct` needs to know.
    """
    logits, scale = _base_2(plan, logits)
    if plan.config.lazy:

        def weigh():
            weights = _weights(logits, scale, reference)
            return weights, _partial_sums(plan, weights)

        def skip():
            return logits, plgpu.layout_cast(jnp.ones_like(total), WGMMA_ROW)

        if warp_has_rows is None:
            weights, sums = weigh()
        else:
            weights, sums = lax.cond(warp_has_rows, weigh, skip)
        grown = any_of_warp(plan, sums > 2.0**GROWTH) if plan.grows else jnp.int32(0)
        return weights, reference, total + sums, grown
    maximum = jnp.maximum(reference, logits.max(axis=1) * scale)
    decay = jnp.exp2(reference - maximum)
    weights = _weights(logits, scale, maximum)
    return weights, maximum, total * decay + _partial_sums(plan, weights), decay


def correct(plan: Plan, correction, acc, weights, reference, total):
    """Makes all that was summed before, and new weights, refer to one reference."""
    if not plan.config.lazy:
        return acc * _along_rows(correction, acc), weights, reference, total
    if not plan.grows:
        return acc, weights, reference, total

    def grow():
        sums = row_sums(plan, _partial_sums(plan, weights))
        grown = jnp.where(sums > 2.0**GROWTH, reference + jnp.log2(sums), reference)
        # From the rounded references, which later weights will refer to.
        factor = jnp.exp2(reference - grown)
        rows = _along_rows(factor, acc)
        return acc * rows, weights * _along_rows(factor, weights), grown, total * factor

    return lax.cond(correction != 0, grow, lambda: (acc, weights, reference, total))


def needs_repair(plan: Plan, total, num_blocks):
    """Rows that must be computed again; None where all are exact."""
    if not plan.config.lazy:
        return None
    is_trusted = (total >= LEAST_SUM) & (total <= MOST_SUM)  # false for NaN
    return jnp.where(is_trusted, 0, num_blocks) > 0


def row_sums(plan: Plan, partial_sums):
    """Adds up what the four threads of each row hold."""
    return partial_sums if plan.emulate_wgmma else _sum_of_four_lanes(partial_sums)


def _base_2(plan: Plan, logits):
    """Logits and a positive factor that makes them exponents of two."""
    scale = plan.scale * LOG2_E
    if scale > 0.0:
        return logits, scale
    return logits * scale, 1.0  # the largest product is not the largest logit


def _weights(logits, scale, reference):
    return jnp.exp2(logits * scale - _along_rows(reference, logits))


def _along_rows(values, like):
    return lax.broadcast_in_dim(values, like.shape, [0])


def _partial_sums(plan: Plan, weights):
    return weights.sum(axis=1) if plan.emulate_wgmma else _thread_sums(weights)


def any_of_warp(plan: Plan, rows):
    """Not zero where the warp holds a true row; in interpret mode, the warpgroup.

    It differs between the warps of a warpgroup: what depends on it must not contain an
    operation of the whole warpgroup.
    """
    if plan.emulate_wgmma:
        return jnp.any(rows).astype(jnp.int32)
    return _lanes_of_warp(rows)


@plgpu.inline_mgpu(
    arg_types=(WGMMA_ROW,),
    return_type=plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), plgpu.Layout.WG_SPLAT),
)
def _lanes_of_warp(_, rows):
    """Bit mask of the lanes of the warp that hold a true row."""
    own = functools.reduce(arith.ori, rows.registers.flat)
    own = vector.extract(own, [], [0]) if isinstance(own.type, ir.VectorType) else own
    everyone = mgpu.c(-1, ir.IntegerType.get_signless(32))
    result = nvvm.vote_sync(everyone, own, "ballot")
    return mgpu.FragmentedArray.splat(result, (), is_signed=True)


@plgpu.inline_mgpu(
    arg_types=(WGMMA,),
    return_type=plgpu.ShapeDtypeStruct((ROWS,), jnp.dtype(jnp.float32), WGMMA_ROW),
)
def _thread_sums(_, weights):
    """Sums over the columns that the same thread holds."""
    pairs = weights.registers.reshape(-1, 2)  # column tiles, rows 8 apart
    sums = []
    for column in pairs.T:
        chains = [functools.reduce(arith.addf, column[i::2]) for i in range(2)]
        pair = arith.addf(*chains)
        low, high = (vector.extract(pair, [], [i]) for i in range(2))
        total = arith.addf(low, high)
        sums.append(vector.broadcast(ir.VectorType.get((1,), total.type), total))
    return _row_array(sums)


@plgpu.inline_mgpu(
    arg_types=(WGMMA_ROW,),
    return_type=plgpu.ShapeDtypeStruct((ROWS,), jnp.dtype(jnp.float32), WGMMA_ROW),
)
def _sum_of_four_lanes(_, sums):
    results = []
    for value in sums.registers.flat:
        for distance in (1, 2):
            value = arith.addf(value, mgpu.utils.shfl_bfly(value, distance))
        results.append(value)
    return _row_array(results)


def _row_array(registers):
    layout = WGMMA_ROW.to_mgpu()
    shape = layout.registers_shape((ROWS,))
    return mgpu.FragmentedArray(
        _registers=np.array(registers, dtype=object).reshape(shape),
        _layout=layout,
        _is_signed=None,
    )
