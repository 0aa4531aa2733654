"""What selection needs of maps of integer keys, for Hopper (sm_90): three kernels.

count_digits   how many keys of a map have each value of a digit: a histogram in shared
               memory, by atomic additions of integers, whose order does not matter
pack_rows      which keys of a row are above or at a threshold, or its largest: a bit
               for each key, 32 to a word, by the votes of warps
write_lists    the columns of the set bits, one after another: a thread for each word

No key is 0: zeros pad the rows in registers. The first two kernels read the keys once
each and are bound by that. A warpgroup works on one row at a time, thread t on the keys
t, t + 128, ... .
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxtyping import Array, Int, UInt32

from pallas_kernels.batching import fold_mapped_axes
from pallas_kernels.interfaces import Device

THREADS = 128  # of a warpgroup
WORD = 32  # bits
NUM_CTAS = 132 * 8  # of count_digits: what an H100 or H200 holds at a time
ROWS_IN_FLIGHT = 2  # whose loads are issued together
MAX_COLUMNS = 8192  # held in registers, 64 for each thread


@dataclasses.dataclass(frozen=True)
class Digit:
    """Some bits of a key."""

    shift: int
    bits: int

    @property
    def num_values(self) -> int:
        return 1 << self.bits


DIGITS = (Digit(21, 11), Digit(10, 11), Digit(0, 10))  # of a key, first to last


def why_unsupported(columns: int, device: Device) -> str | None:
    """Why the kernels cannot take rows of this many keys on a device, or None."""
    if device.compute_capability != (9, 0):
        return f"they need an NVIDIA Hopper GPU (sm_90), not {device.kind}"
    if columns > MAX_COLUMNS:
        return f"they take rows of at most {MAX_COLUMNS} keys, not {columns}"
    return None


def count_digits(
    keys: UInt32[Array, "L R C"], prefix: UInt32[Array, " L"], digit: Digit
) -> Int[Array, "L values"]:
    """Counts the keys of each map by a digit, of those whose higher bits are `prefix`.

    Args:
      keys: Maps, without zeros.
      prefix: The bits above the digit, shifted down; 0 where there are none.
      digit: Which bits to count by.
    """
    num_lists, num_rows, _ = keys.shape
    num_parts = max(1, min(num_rows, NUM_CTAS // num_lists))

    def run(keys, prefix):
        counts = plgpu.kernel(
            functools.partial(_count_body, digit=digit, num_parts=num_parts),
            out_type=jax.ShapeDtypeStruct(
                (keys.shape[0], num_parts, digit.num_values), jnp.int32
            ),
            scratch_types={"counts_smem": plgpu.SMEM((digit.num_values,), jnp.int32)},
            grid=(num_parts, keys.shape[0]),
            grid_names=("part", "map"),
            compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
            kernel_name="count_digits_sm90",
        )(keys, prefix)
        return (counts.sum(1, dtype=jnp.int32),)

    return fold_mapped_axes(run)(keys, prefix)[0]


def _count_body(
    keys_gmem, prefix_gmem, out_gmem, *, counts_smem, digit: Digit, num_parts: int
):
    part, number = lax.axis_index("part"), lax.axis_index("map")
    num_rows = keys_gmem.shape[1]
    counts_smem[...] = jnp.zeros(counts_smem.shape, jnp.int32)
    _warpgroup_barrier()
    prefix = prefix_gmem[number]

    def count(keys):
        value = (keys >> digit.shift) & (digit.num_values - 1)
        if digit.shift + digit.bits == 32:
            _add_ones(value, keys > 0, counts_smem)
        else:
            is_counted = (keys >> (digit.shift + digit.bits)) == prefix
            _add_ones(value, is_counted & (keys > 0), counts_smem)

    num_own = lax.div(num_rows - part + (num_parts - 1), jnp.int32(num_parts))

    def step(i, _):
        rows = [
            _load_row(keys_gmem.at[number, part + (i * ROWS_IN_FLIGHT + j) * num_parts])
            for j in range(ROWS_IN_FLIGHT)
        ]
        for row in rows:
            count(row)
        return ()

    num_steps = lax.div(num_own, jnp.int32(ROWS_IN_FLIGHT))
    lax.fori_loop(0, num_steps, step, ())

    def rest(i, _):
        count(_load_row(keys_gmem.at[number, part + i * num_parts]))
        return ()

    lax.fori_loop(num_steps * ROWS_IN_FLIGHT, num_own, rest, ())
    _warpgroup_barrier()
    out_gmem[number, part] = counts_smem[...]


def pack_rows(
    keys: UInt32[Array, "L R C"], threshold: UInt32[Array, "L R"]
) -> tuple[UInt32[Array, "L R W"], UInt32[Array, "L R W"], UInt32[Array, "L R W"]]:
    """Packs, of each row, the keys above a threshold, those at it, and the largest.

    Args:
      keys: Maps, without zeros.
      threshold: Of each row; not 0.

    Returns:
      Words of 32 keys, the first in the lowest bit; C is rounded up to 128 keys. All
      keys that are as large as the largest of the row are in the third.
    """

    def run(keys, threshold):
        num_lists, num_rows, num_columns = keys.shape
        shape = (num_lists, num_rows, -(-num_columns // THREADS) * THREADS // WORD)
        return plgpu.kernel(
            _pack_body,
            out_type=(jax.ShapeDtypeStruct(shape, jnp.uint32),) * 3,
            grid=(num_rows, num_lists),
            grid_names=("row", "map"),
            kernel_name="pack_rows_sm90",
        )(keys, threshold)

    return fold_mapped_axes(run)(keys, threshold)


def _pack_body(keys_gmem, threshold_gmem, above_gmem, tied_gmem, best_gmem):
    row, number = lax.axis_index("row"), lax.axis_index("map")
    keys = _load_row(keys_gmem.at[number, row])
    threshold = threshold_gmem[number, row]
    _store_votes(keys > threshold, above_gmem.at[number, row])
    _store_votes(keys == threshold, tied_gmem.at[number, row])
    _store_votes(keys == jnp.max(keys), best_gmem.at[number, row])


def write_lists(
    words: UInt32[Array, "L K"],
    starts: Int[Array, "L K"],
    totals: Int[Array, " L"],
    columns: Int[np.ndarray, " K"],
    capacity: int,
) -> Int[Array, "L M"]:
    """Writes the columns of the set bits of each list of words.

    Args:
      words: Sets of columns; K is a multiple of THREADS.
      starts: Place of the first column of each word.
      totals: Columns of each list; the places after them get 0.
      columns: Column of the lowest bit of each word.
      capacity: Places, M. What would come later is not written.
    """

    def run(words, starts, totals):
        num_lists, num_words = words.shape
        return (
            plgpu.kernel(
                functools.partial(_write_body, capacity=capacity),
                out_type=jax.ShapeDtypeStruct((num_lists, capacity), jnp.int32),
                grid=(num_words // THREADS, num_lists),
                grid_names=("chunk", "list"),
                kernel_name="write_lists_sm90",
            )(words, starts, totals, jnp.asarray(columns, jnp.int32)),
        )

    return fold_mapped_axes(run)(words, starts, totals)[0]


def _write_body(
    words_gmem, starts_gmem, totals_gmem, columns_gmem, ids_gmem, *, capacity: int
):
    chunk, number = lax.axis_index("chunk"), lax.axis_index("list")
    own = pl.ds(chunk * THREADS, THREADS)
    words = _load_row(words_gmem.at[number, own])
    starts = _load_row(starts_gmem.at[number, own], jnp.int32)
    columns = _load_row(columns_gmem.at[own], jnp.int32)
    _store_columns(words, starts, columns, ids_gmem.at[number], capacity)
    first = totals_gmem[number] + chunk * THREADS
    stride = words_gmem.shape[1]
    _store_zeros(first, stride, ids_gmem.at[number], capacity)


# ------------------------------------------------- what Pallas has no operation for


def _layout(size: int):
    return plgpu.Layout.WG_STRIDED((size,), vec_size=1)


def _load_row(row_gmem, dtype=jnp.uint32):
    """Loads a row, and zeros up to a multiple of 128 elements.

    Thread t holds the elements t, t + 128, ... . Nothing is assumed of the alignment.
    """
    (size,) = row_gmem.shape
    padded = -(-size // THREADS) * THREADS
    layout = _layout(padded)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((padded,), dtype, layout=layout),
    )
    def load(_, ref):
        pointer = mgpu.utils.memref_ptr(ref)
        thread = mgpu.utils.thread_idx()
        register = ir.VectorType.get((1,), _i32())
        registers = np.empty((padded // THREADS,), dtype=object)
        for i in range(registers.size):
            index = arith.addi(thread, _const(i * THREADS))
            address = mgpu.utils.getelementptr(pointer, [index], _i32())
            if (i + 1) * THREADS <= size:
                value = llvm.load(_i32(), address)
            else:
                value = llvm.inline_asm(
                    _i32(),
                    [llvm.ptrtoint(_i64(), address), index, _const(size)],
                    "{.reg .pred p; setp.lt.u32 p, $2, $3; mov.u32 $0, 0; "
                    "@p ld.global.u32 $0, [$1];}",
                    "=&r,l,r,r",
                    has_side_effects=True,
                )
            registers[i] = mgpu.utils.vector.broadcast(register, value)
        return mgpu.FragmentedArray(
            _registers=registers,
            _layout=mgpu.WGStridedFragLayout((padded,), vec_size=1),
            _is_signed=dtype == jnp.int32,
        )

    return load(row_gmem)


def _add_ones(values, is_counted, counts_smem):
    """Adds 1 to the count of each value."""
    layout = _layout(values.shape[0])

    @plgpu.inline_mgpu(arg_types=(layout, layout, plgpu.RefType()))
    def add(_, values, is_counted, counts):
        pointer = mgpu.utils.memref_ptr(counts)
        base = llvm.ptrtoint(_i32(), pointer)
        for value, flag in _scalars(values, is_counted):
            _asm(
                "{.reg .pred p; .reg .u32 a; setp.ne.u32 p, $2, 0; "
                "mad.lo.u32 a, $1, 4, $0; @p red.shared.add.u32 [a], 1;}",
                "r,r,r",
                base,
                value,
                arith.extui(_i32(), flag),
            )

    add(values, is_counted, counts_smem)


def _store_votes(flags, words_gmem):
    """Stores a bit for each element; warp w votes on the words w, w + 4, ... ."""
    layout = _layout(flags.shape[0])

    @plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType()))
    def store(_, flags, words):
        pointer = mgpu.utils.memref_ptr(words)
        thread = mgpu.utils.thread_idx()
        lane = arith.andi(thread, _const(WORD - 1))
        warp = arith.shrui(thread, _const(5))
        for i, (flag,) in enumerate(_scalars(flags)):
            index = arith.addi(warp, _const(i * THREADS // WORD))
            _asm(
                "{.reg .pred p; .reg .u32 b; .reg .u64 a; setp.ne.u32 p, $1, 0; "
                "vote.sync.ballot.b32 b, p, 0xffffffff; mad.wide.u32 a, $2, 4, $0; "
                "setp.eq.u32 p, $3, 0; @p st.global.u32 [a], b;}",
                "l,r,r,r",
                llvm.ptrtoint(_i64(), pointer),
                arith.extui(_i32(), flag),
                index,
                lane,
            )

    store(flags, words_gmem)


def _store_columns(words, starts, columns, ids_gmem, capacity: int):
    """Each thread stores the columns of its word."""
    layout = _layout(words.shape[0])

    @plgpu.inline_mgpu(arg_types=(layout, layout, layout, plgpu.RefType()))
    def store(_, words, starts, columns, ids):
        pointer = llvm.ptrtoint(_i64(), mgpu.utils.memref_ptr(ids))
        for word, start, column in _scalars(words, starts, columns):
            _asm(
                "{.reg .pred p, q; .reg .u32 w, b, m; .reg .s32 i; .reg .u64 a; "
                "mov.u32 w, $1; mov.s32 i, $2; "
                "LOOP: setp.eq.u32 p, w, 0; @p bra DONE; "
                "brev.b32 b, w; clz.b32 b, b; sub.u32 m, w, 1; and.b32 w, w, m; "
                "add.u32 b, b, $3; mad.wide.s32 a, i, 4, $0; "
                "setp.lt.s32 q, i, $4; @q st.global.u32 [a], b; "
                "add.s32 i, i, 1; bra LOOP; DONE: }",
                "l,r,r,r,r",
                pointer,
                word,
                start,
                column,
                _const(capacity),
            )

    store(words, starts, columns, ids_gmem)


def _store_zeros(first, stride: int, ids_gmem, capacity: int):
    """Thread t stores 0 at first + t, first + t + stride, ... ."""

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT, plgpu.RefType()))
    def store(_, first, ids):
        pointer = llvm.ptrtoint(_i64(), mgpu.utils.memref_ptr(ids))
        place = arith.addi(first.registers[()], mgpu.utils.thread_idx())
        _asm(
            "{.reg .pred p; .reg .s32 i; .reg .u64 a; mov.s32 i, $1; "
            "LOOP: setp.ge.s32 p, i, $2; @p bra DONE; mad.wide.s32 a, i, 4, $0; "
            "st.global.u32 [a], 0; add.s32 i, i, $3; bra LOOP; DONE: }",
            "l,r,r,r",
            pointer,
            place,
            _const(capacity),
            _const(stride),
        )

    store(jnp.asarray(first, jnp.int32), ids_gmem)


def _warpgroup_barrier():
    @plgpu.inline_mgpu()
    def wait(_):
        mgpu.utils.warpgroup_barrier()

    wait()


def _scalars(*arrays):
    """The elements of a thread, array by array: registers are vectors of one."""
    for registers in zip(*(array.registers.flat for array in arrays), strict=True):
        yield tuple(
            mgpu.utils.vector.extract(x, [], [0])
            if isinstance(x.type, ir.VectorType)
            else x
            for x in registers
        )


def _asm(code: str, constraints: str, *arguments):
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        arguments,
        code,
        constraints + ",~{memory}",
        has_side_effects=True,
    )


def _const(value: int):
    return mgpu.utils.c(value, _i32())


def _i32():
    return ir.IntegerType.get_signless(32)


def _i64():
    return ir.IntegerType.get_signless(64)
