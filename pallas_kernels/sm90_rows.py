"""Copies of single tokens between global memory and swizzled shared memory (sm_90).

TMA copies start at multiples of ALIGNMENT tokens. Where blocks do not, each thread of a
warpgroup copies 16 bytes at a time from or to wherever a table says that a row's token
is. Every function is for all 128 threads of a warpgroup.

    fetch(array, tokens, rows_smem, num_rows=64)     # starts (cp.async)
    end_group()
    wait_for_groups(1)                               # all but the last one are done
    store(rows_smem, tokens, array)                  # is done when it returns
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.inline_ptx import THREADS, asm, const, i32, i64
from pallas_kernels.sm90_plan import ALIGNMENT, smem_transforms

CHUNK = 16  # bytes that a thread copies at once
SWIZZLED_ROW = 128  # bytes
ATOM = ALIGNMENT * SWIZZLED_ROW  # bytes after which the swizzle repeats
LOOKED_UP = 8  # tokens that a thread looks up together: it has few registers


def fetch(
    array: jax.Ref, tokens: jax.Ref, rows_smem: jax.Ref, *, num_rows: int, emulate: bool
) -> None:
    """Starts to copy the first rows of a block; rows without a token become zeros.

    Args:
      array: Tokens of one batch item and head in global memory, [T, D] of 2 bytes.
      tokens: Which token each row is, int32 in global memory; -1 for none.
      rows_smem: Where to, [rows, D], as `smem_transforms` says.
      num_rows: How many, a multiple of 16.
      emulate: Interpret mode has no PTX.
    """
    if emulate:
        token = tokens[...][:num_rows]
        rows = array[...][jnp.maximum(token, 0)]
        rows = jnp.where(token[:, None] >= 0, rows, 0.0)
        rows_smem[:num_rows] = rows.astype(rows_smem.dtype)
        return
    _copy_rows(_fetch_code, array, tokens, rows_smem, num_rows)


def store(
    rows_smem: jax.Ref, tokens: jax.Ref, array: jax.Ref, *, emulate: bool
) -> None:
    """Copies all rows that have a token; see `fetch`.

    The warpgroup must have committed what it wrote to shared memory.
    """
    if not emulate:
        _copy_rows(_store_code, array, tokens, rows_smem, rows_smem.shape[0])
        return
    token, rows = tokens[...], rows_smem[...]

    def store_row(i, _):
        @pl.when(token[i] >= 0)
        def _store():
            array[token[i], :] = rows[i]

        return ()

    lax.fori_loop(0, rows.shape[0], store_row, ())


def end_group(*, emulate: bool) -> None:
    """What this thread has started since the last call is a group."""
    if not emulate:
        _emit("cp.async.commit_group;")


def wait_for_groups(pending: int, *, emulate: bool) -> None:
    """Waits until at most this thread's last `pending` groups are under way.

    wgmma may read the others once every thread has told so on a barrier.
    """
    if not emulate:
        _emit(f"cp.async.wait_group {pending};\nfence.proxy.async.shared::cta;")


def _emit(code: str) -> None:
    @plgpu.inline_mgpu()
    def emit(_):
        asm(code, "")

    emit()


def _copy_rows(code, array, tokens, rows_smem, num_rows: int) -> None:
    """Runs code with each thread's first addresses and the distances to the next."""
    row_bytes = 2 * rows_smem.shape[-1]
    threads_per_row, atoms_per_row = row_bytes // CHUNK, row_bytes // SWIZZLED_ROW
    rows_at_once = THREADS // threads_per_row
    smem_step = rows_at_once // ALIGNMENT * atoms_per_row * ATOM

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.RefType(smem_transforms()))
    )
    def run(_, array, tokens, rows_smem):
        thread = arith.andi(mgpu.utils.thread_idx(), const(THREADS - 1))
        row, chunk = _divmod(thread, threads_per_row)
        # Atoms of a group of rows lie side by side.
        group, row_in_atom = _divmod(row, ALIGNMENT)
        atom, place = _divmod(chunk, SWIZZLED_ROW // CHUNK)
        place = arith.xori(place, row_in_atom)
        smem = llvm.ptrtoint(i32(), mgpu.utils.memref_ptr(rows_smem))
        for index, size in (
            (group, atoms_per_row * ATOM),
            (atom, ATOM),
            (row_in_atom, SWIZZLED_ROW),
            (place, CHUNK),
        ):
            smem = arith.addi(smem, arith.muli(index, const(size)))
        (stride, _), _ = ir.MemRefType(array.type).get_strides_and_offset()
        asm(
            code(num_rows // rows_at_once, smem_step, 4 * rows_at_once),
            "r,l,l,r",
            smem,
            _address(array, arith.muli(chunk, const(CHUNK))),
            _address(tokens, arith.muli(row, const(4))),
            const(2 * stride),
        )

    run(array, tokens, rows_smem)


def _divmod(x, divisor: int):
    return arith.divui(x, const(divisor)), arith.remui(x, const(divisor))


def _address(ref, offset):
    pointer = llvm.ptrtoint(i64(), mgpu.utils.memref_ptr(ref))
    return arith.addi(pointer, arith.extui(i64(), offset))


# Operands of both: the thread's first place in shared memory, its bytes of token 0, its
# first entry of the table, and bytes from one token to the next.


def _fetch_code(copies: int, smem_step: int, table_step: int) -> str:
    """Without a token no bytes are read, and 16 zeros are written."""
    return _code(
        copies,
        table_step,
        lambda i, name: (
            f"""
setp.ge.s32 has, {name}, 0;
selp.b32 size, {CHUNK}, 0, has;
max.s32 {name}, {name}, 0;
mad.wide.s32 address, {name}, $3, $1;
cp.async.cg.shared.global [$0+{i * smem_step}], [address], {CHUNK}, size;"""
        ),
    )


def _store_code(copies: int, smem_step: int, table_step: int) -> str:
    return _code(
        copies,
        table_step,
        lambda i, name: (
            f"""
setp.ge.s32 has, {name}, 0;
ld.shared.v4.b32 {{a, b, c, d}}, [$0+{i * smem_step}];
mad.wide.s32 address, {name}, $3, $1;
@has st.global.v4.b32 [address], {{a, b, c, d}};"""
        ),
    )


def _code(copies: int, table_step: int, copy) -> str:
    lines = [
        ".reg .pred has;",
        ".reg .b32 size, a, b, c, d;",
        ".reg .b64 address;",
        f".reg .b32 token<{LOOKED_UP}>;",
    ]
    for first in range(0, copies, LOOKED_UP):
        numbers = range(first, min(first + LOOKED_UP, copies))
        lines += [
            f"ld.global.b32 token{i - first}, [$2+{i * table_step}];" for i in numbers
        ]
        lines += [copy(i, f"token{i - first}") for i in numbers]
    return "{\n" + "\n".join(lines) + "\n}"
