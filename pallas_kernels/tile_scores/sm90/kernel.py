"""Attention between the parts of tiles, summed over pairs of tiles, for Hopper (sm_90).

One CTA works on one block of 128 query parts and walks all key parts twice: the first
time for the log-sum-exp of each row, the second time for probabilities. Both times it
multiplies them anew, for a row's exponentials would not fit into shared memory. What
leaves a step of the second walk is one number for each pair of tiles.

Roles
-----
PRODUCER copies Q once, and the blocks of K, twice, through a ring. Two consumers own 64
query rows each.

  PRODUCER    q, k -- TMA -> | K0 | K1 | K2 | .. |   and Q
                               |
  consumer 0, 1    first walk    S = Q K(i)^T, running maximum and sum of each thread
                   second walk   S = Q K(i)^T, P = exp2(S - log-sum-exp), sums over
                                 the parts of pairs of tiles -> global memory

While one consumer takes exponentials the other one multiplies.

Barriers
--------
Barrier   arrives     waits       count
q_full    copies      consumers   once
k_full    copies      consumers   one for each key block of each walk
k_free    consumers   PRODUCER    likewise

PRODUCER waits for the arrivals that no later copy needs before it ends.

Shapes
------
q_smem [2, 64, D]; k_smem [num_slots, 128, D]; S and P [64, 128]; maximum, sum and
log-sum-exp [64]. The output is flat: [L, S * S].

Hazards
-------
- A thread holds 32 columns of a row, and its own maximum and sum of them, until the
  first walk ends: what looks like a value of a row differs between four lanes.
- The last block may be short: its other rows are zeros. As keys they are masked; as
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
    BLOCK,
    CONSUMER_REGISTERS,
    NUM_CONSUMERS,
    NUM_SLOTS,
    PRODUCER,
    PRODUCER_REGISTERS,
    Plan,
    scratch_types,
)

# Maximum of a thread that has met no key: finite, so that masked logits of -inf become
# exp2(-inf - finite) = 0 and never NaN.
NO_MAXIMUM = -1e38


def sum_probabilities(
    q: BFloat16[Array, "B M N D"],
    k: BFloat16[Array, "B M N D"],
    log_query_weights: Float[Array, " Q"],
    log_key_weights: Float[Array, " Q"],
    *,
    plan: Plan,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Float[Array, "L pairs"]:
    """Computes the scores of all S * S pairs of tiles, of L = B * N maps.

    Args:
      q: Query parts, times the scale and log2(e); M >= BLOCK.
      k: Key parts.
      log_query_weights: Base-2 logarithms, up to a multiple of BLOCK.
      log_key_weights: Likewise; read where `plan.has_key_weights`.
      plan: Static sizes.
      interpret: Run on the CPU in GPU interpret mode.
    """
    maps = q.shape[0] * plan.num_heads
    out = jax.ShapeDtypeStruct((maps, plan.num_tiles**2), jnp.float32)
    return plgpu.kernel(
        functools.partial(_body, plan=plan),
        out_type=out,
        scratch_types=scratch_types(plan),
        # CTAs of one map follow each other, so that its keys stay in L2.
        grid=(maps * plan.num_blocks,),
        grid_names=("cta",),
        num_threads=NUM_CONSUMERS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        kernel_name="tile_scores_sm90",
        interpret=interpret,
    )(q, k, log_query_weights, log_key_weights)


class _Cta(NamedTuple):
    """One warpgroup's view of its CTA."""

    plan: Plan
    gmem: tuple
    smem: tuple
    barriers: tuple
    instructions: Instructions
    wg: jax.Array
    map: jax.Array  # of batch item and head
    block: jax.Array  # of queries

    @property
    def head(self) -> tuple[jax.Array, jax.Array]:
        """Batch item, and head."""
        heads = jnp.int32(self.plan.num_heads)
        return lax.div(self.map, heads), lax.rem(self.map, heads)

    def parts(self, array, first, count: int):
        """Returns parts of this map in global memory."""
        batch, head = self.head
        return array.at[batch, pl.ds(first, count), head]


def _body(*refs, plan: Plan, q_smem, k_smem, q_full, k_full, k_free):
    *gmem, out_gmem = refs
    wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
    context = _Cta(
        plan=plan,
        gmem=(*gmem, out_gmem),
        smem=(q_smem, k_smem),
        barriers=(q_full, k_full, k_free),
        instructions=Emulation() if plan.interpreted else Instructions(),
        wg=wg,
        map=lax.div(cta, jnp.int32(plan.num_blocks)),
        block=lax.rem(cta, jnp.int32(plan.num_blocks)),
    )

    @pl.when(wg == PRODUCER)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        _produce(context)

    @pl.when(wg != PRODUCER)
    def _():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        _consume(context)


