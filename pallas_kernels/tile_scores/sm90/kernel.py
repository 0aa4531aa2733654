"""Attention between the parts of tiles, summed over pairs of tiles, for Hopper (sm_90).

A CTA works on blocks of 192 query parts, one after another, and walks all key parts for
each. What leaves a step are sums of a row's exponentials over the parts of each key
tile. What they must be divided by is known at the end of the walk only, so they wait in
global memory, in bfloat16: one for each query part and key tile, of the query blocks
that are being worked on. L2 holds most of it. Each step of the next walk takes as many
back as it writes.

Roles
-----
PRODUCER copies Q, a block ahead, and the blocks of K, through a ring. Three consumers
own 64 query rows each.

  PRODUCER         q, k -- TMA -> | K0 | K1 | K2 | .. |   and Q
                                    |
  consumer 0 .. 2  step    S = Q K(i)^T, E = exp2(S - reference), sums over the parts
                           of each key tile -> memory
                           what was there, of the query block before: times query
                           weight / sum of the row, summed over the parts of each
                           query tile -> scores

The consumers take turns in issuing products: exponentials of two run beside the product
of the third. Either unit needs 512 cycles for a step of one consumer. Scores of a CTA's
last query block are made behind its walk.

Barriers
--------
Barrier   arrives       waits         count
q_full    copies        consumers     one for each query block
q_free    consumers     PRODUCER      likewise
k_full    copies        consumers     one for each key block of each query block
k_free    consumers     PRODUCER      likewise
turn      one consumer  the next one  likewise

PRODUCER waits for the arrivals that no later copy needs before it ends, and consumer 0
for the last turn.

Shapes
------
q_smem [2, 3, 64, D]; k_smem [num_slots, 128, D]; S and E [64, 128]; reference and sum
[64]. The output is flat: [L, S * S].

Which part is in which row or column of a product is chosen so that a thread holds whole
tiles of keys (`plan.KEY_GROUP`): their sums take no shuffles. A thread reads only sums
back that it wrote.

Reference of a row
------------------
A row's exponentials are exp2(logit - reference). A thread takes the largest logit of
its columns of the first key block, and keeps it: no block is searched for a maximum.
Where a row's sum of a block exceeds MOST_SUM its warp takes larger references, computes
the block's exponentials again, and corrects what it has written. So does the first
block, which has no reference yet.

Hazards
-------
- A thread holds 32 columns of a row, with a reference and a sum of its own, until the
  walk ends: what looks like a value of a row differs between four lanes.
- Sums of columns past the last tile, and of blocks that only fill up the last group
  that is read back, are anything, even NaN. No score is made from them.
- The last blocks may be short: their other rows are zeros. As keys they are masked; as
  queries they weigh nothing, and are not stored.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float

from pallas_kernels.common.lanes import ROWS, WGMMA, WGMMA_COLUMN, WGMMA_ROW
from pallas_kernels.tile_scores.sm90.emulated import Emulation
from pallas_kernels.tile_scores.sm90.instructions import Instructions
from pallas_kernels.tile_scores.sm90.plan import (
    CONSUMER_REGISTERS,
    KEYS,
    NUM_CONSUMERS,
    NUM_SLOTS,
    PRODUCER,
    PRODUCER_REGISTERS,
    Q_SLOTS,
    QUERIES,
    Plan,
    scratch_types,
)
from pallas_kernels.tile_scores.sm90.signals import Signals

# Reference of a thread that has met no key: finite, so that masked logits of -inf
# become exp2(-inf - finite) = 0 and never NaN. Those of real logits become infinite.
NO_REFERENCE = -1e38
MOST_SUM = 2.0**64  # of a thread's part of a row, in one block


def sum_probabilities(
    q: BFloat16[Array, "B Q N D"],
    k: BFloat16[Array, "B K N D"],
    query_weights: Float[Array, " Q"],
    log_key_weights: Float[Array, " K"],
    *,
    plan: Plan,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Float[Array, "L pairs"]:
    """Computes the scores of all S * S pairs of tiles, of L = B * N maps.

    Args:
      q: Query parts, times the scale and log2(e), in whole blocks. They are ordered by
        `plan.QUERY_GROUP`.
      k: Key parts likewise, ordered by `plan.KEY_GROUP`.
      query_weights: Ordered like q, with zeros past the last part.
      log_key_weights: Base-2 logarithms, ordered like k, minus infinity past the last
        part; read where `plan.has_key_weights`.
      plan: Static sizes.
      interpret: Run on the CPU in GPU interpret mode.
    """
    outputs = (
        jax.ShapeDtypeStruct((plan.num_maps, plan.num_tiles**2), jnp.float32),
        jax.ShapeDtypeStruct(plan.sums_shape, jnp.bfloat16),
    )
    scores, _ = plgpu.kernel(
        functools.partial(_body, plan=plan),
        out_type=outputs,
        scratch_types=scratch_types(plan),
        # CTAs work on blocks of one map together, so that its keys stay in L2.
        grid=(plan.num_ctas,),
        grid_names=("cta",),
        num_threads=NUM_CONSUMERS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        kernel_name="tile_scores_sm90",
        interpret=interpret,
    )(q, k, query_weights, log_key_weights)
    return scores


class _GlobalMemory(NamedTuple):
    q: jax.Ref
    k: jax.Ref
    query_weights: jax.Ref
    log_key_weights: jax.Ref
    scores: jax.Ref
    sums: jax.Ref


class _Task(NamedTuple):
    """A block of queries; without one before the first of a CTA, at place -1."""

    place: jax.Array  # among those of the CTA
    map: jax.Array  # of batch item and head
    block: jax.Array


class _Cta(NamedTuple):
    """One warpgroup's view of its CTA."""

    plan: Plan
    gmem: _GlobalMemory
    q_smem: jax.Ref
    k_smem: jax.Ref
    signals: Signals
    instructions: Instructions
    wg: jax.Array

    @property
    def num_tasks(self) -> jax.Array:
        """Counts the query blocks of this CTA."""
        later = self.plan.num_tasks - lax.axis_index("cta")
        num_ctas = jnp.int32(self.plan.num_ctas)
        return lax.div(later + (num_ctas - 1), num_ctas)

    def task(self, place) -> _Task:
        """Returns a query block of this CTA."""
        number = lax.axis_index("cta") + place * self.plan.num_ctas
        number, blocks = jnp.maximum(number, 0), jnp.int32(self.plan.num_query_blocks)
        return _Task(place, lax.div(number, blocks), lax.rem(number, blocks))

    def parts(self, array, task: _Task, first, count: int):
        """Returns parts of a task's map in global memory."""
        heads = jnp.int32(self.plan.num_heads)
        batch, head = lax.div(task.map, heads), lax.rem(task.map, heads)
        return array.at[batch, pl.ds(first, count), head]

    def q_slot_of(self, place):
        """Returns the slot of a query block."""
        return lax.rem(place, jnp.int32(Q_SLOTS))

    def slot_of(self, fill):
        """Returns the slot of a copy of K, counted over the walks of the CTA."""
        return lax.rem(fill, jnp.int32(NUM_SLOTS))


