"""Instructions of sm_90 that interpret mode does not have: products, shuffles, memory.

`emulated.Emulation` does the same in plain JAX.

A thread holds sums of tiles one to a register: 32 / J tiles of keys of its upper row,
then of the row 8 below (`common.lanes`). They are arrays of one axis, "strided".
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.common import lanes
from pallas_kernels.common.inline_ptx import (
    THREADS,
    WORD,
    array_of,
    asm,
    const,
    i32,
    i64,
    scalars,
    shaped,
    strided,
)

ROW_BITS = (2, 3, 4)  # of a lane's number: its two rows, of a warp's 16
PER_THREAD = 32  # columns of a block of keys, of each of two rows
WORDS = 4  # of 32 bits that a thread moves at once


class Instructions:
    """What consumers do, as the GPU does it."""

    uses_named_barriers = True

    def logits(self, q_rows, k_block, *, after_issue: Callable[[], None]):
        """Returns q @ k.T, waited for; other code is called when it has begun."""

        def product(logits_ref):
            plgpu.wgmma(logits_ref, q_rows, k_block.T)
            after_issue()
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

    def maximum_of_row(self, maxima):
        """Finds the largest of what the four threads of each row hold."""
        return lanes.maximum_of_four_lanes(maxima)

    def sum_of_row(self, sums):
        """Adds up what the four threads of each row hold."""
        return lanes.sum_of_four_lanes(sums)

    def any_of_warp(self, rows):
        """Returns an integer that is not zero where the warp holds a true row.

        It differs between the warps of a warpgroup: what depends on it must not
        contain an operation of the whole warpgroup.
        """
        return lanes.lanes_of_warp(rows)

    def tile_sums(self, weights, per_tile: int):
        """Sums each row over the columns of each key tile, and rounds to bfloat16.

        What is added up of these is then the sum of what is written.
        """

        @plgpu.inline_mgpu(arg_types=(lanes.WGMMA,), return_type=_shaped_sums(per_tile))
        def add_up(_, weights):
            words = _rounded(_tile_sums(weights, per_tile))
            return _floats([half for word in words for half in _halves(word)])

        return add_up(weights)

    def row_sums(self, sums):
        """Sums each row over the tiles that a thread holds."""
        dtype = jnp.dtype(jnp.float32)
        result = plgpu.ShapeDtypeStruct((lanes.ROWS,), dtype, lanes.WGMMA_ROW)

        @plgpu.inline_mgpu(arg_types=(strided(sums.shape[0]),), return_type=result)
        def add_up(_, sums):
            register = ir.VectorType.get((1,), ir.F32Type.get())
            totals = [_tree(row) for row in _rows_of(sums)]
            return lanes.row_array([vector.broadcast(register, x) for x in totals])

        return add_up(sums)

    def times_rows(self, sums, factors):
        """Multiplies each row."""
        layout = strided(sums.shape[0])

        @plgpu.inline_mgpu(
            arg_types=(layout, lanes.WGMMA_ROW),
            return_type=shaped(sums.shape[0], jnp.float32),
        )
        def multiply(_, sums, factors):
            rows = zip(_rows_of(sums), scalars(factors), strict=True)
            products = [arith.mulf(x, f) for row, (f,) in rows for x in row]
            return _floats(products)

        return multiply(sums, factors)

    def keep(self, memory, block, sums) -> None:
        """Writes sums of a block in bfloat16, each thread its own."""
        layout = strided(sums.shape[0])

        @plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType(), plgpu.Layout.WG_SPLAT))
        def write(_, sums, memory, block):
            words = _rounded([x for (x,) in scalars(sums)])
            for address, some in _places(memory, block, words):
                size = len(some)
                operands = ", ".join(f"${i + 1}" for i in range(size))
                asm(
                    f"st.global.v{size}.b32 [$0], {{{operands}}};",
                    "l" + ",r" * size,
                    address,
                    *some,
                )

        write(sums, memory, block)

    def kept(self, memory, block, per_tile: int):
        """Reads sums of a block that this thread wrote, as they were written."""
        num_words = PER_THREAD // per_tile

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT),
            return_type=shaped(num_words * THREADS, jnp.uint32),
        )
        def read(_, memory, block):
            words = []
            for address, some in _places(memory, block, range(num_words)):
                words += _load_words(address, len(some))
            return array_of(np.array(words, dtype=object))

        return read(memory, block)

    def unpacked(self, kept):
        """Returns sums that were read."""
        result = shaped(2 * kept.shape[0], jnp.float32)

        @plgpu.inline_mgpu(arg_types=(strided(kept.shape[0]),), return_type=result)
        def unpack(_, kept):
            return _floats(
                [half for (word,) in scalars(kept) for half in _halves(word)]
            )

        return unpack(kept)

    def store_scores(
        self, sums, scores, first_row, first_column, *, per_tile: int, num_tiles: int
    ) -> None:
        """Sums over the rows of each query tile and stores what is within the map.

        A warp has whole tiles of rows, so its lanes add up all of a pair. They exchange
        half of what they hold at a time, so that each ends with other pairs.

        Args:
          sums: Of a block of keys, each row times its factor.
          scores: The map, flat, in global memory.
          first_row: Tile of the first row.
          first_column: Tile of the first column.
          per_tile: Parts of a tile: 2, 4, 8 or 16.
          num_tiles: Rows and columns of the map.
        """
        splat = plgpu.Layout.WG_SPLAT
        layout = strided(sums.shape[0])

        @plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType(), splat, splat))
        def store(_, sums, scores, first_row, first_column):
            pairs = _PairSums(_rows_of(sums), mgpu.utils.thread_idx(), per_tile)
            pointer = llvm.ptrtoint(i64(), mgpu.utils.memref_ptr(scores))
            row = arith.addi(first_row.registers[()], pairs.row)
            for value, own in pairs.columns():
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
                    row,
                    arith.addi(first_column.registers[()], own),
                    value,
                    pairs.is_stored,
                )

        store(sums, scores, first_row, first_column)


class _PairSums:
    """Sums of pairs of tiles that end in one lane each, or in a few alike.

    Attributes:
      row: Tile of rows of what the lane ends with, among those of the warpgroup.
      is_stored: 1 in the lanes that store, 0 in others that hold the same.
    """

    def __init__(self, rows, thread, per_tile: int) -> None:
        self._per_tile = per_tile
        self._lane = arith.andi(thread, const(WORD - 1))
        warp = arith.andi(arith.shrui(thread, const(5)), const(3))
        upper = arith.shrui(self._lane, const(2))  # of the warp's pairs of rows
        first = arith.addi(arith.muli(warp, const(16)), arith.muli(upper, const(2)))
        self.row = arith.divui(first, const(per_tile))
        self._first = const(0)  # of the tiles of columns that a lane ends with
        self.is_stored = const(1)
        values = [arith.addf(*both) for both in zip(*rows, strict=True)]
        for bit in reversed(ROW_BITS[: per_tile.bit_length() - 2]):
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

    def columns(self):
        """Yields each sum, and its tile of columns in the block."""
        quarter = arith.andi(self._lane, const(3))
        first = arith.muli(quarter, const(PER_THREAD // self._per_tile))
        first = arith.addi(first, self._first)
        for i, value in enumerate(self._values):
            yield value, arith.addi(first, const(i))


def _tile_sums(weights, per_tile: int):
    """Returns sums of a thread's columns by tile, of its upper row, then of the other.

    Its columns are those of whole tiles, one after another: see `plan.KEY_GROUP`.
    """
    pairs = weights.registers.reshape(-1, 2)  # groups of columns, rows 8 apart
    size = per_tile // 2
    return [
        _both(_tree(row[first : first + size]))
        for row in pairs.T
        for first in range(0, len(row), size)
    ]


def _tree(values):
    """Adds values, pair by pair."""
    values = list(values)
    while len(values) > 1:
        odd = values[-1:] if len(values) % 2 else []
        pairs = zip(values[::2], values[1::2], strict=False)
        values = [arith.addf(*both) for both in pairs] + odd
    return values[0]


def _both(pair):
    """Adds the two columns of a register."""
    return arith.addf(*(vector.extract(pair, [], [i]) for i in range(2)))


def _shaped_sums(per_tile: int):
    """Returns the type of the sums of a block."""
    return shaped(2 * PER_THREAD // per_tile * THREADS, jnp.float32)


def _floats(values):
    """Makes an array of numbers of a thread."""
    return array_of(np.array(values, dtype=object), is_signed=None)


def _rows_of(sums):
    """Returns a thread's sums of its upper row, and of the other."""
    values = [x for (x,) in scalars(sums)]
    half = len(values) // 2
    return values[:half], values[half:]


