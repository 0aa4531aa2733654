"""Operations in PTX (sm_90) that kernels on many short rows need and Pallas lacks.

Teams of warps work on several rows at once; see `Rows`. A value of a row, such as its
threshold, is an array of 128, the same for all threads of its team. `emulated.py` has
the same functions in plain JAX.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

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
from pallas_kernels.ranking.keys import MASS_UNITS

WARPS = 4
SCRATCH_WORDS = 12  # in shared memory: `or_of_all` has 4, others 4 for each value
# Bits of a thread's sum that a warp adds by themselves, 32 * 2^LOW_BITS at most; it
# adds the bits above them below the count, in one word.
LOW_BITS = 25
ONE_IN_COUNT = 1 << 16  # above 32 * 2^(30 - LOW_BITS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a matrix as they are dealt to teams of warps, one to each team.

    Thread t of a team holds the columns t, t + lanes, ... of its row.

    Attributes:
      num_rows: Rows of the matrix. Teams without a row load the last one and store
        nothing.
      columns: Columns of the matrix.
      team: Warps of a team, 1 or 4.
    """

    num_rows: int
    columns: int
    team: int

    @property
    def lanes(self) -> int:
        """Threads of a team."""
        return self.team * WORD

    @property
    def per_cta(self) -> int:
        """Rows of a warpgroup."""
        return WARPS // self.team

    @property
    def registers(self) -> int:
        """Registers of each thread."""
        return -(-self.columns // self.lanes)

    @property
    def size(self) -> int:
        """Elements that a warpgroup holds."""
        return self.registers * THREADS

    @property
    def num_words(self) -> int:
        """Words of the bits of a row."""
        return -(-self.columns // WORD)


def load_rows(matrix_gmem, first, rows: Rows):
    """Loads the row of each team, `first` being that of the first team.

    Returns the words, 0 past the last column, and which of them are columns.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT),
        return_type=(
            shaped(rows.size, jnp.uint32),
            shaped(rows.size, jnp.bool_),
        ),
    )
    def load(_, matrix, first):
        row, _, rank = _row_of_thread(first, rows)
        row = arith.minui(row, const(rows.num_rows - 1))
        own = arith.addi(_wide_mul(row, rows.columns), arith.extui(i64(), rank))
        address = _address(matrix, own)
        words = np.empty((rows.registers,), dtype=object)
        is_column = np.empty((rows.registers,), dtype=object)
        for i in range(rows.registers):
            column = arith.addi(rank, const(i * rows.lanes))
            is_column[i] = arith.cmpi(
                arith.CmpIPredicate.ult, column, const(rows.columns)
            )
            words[i] = asm(
                "{.reg .pred p; setp.ne.u32 p, $2, 0; mov.u32 $0, 0; "
                f"@p ld.global.u32 $0, [$1 + {4 * i * rows.lanes}];}}",
                "=&r,l,r",
                address,
                arith.extui(i32(), is_column[i]),
                result=i32(),
            )
        return array_of(words), array_of(is_column)

    return load(matrix_gmem, jnp.asarray(first, jnp.int32))


def load_flags(words_gmem, first, rows: Rows):
    """Loads a bit for each column of each team's row, from row % R of packed rows."""
    num_flag_rows = words_gmem.shape[0]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT),
        return_type=shaped(rows.size, jnp.bool_),
    )
    def load(_, words, first):
        row, _, rank = _row_of_thread(first, rows)
        row = arith.remui(row, const(num_flag_rows))
        pointer = _address(words, _wide_mul(row, rows.num_words))
        lane = arith.andi(rank, const(WORD - 1))
        flags = np.empty((rows.registers,), dtype=object)
        for i in range(rows.registers):
            index = arith.addi(
                arith.shrui(rank, const(5)), const(i * rows.team)
            )  # the same for the threads of a warp
            word = asm(
                "{.reg .pred p; .reg .u64 a; setp.lt.u32 p, $2, $3; mov.u32 $0, 0; "
                "mad.wide.u32 a, $2, 4, $1; @p ld.global.u32 $0, [a];}",
                "=&r,l,r,r",
                pointer,
                index,
                const(rows.num_words),
                result=i32(),
            )
            bit = arith.andi(arith.shrui(word, lane), const(1))
            flags[i] = arith.cmpi(arith.CmpIPredicate.ne, bit, const(0))
        return array_of(flags)

    return load(words_gmem, jnp.asarray(first, jnp.int32))


