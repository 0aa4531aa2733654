"""Block-sparse attention, forward, for Hopper (sm_90): Pallas, Mosaic GPU.

One CTA works on one query block of 128 tokens at a time and walks its list of kept
key blocks. Warpgroup PRODUCER issues TMA copies; the two consumers own 64 query rows
each. K and V blocks share one ring, in the order in which the consumers need them:
K0 K1 V0 K2 V1 ... K(n-1) V(n-2) V(n-1), because the logits of step i + 1 are issued
before step i is multiplied with V, so that softmax runs while the tensor cores do.

Barrier    arrives        waits      count
q_full     TMA            consumers  one for each query block
q_free     consumers      PRODUCER   one for each query block
kv_full    TMA            consumers  two for each kept key block
kv_free    consumers      PRODUCER   two for each kept key block
turn       one consumer   the other  one for each step after the first of a width
pair_free  both PRODUCERs PRODUCER   two for each key block of a shared row

Two CTAs are a cluster. Where both have full rows of one head, which read the same keys
in the same order, each copies half of every block to both: L2 is read half as often,
and its wires are what a dense call has left to save. A slot of both is then written by
both PRODUCERs, so each tells the other, on pair_free, when its own consumers are done
with it. Other rows take no notice of their neighbour.

Lists have their short blocks last, by classes of width (`partition_lists_sm90.py`). A
class is walked like a list of its own, with products over as many keys as it has.

PRODUCER waits for the arrivals that no later copy needs before it ends ("drains"), so
that every barrier completion is observed. The output leaves through the shared memory
of Q, so q_free comes after it has been read. Consumers call commit_smem before each
copy to global memory.

A block lies in one piece in tiled order. In raster order one copy takes a box of 8
columns, or, where text stands beside the video, one row of the tile; that is eight
copies for a block and slower, for every copy is an arrival of all threads. A short
block (edge tile or text) is copied up to its width, a query block whole: the rows past
its end are other tokens, or zeros past the end of the array. As keys they are masked;
as queries the consumers set them to zero, and they are not stored.

Where blocks do not start at multiples of 8 tokens, PRODUCER's threads copy rows instead
(`sm90_rows.py`). A copy then arrives when the one `copies_ahead` later has been
started, and Q arrives with the first K.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.sm90 import copies as sm90_rows
from pallas_kernels.attention.sm90.consumer import consume
from pallas_kernels.attention.sm90.plan import (
    ALIGNMENT,
    BLOCK,
    NUM_CONSUMERS,
    PRODUCER,
    ROWS,
    Boxes,
    GlobalRefs,
    Plan,
    Runs,
    Signals,
    SingleRows,
    Tile,
    Width,
    block_of,
    bounds_of_width,
    box_of,
    for_each_tile,
    num_own_tiles,
    scratch_types,
    shares_keys,
    slot_of,
    token_of_row,
)


class Work(NamedTuple):
    """What the kernel computes, for L = B * N lists of R query blocks each.

    Attributes:
      row_offsets: Start of each query block's list.
      block_ids: Key blocks of the lists, by width.
      width_ends: Where each width ends in each list, counted from its start.
      full_list: The list of a query block that keeps every block.
      order: Query blocks, numbered row by row, as CTAs take them.
      num_tiles: How many entries of `order` there are.
      starts: Where blocks begin: see `sm90_geometry.Geometry`.
      strides: Likewise.
      lengths: Tokens of each block.
      valid: Tokens of each block of each batch item that are not padding.
      reciprocals: See `sm90_geometry.Geometry`; read if blocks are copied by rows.
    """

    row_offsets: Int[Array, "L R+1"]
    block_ids: Int[Array, "L M"]
    width_ends: Int[Array, "L R widths"]
    full_list: Int[Array, " R"]
    order: Int[Array, " L*R"]
    num_tiles: Int[Array, " 1"]
    starts: Int[Array, " R"]
    strides: Int[Array, " R"]
    lengths: Int[Array, " R"]
    valid: Int[Array, "B R"]
    reciprocals: Int[Array, " R"]


def attend_blocks(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    work: Work,
    *,
    plan: Plan,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Float[Array, "B T N D"], Float[Array, "L R 128"]]:
    """Computes every query block.

    Args:
      q: Queries, bfloat16 or float16; T >= BLOCK unless blocks are copied by rows.
      k: Keys.
      v: Values.
      work: Lists and their order, which has every query block.
      plan: Static sizes and choices.
      interpret: Run on the CPU in GPU interpret mode.

    Returns:
      The output, and the natural log-sum-exp of each row of each block; rows past a
      block's length are undefined.
    """
    lse_shape = (work.row_offsets.shape[0], plan.num_blocks, BLOCK)
    outputs = (
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct(lse_shape, jnp.float32),
    )
    return _kernel(q.dtype, plan, outputs, interpret)(q, k, v, *work)


def attend_blocks_again(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    work: Work,
    out: Float[Array, "B T N D"],
    lse: Float[Array, "L R 128"],
    *,
    plan: Plan,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Float[Array, "B T N D"], Float[Array, "L R 128"]]:
    """Computes the first `work.num_tiles` query blocks of `work.order`, in place.

    Takes what `attend_blocks` took and returned, and a plan with persistent CTAs.
    """
    refs = jax.new_ref(out), jax.new_ref(lse)
    _kernel(q.dtype, plan, (), interpret)(q, k, v, *work, *refs)
    out, lse = (jax.freeze(ref) for ref in refs)
    return out, lse


def _kernel(dtype, plan: Plan, outputs, interpret):
    return plgpu.kernel(
        functools.partial(_body, plan=plan),
        out_type=outputs,
        scratch_types=scratch_types(plan, dtype),
        grid=(plan.num_ctas // 2 if plan.pairs else plan.num_ctas,),
        grid_names=("cta",),
        cluster=(2,) if plan.pairs else (),
        cluster_names=("pair",) if plan.pairs else (),
        num_threads=NUM_CONSUMERS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
        ),
        kernel_name="block_sparse_attention_sm90",
        interpret=interpret,
    )


def _body(*refs, plan: Plan, q_free, kv_free, turn, lse_smem, pair_free=None, **inputs):
    gmem = GlobalRefs(*refs)
    signals = Signals(plan, q_free, kv_free, turn, pair_free)
    wg = lax.axis_index("wg")

    @pl.when(wg == PRODUCER)
    def _():
        plgpu.set_max_registers(plan.config.producer_registers, action="decrease")
        _produce(gmem, plan, signals, **inputs)

    @pl.when(wg != PRODUCER)
    def _():
        plgpu.set_max_registers(plan.config.consumer_registers, action="increase")
        consume(gmem, plan, signals, wg, lse_smem=lse_smem, **inputs)


def _produce(gmem, plan: Plan, signals: Signals, *, q_smem, kv_smem, q_full, kv_full):
    """Copies Q, then K and V of every kept block, as far ahead as the ring allows."""
    num_slots = plan.config.num_slots

    def load_tile(tile, index, fill):
        @pl.when(index > 0)
        def _():
            signals.wait_q_free()

        _load_queries(gmem, plan, tile, q_smem, q_full)
        rows = None
        if isinstance(plan.copies, SingleRows):
            rows = _RowCopies(plan, fill, q_full, kv_full)
        for number, width in enumerate(plan.widths):
            begin, end = bounds_of_width(gmem, plan, tile, number)
            loader = _Loader(gmem, plan, signals, tile, width, kv_smem, kv_full, rows)
            loader.load(begin, end, fill)
            fill += 2 * (end - begin)

        if rows is not None:
            rows.finish(fill)
        return fill

    fill = for_each_tile(gmem, plan, load_tile, jnp.int32(0))

    @pl.when(num_own_tiles(gmem, plan) > 0)
    def _():
        signals.wait_q_free()

    is_shared = shares_keys(gmem, plan)

    @pl.loop(jnp.maximum(fill - num_slots, 0), fill)
    def _drain(last_fill):
        # A CTA of a pair stays until the other has what is copied to it.
        signals.wait_kv_free(slot_of(plan, last_fill), is_shared)


def _load_queries(gmem, plan: Plan, tile: Tile, q_smem, q_full):
    match plan.copies:
        case SingleRows():
            source = gmem.q.at[tile.batch, :, tile.head]
            for consumer in range(NUM_CONSUMERS):
                sm90_rows.fetch(
                    source,
                    sm90_rows.rows_of_block(gmem, tile.block, consumer * ROWS),
                    q_smem.at[consumer],
                    num_rows=ROWS,
                    emulate=plan.emulate_wgmma,
                )
        case Boxes(rows, number_of_boxes) as boxes:
            for number in range(number_of_boxes):
                consumer, place = divmod(number, ROWS // boxes.tokens)
                source = box_of(gmem, gmem.q, tile, tile.block, number, rows)
                target = q_smem.at[consumer, pl.ds(place * rows, rows)]
                plgpu.copy_gmem_to_smem(source, target, q_full)
        case Runs() as runs:
            size = min(runs.tokens, ROWS)
            for row in range(0, BLOCK, size):
                token = token_of_row(gmem, runs, tile.block, row)
                source = gmem.q.at[tile.batch, pl.ds(token, size), tile.head]
                target = q_smem.at[row // ROWS, pl.ds(row % ROWS, size)]
                plgpu.copy_gmem_to_smem(source, target, q_full)


@dataclasses.dataclass(frozen=True)
class _RowCopies:
    """Arrivals of the copies by rows that belong to one query block.

    Threads learn that their own copies are done by waiting for them, in the order in
    which they were started. Q is in the group of the first K.
    """

    plan: Plan
    first: jax.Array  # number of the query block's first copy
    q_full: Any  # a barrier
    kv_full: jax.Ref

    def follow(self, fill):
        """Ends the group of a copy, and tells of one started before it."""
        plan = self.plan
        sm90_rows.end_group(emulate=plan.emulate_wgmma)

        @pl.when(fill - self.first >= plan.copies_ahead)
        def _():
            self._tell(fill, plan.copies_ahead)

    def finish(self, end):
        """Tells of the last copies; `end` is the number of the next one."""
        for pending in range(self.plan.copies_ahead - 1, -1, -1):
            pl.when(end - 1 - pending >= self.first)(
                functools.partial(self._tell, end - 1, pending)
            )

        @pl.when(end == self.first)
        def _no_keys():
            sm90_rows.end_group(emulate=self.plan.emulate_wgmma)
            sm90_rows.wait_for_groups(0, emulate=self.plan.emulate_wgmma)
            plgpu.barrier_arrive(self.q_full)

    def _tell(self, last, pending: int):
        fill = last - pending
        sm90_rows.wait_for_groups(pending, emulate=self.plan.emulate_wgmma)

        @pl.when(fill == self.first)
        def _():
            plgpu.barrier_arrive(self.q_full)

        plgpu.barrier_arrive(self.kv_full.at[slot_of(self.plan, fill)])


@dataclasses.dataclass(frozen=True)
class _Loader:
    """Copies of the key blocks of one width of one list."""

    gmem: GlobalRefs
    plan: Plan
    signals: Signals
    tile: Tile
    width: Width
    kv_smem: jax.Ref
    kv_full: jax.Ref
    rows: _RowCopies | None  # if blocks are copied by rows

    def load(self, begin, end, fill):
        """Copies K of each step, then V of the one before; `fill` counts copies."""

        def load_step(step, blocks):
            # The next block's number is read before the copies wait for a free slot.
            block_v, block_k = blocks
            next_block = block_of(self.gmem, self.plan, self.tile, step + 1)
            place = fill + 2 * (step - begin)
            self._copy(self.gmem.k, block_k, place - jnp.minimum(step - begin, 1))

            @pl.when(step > begin)
            def _():
                self._copy(self.gmem.v, block_v, place)

            return block_k, next_block

        @pl.when(end > begin)
        def _():
            first = block_of(self.gmem, self.plan, self.tile, begin)
            last, _ = lax.fori_loop(begin, end, load_step, (first, first))
            self._copy(self.gmem.v, last, fill + 2 * (end - begin) - 1)

    def _copy(self, source, block, fill):
        plan, tile = self.plan, self.tile
        slot = slot_of(plan, fill)

        @pl.when(fill >= plan.config.num_slots)
        def _():
            self.signals.wait_kv_free(slot, tile.is_shared)

        if self.rows is not None:
            sm90_rows.fetch(
                source.at[tile.batch, :, tile.head],
                sm90_rows.rows_of_block(self.gmem, block),
                self.kv_smem.at[slot],
                num_rows=self.width.tokens,
                emulate=plan.emulate_wgmma,
            )
            self.rows.follow(fill)
            return

        copies = plan.copies
        assert not isinstance(copies, SingleRows)

        def copy(**options):
            for source_rows, target in self._pieces(copies, source, block, slot):
                plgpu.copy_gmem_to_smem(
                    source_rows, target, self.kv_full.at[slot], **options
                )

        if plan.pairs and self._can_be_halved(copies):
            lax.cond(
                tile.is_shared, lambda: copy(collective_axes="pair"), lambda: copy()
            )
        else:
            copy()  # each CTA makes its own, and both still wait for each other

    def _can_be_halved(self, copies: Runs | Boxes) -> bool:
        """Whether each of the two CTAs can take half of every copy.

        Halves are whole groups of ALIGNMENT tokens, or half the channels of one.
        Interpret mode has no copies to two CTAs.
        """
        groups = {size // ALIGNMENT for _, size in copies.parts(self.width)}
        odd = {n for n in groups if n % 2}
        return not self.plan.emulate_wgmma and (
            not odd or (odd == {1} and self.plan.head_dim == 128)
        )

    def _pieces(self, copies: Runs | Boxes, source, block, slot):
        """What to copy, and where to: as many as kv_full expects arrivals."""
        gmem, tile, slot_smem = self.gmem, self.tile, self.kv_smem.at[slot]
        for number, (row, size) in enumerate(copies.parts(self.width)):
            if isinstance(copies, Boxes):
                first, rows = row // ALIGNMENT, size // ALIGNMENT
                box = box_of(gmem, source, tile, block, number, rows)
                yield box, slot_smem.at[pl.ds(first, rows)]
            else:
                token = token_of_row(gmem, copies, block, row)
                tokens = source.at[tile.batch, pl.ds(token, size), tile.head]
                yield tokens, slot_smem.at[pl.ds(row, size)]
