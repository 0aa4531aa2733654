"""Copies of single tokens between global memory and swizzled shared memory (sm_90).

TMA copies start at multiples of ALIGNMENT tokens. Where blocks do not, each thread of a
warpgroup copies 16 bytes at a time, from or to wherever its row's token is. Functions
that copy or wait are for all 128 threads of a warpgroup.

    fetch(array, rows, rows_smem, num_rows=64)   # starts (cp.async)
    end_group()
    wait_for_groups(1)                           # all but the last one are done
    store(rows_smem, rows, array)                # is done when it returns
"""

from typing import Any, NamedTuple

import jax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.attention.sm90.plan import BLOCK
from pallas_kernels.common.inline_ptx import THREADS, asm, const, i32, i64
from pallas_kernels.common.lanes import ALIGNMENT, smem_transforms

# A `jax.Ref`, or a part of one by `.at[...]`, which has no public type.
Memory = Any

CHUNK = 16  # bytes that a thread copies at once
SWIZZLED_ROW = 128  # bytes
ATOM = ALIGNMENT * SWIZZLED_ROW  # bytes after which the swizzle repeats
RECIPROCAL_BITS = 16  # row * reciprocal >> 16 is row // run: exact, for rows are few
COMMON_RUNS = (BLOCK, 16)  # of tiled order, and of tiles 16 tokens wide in raster order


class Rows(NamedTuple):
    """Positions of the tokens of some rows of a block.

    A block is runs of tokens that follow each other in memory, at equal distances: one
    run in tiled order, rows of a tile in raster order.
    """

    start: jax.Array  # token of the block's row 0
    jump: jax.Array  # tokens from the end of a run to the start of the next
    reciprocal: jax.Array  # of the length of a run, see `reciprocal_of`
    length: jax.Array  # tokens of the block
    first: jax.Array  # the first of the rows


