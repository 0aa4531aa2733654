"""The three ways of copying blocks between global and shared memory.

`Runs` and `Boxes` are TMA's: one thread starts a copy, and the hardware arrives on a
barrier. `SingleRows` is for sequences that TMA cannot read: each thread copies 16 bytes
at a time. A way of copying owns its addresses, its shared memory, its loads and its
store (`plan.BlockCopies`); nothing else asks which one it is.
"""

import abc
import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from pallas_kernels.attention.sm90.cta import Cta, QueryBlock
from pallas_kernels.attention.sm90.plan import (
    BLOCK,
    NUM_CONSUMERS,
    ROWS,
    Width,
)
from pallas_kernels.attention.sm90.row_copies import Rows, reciprocal_of
from pallas_kernels.common.lanes import ALIGNMENT, smem_transforms


class RunAddresses(NamedTuple):
    """Addresses of blocks of runs, in units of ALIGNMENT tokens.

    Attributes:
      first_unit: Start of each block.
      units_to_next_run: From the start of a run to that of the next, for each block.
    """

    first_unit: Int[Array | np.ndarray, " R"]
    units_to_next_run: Int[Array | np.ndarray, " R"]


class BoxAddresses(NamedTuple):
    """Addresses of blocks of boxes.

    Attributes:
      first_row: First row of each block among the rows of all frames.
      first_column: First column of each block, over ALIGNMENT.
    """

    first_row: Int[Array | np.ndarray, " R"]
    first_column: Int[Array | np.ndarray, " R"]


class RowAddresses(NamedTuple):
    """Addresses of blocks that are copied row by row.

    Attributes:
      first_token: First token of each block.
      gap: Tokens from the end of a run to the start of the next, for each block.
      reciprocal: Of the length of each block's runs: see `row_copies.reciprocal_of`.
    """

    first_token: Int[Array | np.ndarray, " R"]
    gap: Int[Array | np.ndarray, " R"]
    reciprocal: Int[Array | np.ndarray, " R"]


class _AsMatrix:
    """Blocks that lie in shared memory as matrices of tokens."""

    def smem(self, num_groups, size, head_dim, dtype):
        """Returns the shared memory of so many groups of `size` tokens."""
        shape = (num_groups, size, head_dim)
        return plgpu.SMEM(shape, dtype, transforms=smem_transforms())

    def first_tokens(self, smem, slot, width):
        """Returns the first tokens of a block in shared memory."""
        return smem.at[slot, pl.ds(0, width)]

    def mean_shape(self, num_means):
        """Returns the axes of so many means in the array that they are read from."""
        return (num_means,)

    def is_row_of_block(self, row, consumer, length):
        """Says which rows of a consumer hold tokens of a block of this length."""
        return row + consumer * ROWS < length


class _ByTma(abc.ABC):
    """Blocks that TMA copies, in pieces."""

    uses_tma = True

    @property
    @abc.abstractmethod
    def num_arrivals(self) -> int:
        """Copies of a key block that arrive on its barrier."""

    @abc.abstractmethod
    def parts(self, width: Width) -> list[tuple[int, int]]:
        """Lists the first row in shared memory, and the tokens, of a block's copies."""

    @abc.abstractmethod
    def query_pieces(self, cta: Cta, query_block: QueryBlock) -> Iterator[tuple]:
        """Yields the source and target of each copy of a query block."""

    @abc.abstractmethod
    def key_pieces(
        self, cta: Cta, array, query_block: QueryBlock, block, slot, width: Width
    ) -> Iterator[tuple]:
        """Yields the source and target of each copy of a key block."""

    @abc.abstractmethod
    def mean_pieces(
        self, cta: Cta, array, query_block: QueryBlock, block, slot
    ) -> Iterator[tuple]:
        """Yields the source and target of each copy of a block of means.

        They lie in one piece, but the barrier counts the copies of any key block.
        """

    @property
    def _means_of_a_copy(self) -> int:
        return BLOCK // self.num_arrivals

    @property
    def num_query_arrivals(self) -> int:
        """Copies of a query block; each is for one consumer."""
        return max(self.num_arrivals, NUM_CONSUMERS)

    def loads(self, cta: Cta, query_block: QueryBlock, fill) -> "_TmaLoads":
        """Returns what copies a query block and its key blocks."""
        del fill
        return _TmaLoads(self, cta, query_block)