def _body(*gmem, plan: Plan, q_smem, k_smem, **barriers):
    instructions = Emulation() if plan.interpreted else Instructions()
    wg = lax.axis_index("wg")
    cta = _Cta(
        plan=plan,
        gmem=_GlobalMemory(*gmem),
        q_smem=q_smem,
        k_smem=k_smem,
        signals=Signals(
            **barriers, uses_named_barriers=instructions.uses_named_barriers
        ),
        instructions=instructions,
        wg=wg,
    )

    @pl.when(wg == PRODUCER)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        _produce(cta)

    @pl.when(wg != PRODUCER)
    def _():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        _consume(cta)


def _produce(cta: _Cta) -> None:
    """Copies Q, then the blocks of K, as far ahead as the ring allows."""
    signals, num_blocks = cta.signals, cta.plan.num_key_blocks

    @pl.loop(0, cta.num_tasks)
    def _load_task(index):
        task, q_slot = cta.task(index), cta.q_slot_of(index)
        pl.when(index >= Q_SLOTS)(lambda: signals.wait_q_free(q_slot))
        for consumer in range(NUM_CONSUMERS):
            first = task.block * QUERIES + consumer * ROWS
            rows = cta.parts(cta.gmem.q, task, first, ROWS)
            plgpu.copy_gmem_to_smem(
                rows, cta.q_smem.at[q_slot, consumer], signals.q_full.at[q_slot]
            )

        @pl.loop(0, num_blocks)
        def _load(block):
            fill = index * num_blocks + block
            slot = cta.slot_of(fill)
            pl.when(fill >= NUM_SLOTS)(lambda: signals.wait_k_free(slot))
            keys = cta.parts(cta.gmem.k, task, block * KEYS, KEYS)
            plgpu.copy_gmem_to_smem(keys, cta.k_smem.at[slot], signals.k_full.at[slot])

    @pl.loop(jnp.maximum(cta.num_tasks - Q_SLOTS, 0), cta.num_tasks)
    def _drain_q(index):
        signals.wait_q_free(cta.q_slot_of(index))

    num_fills = cta.num_tasks * num_blocks

    @pl.loop(jnp.maximum(num_fills - NUM_SLOTS, 0), num_fills)
    def _drain(fill):
        signals.wait_k_free(cta.slot_of(fill))