def reciprocal_of(run):
    """Returns what `Rows` holds for runs of this length."""
    return -(-(1 << RECIPROCAL_BITS) // run)


def fetch(array: Memory, rows: Rows, rows_smem: Memory, *, num_rows: int) -> None:
    """Starts to copy rows of a block; rows past its end are zeros or other tokens.

    Args:
      array: Tokens of one batch item and head in global memory, [T, D] of 2 bytes.
      rows: Where the tokens are.
      rows_smem: Where to, [rows, D], as `smem_transforms` says.
      num_rows: How many, a multiple of 16.
    """
    _copy_rows(_fetch_code, array, rows, rows_smem, num_rows)


def store(rows_smem: Memory, rows: Rows, array: Memory) -> None:
    """Copies all rows within the block; see `fetch`.

    The warpgroup must have committed what it wrote to shared memory.
    """
    _copy_rows(_store_code, array, rows, rows_smem, rows_smem.shape[0])


def end_group() -> None:
    """Makes a group of what this thread has started since the last call."""
    _emit("cp.async.commit_group;")


def wait_for_groups(pending: int) -> None:
    """Waits until at most this thread's last `pending` groups are under way.

    wgmma may read the others once every thread has arrived on a barrier.
    """
    _emit(f"cp.async.wait_group {pending};\nfence.proxy.async.shared::cta;")


def _emit(code: str) -> None:
    @plgpu.inline_mgpu()
    def emit(_):
        asm(code, "")

    emit()


def _copy_rows(code, array, rows: Rows, rows_smem, num_rows: int) -> None:
    """Runs code with each thread's first addresses and the distances to the next."""
    row_bytes = 2 * rows_smem.shape[-1]
    threads_per_row, atoms_per_row = row_bytes // CHUNK, row_bytes // SWIZZLED_ROW
    rows_at_once = THREADS // threads_per_row
    smem_step = rows_at_once // ALIGNMENT * atoms_per_row * ATOM

    @plgpu.inline_mgpu(
        arg_types=(
            plgpu.RefType(),
            plgpu.RefType(smem_transforms()),
            *(plgpu.Layout.WG_SPLAT for _ in rows),
        )
    )
    def run(_, array, rows_smem, *rows):
        *place_of_rows, first = (x.registers[()] for x in rows)
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
        pointer = llvm.ptrtoint(i64(), mgpu.utils.memref_ptr(array))
        offset = arith.extui(i64(), arith.muli(chunk, const(CHUNK)))
        array_type = ir.MemRefType(array.type)
        (stride, _), _ = array_type.get_strides_and_offset()
        copies = _Copies(
            places=tuple(i * smem_step for i in range(num_rows // rows_at_once)),
            rows_at_once=rows_at_once,
            token_bytes=2 * stride,
            num_tokens=array_type.shape[0],
        )
        asm(
            code(copies),
            "r,l,r,r,r,r,r",
            smem,
            arith.addi(pointer, offset),
            arith.addi(first, row),
            *place_of_rows,
        )

    run(array, rows_smem, *rows)


def _divmod(x, divisor: int):
    return arith.divui(x, const(divisor)), arith.remui(x, const(divisor))


class _Copies(NamedTuple):
    """The copies of one thread, as far as they are known beforehand."""

    places: tuple[int, ...]  # in shared memory, counted from the first
    rows_at_once: int  # that the warpgroup copies, and so from a row to the next
    token_bytes: int  # from one token to the next
    num_tokens: int


# Operands of the PTX: a thread's first place in shared memory, its bytes of token 0 and
# its first row, then start, jump, reciprocal and length of the block.


def _fetch_code(copies: _Copies) -> str:
    """Past the block's end no bytes are read, and 16 zeros are written.

    Every instruction takes power from the consumers, so blocks of COMMON_RUNS have code
    of their own, where a thread's rows lie at known distances. What it copies past the
    block's end are other tokens; that must not be past the last one.
    """

    def copy(place: int) -> str:
        return (
            f"selp.b32 size, {CHUNK}, 0, own;\n"
            f"cp.async.cg.shared.global [$0+{place}], [address], {CHUNK}, size;"
        )

    common = [_common_runs(copies, run) for run in COMMON_RUNS]
    return _scope(*common, *_each_row(copies, copy), "DONE:")


def _store_code(copies: _Copies) -> str:
    def copy(place: int) -> str:
        return (
            f"ld.shared.v4.b32 {{a, b, c, d}}, [$0+{place}];\n"
            "@own st.global.v4.b32 [address], {a, b, c, d};"
        )

    return _scope(*_each_row(copies, copy))


def _scope(*lines: str) -> str:
    registers = (
        ".reg .pred own, other;",
        ".reg .b32 last, row, near, run, token, size, a, b, c, d;",
        ".reg .b64 address, run_bytes;",
    )
    return "\n".join(("{", *registers, *lines, "}"))


def _each_row(copies: _Copies, copy) -> list[str]:
    """Finds each row's token and calls `copy(place)` for its code."""
    lines = ["sub.s32 last, $6, 1;"]
    for i, place in enumerate(copies.places):
        lines += [
            f"add.s32 row, $2, {i * copies.rows_at_once};",
            "setp.lt.s32 own, row, $6;",
            "min.s32 near, row, last;",
            "mul.lo.s32 run, near, $5;",
            f"shr.u32 run, run, {RECIPROCAL_BITS};",
            "add.s32 token, near, $3;",
            "mad.lo.s32 token, run, $4, token;",
            f"mad.wide.s32 address, token, {copies.token_bytes}, $1;",
            copy(place),
        ]
    return lines


def _common_runs(copies: _Copies, run: int) -> str:
    """Fetches a block whose runs have this length; else goes on after this code."""
    assert run % copies.rows_at_once == 0
    step = copies.rows_at_once
    final_row = (len(copies.places) - 1) * step
    lines = [
        f"setp.ne.s32 other, $5, {reciprocal_of(run)};",
        f"shr.u32 run, $2, {run.bit_length() - 1};",
        "add.s32 token, $3, $2;",
        "mad.lo.s32 token, run, $4, token;",
        f"add.s32 last, token, {final_row};",
        f"mad.lo.s32 last, $4, {final_row // run}, last;",
        f"setp.ge.or.s32 other, last, {copies.num_tokens}, other;",
        f"@other bra NOT_{run};",
        f"mad.wide.s32 address, token, {copies.token_bytes}, $1;",
        f"add.s32 run, $4, {run};",
        f"mul.wide.s32 run_bytes, run, {copies.token_bytes};",
    ]
    for i, place in enumerate(copies.places):
        row = i * step % run
        if i and not row:
            lines.append("add.s64 address, address, run_bytes;")
        lines.append(
            f"cp.async.cg.shared.global [$0+{place}], "
            f"[address+{row * copies.token_bytes}], {CHUNK};"
        )
    return "\n".join((*lines, "bra DONE;", f"NOT_{run}:"))
