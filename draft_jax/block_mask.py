"""Masks of block pairs, in the form that a kernel walks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from draft_jax.grid import VideoGrid
from draft_jax.pytree import register_dataclass
from pallas_kernels import ranking
from pallas_kernels.common import jit_once, lists_of_maps, on_own_shards


@register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class BlockMask:
    """Kept block pairs per batch item and head, as compressed sparse rows.

    Blocks are those of `grid` in tiled order, text blocks included: R = C =
    `grid.num_blocks`. Query block `r` attends to the key blocks
    `block_ids[b, n, row_offsets[b, n, r] : row_offsets[b, n, r + 1]]`, which are
    in ascending order. Shapes are static: the capacity M bounds the kept pairs of
    one head, and entries at or past `row_offsets[b, n, R]` are 0 and not read.

    A pytree whose leaves are the two arrays; `grid` is static. `==` and `hash` go by
    identity; `to_dense` makes arrays that can be compared.

    Attributes:
      row_offsets: int32 [B, N, R + 1], non-decreasing, first entry 0.
      block_ids: int32 [B, N, M], key block of each kept pair.
      grid: Geometry that defines the blocks.
    """

    row_offsets: Int[Array, "*layers B N offsets"]
    block_ids: Int[Array, "*layers B N M"]
    grid: VideoGrid = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_dense(
        cls,
        dense: Bool[Array | np.ndarray, "B N R R"],
        *,
        grid: VideoGrid,
        capacity: int | None = None,
    ) -> "BlockMask":
        """Compresses a boolean map of all block pairs.

        Args:
          dense: True where the pair (query block, key block) is kept, over all
            `grid.num_blocks` blocks in tiled order, text blocks included. Batch items
            and heads that share a map repeat it, such as by `jnp.broadcast_to`.
          grid: Geometry that defines the blocks.
          capacity: Most pairs any head can keep; R * R by default. A smaller one
            saves memory. Under jit the map's contents are not known, so nothing
            can be raised there: pairs past the capacity, last rows first, are
            dropped.

        Returns:
          A mask with the same kept pairs.

        Raises:
          ValueError: dense is not square over the grid's blocks, or a head keeps
            more pairs than `capacity` (outside jit).
          TypeError: dense is not boolean.
        """
        num_blocks = grid.num_blocks
        _check_map("dense", dense, num_blocks, f"block of {grid}")
        if capacity is None:
            capacity = num_blocks * num_blocks
        if capacity < 1:
            raise ValueError(f"{capacity=} must be at least 1")
        if not isinstance(dense, jax.core.Tracer):
            with jax.ensure_compile_time_eval():  # a known map in a traced function
                kept_pairs = dense.sum((-2, -1), dtype=np.int32)
            most_kept = int(jax.device_get(kept_pairs).max(initial=0))
            if most_kept > capacity:
                raise ValueError(
                    f"{capacity=} is too small: a head keeps {most_kept} pairs"
                )
        words = ranking.pack(jnp.asarray(dense))
        first_columns = np.arange(words.shape[-1], dtype=np.int32) * ranking.WORD_BITS
        row_offsets, block_ids = ranking.compress_rows(words, first_columns, capacity)
        mask = cls(row_offsets=row_offsets, block_ids=block_ids, grid=grid)
        return mask.vouched_for()

    @classmethod
    def from_visual(
        cls,
        visual: Bool[Array | np.ndarray, "B N S S"],
        *,
        grid: VideoGrid,
        capacity: int | None = None,
    ) -> "BlockMask":
        """Compresses a boolean map of the video's block pairs; text is kept.

        Every pair with a text block is kept beside the pairs of the map.

        Args:
          visual: True where the pair (query block, key block) is kept, over the
            `grid.num_visual_blocks` tiles of the video in tiled order.
          grid: Geometry that defines the blocks.
          capacity: As in `from_dense`; the pairs with text count.

        Returns:
          A mask with these pairs and all pairs with text.

        Raises:
          ValueError: visual is not square over the grid's tiles, or a head keeps more
            pairs than `capacity` (outside jit).
          TypeError: visual is not boolean.
        """
        _check_map("visual", visual, grid.num_visual_blocks, f"visual block of {grid}")
        text = (grid.visual_blocks.start, grid.num_blocks - grid.visual_blocks.stop)
        # A known map stays known: its pairs are counted.
        pad = jnp.pad if isinstance(visual, jax.Array) else np.pad
        dense = pad(visual, ((0, 0), (0, 0), text, text), constant_values=True)
        return cls.from_dense(dense, grid=grid, capacity=capacity)

    @classmethod
    def full(cls, *, grid: VideoGrid, batch: int, num_heads: int) -> "BlockMask":
        """Returns the mask that keeps every pair, which is dense attention."""
        num_blocks = grid.num_blocks
        row_offsets = np.arange(num_blocks + 1, dtype=np.int32) * num_blocks
        block_ids = np.tile(np.arange(num_blocks, dtype=np.int32), num_blocks)
        shape = (batch, num_heads)
        return cls(
            row_offsets=jnp.broadcast_to(row_offsets, (*shape, num_blocks + 1)),
            block_ids=jnp.broadcast_to(block_ids, (*shape, num_blocks**2)),
            grid=grid,
        ).vouched_for()

    @property
    def lists_are_valid(self) -> bool:
        """Whether this package made the lists, so that no kernel has to check them.

        It is known of this object only: one that is built, replaced or mapped from
        its parts is checked again where it is used.
        """
        return self.__dict__.get("_lists_are_valid", False)

    def vouched_for(self) -> "BlockMask":
        """Returns this mask as one whose lists are valid; for their makers only."""
        object.__setattr__(self, "_lists_are_valid", True)
        return self

    @property
    def capacity(self) -> int:
        """Most pairs a head can keep, M."""
        return self.block_ids.shape[-1]

    @property
    @jit_once
    def counts(self) -> Int[Array, "*layers B N R"]:
        """Key blocks kept by each query block."""
        return jnp.diff(self.row_offsets, axis=-1)

    @jit_once
    def row_ids(self) -> Int[Array, "B N M"]:
        """Returns the query block of each kept pair; R for entries not read."""
        capacity = self.capacity

        def run(row_offsets):
            batch, num_heads, _ = row_offsets.shape
            item, head = jnp.ogrid[:batch, :num_heads]
            # The row of an entry is the number of rows that end at or before it.
            ends = jnp.zeros((batch, num_heads, capacity + 1), jnp.int32)
            place = (item[..., None], head[..., None], row_offsets[..., 1:])
            ends = ends.at[place].add(1)
            return (jnp.cumsum(ends[..., :capacity], axis=-1, dtype=jnp.int32),)

        (rows,) = on_own_shards(
            run,
            operation="BlockMask.row_ids",
            operands=("row_offsets: B N R",),
            results=("B N M",),
        )(self.row_offsets)
        return rows

    @jit_once
    def to_dense(self) -> Bool[Array, "B N R R"]:
        """Returns the boolean map of kept block pairs, text blocks included."""
        num_blocks = self.grid.num_blocks

        def run(rows, block_ids):
            columns = jnp.where(rows < num_blocks, block_ids, 0)
            batch, num_heads, _ = rows.shape
            # Entries that are not read go to a row of their own, not out of bounds,
            # where checkify would stop. It has no rule for a scatter under vmap.
            kept = jnp.zeros((batch, num_heads, num_blocks + 1, num_blocks), jnp.bool_)
            item, head = jnp.ogrid[:batch, :num_heads]
            kept = kept.at[item[..., None], head[..., None], rows, columns].set(True)
            return (kept[:, :, :num_blocks],)

        (dense,) = on_own_shards(
            run,
            operation="BlockMask.to_dense",
            operands=("row_ids: B N M", "block_ids: B N M"),
            results=("B N R C",),
        )(self.row_ids(), self.block_ids)
        return dense

    @property
    @jit_once
    def density(self) -> Float[Array, "*layers B N"]:
        """Share of token pairs kept, weighting each block pair by its real tokens.

        1.0 is dense attention. The cost of a block-sparse kernel is proportional
        to it; with short blocks or text it differs from the share of block pairs.
        """
        lists = lists_of_maps(self.row_offsets.ndim - 1)
        (shares,) = on_own_shards(
            lambda mask: (_density(mask),),
            operation="BlockMask.density",
            operands=(f"mask: {lists} R",),
            results=(lists,),
        )(self)
        return shares


def _density(mask: BlockMask) -> Float[Array, "*layers B N"]:
    lengths = np.asarray(mask.grid.block_lengths, np.int32)
    if (lengths == lengths[0]).all():
        kept_tokens = mask.counts * lengths[0]
    else:
        # Sums may pass 2**31 and wrap round: differences within a row do not.
        sums = jnp.cumsum(jnp.asarray(lengths)[mask.block_ids], -1, dtype=jnp.int32)
        sums = jnp.concatenate([jnp.zeros_like(sums[..., :1]), sums], axis=-1)
        kept_tokens = jnp.diff(jnp.take_along_axis(sums, mask.row_offsets, -1))
    pairs = kept_tokens.astype(jnp.float32) * lengths.astype(np.float32)
    return pairs.sum(-1) / float(mask.grid.num_tokens) ** 2


def _check_map(
    name: str, kept: Array | np.ndarray, num_blocks: int, blocks: str
) -> None:
    """Raises unless `kept` is boolean [B, N, num_blocks, num_blocks]."""
    if not isinstance(kept, (jax.Array, np.ndarray)):
        raise TypeError(f"{name} is {type(kept).__name__}; expected a boolean array")
    if kept.ndim != 4 or kept.shape[2:] != (num_blocks, num_blocks):
        raise ValueError(
            f"{name} has shape {kept.shape}; expected [batch, heads, {num_blocks}, "
            f"{num_blocks}], one row and column per {blocks}"
        )
    if kept.dtype != np.bool_:
        raise TypeError(f"{name} has dtype {kept.dtype}; expected bool")
