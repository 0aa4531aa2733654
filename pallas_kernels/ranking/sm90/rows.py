"""Selection within the rows of a map, for Hopper (sm_90): threshold and bits in one go.

A row is read once and stays in the registers of its team: one warp for short rows, so
that counting needs no barrier, or a warpgroup. Scores become integers of the same
order, and the team finds by bisection on their bits what to keep: a step is a count,
and for a mass also a sum, of what is at least a candidate. Bits that all keys share are
not searched, and the search ends when all rows are determined: after 9 to 17 of 32
steps on softmax maps of 990 columns.

PTX comes from `teams`, or what stands for it from `emulated` in interpret mode.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels.common.batching import fold_mapped_axes
from pallas_kernels.common.inline_ptx import THREADS, strided
from pallas_kernels.ranking.keys import FIRST, INFINITY, LAST, MASS_UNITS, SIGN
from pallas_kernels.ranking.sm90 import emulated, teams
from pallas_kernels.ranking.sm90.teams import SCRATCH_WORDS, WARPS, Rows

# Columns of a row that one warp holds, at most: 32 registers for each thread.
WARP_COLUMNS = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowsPlan:
    """Everything static about one launch."""

    rows: Rows
    wanted: int | None  # units of mass to reach in each row
    has_forced: bool


def select_in_rows(
    scores: Float[Array, "L R C"],
    least: Int[Array, "L R"],
    most: Int[Array, "L R"],
    forced: UInt32[np.ndarray, "R W"] | None,
    *,
    wanted: int | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[UInt32[Array, "L R W"], UInt32[Array, "L R W"], Int[Array, "L R"]]:
    """Finds the best scores of each row: `most` of them, or as few as hold a mass.

    Args:
      scores: float32 maps. NaN ranks last.
      least: Scores to keep at least, 1 to C and not less than the row's forced ones.
      most: Scores to keep at most, `least` to C.
      forced: Bits of scores that rank before all others, 32 to a word, the first in the
        lowest bit; the same in each map. None if there are none.
      wanted: Mass to reach, in units of 1 / MASS_UNITS and at most as many. A score
        counts as a mass of 0 to 1: negative ones and NaN as 0, larger ones as 1. The
        sum of a row may be any. Without it `most` are kept.
      interpret: Run on the CPU in GPU interpret mode.

    Returns:
      Bits of the scores that are kept whatever the ties, bits of the scores that tie
      for the rest, and how many to keep in all: at least as many as the former, at most
      as many as both.
    """
    run = functools.partial(_run, forced=forced, wanted=wanted, interpret=interpret)
    return fold_mapped_axes(run)(scores, least, most)


def _run(scores, least, most, *, forced, wanted, interpret):
    num_maps, num_rows, columns = scores.shape
    rows = Rows(
        num_rows=num_maps * num_rows,
        columns=columns,
        team=1 if columns <= WARP_COLUMNS else WARPS,
    )
    plan = RowsPlan(rows=rows, wanted=wanted, has_forced=forced is not None)
    ops = teams if interpret is None else emulated
    words = jax.ShapeDtypeStruct((rows.num_rows, rows.num_words), jnp.uint32)
    outs = plgpu.kernel(
        functools.partial(_body, plan=plan, ops=ops),
        out_type=(words, words, jax.ShapeDtypeStruct((rows.num_rows,), jnp.int32)),
        scratch_types={"scratch_smem": plgpu.SMEM((SCRATCH_WORDS,), jnp.uint32)},
        grid=(-(-rows.num_rows // rows.per_cta),),
        grid_names=("step",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        kernel_name="select_in_rows_sm90",
        interpret=interpret,
    )(
        lax.bitcast_convert_type(scores, jnp.uint32).reshape(-1, columns),
        least.reshape(-1),
        most.reshape(-1),
        *(() if forced is None else (jnp.asarray(forced),)),
    )
    return tuple(x.reshape(num_maps, num_rows, *x.shape[1:]) for x in outs)


def _body(scores_gmem, least_gmem, most_gmem, *refs, scratch_smem, plan: RowsPlan, ops):
    *forced_gmem, above_gmem, tied_gmem, count_gmem = refs
    rows = plan.rows
    first = lax.axis_index("step") * rows.per_cta
    bits, is_column = ops.load_rows(scores_gmem, first, rows)
    least = ops.load_values(least_gmem, first, rows)
    most = ops.load_values(most_gmem, first, rows)
    keys = _rank_keys(bits)
    if plan.has_forced:
        keys = jnp.where(ops.load_flags(forced_gmem[0], first, rows), FIRST, keys)
    keys = jnp.where(is_column, keys, jnp.uint32(0))
    units: Any = None if plan.wanted is None else ops.units_of(bits, MASS_UNITS)

    reduce = functools.partial(ops.reduce_rows, scratch_smem=scratch_smem, rows=rows)
    largest = reduce(keys, "max")
    smallest = reduce(jnp.where(is_column, keys, FIRST), "min")
    found = _bisect(
        functools.partial(
            ops.totals_from, keys, units=units, scratch_smem=scratch_smem, rows=rows
        ),
        functools.partial(ops.or_of_all, scratch_smem=scratch_smem, rows=rows),
        (least, most, largest, smallest),
        plan,
    )
    low, last, num_above, held_above = found
    is_above = keys > ops.spread(last, rows)
    is_tied = (keys >= ops.spread(low, rows)) & (keys <= ops.spread(last, rows))
    ops.store_row_votes(is_above, above_gmem, first, rows)
    ops.store_row_votes(is_tied & is_column, tied_gmem, first, rows)
    count = most
    if plan.wanted is not None:
        tied_units = jnp.where(is_tied & is_column, units, jnp.uint32(0))
        each = reduce(tied_units, "max")
        count = _count_to_mass(num_above, held_above, each, least, most, plan.wanted)
    ops.store_values(count, count_gmem, first, rows)


def _rank_keys(bits):
    """Returns integers in the order of float32 numbers; -0 is 0, NaN is -inf."""
    keys = jnp.where(bits > SIGN, bits ^ FIRST, bits | SIGN)
    return jnp.where((bits & ~SIGN) > INFINITY, LAST, keys)


def _bisect(totals_from, or_of_all, bounds, plan: RowsPlan):
    """Narrows, for each row, a range of keys until what it keeps is determined.

    Each row keeps what is above its range, and of what is in its range the first ones.
    In the end the keys in a range are equal, or one, or all kept.

    Args:
      totals_from: Adds up count and units of the keys that reach a value of their row.
      or_of_all: Takes the bitwise or over all rows.
      bounds: Least and most keys to keep, largest and smallest key, for each row.
      plan: Plan of the launch.

    Returns:
      First and last key of the range, and count and units of the keys above it.
    """
    least, most, largest, smallest = bounds
    # Ranges have 2^n keys and as many of them as bits are open, the same for all rows.
    open_bits = largest ^ smallest
    for shift in (1, 2, 4, 8, 16):
        open_bits |= open_bits >> np.uint32(shift)
    mask = or_of_all(open_bits)
    low = largest & (mask ^ FIRST)
    none = plgpu.layout_cast(jnp.zeros(THREADS, jnp.int32), strided(THREADS))
    num_all = none + plan.rows.columns

    def is_open(num_from, num_above):
        is_found = (num_from == least) | (num_from - num_above == 1)
        return or_of_all(jnp.where(is_found, jnp.uint32(0), jnp.uint32(1)))

    def step(state):
        mask, _, low, num_from, num_above, held_above = state
        mask = mask >> np.uint32(1)
        middle = low | (mask + np.uint32(1))
        count, held = totals_from(middle)
        reached = count >= most
        if plan.wanted is not None:
            reached = (reached | (held >= np.uint32(plan.wanted))) & (count >= least)
            held_above = jnp.where(reached, held_above, held)
        low = jnp.where(reached, middle, low)
        num_from = jnp.where(reached, count, num_from)
        num_above = jnp.where(reached, num_above, count)
        running = is_open(num_from, num_above)
        return mask, running, low, num_from, num_above, held_above

    state = (mask, is_open(num_all, none), low, num_all, none, none.astype(jnp.uint32))
    mask, _, low, _, num_above, held_above = lax.while_loop(
        lambda state: (state[0] != 0) & (state[1] != 0), step, state
    )
    return low, low | mask, num_above, held_above


def _count_to_mass(num_above, held_above, each, least, most, wanted: int):
    """Counts the keys to keep: all above, and as many tied ones as the mass takes."""
    missing = jnp.uint32(wanted) - jnp.minimum(held_above, jnp.uint32(wanted))
    each = jnp.maximum(each, jnp.uint32(1))
    num_tied = lax.div(missing + each - jnp.uint32(1), each).astype(jnp.int32)
    return jnp.minimum(jnp.maximum(num_above + num_tied, least), most)