@dataclasses.dataclass(frozen=True)
class Runs(_AsMatrix, _ByTma):
    """One TMA copy for each run of tokens that follow each other in memory."""

    tokens: int  # of a run; BLOCK if a block is one
    start_at_multiples: bool = False  # block r starts at token r * BLOCK

    @property
    def num_arrivals(self) -> int:
        """Copies of a key block that arrive on its barrier."""
        return BLOCK // self.tokens

    def parts(self, width: Width) -> list[tuple[int, int]]:
        """Lists the first row in shared memory, and the tokens, of a block's copies.

        Runs past the width are copied too: a barrier counts all of them.
        """
        return [
            (row, min(self.tokens, max(width.tokens - row, ALIGNMENT)))
            for row in range(0, BLOCK, self.tokens)
        ]

    def query_pieces(self, cta: Cta, query_block: QueryBlock):
        """Yields the source and target of each copy of a query block."""
        size = min(self.tokens, ROWS)
        for row in range(0, BLOCK, size):
            source = self._tokens(cta, cta.gmem.q, query_block, row, size)
            target = cta.smem.q_smem.at[row // ROWS, pl.ds(row % ROWS, size)]
            yield source, target

    def key_pieces(
        self, cta: Cta, array, query_block: QueryBlock, block, slot, width: Width
    ):
        """Yields the source and target of each copy of a key block."""
        slot_smem = cta.smem.kv_smem.at[slot]
        for row, size in self.parts(width):
            token = self._token(cta, block, row)
            source = array.at[query_block.batch, pl.ds(token, size), query_block.head]
            yield source, slot_smem.at[pl.ds(row, size)]

    def mean_pieces(self, cta: Cta, array, query_block: QueryBlock, block, slot):
        """Yields the source and target of each copy of a block of means."""
        slot_smem, size = cta.smem.kv_smem.at[slot], self._means_of_a_copy
        for row in range(0, BLOCK, size):
            means = pl.ds(block * BLOCK + row, size)
            source = array.at[query_block.batch, means, query_block.head]
            yield source, slot_smem.at[pl.ds(row, size)]

    def store(self, cta: Cta, query_block: QueryBlock, o_smem) -> None:
        """Starts to copy a consumer's rows that belong to the block."""

        def store_run(row, num_rows):
            target = self._tokens(
                cta, cta.gmem.out, query_block, cta.wg * ROWS + row, num_rows
            )
            source = o_smem.at[pl.ds(row, num_rows)]
            plgpu.copy_smem_to_gmem(source, target, commit_group=False)

        def store_all():
            run = min(self.tokens, ROWS)
            for row in range(0, ROWS, run):
                store_run(row, run)

        def store_short(length):
            # A swizzled buffer can be cut at multiples of ALIGNMENT rows, and so are
            # the short blocks of the sequences that are read in place.
            @pl.loop(0, lax.div(jnp.maximum(length, 0), jnp.int32(ALIGNMENT)))
            def _(step):
                store_run(step * ALIGNMENT, ALIGNMENT)

        if cta.plan.has_short_blocks:
            length = cta.gmem.work.lengths[query_block.block] - cta.wg * ROWS
            lax.cond(length >= ROWS, store_all, lambda: store_short(length))
        else:
            store_all()

    def _tokens(self, cta: Cta, array, query_block: QueryBlock, row, size):
        """Returns `size` tokens of the query block in global memory."""
        token = self._token(cta, query_block.block, row)
        return array.at[query_block.batch, pl.ds(token, size), query_block.head]

    def _token(self, cta: Cta, block, row):
        """Returns the token of a row of a block.

        `row` is a multiple of ALIGNMENT, and Mosaic must see that the token is one.
        """
        if self.start_at_multiples:
            return block * BLOCK + row
        addresses: RunAddresses = cta.gmem.work.addresses
        first_unit = addresses.first_unit[block]
        if self.tokens == BLOCK:
            return first_unit * ALIGNMENT + row
        run = lax.div(jnp.asarray(row, jnp.int32), jnp.int32(self.tokens))
        gap = addresses.units_to_next_run[block] - self.tokens // ALIGNMENT
        return (first_unit + run * gap) * ALIGNMENT + row


@dataclasses.dataclass(frozen=True)
class Boxes(_ByTma):
    """Raster order: a block is boxes of ALIGNMENT columns, one beside the other.

    One TMA copy takes a box out of an array of frames and rows, columns over ALIGNMENT,
    ALIGNMENT. In shared memory the boxes follow each other, so the tokens of a block
    stand in another order there than in tiled order.
    """

    rows: int  # of a tile; the lowest tiles of a frame may have fewer
    num_boxes: int  # side by side, each a copy that arrives on the block's barrier

    @property
    def tokens(self) -> int:
        """Tokens of a box."""
        return self.rows * ALIGNMENT

    @property
    def num_arrivals(self) -> int:
        """Copies of a key block that arrive on its barrier."""
        return self.num_boxes

    def smem(self, num_groups, size, head_dim, dtype):
        """Returns the shared memory of so many groups of `size` tokens."""
        shape = (num_groups, size // ALIGNMENT, ALIGNMENT, head_dim)
        return plgpu.SMEM(shape, dtype, transforms=smem_transforms(in_boxes=True))

    def first_tokens(self, smem, slot, width):
        """Returns the first tokens of a block in shared memory."""
        return smem.at[slot, pl.ds(0, width // ALIGNMENT)]

    def mean_shape(self, num_means):
        """Returns the axes of so many means in the array that they are read from."""
        return num_means // ALIGNMENT, ALIGNMENT

    def mean_pieces(self, cta: Cta, array, query_block: QueryBlock, block, slot):
        """Yields the source and target of each copy of a block of means."""
        slot_smem, size = cta.smem.kv_smem.at[slot], self._means_of_a_copy // ALIGNMENT
        for row in range(0, BLOCK // ALIGNMENT, size):
            rows = pl.ds(block * (BLOCK // ALIGNMENT) + row, size)
            source = array.at[query_block.batch, rows, :, query_block.head]
            yield source, slot_smem.at[pl.ds(row, size)]

    def is_row_of_block(self, row, consumer, length):
        """Says which rows of a consumer hold tokens of a block of this length."""
        del consumer  # each box of a short block is short
        return row % self.tokens < lax.div(length, jnp.int32(self.num_boxes))

    def parts(self, width: Width) -> list[tuple[int, int]]:
        """Lists the first row in shared memory, and the tokens, of a block's copies."""
        size = width.longest // self.num_boxes
        return [(box * size, size) for box in range(self.num_boxes)]

    def query_pieces(self, cta: Cta, query_block: QueryBlock):
        """Yields the source and target of each copy of a query block."""
        for box in range(self.num_boxes):
            consumer, place = divmod(box, ROWS // self.tokens)
            source = self._box(
                cta, cta.gmem.q, query_block, query_block.block, box, self.rows
            )
            rows = pl.ds(place * self.rows, self.rows)
            yield source, cta.smem.q_smem.at[consumer, rows]

    def key_pieces(
        self, cta: Cta, array, query_block: QueryBlock, block, slot, width: Width
    ):
        """Yields the source and target of each copy of a key block."""
        slot_smem = cta.smem.kv_smem.at[slot]
        for box, (row, size) in enumerate(self.parts(width)):
            first, rows = row // ALIGNMENT, size // ALIGNMENT
            source = self._box(cta, array, query_block, block, box, rows)
            yield source, slot_smem.at[pl.ds(first, rows)]

    def store(self, cta: Cta, query_block: QueryBlock, o_smem) -> None:
        """Starts to copy a consumer's rows that belong to the block."""
        own = ROWS // self.tokens

        def store_boxes(width: Width):
            rows = width.longest // (ALIGNMENT * self.num_boxes)
            for place in range(own):
                source = o_smem.at[pl.ds(place * self.rows, rows)]
                box = cta.wg * own + place
                target = self._box(
                    cta, cta.gmem.out, query_block, query_block.block, box, rows
                )
                plgpu.copy_smem_to_gmem(source, target, commit_group=False)

        widest, *others = cta.plan.widths
        if not others:
            store_boxes(widest)
        else:
            length = cta.gmem.work.lengths[query_block.block]
            lax.cond(
                length < widest.longest,
                lambda: store_boxes(others[0]),
                lambda: store_boxes(widest),
            )

    def _box(self, cta: Cta, array, query_block: QueryBlock, block, box, rows):
        """Returns the first rows of one box of a block, [rows, ALIGNMENT, D]."""
        addresses: BoxAddresses = cta.gmem.work.addresses
        column = addresses.first_column[block] + box
        first = addresses.first_row[block]
        return array.at[
            query_block.batch, pl.ds(first, rows), column, :, query_block.head
        ]


@dataclasses.dataclass(frozen=True)
class _TmaLoads:
    """TMA copies of one query block and its key blocks; they arrive by themselves."""

    copies: _ByTma
    cta: Cta
    query_block: QueryBlock

    def load_queries(self) -> None:
        """Starts to copy the query block."""
        for source, target in self.copies.query_pieces(self.cta, self.query_block):
            plgpu.copy_gmem_to_smem(source, target, self.cta.signals.q_full)

    def load_block(self, source, block, slot, fill, width: Width) -> None:
        """Starts to copy a key block into a free slot of the ring."""
        del fill
        kv_full = self.cta.signals.kv_full

        def copy(**options):
            for piece, target in self.copies.key_pieces(
                self.cta, source, self.query_block, block, slot, width
            ):
                plgpu.copy_gmem_to_smem(piece, target, kv_full.at[slot], **options)

        if self.cta.plan.pairs and self._can_be_halved(width):
            lax.cond(
                self.query_block.is_shared,
                lambda: copy(collective_axes="pair"),
                lambda: copy(),
            )
        else:
            copy()  # each CTA makes its own, and both still wait for each other

    def load_means(self, source, block, slot, fill) -> None:
        """Starts to copy a block of means into a free slot of the ring."""
        del fill
        pieces = self.copies.mean_pieces(
            self.cta, source, self.query_block, block, slot
        )
        for piece, target in pieces:
            plgpu.copy_gmem_to_smem(piece, target, self.cta.signals.kv_full.at[slot])

    def finish(self, end) -> None:
        """Does nothing: the hardware arrives."""

    def _can_be_halved(self, width: Width) -> bool:
        """Says whether each of the two CTAs can take half of every copy.

        Halves are whole groups of ALIGNMENT tokens, or half the channels of one.
        """
        groups = {size // ALIGNMENT for _, size in self.copies.parts(width)}
        odd = {n for n in groups if n % 2}
        return self.cta.instructions.copies_for_pairs and (
            not odd or (odd == {1} and self.cta.plan.head_dim == 128)
        )


@dataclasses.dataclass(frozen=True)
class SingleRows(_AsMatrix):
    """The producer's threads copy each row of a block, for TMA cannot."""

    uses_tma = False
    num_arrivals = 1  # all threads of the producer arrive together
    num_query_arrivals = 1

    def loads(self, cta: Cta, query_block: QueryBlock, fill) -> "_RowLoads":
        """Returns what copies a query block and its key blocks."""
        return _RowLoads(cta, query_block, fill)

    def store(self, cta: Cta, query_block: QueryBlock, o_smem) -> None:
        """Copies a consumer's rows that belong to the block."""
        rows = _rows_of_block(cta, query_block.block, cta.wg * ROWS)
        target = cta.gmem.out.at[query_block.batch, :, query_block.head]
        cta.instructions.store_rows(o_smem, rows, target)


@dataclasses.dataclass(frozen=True)
class _RowLoads:
    """Copies by threads of one query block and its key blocks.

    Threads learn that their own copies are done by waiting for groups of them, in the
    order in which they were started. Only then do they arrive on the barrier of the
    block: when a later copy has been started. Q is in the group of the first K.
    """

    cta: Cta
    query_block: QueryBlock
    first_fill: jax.Array  # `fill` of the query block's first copy

    @property
    def copies_ahead(self) -> int:
        """Copies that are under way while the next one is started.

        A slot is free once its block and the next have arrived and been used, so two
        slots at least are for blocks that have.
        """
        return min(2, self.cta.plan.config.num_slots - 2)

    def load_queries(self) -> None:
        """Starts to copy the query block."""
        source = self.cta.gmem.q.at[self.query_block.batch, :, self.query_block.head]
        for consumer in range(NUM_CONSUMERS):
            rows = _rows_of_block(self.cta, self.query_block.block, consumer * ROWS)
            self.cta.instructions.fetch_rows(
                source, rows, self.cta.smem.q_smem.at[consumer], num_rows=ROWS
            )

    def load_block(self, source, block, slot, fill, width: Width) -> None:
        """Starts to copy a key block, and makes one arrive that was started before."""
        rows = _rows_of_block(self.cta, block)
        self._load(source, rows, slot, fill, num_rows=width.tokens)

    def load_means(self, source, block, slot, fill) -> None:
        """Starts to copy a block of means likewise."""
        first = block * BLOCK
        rows = Rows(
            start=first,
            jump=jnp.int32(0),
            reciprocal=jnp.int32(reciprocal_of(BLOCK)),
            length=jnp.minimum(source.shape[1] - first, BLOCK),
            first=jnp.int32(0),
        )
        self._load(source, rows, slot, fill, num_rows=BLOCK)

    def _load(self, source, rows: Rows, slot, fill, *, num_rows: int) -> None:
        self.cta.instructions.fetch_rows(
            source.at[self.query_block.batch, :, self.query_block.head],
            rows,
            self.cta.smem.kv_smem.at[slot],
            num_rows=num_rows,
        )
        self.cta.instructions.end_group()

        @pl.when(fill - self.first_fill >= self.copies_ahead)
        def _():
            self._arrive(fill, self.copies_ahead)

    def finish(self, end) -> None:
        """Makes the last copies arrive; `end` is the `fill` of the next one."""
        for pending in range(self.copies_ahead - 1, -1, -1):
            pl.when(end - 1 - pending >= self.first_fill)(
                functools.partial(self._arrive, end - 1, pending)
            )

        @pl.when(end == self.first_fill)
        def _no_keys():
            self.cta.instructions.end_group()
            self.cta.instructions.wait_for_groups(0)
            plgpu.barrier_arrive(self.cta.signals.q_full)

    def _arrive(self, last, pending: int):
        """Waits for the copy `pending` before the last one, and arrives for it."""
        fill = last - pending
        self.cta.instructions.wait_for_groups(pending)

        @pl.when(fill == self.first_fill)
        def _():
            plgpu.barrier_arrive(self.cta.signals.q_full)

        plgpu.barrier_arrive(self.cta.signals.kv_full.at[self.cta.slot_of(fill)])


def _rows_of_block(cta: Cta, block, first=0) -> Rows:
    """Returns the rows of a block from `first` on."""
    addresses: RowAddresses = cta.gmem.work.addresses
    return Rows(
        addresses.first_token[block],
        addresses.gap[block],
        addresses.reciprocal[block],
        cta.gmem.work.lengths[block],
        jnp.asarray(first, jnp.int32),
    )
