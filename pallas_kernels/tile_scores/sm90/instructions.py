"""Instructions of sm_90 that interpret mode does not have: products, shuffles, stores.

`emulated.Emulation` does the same in plain JAX.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.common import lanes
from pallas_kernels.common.inline_ptx import WORD, asm, const, i64

ROWS_APART = 8  # the two rows of a thread
COLUMN_BITS, ROW_BITS = (0, 1), (2, 3, 4)  # of a lane's number


class Instructions:
    """What consumers do, as the GPU does it."""

    def logits(self, q_rows, k_block):
        """Returns q @ k.T, waited for."""

        def product(logits_ref):
            plgpu.wgmma(logits_ref, q_rows, k_block.T)
            return logits_ref[...]

        shape = (q_rows.shape[0], k_block.shape[0])
        return pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))

    def finish_reads(self) -> None:
        """Orders reads of shared memory before the copies that overwrite it.

        wgmma reads as the copies write and needs nothing.
        """

    def thread_maxima(self, logits):
        """Finds the largest of each row among the columns that a thread holds."""
        return lanes.thread_maxima(logits)

    def thread_sums(self, weights):
        """Sums each row over the columns that a thread holds."""
        return lanes.thread_sums(weights)

    def maximum_of_row(self, maxima):
        """Finds the largest of what the four threads of each row hold."""
        return lanes.maximum_of_four_lanes(maxima)

    def sum_of_row(self, sums):
        """Adds up what the four threads of each row hold."""
        return lanes.sum_of_four_lanes(sums)

    def store_pair_sums(
        self, weights, scores, first_row, first_column, *, per_tile: int, num_tiles: int
    ) -> None:
        """Sums weights over pairs of tiles and stores what is within the map.

        A warp has whole tiles of rows, so its lanes add up all of a pair. They exchange
        half of what they hold at a time, so that each ends with other pairs.

        Args:
          weights: [64, 128], of parts of both.
          scores: The map, flat, in global memory.
          first_row: Tile of the first row.
          first_column: Tile of the first column.
          per_tile: Parts of a tile: 2, 4, 8 or 16.
          num_tiles: Rows and columns of the map.
        """
        splat = plgpu.Layout.WG_SPLAT

        @plgpu.inline_mgpu(arg_types=(lanes.WGMMA, plgpu.RefType(), splat, splat))
        def store(_, weights, scores, first_row, first_column):
            thread = mgpu.utils.thread_idx()
            sums = _PairSums(weights, thread, per_tile)
            pointer = llvm.ptrtoint(i64(), mgpu.utils.memref_ptr(scores))
            for value, row, column in sums.places():
                asm(
                    "{.reg .pred p; .reg .b32 place; .reg .b64 address; "
                    f"setp.lt.s32 p, $1, {num_tiles}; "
                    f"setp.lt.and.s32 p, $2, {num_tiles}, p; "
                    "setp.ne.and.s32 p, $4, 0, p; "
                    f"mad.lo.s32 place, $1, {num_tiles}, $2; "
                    "mad.wide.s32 address, place, 4, $0; "
                    "@p st.global.f32 [address], $3;}",
                    "l,r,r,f,r",
                    pointer,
                    arith.addi(first_row.registers[()], row),
                    arith.addi(first_column.registers[()], column),
                    value,
                    sums.is_stored,
                )

        store(weights, scores, first_row, first_column)


class _PairSums:
    """Sums of pairs of tiles that end in one lane each, or in a few alike.

    Attributes:
      is_stored: 1 in the lanes that store, 0 in others that hold the same.
    """

    def __init__(self, weights, thread, per_tile: int) -> None:
        self._per_tile = per_tile
        self._lane = arith.andi(thread, const(WORD - 1))
        self._warp = arith.andi(arith.shrui(thread, const(5)), const(3))
        pairs = weights.registers.reshape(-1, 2)  # groups of columns, rows 8 apart
        self._groups = len(pairs)
        values = [_both(pair) for rows in pairs.T for pair in rows]
        if per_tile > lanes.GROUP:  # 16: a thread's rows, and two groups, are one tile
            upper, lower = values[: self._groups], values[self._groups :]
            values = [arith.addf(*both) for both in zip(upper, lower, strict=True)]
            values = [
                arith.addf(*both)
                for both in zip(values[::2], values[1::2], strict=True)
            ]
        levels = min(per_tile, lanes.GROUP).bit_length() - 1
        self._row_bits, self._column_bits = ROW_BITS[:levels], COLUMN_BITS[: levels - 1]
        self._first = const(0)  # of the values that a lane ends with
        self.is_stored = const(1)
        for bit in sorted((*self._row_bits, *self._column_bits), reverse=True):
            values = self._exchange(values, bit)
        self._values = values

    def _exchange(self, values, bit: int):
        """Adds values of the lanes that differ in a bit; each keeps half of them."""
        distance = 1 << bit
        own = arith.andi(arith.shrui(self._lane, const(bit)), const(1))
        half = len(values) // 2
        if not half:
            self.is_stored = arith.muli(self.is_stored, arith.subi(const(1), own))
            (value,) = values
            return [arith.addf(value, mgpu.utils.shfl_bfly(value, distance))]
        self._first = arith.addi(self._first, arith.muli(own, const(half)))
        is_high = arith.cmpi(arith.CmpIPredicate.ne, own, const(0))
        kept = []
        for low, high in zip(values[:half], values[half:], strict=True):
            given = arith.select(is_high, low, high)
            value = arith.select(is_high, high, low)
            kept.append(arith.addf(value, mgpu.utils.shfl_bfly(given, distance)))
        return kept

    def places(self):
        """Yields each sum, and its tile of rows and of columns in the block."""
        if self._per_tile > lanes.GROUP:
            for value in self._values:
                yield value, self._warp, self._first
            return
        row_in_warp = _without(
            arith.shrui(self._lane, const(2)), [b - 2 for b in self._row_bits]
        )
        pair = _without(arith.andi(self._lane, const(3)), self._column_bits)
        for i, value in enumerate(self._values):
            number = arith.addi(self._first, const(i))
            lower, group = (
                operation(number, const(self._groups))
                for operation in (arith.divui, arith.remui)
            )
            row = arith.addi(arith.muli(lower, const(ROWS_APART)), row_in_warp)
            row = arith.addi(arith.muli(self._warp, const(2 * ROWS_APART)), row)
            column = arith.muli(group, const(lanes.GROUP))
            column = arith.addi(column, arith.muli(pair, const(2)))
            size = const(self._per_tile)
            yield value, arith.divui(row, size), arith.divui(column, size)


def _both(pair):
    """Adds the two columns of a register."""
    return arith.addf(*(vector.extract(pair, [], [i]) for i in range(2)))


def _without(number, bits):
    """Clears bits of a small number."""
    return arith.andi(number, const(7 & ~sum(1 << bit for bit in bits)))