def _places(memory, block, words):
    """Yields some words of a thread at a time, and where they are in memory.

    Threads next to each other have words next to each other.
    """
    words = list(words)
    size = min(WORDS, len(words))
    base = llvm.ptrtoint(i64(), mgpu.utils.memref_ptr(memory))
    thread = arith.andi(mgpu.utils.thread_idx(), const(THREADS - 1))
    first = arith.muli(block.registers[()], const(len(words) // size * THREADS))
    for i in range(0, len(words), size):
        place = arith.addi(arith.addi(first, const(i // size * THREADS)), thread)
        offset = arith.extui(i64(), arith.muli(place, const(4 * size)))
        yield arith.addi(base, offset), words[i : i + size]


def _load_words(address, size: int):
    """Loads words that lie in a row, past L1, which has no room for them."""
    operands = ", ".join(f"${i}" for i in range(size))
    loaded = asm(
        f"ld.global.cg.v{size}.b32 {{{operands}}}, [${size}];",
        "=r," * size + "l",
        address,
        result=ir.Type.parse(f"!llvm.struct<({', '.join(['i32'] * size)})>"),
    )
    return [llvm.extractvalue(i32(), loaded, [i]) for i in range(size)]


def _rounded(values):
    """Returns words of two numbers as bfloat16 each, the first in the low half."""
    code = "cvt.rn.bf16x2.f32 $0, $2, $1;"
    return [
        asm(code, "=r,f,f", *pair, result=i32(), is_pure=True)
        for pair in zip(values[::2], values[1::2], strict=True)
    ]


def _halves(word):
    """Returns two bfloat16 numbers as float32: the low half, and the high one."""
    low = arith.shli(word, const(16))
    high = arith.andi(word, const(0xFFFF0000 - 2**32))
    return [arith.bitcast(ir.F32Type.get(), half) for half in (low, high)]
