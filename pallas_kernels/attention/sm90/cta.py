"""The context that the roles of one CTA share: memory, signals, query blocks."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.sm90.instructions import Instructions
from pallas_kernels.attention.sm90.plan import Plan, Ref
from pallas_kernels.attention.sm90.signals import Signals


class MeanBlocks(NamedTuple):
    """Means for skipped key blocks, in blocks of BLOCK: see `means`.

    Attributes:
      k: Mean keys, [B, M, N, D]; M as `BlockCopies.mean_shape` splits it.
      v: Mean values, like k.
      log_dropped: Base-2 logarithm of the frames that a query block dropped of each
        column, times the tokens of a mean in a frame where that is the same for all;
        minus infinity for none.
      log_tokens: Base-2 logarithm of the tokens of each mean in a frame; not read
        where they are the same.
      num_blocks: Blocks of means that each query block walks: all or none.
    """

    k: Any
    v: Any
    log_dropped: Float[Array, "L R C"]
    log_tokens: Float[Array, " M"]
    num_blocks: Int[Array, "L R"]


class Work(NamedTuple):
    """Arrays that say what to compute, for L = B * N lists of R query blocks each.

    Outside the kernel its parts are arrays, inside references to global memory.

    Attributes:
      row_offsets: Start of each query block's list.
      block_ids: Key blocks of the lists, by width.
      width_ends: Where each width ends in each list, counted from its start.
      full_list: The list of a query block that keeps every key block.
      launch_order: Query blocks, counted list by list, as CTAs take them.
      num_query_blocks: How many entries of `launch_order` there are.
      addresses: Where blocks lie; the class belongs to the way of copying.
      lengths: Tokens of each query block.
      valid: Tokens of each key block of each batch item that are not padding. Where
        queries are masked, blocks of both are the same.
      means: What stands for the blocks that are in no list, or None.
    """

    row_offsets: Int[Array, "L offsets"]
    block_ids: Int[Array, "L M"]
    width_ends: Int[Array, "L R widths"]
    full_list: Int[Array, " K"]
    launch_order: Int[Array, " L*R"]
    num_query_blocks: Int[Array, " 1"]
    addresses: Any
    lengths: Int[Array, " R"]
    valid: Int[Array, "B K"]
    means: MeanBlocks | None = None


class GlobalMemory(NamedTuple):
    """References to global memory; tokens are [B, T, N, D] or boxes of them."""

    q: Ref
    k: Ref
    v: Ref
    work: Work
    out: Ref
    lse: Ref  # [L, R, BLOCK]


class SharedMemory(NamedTuple):
    """References to shared memory."""

    q_smem: Ref  # one group of ROWS for each consumer
    kv_smem: Ref  # the ring
    lse_smem: Ref  # [NUM_CONSUMERS, ROWS]


@dataclasses.dataclass(frozen=True)
class QueryBlock:
    """One query block and the entries of its list."""

    batch: jax.Array
    head: jax.Array
    list_row: jax.Array  # batch * num_heads + head
    block: jax.Array
    first: jax.Array  # entry in block_ids
    count: jax.Array
    is_shared: jax.Array | bool  # both CTAs of the pair have full rows of one head
    num_means: jax.Array | int  # blocks of means behind the list


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cta:
    """One warpgroup's view of its CTA."""

    plan: Plan
    gmem: GlobalMemory
    smem: SharedMemory
    signals: Signals
    instructions: Instructions
    wg: jax.Array  # value of the "wg" axis

    @property
    def means(self) -> MeanBlocks:
        """The means of a launch that has them."""
        assert self.gmem.work.means is not None
        return self.gmem.work.means

    def for_each_query_block(self, body, carry):
        """Calls `carry = body(query_block, index, carry)` for this CTA's blocks."""
        cta = lax.axis_index("cta")
        if self.plan.pairs:
            return body(self._query_block_of_pair(), jnp.int32(0), carry)
        if not self.plan.persistent:
            return body(self._query_block(cta), jnp.int32(0), carry)

        def step(index, carry):
            position = cta + index * self.plan.num_ctas
            return body(self._query_block(position), index, carry)

        return lax.fori_loop(0, self.num_query_blocks(), step, carry)

    def num_query_blocks(self):
        """Counts the query blocks of this CTA."""
        if not self.plan.persistent:
            return jnp.int32(1)
        later = self.gmem.work.num_query_blocks[0] - lax.axis_index("cta")
        return lax.div(later + (self.plan.num_ctas - 1), jnp.int32(self.plan.num_ctas))

    def _query_block(self, position) -> QueryBlock:
        plan, work = self.plan, self.gmem.work
        row = work.launch_order[position]
        list_row = lax.div(row, jnp.int32(plan.num_blocks))
        block = lax.rem(row, jnp.int32(plan.num_blocks))
        if plan.is_dense:
            first, last = jnp.int32(0), jnp.int32(plan.num_key_blocks)
        else:
            first = work.row_offsets[list_row, block]
            last = work.row_offsets[list_row, block + 1]
        num_means: jax.Array | int = 0
        if plan.means is not None:
            num_means = self.means.num_blocks[list_row, block]
        return QueryBlock(
            batch=lax.div(list_row, jnp.int32(plan.num_heads)),
            head=lax.rem(list_row, jnp.int32(plan.num_heads)),
            list_row=list_row,
            block=block,
            first=first,
            count=last - first,
            is_shared=False,
            num_means=num_means,
        )

    def _query_block_of_pair(self) -> QueryBlock:
        first, own = 2 * lax.axis_index("cta"), lax.axis_index("pair")
        query_block = self._query_block(first + own)
        peer = self._query_block(first + 1 - own)
        is_shared = (query_block.list_row == peer.list_row) & (
            jnp.minimum(query_block.count, peer.count) == self.plan.num_key_blocks
        )
        return dataclasses.replace(query_block, is_shared=is_shared)

    def shares_keys(self) -> jax.Array | bool:
        """Says whether the two CTAs of a pair copy key blocks for each other."""
        return self._query_block_of_pair().is_shared if self.plan.pairs else False

    def key_block(self, query_block: QueryBlock, step):
        """Returns the key block of a step; the last step's for steps beyond it.

        A full row's list may have any order; both CTAs of a pair must take the same.
        """
        work = self.gmem.work
        step = jnp.minimum(step, query_block.count - 1)
        if self.plan.is_dense:
            return work.full_list[step]
        block = work.block_ids[query_block.list_row, query_block.first + step]
        if not self.plan.pairs:
            return block
        return jnp.where(query_block.is_shared, work.full_list[step], block)

    def steps_of_width(self, query_block: QueryBlock, index: int):
        """Returns the first step of a width's blocks, and the one after the last."""
        widths = self.plan.widths
        if len(widths) == 1:
            return jnp.int32(0), query_block.count
        if self.plan.is_dense:
            before = sum(width.blocks for width in widths[:index])
            return jnp.int32(before), jnp.int32(before + widths[index].blocks)
        row = query_block.list_row, query_block.block
        ends = self.gmem.work.width_ends
        begin = ends[*row, index - 1] if index else jnp.int32(0)
        return begin, ends[*row, index]

    def slot_of(self, fill):
        """Returns the slot of the ring that a copy of K or V fills."""
        return lax.rem(fill, jnp.int32(self.plan.config.num_slots))
