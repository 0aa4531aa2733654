"""Block-sparse attention, forward, for Hopper (sm_90): Pallas, Mosaic GPU.

One CTA works on one query block of 128 tokens at a time and walks its list of kept
key blocks. Warpgroup PRODUCER issues TMA copies; the two consumers own 64 query rows
each. K and V blocks share one ring, in the order in which the consumers need them:
K0 K1 V0 K2 V1 ... K(n-1) V(n-2) V(n-1), because the logits of step i + 1 are issued
before step i is multiplied with V, so that softmax runs while the tensor cores do.

Barrier   arrives       waits      count
q_full    TMA           consumers  one for each query block
q_free    consumers     PRODUCER   one for each query block
kv_full   TMA           consumers  two for each kept key block
kv_free   consumers     PRODUCER   two for each kept key block
turn      one consumer  the other  one for each step after a query block's first

PRODUCER waits for the arrivals that no later copy needs before it ends ("drains"), so
that every barrier completion is observed. The output leaves through the shared memory
of Q, so q_free comes after it has been read. Consumers call commit_smem before each
copy to global memory.

A short block (edge tile or text) is copied whole: the rows past its end belong to the
next block, or are filled with zeros past the end of the array. As keys they are masked;
as queries they are computed and not stored.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.sm90_consumer import consume
from pallas_kernels.sm90_plan import (
    BLOCK,
    NUM_CONSUMERS,
    PRODUCER,
    ROWS,
    GlobalRefs,
    Plan,
    Signals,
    entry_of,
    for_each_tile,
    num_own_tiles,
    scratch_types,
    slot_of,
    start_of,
    unit_of,
)


class Work(NamedTuple):
    """What the kernel computes, for L = B * N lists of R query blocks each.

    Attributes:
      row_offsets: Start of each query block's list.
      block_ids: Key blocks of the lists.
      order: Query blocks, numbered row by row, as CTAs take them.
      num_tiles: How many entries of `order` there are.
      starts: First token of each block, divided by ALIGNMENT.
      lengths: Tokens of each block.
      valid: Tokens of each block of each batch item that are not padding.
    """

    row_offsets: Int[Array, "L R+1"]
    block_ids: Int[Array, "L M"]
    order: Int[Array, " L*R"]
    num_tiles: Int[Array, " 1"]
    starts: Int[Array, " R"]
    lengths: Int[Array, " R"]
    valid: Int[Array, "B R"]


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
      q: Queries, bfloat16 or float16, T >= BLOCK.
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
        grid=(plan.num_ctas,),
        grid_names=("cta",),
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


def _body(*refs, plan: Plan, q_free, kv_free, turn, lse_smem, **inputs):
    gmem = GlobalRefs(*refs)
    signals = Signals(plan, q_free, kv_free, turn)
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
    unit = unit_of(plan)

    def copy(source, tile, start, fill):
        @pl.when(fill >= num_slots)
        def _():
            signals.wait_kv_free(slot_of(plan, fill))

        slot = slot_of(plan, fill)
        rows = source.at[tile.batch, pl.ds(start * unit, BLOCK), tile.head]
        plgpu.copy_gmem_to_smem(rows, kv_smem.at[slot], kv_full.at[slot])

    def load_tile(tile, index, fill):
        @pl.when(index > 0)
        def _():
            signals.wait_q_free()

        token = start_of(gmem, plan, tile.block) * unit
        for wg in range(NUM_CONSUMERS):
            rows = gmem.q.at[tile.batch, pl.ds(token + wg * ROWS, ROWS), tile.head]
            plgpu.copy_gmem_to_smem(rows, q_smem.at[wg], q_full)

        def start_of_step(step):
            entry = entry_of(tile, step)
            return start_of(gmem, plan, gmem.block_ids[tile.list_row, entry])

        def load_step(step, starts):
            # K of this step, then V of the one before. The next start is read before
            # the copies wait for a free slot.
            start_v, start_k = starts
            next_start = start_of_step(step + 1)
            copy(gmem.k, tile, start_k, fill + 2 * step - jnp.minimum(step, 1))

            @pl.when(step > 0)
            def _():
                copy(gmem.v, tile, start_v, fill + 2 * step)

            return start_k, next_start

        @pl.when(tile.count > 0)
        def _():
            first = start_of_step(jnp.int32(0))
            last, _ = lax.fori_loop(0, tile.count, load_step, (first, first))
            copy(gmem.v, tile, last, fill + 2 * tile.count - 1)

        return fill + 2 * tile.count

    fill = for_each_tile(gmem, plan, load_tile, jnp.int32(0))

    @pl.when(num_own_tiles(gmem, plan) > 0)
    def _():
        signals.wait_q_free()

    @pl.loop(jnp.maximum(fill - num_slots, 0), fill)
    def _drain(last_fill):
        signals.wait_kv_free(slot_of(plan, last_fill))