def load_values(values_gmem, first, rows: Rows):
    """Loads one int32 for each team's row."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT),
        return_type=shaped(THREADS, jnp.int32),
    )
    def load(_, values, first):
        row, _, _ = _row_of_thread(first, rows)
        row = arith.minui(row, const(rows.num_rows - 1))
        address = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(values), [row], i32())
        loaded = np.array([llvm.load(i32(), address)], dtype=object)
        return array_of(loaded, is_signed=True)

    return load(values_gmem, jnp.asarray(first, jnp.int32))


def spread(values, rows: Rows):
    """Gives each element of a row the value of the row: costs nothing."""
    dtype = values.dtype

    @plgpu.inline_mgpu(
        arg_types=(strided(THREADS),),
        return_type=shaped(rows.size, dtype),
    )
    def repeat(_, values):
        ((value,),) = scalars(values)
        repeated = np.full((rows.registers,), value, dtype=object)
        return array_of(repeated, is_signed=dtype == jnp.int32)

    return repeat(plgpu.layout_cast(values, strided(THREADS)))


def units_of(words, units: int):
    """Converts the float32 of each word to multiples of 1 / units; NaN is 0.

    Results are 0 to units. `units` is a power of two, so only the conversion rounds: to
    nearest, ties to even.
    """
    layout = strided(words.shape[0])

    @plgpu.inline_mgpu(
        arg_types=(layout,),
        return_type=shaped(words.shape[0], jnp.uint32),
    )
    def convert(_, words):
        scale = np.float32(units).view(np.uint32)
        out = [
            asm(
                "{.reg .f32 x; mov.b32 x, $1; "
                f"mul.rn.f32 x, x, 0f{int(scale):08X}; "
                f"cvt.rni.u32.f32 $0, x; min.u32 $0, $0, {units};}}",
                "=r,r",
                word,
                result=i32(),
            )
            for (word,) in scalars(words)
        ]
        return array_of(np.array(out, dtype=object))

    return convert(words)


def totals_from(keys, value, units, scratch_smem, rows: Rows):
    """Counts the keys of each row that reach a value, and adds up their units.

    Args:
      keys: uint32.
      value: uint32, one for each row.
      units: uint32, at most MASS_UNITS each; or None: no sum then.
      scratch_smem: SCRATCH_WORDS words.
      rows: How the rows lie.

    Returns:
      Counts in int32, and sums in uint32 or None: MASS_UNITS where a sum is larger.
    """
    layout, row_layout = strided(rows.size), strided(THREADS)
    has_units = units is not None
    assert rows.registers <= 64, "counts and sums of a warp share a word"
    arrays = (keys, units) if has_units else (keys,)
    types = (jnp.int32, jnp.uint32) if has_units else (jnp.int32,)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), row_layout, *(layout for _ in arrays)),
        return_type=tuple(shaped(THREADS, dtype) for dtype in types),
    )
    def total(_, scratch, value, *arrays):
        ((value,),) = scalars(value)
        if has_units:
            sums = _sums_of_team(value, scalars(*arrays), scratch, rows)
        else:
            count = _count_at_least(value, scalars(*arrays))
            sums = [_reduce(count, "add", scratch, rows)]
        return tuple(
            array_of(np.array([x], dtype=object), is_signed=dtype == jnp.int32)
            for x, dtype in zip(sums, types, strict=True)
        )

    value = plgpu.layout_cast(value, row_layout)
    totals = total(scratch_smem, value, *arrays)
    return totals if has_units else (totals[0], None)


def _count_at_least(value, elements):
    """Counts a thread's keys that reach a value: a predicated addition for each."""
    count = const(0)
    for (key,) in elements:
        count = asm(
            "{.reg .pred p; setp.ge.u32 p, $2, $3; @p add.u32 $0, $0, 1;}",
            "=r,0,r,r",
            count,
            key,
            value,
            result=i32(),
            is_pure=True,
        )
    return count