def _consume(cta: _Cta) -> None:
    """Scores ROWS query parts of each block."""
    plan, last = cta.plan, NUM_CONSUMERS - 1
    pl.when(cta.wg == last)(lambda: cta.signals.give_turn_after(last))

    def walk(index, factor):
        task, before = cta.task(index), _Walked(cta.task(index - 1), factor)
        cta.signals.wait_q_full(cta.q_slot_of(index))
        add = functools.partial(_add_block, cta, task, before)
        first = cta.instructions.kept(_sums_gmem(cta), jnp.int32(0), plan.per_tile)
        state = _Walk(_rows_of(NO_REFERENCE), _rows_of(0.0), first)
        num_whole = plan.num_key_blocks - plan.is_last_short
        state = lax.fori_loop(0, num_whole, add, state)
        if plan.is_last_short:
            state = add(jnp.int32(num_whole), state, masks=True)
        cta.signals.free_q(cta.q_slot_of(index))
        return _factors(cta, task, state)

    factor = lax.fori_loop(0, cta.num_tasks, walk, _rows_of(0.0))
    _store_last(cta, _Walked(cta.task(cta.num_tasks - 1), factor))
    pl.when(cta.wg == 0)(lambda: cta.signals.take_turn(0))


class _Walk(NamedTuple):
    """What a thread carries from key block to key block.

    Attributes:
      reference: Of the columns of each row that it holds.
      total: Their sum.
      earlier: What the next key block's sums replace, of the query block before: read a
        step ahead.
    """

    reference: jax.Array
    total: jax.Array
    earlier: jax.Array


class _Walked(NamedTuple):
    """A query block whose sums are in memory, and what each row's are multiplied by."""

    task: _Task
    factor: jax.Array


def _sums_gmem(cta: _Cta):
    """Returns the memory of this consumer's sums, block by block."""
    return cta.gmem.sums.at[lax.axis_index("cta"), cta.wg]


def _add_block(
    cta: _Cta, task: _Task, before: _Walked, block, state: _Walk, *, masks: bool = False
) -> _Walk:
    """Sums the exponentials of a key block by tiles, and keeps the sums.

    They take the place of those of the query block before, of which scores are made
    first: a consumer waits for its turn anyway.
    """
    instructions, per_tile = cta.instructions, cta.plan.per_tile
    memory, last = _sums_gmem(cta), cta.plan.num_key_blocks - 1
    _store(cta, before, block, state.earlier)
    following = instructions.kept(memory, jnp.minimum(block + 1, last), per_tile)
    logits = _logits(cta, task, block, masks)
    sums = instructions.tile_sums(_weights(logits, state.reference), per_tile)
    of_row = instructions.row_sums(sums)
    has_grown = instructions.any_of_warp(of_row > MOST_SUM)

    def grow():
        maxima = jnp.maximum(state.reference, instructions.thread_maxima(logits))
        reference = jnp.where(of_row > MOST_SUM, maxima, state.reference)
        factor = jnp.exp2(state.reference - reference)

        @pl.loop(0, block)
        def _correct(earlier):
            kept = instructions.kept(memory, earlier, per_tile)
            kept = instructions.times_rows(instructions.unpacked(kept), factor)
            instructions.keep(memory, earlier, kept)

        sums = instructions.tile_sums(_weights(logits, reference), per_tile)
        return sums, reference, state.total * factor

    sums, reference, total = lax.cond(
        has_grown != 0, grow, lambda: (sums, state.reference, state.total)
    )
    instructions.keep(memory, block, sums)
    return _Walk(reference, total + instructions.row_sums(sums), following)


