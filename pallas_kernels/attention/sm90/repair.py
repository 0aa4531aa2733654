"""Computes query blocks again whose sums overflowed."""

import dataclasses

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.attention.sm90.cta import Work
from pallas_kernels.attention.sm90.kernel import attend_blocks_again
from pallas_kernels.attention.sm90.plan import Plan
from pallas_kernels.common import device


def repair(
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
    """Computes query blocks whose sums overflowed again, with exact maxima.

    That takes logits 44 nats above all of the first kept block, or a first block
    without keys and logits far from 0, or NaN in the inputs. Where there are none,
    which is the usual case, the second kernel ends as soon as it has read that.

    Args:
      q: As `attend_blocks` took it.
      k: Likewise.
      v: Likewise.
      work: Likewise.
      out: The output that it returned.
      lse: Its log-sum-exp, infinite or NaN in rows that need it.
      plan: Its plan.
      interpret: Run on the CPU in GPU interpret mode.

    Returns:
      The output and the log-sum-exp.
    """
    failed = ~(lse < jnp.inf).all(axis=-1).ravel()
    query_blocks = jnp.arange(failed.size, dtype=jnp.int32)
    # What has not failed goes to places past the end, each to its own.
    place = jnp.where(failed, jnp.cumsum(failed) - 1, failed.size + query_blocks)
    launch_order = jnp.zeros_like(query_blocks)
    launch_order = launch_order.at[place].set(
        query_blocks, mode="drop", unique_indices=True
    )
    plan = dataclasses.replace(
        plan,
        config=dataclasses.replace(plan.config, exact_softmax=True),
        num_ctas=min(device.num_multiprocessors(), failed.size),
        persistent=True,
        pairs=False,
    )
    work = work._replace(
        launch_order=launch_order,
        num_query_blocks=failed.sum(dtype=jnp.int32)[None],
    )
    return attend_blocks_again(q, k, v, work, out, lse, plan=plan, interpret=interpret)