def _sums_of_team(value, elements, scratch, rows: Rows):
    """Counts a team's keys that reach a value, and adds their units up to MASS_UNITS.

    A sum is cut to MASS_UNITS before it can pass 32 bits: after two additions in a
    thread, and by adding its low and high bits apart in a warp.
    """
    pair = ir.Type.parse("!llvm.struct<(i32, i32)>")
    count = held = const(0)
    for i, (key, units) in enumerate(elements):
        limit = f"min.u32 $1, $1, {MASS_UNITS};" if i % 2 else ""
        both = asm(
            f"{{.reg .pred p; setp.ge.u32 p, $4, $5; @p add.u32 $0, $0, {ONE_IN_COUNT};"
            f"@p add.u32 $1, $1, $6; {limit}}}",
            "=&r,=&r,0,1,r,r,r",
            count,
            held,
            key,
            value,
            units,
            result=pair,
            is_pure=True,
        )
        count, held = (llvm.extractvalue(i32(), both, [i]) for i in range(2))
    held = arith.minui(held, const(MASS_UNITS))
    high = arith.addi(count, arith.shrui(held, const(LOW_BITS)))
    low = arith.andi(held, const((1 << LOW_BITS) - 1))
    high = _reduce_warp(high, "add")
    low = _reduce_warp(low, "add")
    count = arith.divui(high, const(ONE_IN_COUNT))
    high = arith.andi(high, const(ONE_IN_COUNT - 1))
    high = arith.minui(high, const(MASS_UNITS >> LOW_BITS))
    held = _add_up_to_max(arith.shli(high, const(LOW_BITS)), low)
    if rows.team == 1:
        return [count, held]
    values = [(count, arith.addi), (held, _add_up_to_max)]
    return _exchange(values, scratch, first_word=WARPS)


def _add_up_to_max(a, b):
    return arith.minui(arith.addi(a, b), const(MASS_UNITS))


def reduce_rows(values, operation: str, scratch_smem, rows: Rows):
    """Reduces the elements of each row by "add", "min" or "max", uint32."""
    combine = {"add": arith.addi, "min": arith.minui, "max": arith.maxui}[operation]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), strided(rows.size)),
        return_type=shaped(THREADS, jnp.uint32),
    )
    def reduce(_, scratch, values):
        own = functools.reduce(combine, (x for (x,) in scalars(values)))
        reduced = _reduce(own, operation, scratch, rows)
        return array_of(np.array([reduced], dtype=object))

    return reduce(scratch_smem, plgpu.layout_cast(values, strided(rows.size)))


def _reduce(value, operation: str, scratch, rows: Rows):
    """Reduces a value over the threads of each team."""
    value = _reduce_warp(value, operation)
    if rows.team == 1:
        return value
    combine = {"add": arith.addi, "min": arith.minui, "max": arith.maxui}[operation]
    (value,) = _exchange([(value, combine)], scratch, first_word=WARPS)
    return value


