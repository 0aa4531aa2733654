"""Orders each kept-block list by classes of blocks, for Hopper (sm_90).

The attention kernel walks blocks of one width after another. A warp moves one list. For
each class it reads the list 32 entries at a time and votes on which are of the class;
each lane writes its entry behind those of the lanes before it. The order within a class
stays. Lists are short (a hundred entries), so this takes microseconds.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith, llvm
from jaxtyping import Array, Int

from pallas_kernels.common.emulation import store_each
from pallas_kernels.common.inline_ptx import WORD, asm, const, i64

LISTS_PER_CTA = 4  # one for each warp of a warpgroup


def partition_lists(
    row_offsets: Int[Array, "L offsets"],
    block_ids: Int[Array, "L M"],
    class_of_block: Int[np.ndarray, " R"],
    *,
    num_classes: int,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Int[Array, "L M"], Int[Array, "L R classes"]]:
    """Sorts the entries of each list by class, stably.

    Args:
      row_offsets: Start of each list in `block_ids`.
      block_ids: Entries of the lists.
      class_of_block: Class of each block, from 0.
      num_classes: How many classes there are.
      interpret: Run on the CPU in GPU interpret mode.

    Returns:
      The entries, undefined past the last list's end, and where each class ends in
      each list, counted from the list's start.
    """
    num_lists, num_rows = row_offsets.shape[0], row_offsets.shape[1] - 1
    move = _move if interpret is None else _move_emulated
    return plgpu.kernel(
        functools.partial(_body, move=functools.partial(move, num_classes=num_classes)),
        out_type=(
            jax.ShapeDtypeStruct(block_ids.shape, jnp.int32),
            jax.ShapeDtypeStruct((num_lists, num_rows, num_classes), jnp.int32),
        ),
        grid=(-(-num_rows // LISTS_PER_CTA), num_lists),
        grid_names=("chunk", "map"),
        kernel_name="partition_lists_sm90",
        interpret=interpret,
    )(row_offsets, block_ids, jnp.asarray(class_of_block, jnp.int32))


def _body(offsets_gmem, ids_gmem, classes_gmem, out_gmem, ends_gmem, *, move):
    chunk, head = lax.axis_index("chunk"), lax.axis_index("map")
    move(
        chunk,
        offsets_gmem.at[head],
        ids_gmem.at[head],
        classes_gmem,
        out_gmem.at[head],
        ends_gmem.at[head],
    )


def _move(chunk, offsets_gmem, *others, num_classes: int):
    num_rows = offsets_gmem.shape[0] - 1

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WG_SPLAT, *(plgpu.RefType(),) * 5),
    )
    def move(_, chunk, offsets, ids, classes, out, ends):
        pointers = (
            llvm.ptrtoint(i64(), mgpu.utils.memref_ptr(ref))
            for ref in (offsets, ids, classes, out, ends)
        )
        thread = mgpu.utils.thread_idx()
        first = arith.muli(chunk.registers[()], const(LISTS_PER_CTA))
        row = arith.addi(first, arith.shrui(thread, const(5)))
        lane = arith.andi(thread, const(WORD - 1))
        sizes = (const(n) for n in (num_rows, num_classes))
        asm(_CODE, "l,l,l,l,l,r,r,r,r", *pointers, row, lane, *sizes)

    move(chunk, offsets_gmem, *others)


def _move_emulated(
    chunk,
    offsets_gmem,
    ids_gmem,
    classes_gmem,
    out_gmem,
    ends_gmem,
    *,
    num_classes: int,
):
    """Does what `_CODE` does in plain JAX: interpret mode has no PTX."""
    num_rows, size = offsets_gmem.shape[0] - 1, ids_gmem.shape[0]
    ids, classes = ids_gmem[...], classes_gmem[...]
    lanes = jnp.arange(WORD, dtype=jnp.int32)

    def move_list(row, _):
        start, stop = offsets_gmem[row], offsets_gmem[row + 1]

        def move_chunk(i, base, *, wanted: int):
            entries = start + i * WORD + lanes
            own = ids[jnp.minimum(entries, size - 1)]
            is_own = (entries < stop) & (classes[own] == wanted)
            before = base + jnp.cumsum(is_own, dtype=jnp.int32) - is_own
            store_each(jnp.where(is_own, before, size), own, out_gmem, size)
            return base + is_own.sum(dtype=jnp.int32)

        base = start
        num_chunks = lax.div(stop - start + (WORD - 1), jnp.int32(WORD))
        for class_ in range(num_classes):
            move_own = functools.partial(move_chunk, wanted=class_)
            base = lax.fori_loop(0, num_chunks, move_own, base)
            ends_gmem[row, class_] = base - start
        return ()

    first = chunk * LISTS_PER_CTA
    last = jnp.minimum(first + LISTS_PER_CTA, num_rows)
    lax.fori_loop(first, last, move_list, ())


# Operands: pointers to offsets, ids, classes, out and ends of this map, then row, lane,
# number of rows and of classes. A warp has one row, so its lanes take every branch but
# that of `q` together.
_CODE = """{
.reg .pred p, q, inside;
.reg .b32 start, stop, class, at, entry, id, own, votes, before, count, base, mask;
.reg .b64 address, offset;
setp.ge.s32 p, $5, $7;
@p bra DONE;
mad.wide.s32 address, $5, 4, $0;
ld.global.b32 start, [address];
ld.global.b32 stop, [address+4];
mov.u32 mask, %lanemask_lt;
mov.b32 base, start;
mov.b32 class, 0;
CLASS:
mov.b32 at, start;
CHUNK:
setp.ge.s32 p, at, stop;
@p bra NEXT;
add.s32 entry, at, $6;
setp.lt.s32 inside, entry, stop;
mov.b32 own, -1;
@inside mad.wide.s32 address, entry, 4, $1;
@inside ld.global.b32 id, [address];
@inside mad.wide.s32 address, id, 4, $2;
@inside ld.global.b32 own, [address];
setp.eq.s32 q, own, class;
vote.sync.ballot.b32 votes, q, 0xffffffff;
and.b32 before, votes, mask;
popc.b32 before, before;
add.s32 before, before, base;
@q mad.wide.s32 address, before, 4, $3;
@q st.global.b32 [address], id;
popc.b32 count, votes;
add.s32 base, base, count;
add.s32 at, at, 32;
bra CHUNK;
NEXT:
mad.lo.s32 entry, $5, $8, class;
mad.wide.s32 address, entry, 4, $4;
sub.s32 count, base, start;
setp.eq.s32 q, $6, 0;
@q st.global.b32 [address], count;
add.s32 class, class, 1;
setp.lt.s32 p, class, $8;
@p bra CLASS;
DONE:
}"""
