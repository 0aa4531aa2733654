"""Block-sparse attention, forward, for Hopper (sm_90): Pallas, Mosaic GPU.

One CTA works on one query block of 128 tokens at a time and walks its list of kept key
blocks.

Roles
-----
PRODUCER (`producer`) copies Q, K and V to shared memory. Two consumers (`consumer`) own
64 query rows each: matrix products, softmax, output.

              global memory     ring of num_slots K or V blocks
                                +----+----+----+----+----+----+
  PRODUCER    q, k, v -- TMA -> | K0 | K1 | V0 | K2 | V1 | .. |   and Q
                                +----+----+----+----+----+----+
                                   |
  consumer 0, 1    wait K(i+1), V(i)     S = Q K(i+1)^T  issued, then
                                         O += P V(i)     issued; while it runs,
                                         P = softmax weights of S

K and V blocks share one ring, in the order in which the consumers need them: K0 K1 V0
K2 V1 ... K(n-1) V(n-2) V(n-1). The logits of step i + 1 are issued before step i is
multiplied with V, so that softmax runs while the tensor cores do. The consumers take
turns in issuing, so that one's softmax runs beside the other's products.

Barriers
--------
Barrier    arrives        waits      count
q_full     copies         consumers  one for each query block
q_free     consumers      PRODUCER   one for each query block
kv_full    copies         consumers  two for each key block, also of means
kv_free    consumers      PRODUCER   likewise
turn       one consumer   the other  one for each step after the first of a width
pair_free  both PRODUCERs PRODUCER   two for each key block of a shared row

PRODUCER waits for the arrivals that no later copy needs before it ends ("drains"), so
that every barrier completion is observed.

Two CTAs are a cluster. Where both have full rows of one head, which read the same keys
in the same order, each copies half of every block to both: L2 is read half as often,
and its wires are what a dense call has left to save. A slot of both is then written by
both PRODUCERs, so each tells the other, on pair_free, when its own consumers are done
with it. Other rows take no notice of their neighbour.

Shapes
------
q_smem [2, 64, D]; kv_smem [num_slots, 128, D]; lse_smem [2, 64]; S and P [64, width];
O [64, D]; a row's reference and sum [64]. With `copies.Boxes` tokens in shared memory
are [rows, 8] instead of one axis.

Lists have their short blocks last, by classes of width (`partition_lists`). A class is
walked like a list of its own, with products over as many keys as it has.

Behind its list a row that drops something walks means of what it drops, in blocks of
128, with a loop of its own: see `means`.

How blocks are copied (`copies`) is one of three. A block lies in one piece in tiled
order. In raster order one copy takes a box of 8 columns, or, where text stands beside
the video, one row of the tile; that is eight copies for a block and slower, for every
copy is an arrival of all threads. Where blocks do not start at multiples of 8 tokens,
PRODUCER's threads copy rows instead (`row_copies`): a copy then arrives when the one
`copies_ahead` later has been started, and Q arrives with the first K.

Hazards
-------
- A short block (edge tile or text) is copied up to its width, a query block whole: the
  rows past its end are other tokens, or zeros past the end of the array. As keys they
  are masked; as queries the consumers set them to zero, and they are not stored.
- Means past the last one are zeros, and count as none: their logits get -inf.
- The output leaves through the shared memory of Q, so q_free comes after it has been
  read.
- Consumers call commit_smem before each copy to global memory.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.attention.sm90.consumer import consume
from pallas_kernels.attention.sm90.cta import Cta, GlobalMemory, SharedMemory, Work
from pallas_kernels.attention.sm90.emulation import Emulation
from pallas_kernels.attention.sm90.instructions import Instructions
from pallas_kernels.attention.sm90.plan import (
    BLOCK,
    NUM_CONSUMERS,
    PRODUCER,
    Plan,
    scratch_types,
)
from pallas_kernels.attention.sm90.producer import produce
from pallas_kernels.attention.sm90.signals import Signals


def attend_blocks(
    q: Float[Array, "B *Q N D"],
    k: Float[Array, "B *T N D"],
    v: Float[Array, "B *T N D"],
    work: Work,
    *,
    plan: Plan,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Float[Array, "B *Q N D"], Float[Array, "L R 128"]]:
    """Computes every query block.

    Args:
      q: Queries, bfloat16 or float16; Q and T >= BLOCK unless blocks are copied by
        rows. With boxes both are three axes: see `Geometry.frame_shape`.
      k: Keys.
      v: Values.
      work: Lists and the order of query blocks, which has all of them.
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
    return _launch((q, k, v, work), outputs, plan=plan, interpret=interpret)


def attend_blocks_again(
    q: Float[Array, "B *Q N D"],
    k: Float[Array, "B *T N D"],
    v: Float[Array, "B *T N D"],
    work: Work,
    out: Float[Array, "B *Q N D"],
    lse: Float[Array, "L R 128"],
    *,
    plan: Plan,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Float[Array, "B *Q N D"], Float[Array, "L R 128"]]:
    """Computes the first `work.num_query_blocks` query blocks, in place.

    Args:
      q: As `attend_blocks` took it.
      k: Likewise.
      v: Likewise.
      work: Likewise, with the query blocks to compute in its `launch_order`.
      out: The output that `attend_blocks` returned.
      lse: Its log-sum-exp.
      plan: A plan with persistent CTAs.
      interpret: Run on the CPU in GPU interpret mode.

    Returns:
      The output and the log-sum-exp, with those query blocks replaced.
    """
    refs = jax.new_ref(out), jax.new_ref(lse)
    _launch((q, k, v, work, *refs), (), plan=plan, interpret=interpret)
    out, lse = (jax.freeze(ref) for ref in refs)
    return out, lse


def _launch(inputs, outputs, *, plan: Plan, interpret):
    """Runs the kernel; `inputs` and `outputs` together are a `GlobalMemory`."""
    operands, structure = jax.tree.flatten(inputs)

    def body(*refs, **scratch):
        given = jax.tree.unflatten(structure, refs[: len(operands)])
        gmem = GlobalMemory(*given, *refs[len(operands) :])
        _body(gmem, plan=plan, **scratch)

    kernel = plgpu.kernel(
        body,
        out_type=outputs,
        scratch_types=scratch_types(plan, inputs[0].dtype),
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
    return kernel(*operands)


def _body(gmem, *, plan: Plan, q_smem, kv_smem, lse_smem, **barriers):
    instructions = Emulation() if plan.interpreted else Instructions()
    wg = lax.axis_index("wg")
    cta = Cta(
        plan=plan,
        gmem=gmem,
        smem=SharedMemory(q_smem, kv_smem, lse_smem),
        signals=Signals(
            **barriers, uses_named_barriers=instructions.uses_named_barriers
        ),
        instructions=instructions,
        wg=wg,
    )

    @pl.when(wg == PRODUCER)
    def _():
        plgpu.set_max_registers(plan.config.producer_registers, action="decrease")
        produce(cta)

    @pl.when(wg != PRODUCER)
    def _():
        plgpu.set_max_registers(plan.config.consumer_registers, action="increase")
        consume(cta)