def or_of_all(values, scratch_smem, rows: Rows):
    """Takes the bitwise or of one word for each row, as a scalar."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), strided(THREADS)),
        return_type=plgpu.ShapeDtypeStruct(
            (), jnp.dtype(jnp.uint32), layout=plgpu.Layout.WG_SPLAT
        ),
    )
    def reduce(_, scratch, values):
        ((word,),) = scalars(values)
        if rows.per_cta > 1:
            word = _reduce_warp(word, "or")
            (word,) = _exchange([(word, arith.ori)], scratch, first_word=0)
        return mgpu.FragmentedArray.splat(word, (), is_signed=False)

    return reduce(scratch_smem, plgpu.layout_cast(values, strided(THREADS)))


def _reduce_warp(value, operation: str):
    kind = "or.b32" if operation == "or" else f"{operation}.u32"
    code = f"redux.sync.{kind} $0, $1, 0xffffffff;"
    return asm(code, "=r,r", value, result=i32())


def _exchange(values, scratch, *, first_word: int):
    """Combines values over the warps, each by its function; at most two.

    Lane 0 of each warp tells the others its own.
    """
    assert first_word + WARPS * len(values) <= SCRATCH_WORDS
    base = llvm.ptrtoint(i32(), mgpu.utils.memref_ptr(scratch))
    thread = mgpu.utils.thread_idx()
    lane = arith.andi(thread, const(WORD - 1))
    warp = arith.shrui(thread, const(5))
    for i, (value, _) in enumerate(values):
        asm(
            "{.reg .pred p; .reg .u32 a; setp.eq.u32 p, $1, 0; "
            "mad.lo.u32 a, $2, 4, $0; @p st.shared.u32 [a], $3;}",
            "r,r,r,r",
            arith.addi(base, const(4 * (first_word + WARPS * i))),
            lane,
            warp,
            value,
        )
    mgpu.utils.warpgroup_barrier()
    combined = []
    for i, (_, combine) in enumerate(values):
        loaded = [
            asm(
                "ld.shared.u32 $0, [$1];",
                "=r,r",
                arith.addi(base, const(4 * (first_word + WARPS * i + w))),
                result=i32(),
            )
            for w in range(WARPS)
        ]
        combined.append(functools.reduce(combine, loaded))
    # All have read before the next exchange writes.
    mgpu.utils.warpgroup_barrier()
    return combined


def store_row_votes(flags, words_gmem, first, rows: Rows):
    """Stores a bit for each column of each team's row."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT, strided(rows.size))
    )
    def store(_, words, first, flags):
        row, is_row, rank = _row_of_thread(first, rows)
        pointer = _address(words, _wide_mul(row, rows.num_words))
        lane = arith.andi(rank, const(WORD - 1))
        is_first = arith.cmpi(arith.CmpIPredicate.eq, lane, const(0))
        # An index that no row has keeps the other threads from storing.
        stores = arith.andi(is_first, is_row)
        limit = arith.select(stores, const(rows.num_words), const(0))
        for i, (flag,) in enumerate(scalars(flags)):
            index = arith.addi(arith.shrui(rank, const(5)), const(i * rows.team))
            asm(
                "{.reg .pred p; .reg .u32 b; .reg .u64 a; setp.ne.u32 p, $1, 0; "
                "vote.sync.ballot.b32 b, p, 0xffffffff; mad.wide.u32 a, $2, 4, $0; "
                "setp.lt.u32 p, $2, $3; @p st.global.u32 [a], b;}",
                "l,r,r,r",
                pointer,
                arith.extui(i32(), flag),
                index,
                limit,
            )

    flags = plgpu.layout_cast(flags, strided(rows.size))
    store(words_gmem, jnp.asarray(first, jnp.int32), flags)


def store_values(values, values_gmem, first, rows: Rows):
    """Stores one int32 for each team's row."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT, strided(THREADS))
    )
    def store(_, out, first, values):
        row, is_row, rank = _row_of_thread(first, rows)
        is_first = arith.cmpi(arith.CmpIPredicate.eq, rank, const(0))
        ((value,),) = scalars(values)
        asm(
            "{.reg .pred p; .reg .u64 a; setp.ne.u32 p, $2, 0; "
            "mad.wide.u32 a, $1, 4, $0; @p st.global.u32 [a], $3;}",
            "l,r,r,r",
            llvm.ptrtoint(i64(), mgpu.utils.memref_ptr(out)),
            row,
            arith.extui(i32(), arith.andi(is_first, is_row)),
            value,
        )

    values = plgpu.layout_cast(values, strided(THREADS))
    store(values_gmem, jnp.asarray(first, jnp.int32), values)


def _row_of_thread(first, rows: Rows):
    """Returns the row of a thread's team, if it exists, and the rank in the team."""
    thread = mgpu.utils.thread_idx()
    shift = rows.lanes.bit_length() - 1
    row = arith.addi(first.registers[()], arith.shrui(thread, const(shift)))
    exists = arith.cmpi(arith.CmpIPredicate.ult, row, const(rows.num_rows))
    return row, exists, arith.andi(thread, const(rows.lanes - 1))


def _wide_mul(row, columns: int):
    """Returns the words before a row in 64 bits: a matrix may have more than 2^32."""
    return arith.muli(arith.extui(i64(), row), const(columns, i64()))


def _address(ref, index):
    """Returns the address of a word, as an integer."""
    pointer = llvm.ptrtoint(i64(), mgpu.utils.memref_ptr(ref))
    return arith.addi(pointer, arith.muli(index, const(4, i64())))