def _factors(cta: _Cta, task: _Task, state: _Walk):
    """Returns what makes shares of its query tile's attention of a row's sums."""
    instructions = cta.instructions
    common = instructions.maximum_of_row(state.reference)
    factor = jnp.exp2(state.reference - common)
    total = instructions.sum_of_row(state.total * factor)
    rows = pl.ds(task.block * QUERIES + cta.wg * ROWS, ROWS)
    weights = plgpu.load(
        cta.gmem.query_weights.at[rows], layout=WGMMA_ROW, optimized=False
    )
    return factor * weights / total


def _store_last(cta: _Cta, walked: _Walked) -> None:
    """Makes scores of the CTA's last query block."""
    plan, instructions = cta.plan, cta.instructions

    @pl.loop(0, plan.sums_shape[2] // plan.blocks_at_once)
    def _store_group(group):
        blocks = [group * plan.blocks_at_once + i for i in range(plan.blocks_at_once)]
        # All are under way before the first is waited for.
        memory = _sums_gmem(cta)
        kept = [instructions.kept(memory, block, plan.per_tile) for block in blocks]
        for block, own in zip(blocks, kept, strict=True):
            _store(cta, walked, block, own)


def _store(cta: _Cta, walked: _Walked, block, kept) -> None:
    """Makes scores of what was kept of a key block; none without a query block."""
    plan, task = cta.plan, walked.task
    sums = cta.instructions.unpacked(kept)
    row = lax.div(task.block * QUERIES + cta.wg * ROWS, jnp.int32(plan.per_tile))
    cta.instructions.store_scores(
        cta.instructions.times_rows(sums, walked.factor),
        cta.gmem.scores.at[task.map],
        jnp.where(task.place < 0, plan.num_tiles, row),
        block * (KEYS // plan.per_tile),
        per_tile=plan.per_tile,
        num_tiles=plan.num_tiles,
    )


def _logits(cta: _Cta, task: _Task, block, masks: bool):
    """Returns the logits of a key block, in base 2, and frees its slot.

    The last block has keys to be masked where it is short.
    """
    plan, signals = cta.plan, cta.signals
    slot = cta.slot_of(task.place * plan.num_key_blocks + block)
    log_weights = None
    if plan.has_key_weights:  # read before the wait, for it takes as long
        keys = pl.ds(block * KEYS, KEYS)
        log_weights = plgpu.load(
            cta.gmem.log_key_weights.at[keys], layout=WGMMA_COLUMN, optimized=False
        )
    signals.wait_k_full(slot)
    signals.take_turn(cta.wg)
    logits = cta.instructions.logits(
        cta.q_smem.at[cta.q_slot_of(task.place), cta.wg],
        cta.k_smem.at[slot],
        after_issue=lambda: signals.give_turn_after(cta.wg),
    )
    cta.instructions.finish_reads()
    signals.free_k(slot)
    if log_weights is not None:
        return logits + lax.broadcast_in_dim(log_weights, logits.shape, [1])
    if not masks:
        return logits
    column = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=WGMMA)
    # KEY_GROUP, from the places of a product back to keys.
    key = (column & 6) * 16 + (column >> 3) * 2 + (column & 1)
    return jnp.where(key < plan.num_parts % KEYS, logits, -jnp.inf)


def _weights(logits, reference):
    return jnp.exp2(logits - lax.broadcast_in_dim(reference, logits.shape, [0]))


def _rows_of(value: float):
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), WGMMA_ROW)
