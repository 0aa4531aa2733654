"""Three kernels on maps of integer keys, for selection on Hopper GPUs (sm_90).

count_digits   how many keys of a map have each value of a digit: a histogram in shared
               memory, by atomic additions of integers, whose order does not matter
pack_rows      which keys of a row are above or at a threshold, or its largest: a bit
               for each key, 32 to a word, by the votes of warps
write_lists    the columns of the set bits, one after another: a thread for each word

No key is 0: zeros pad the rows in registers. The first two kernels read the keys once
each and are bound by that. A warpgroup works on one row at a time, thread t on the keys
t, t + 128, ... . `rows.py` selects within rows.

PTX comes from `registers`, or what stands for it from `emulated` in interpret mode.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int, UInt32

from pallas_kernels.common.batching import fold_mapped_axes
from pallas_kernels.common.inline_ptx import THREADS, WORD
from pallas_kernels.ranking.sm90 import emulated, registers

Interpret = plgpu.InterpretGPUParams | None
NUM_CTAS = 132 * 8  # of count_digits: as many as an H100 or H200 holds at a time
ROWS_IN_FLIGHT = 2  # whose loads are issued together
MAX_COLUMNS = 8192  # held in registers, 64 for each thread


@dataclasses.dataclass(frozen=True)
class Digit:
    """Some bits of a key."""

    shift: int
    bits: int

    @property
    def num_values(self) -> int:
        """Values that the digit can have."""
        return 1 << self.bits


DIGITS = (Digit(21, 11), Digit(10, 11), Digit(0, 10))  # of a key, first to last


def count_digits(
    keys: UInt32[Array, "L R C"],
    prefix: UInt32[Array, " L"],
    digit: Digit,
    *,
    interpret: Interpret = None,
) -> Int[Array, "L values"]:
    """Counts the keys of each map whose higher bits are `prefix`, by a digit.

    Args:
      keys: Maps, without zeros.
      prefix: The bits above the digit, shifted down; 0 where there are none.
      digit: Which bits to count by.
      interpret: Run on the CPU in GPU interpret mode.

    Returns:
      Keys of each value of the digit.
    """
    num_lists, num_rows, _ = keys.shape
    num_parts = max(1, min(num_rows, NUM_CTAS // num_lists))

    def run(keys, prefix):
        counts = plgpu.kernel(
            functools.partial(
                _count_body,
                digit=digit,
                num_parts=num_parts,
                ops=_operations(interpret),
            ),
            out_type=jax.ShapeDtypeStruct(
                (keys.shape[0], num_parts, digit.num_values), jnp.int32
            ),
            scratch_types={"counts_smem": plgpu.SMEM((digit.num_values,), jnp.int32)},
            grid=(num_parts, keys.shape[0]),
            grid_names=("part", "map"),
            compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
            kernel_name="count_digits_sm90",
            interpret=interpret,
        )(keys, prefix)
        return (counts.sum(1, dtype=jnp.int32),)

    return fold_mapped_axes(run)(keys, prefix)[0]


def _count_body(
    keys_gmem, prefix_gmem, out_gmem, *, counts_smem, digit: Digit, num_parts: int, ops
):
    part, map_index = lax.axis_index("part"), lax.axis_index("map")
    num_rows = keys_gmem.shape[1]
    counts_smem[...] = jnp.zeros(counts_smem.shape, jnp.int32)
    ops.warpgroup_barrier()
    prefix = prefix_gmem[map_index]

    def count(keys):
        value = (keys >> digit.shift) & (digit.num_values - 1)
        if digit.shift + digit.bits == 32:
            ops.add_ones(value, keys > 0, counts_smem)
        else:
            is_counted = (keys >> (digit.shift + digit.bits)) == prefix
            ops.add_ones(value, is_counted & (keys > 0), counts_smem)

    num_own = lax.div(num_rows - part + (num_parts - 1), jnp.int32(num_parts))

    def step(i, _):
        rows = [
            ops.load_row(
                keys_gmem.at[map_index, part + (i * ROWS_IN_FLIGHT + j) * num_parts]
            )
            for j in range(ROWS_IN_FLIGHT)
        ]
        for row in rows:
            count(row)
        return ()

    num_steps = lax.div(num_own, jnp.int32(ROWS_IN_FLIGHT))
    lax.fori_loop(0, num_steps, step, ())

    def rest(i, _):
        count(ops.load_row(keys_gmem.at[map_index, part + i * num_parts]))
        return ()

    lax.fori_loop(num_steps * ROWS_IN_FLIGHT, num_own, rest, ())
    ops.warpgroup_barrier()
    out_gmem[map_index, part] = counts_smem[...]


def pack_rows(
    keys: UInt32[Array, "L R C"],
    threshold: UInt32[Array, "L R"],
    *,
    interpret: Interpret = None,
) -> tuple[UInt32[Array, "L R W"], UInt32[Array, "L R W"], UInt32[Array, "L R W"]]:
    """Packs the keys of each row above a threshold, those at it, and the largest.

    Args:
      keys: Maps, without zeros.
      threshold: Threshold of each row; not 0.
      interpret: Run on the CPU in GPU interpret mode.

    Returns:
      Words of 32 keys, the first in the lowest bit; C is rounded up to 128 keys. All
      keys that are as large as the largest of the row are in the third.
    """

    def run(keys, threshold):
        num_lists, num_rows, num_columns = keys.shape
        shape = (num_lists, num_rows, -(-num_columns // THREADS) * THREADS // WORD)
        return plgpu.kernel(
            functools.partial(_pack_body, ops=_operations(interpret)),
            out_type=(jax.ShapeDtypeStruct(shape, jnp.uint32),) * 3,
            grid=(num_rows, num_lists),
            grid_names=("row", "map"),
            kernel_name="pack_rows_sm90",
            interpret=interpret,
        )(keys, threshold)

    return fold_mapped_axes(run)(keys, threshold)


def _pack_body(keys_gmem, threshold_gmem, above_gmem, tied_gmem, best_gmem, *, ops):
    row, map_index = lax.axis_index("row"), lax.axis_index("map")
    keys = ops.load_row(keys_gmem.at[map_index, row])
    threshold = threshold_gmem[map_index, row]
    ops.store_votes(keys > threshold, above_gmem.at[map_index, row])
    ops.store_votes(keys == threshold, tied_gmem.at[map_index, row])
    ops.store_votes(keys == jnp.max(keys), best_gmem.at[map_index, row])


def write_lists(
    words: UInt32[Array, "L K"],
    starts: Int[Array, "L K"],
    totals: Int[Array, " L"],
    columns: Int[np.ndarray, " K"],
    capacity: int,
    *,
    interpret: Interpret = None,
) -> Int[Array, "L M"]:
    """Writes the columns of the set bits of each list of words.

    Args:
      words: Sets of columns; K is a multiple of THREADS.
      starts: Entry of the first column of each word.
      totals: Columns of each list; the entries after them get 0.
      columns: Column of the lowest bit of each word.
      capacity: Entries of a list, M. Later ones are not written.
      interpret: Run on the CPU in GPU interpret mode.

    Returns:
      The lists.
    """

    def run(words, starts, totals):
        num_lists, num_words = words.shape
        return (
            plgpu.kernel(
                functools.partial(
                    _write_body, capacity=capacity, ops=_operations(interpret)
                ),
                out_type=jax.ShapeDtypeStruct((num_lists, capacity), jnp.int32),
                grid=(num_words // THREADS, num_lists),
                grid_names=("chunk", "list"),
                kernel_name="write_lists_sm90",
                interpret=interpret,
            )(words, starts, totals, jnp.asarray(columns, jnp.int32)),
        )

    return fold_mapped_axes(run)(words, starts, totals)[0]


def _write_body(
    words_gmem, starts_gmem, totals_gmem, columns_gmem, ids_gmem, *, capacity: int, ops
):
    chunk, list_index = lax.axis_index("chunk"), lax.axis_index("list")
    own = pl.ds(chunk * THREADS, THREADS)
    words = ops.load_row(words_gmem.at[list_index, own])
    starts = ops.load_row(starts_gmem.at[list_index, own], jnp.int32)
    columns = ops.load_row(columns_gmem.at[own], jnp.int32)
    ops.store_columns(words, starts, columns, ids_gmem.at[list_index], capacity)
    first = totals_gmem[list_index] + chunk * THREADS
    stride = words_gmem.shape[1]
    ops.store_zeros(first, stride, ids_gmem.at[list_index], capacity)


def _operations(interpret: Interpret):
    """Returns the module with the operations that Pallas lacks."""
    return registers if interpret is None else emulated