def _produce(cta: _Cta) -> None:
    """Copies Q, then the blocks of K twice, as far ahead as the ring allows."""
    q_gmem, k_gmem, *_ = cta.gmem
    q_smem, k_smem = cta.smem
    q_full, k_full, k_free = cta.barriers
    for consumer in range(NUM_CONSUMERS):
        rows = cta.parts(q_gmem, cta.block * BLOCK + consumer * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(rows, q_smem.at[consumer], q_full)
    num_fills = 2 * cta.plan.num_blocks

    @pl.loop(0, num_fills)
    def _load(fill):
        slot = lax.rem(fill, jnp.int32(NUM_SLOTS))

        @pl.when(fill >= NUM_SLOTS)
        def _():
            plgpu.barrier_wait(k_free.at[slot])

        block = lax.rem(fill, jnp.int32(cta.plan.num_blocks))
        keys = cta.parts(k_gmem, block * BLOCK, BLOCK)
        plgpu.copy_gmem_to_smem(keys, k_smem.at[slot], k_full.at[slot])

    @pl.loop(max(num_fills - NUM_SLOTS, 0), num_fills)
    def _drain(fill):
        plgpu.barrier_wait(k_free.at[lax.rem(fill, jnp.int32(NUM_SLOTS))])


def _consume(cta: _Cta) -> None:
    """Scores ROWS query parts."""
    plan, instructions = cta.plan, cta.instructions
    plgpu.barrier_wait(cta.barriers[0])

    def add(block, state):
        maximum, total = state
        logits = _logits(cta, block, block)
        new = jnp.maximum(maximum, instructions.thread_maxima(logits))
        weights = jnp.exp2(logits - _along_rows(new, logits))
        total = total * jnp.exp2(maximum - new) + instructions.thread_sums(weights)
        return new, total

    start = (_rows_of(NO_MAXIMUM), _rows_of(0.0))
    maximum, total = lax.fori_loop(0, plan.num_blocks, add, start)
    of_row = instructions.maximum_of_row(maximum)
    total = instructions.sum_of_row(total * jnp.exp2(maximum - of_row))
    first = cta.block * BLOCK + cta.wg * ROWS
    log_weights = plgpu.load(
        cta.gmem[2].at[pl.ds(first, ROWS)], layout=WGMMA_ROW, optimized=False
    )
    # A row without a weight gets infinity, and its probabilities are 0.
    offset = of_row + jnp.log2(total) - log_weights
    scores_gmem = cta.gmem[-1].at[cta.map]

    @pl.loop(0, plan.num_blocks)
    def _score(block):
        logits = _logits(cta, block, block + plan.num_blocks)
        weights = jnp.exp2(logits - _along_rows(offset, logits))
        instructions.store_pair_sums(
            weights,
            scores_gmem,
            lax.div(first, jnp.int32(plan.per_tile)),
            block * (BLOCK // plan.per_tile),
            per_tile=plan.per_tile,
            num_tiles=plan.num_tiles,
        )


def _logits(cta: _Cta, block, fill):
    """Returns the logits of a key block, in base 2, and frees its slot."""
    plan = cta.plan
    _, k_full, k_free = cta.barriers
    slot = lax.rem(fill, jnp.int32(NUM_SLOTS))
    log_weights = None
    if plan.has_key_weights:  # read before the wait, for it takes as long
        keys = pl.ds(block * BLOCK, BLOCK)
        log_weights = plgpu.load(
            cta.gmem[3].at[keys], layout=WGMMA_COLUMN, optimized=False
        )
    plgpu.barrier_wait(k_full.at[slot])
    q_smem, k_smem = cta.smem
    logits = cta.instructions.logits(q_smem.at[cta.wg], k_smem.at[slot])
    cta.instructions.finish_reads()
    plgpu.barrier_arrive(k_free.at[slot])
    if log_weights is not None:
        return logits + lax.broadcast_in_dim(log_weights, logits.shape, [1])
    if not plan.is_last_short:
        return logits

    def mask():
        column = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=WGMMA)
        return jnp.where(column < plan.num_parts % BLOCK, logits, -jnp.inf)

    return lax.cond(block == plan.num_blocks - 1, mask, lambda: logits)


def _rows_of(value: float):
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), WGMMA_ROW)


def _along_rows(values, like):
    return lax.broadcast_in_dim(values, like.shape, [0])
