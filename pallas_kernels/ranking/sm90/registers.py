"""Operations in PTX (sm_90) that the kernels on maps need and Pallas lacks.

`emulated.py` has the same functions in plain JAX, for interpret mode: a function added
here or in `teams.py` needs one there.
"""

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.common.inline_ptx import (
    THREADS,
    WORD,
    asm,
    const,
    i32,
    i64,
    scalars,
    strided,
)


def load_row(row_gmem, dtype=jnp.uint32):
    """Loads a row, and zeros up to a multiple of 128 elements.

    Thread t holds the elements t, t + 128, ... . Nothing is assumed of the alignment.
    """
    (size,) = row_gmem.shape
    padded = -(-size // THREADS) * THREADS
    layout = strided(padded)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((padded,), dtype, layout=layout),
    )
    def load(_, ref):
        pointer = mgpu.utils.memref_ptr(ref)
        thread = mgpu.utils.thread_idx()
        register = ir.VectorType.get((1,), i32())
        registers = np.empty((padded // THREADS,), dtype=object)
        for i in range(registers.size):
            index = arith.addi(thread, const(i * THREADS))
            address = mgpu.utils.getelementptr(pointer, [index], i32())
            if (i + 1) * THREADS <= size:
                value = llvm.load(i32(), address)
            else:
                value = llvm.inline_asm(
                    i32(),
                    [llvm.ptrtoint(i64(), address), index, const(size)],
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


def add_ones(values, is_counted, counts_smem):
    """Adds 1 to the count of each value."""
    layout = strided(values.shape[0])

    @plgpu.inline_mgpu(arg_types=(layout, layout, plgpu.RefType()))
    def add(_, values, is_counted, counts):
        pointer = mgpu.utils.memref_ptr(counts)
        base = llvm.ptrtoint(i32(), pointer)
        for value, flag in scalars(values, is_counted):
            asm(
                "{.reg .pred p; .reg .u32 a; setp.ne.u32 p, $2, 0; "
                "mad.lo.u32 a, $1, 4, $0; @p red.shared.add.u32 [a], 1;}",
                "r,r,r",
                base,
                value,
                arith.extui(i32(), flag),
            )

    add(values, is_counted, counts_smem)


def store_votes(flags, words_gmem):
    """Stores a bit for each element; warp w votes on the words w, w + 4, ... ."""
    layout = strided(flags.shape[0])

    @plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType()))
    def store(_, flags, words):
        pointer = mgpu.utils.memref_ptr(words)
        thread = mgpu.utils.thread_idx()
        lane = arith.andi(thread, const(WORD - 1))
        warp = arith.shrui(thread, const(5))
        for i, (flag,) in enumerate(scalars(flags)):
            index = arith.addi(warp, const(i * THREADS // WORD))
            asm(
                "{.reg .pred p; .reg .u32 b; .reg .u64 a; setp.ne.u32 p, $1, 0; "
                "vote.sync.ballot.b32 b, p, 0xffffffff; mad.wide.u32 a, $2, 4, $0; "
                "setp.eq.u32 p, $3, 0; @p st.global.u32 [a], b;}",
                "l,r,r,r",
                llvm.ptrtoint(i64(), pointer),
                arith.extui(i32(), flag),
                index,
                lane,
            )

    store(flags, words_gmem)


def store_columns(words, starts, columns, ids_gmem, capacity: int):
    """Each thread stores the columns of its word."""
    layout = strided(words.shape[0])

    @plgpu.inline_mgpu(arg_types=(layout, layout, layout, plgpu.RefType()))
    def store(_, words, starts, columns, ids):
        pointer = llvm.ptrtoint(i64(), mgpu.utils.memref_ptr(ids))
        for word, start, column in scalars(words, starts, columns):
            asm(
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
                const(capacity),
            )

    store(words, starts, columns, ids_gmem)


def store_zeros(first, stride: int, ids_gmem, capacity: int):
    """Thread t stores 0 at first + t, first + t + stride, ... ."""

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT, plgpu.RefType()))
    def store(_, first, ids):
        pointer = llvm.ptrtoint(i64(), mgpu.utils.memref_ptr(ids))
        own_first = arith.addi(first.registers[()], mgpu.utils.thread_idx())
        asm(
            "{.reg .pred p; .reg .s32 i; .reg .u64 a; mov.s32 i, $1; "
            "LOOP: setp.ge.s32 p, i, $2; @p bra DONE; mad.wide.s32 a, i, 4, $0; "
            "st.global.u32 [a], 0; add.s32 i, i, $3; bra LOOP; DONE: }",
            "l,r,r,r",
            pointer,
            own_first,
            const(capacity),
            const(stride),
        )

    store(jnp.asarray(first, jnp.int32), ids_gmem)


def warpgroup_barrier():
    """Waits for all threads of the warpgroup."""

    @plgpu.inline_mgpu()
    def wait(_):
        mgpu.utils.warpgroup_barrier()

    wait()
