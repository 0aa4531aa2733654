"""Dense attention with the block-sparse kernel for Hopper: every list is full.

No list is read. All query blocks of a head walk the same keys, so pairs of CTAs share
them. The order of tokens does not matter: blocks are 128 of them, one after another.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.sm90 import backend as hopper
from pallas_kernels.attention.sm90 import plan as sm90
from pallas_kernels.attention.sm90.kernel import Work, attend_blocks
from pallas_kernels.attention.sm90.wgmma import STEP
from pallas_kernels.common.batching import fold_mapped_axes
from pallas_kernels.common.device import Device

# Timed at 32,760 tokens and more, where it beats cuDNN by 13 to 20 %. Shorter sequences
# have fewer query blocks than fill the card evenly; where cuDNN wins is not known.
LEAST_TOKENS = 4096


def hopper_dense_attention(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    *,
    scale: float,
    lengths: Int[Array, " B"] | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Float[Array, "B T N D"]:
    """Attention of every token over the first `lengths` ones; forward only.

    Args:
      q: Queries, bfloat16 or float16; T is a multiple of 8 and at least 128.
      k: Keys.
      v: Values.
      scale: Factor on the logits.
      lengths: Valid tokens of each batch item, at least one; None means all. Later
        queries get zeros.
      interpret: Run the kernel on the CPU in GPU interpret mode.

    Returns:
      The output in q's dtype.
    """
    masks = lengths is not None
    if lengths is None:
        lengths = jnp.full(q.shape[0], q.shape[1], jnp.int32)
    run = functools.partial(_run, scale=scale, masks=masks, interpret=interpret)
    return fold_mapped_axes(run)(q, k, v, lengths)[0]


def why_unsupported(
    shape: tuple[int, ...], dtype: str, device: Device, least_tokens: int = LEAST_TOKENS
) -> str | None:
    """Why the kernel is not used for q of this shape on a device, or None if it is."""
    if cause := device.why_not_hopper():
        return cause
    _, num_tokens, _, head_dim = shape
    if num_tokens < least_tokens or num_tokens % sm90.ALIGNMENT:
        return (
            f"it takes a multiple of {sm90.ALIGNMENT} tokens, at least {least_tokens}, "
            f"not {num_tokens}"
        )
    return hopper.why_unsupported_shape(dtype, head_dim, sm90.BLOCK)


@functools.partial(jax.jit, static_argnames=("scale", "masks", "interpret"))
def _run(q, k, v, lengths, *, scale, masks, interpret):
    batch, num_tokens, num_heads, head_dim = q.shape
    num_lists, num_blocks = batch * num_heads, -(-num_tokens // sm90.BLOCK)
    num_tiles = num_lists * num_blocks
    starts = np.arange(num_blocks, dtype=np.int32) * sm90.BLOCK
    block_lengths = np.minimum(sm90.BLOCK, num_tokens - starts).astype(np.int32)
    unused = jnp.zeros((1, 1), jnp.int32)
    work = Work(
        row_offsets=jnp.zeros((num_lists, 1), jnp.int32),
        block_ids=unused,
        width_ends=unused[None],
        full_list=jnp.arange(num_blocks, dtype=jnp.int32),
        order=jnp.arange(num_tiles, dtype=jnp.int32),
        num_tiles=jnp.full(1, num_tiles, jnp.int32),
        starts=jnp.asarray(starts // sm90.ALIGNMENT),
        strides=unused[0],
        lengths=jnp.asarray(block_lengths),
        valid=jnp.clip(lengths[:, None] - starts, 0, block_lengths),
        reciprocals=unused[0],
    )
    config = sm90.KernelConfig.for_head_dim(head_dim)
    plan = sm90.Plan(
        config=config,
        num_blocks=num_blocks,
        num_heads=num_heads,
        head_dim=head_dim,
        num_ctas=num_tiles,
        persistent=False,
        pairs=config.pairs and num_tiles % 2 == 0,
        is_dense=True,
        scale=scale,
        copies=sm90.Runs(sm90.BLOCK, start_at_multiples=True),
        widths=_widths(block_lengths, masks),
        masks_queries=masks,
        has_short_blocks=bool(block_lengths[-1] < sm90.BLOCK),
        grows=q.dtype == jnp.float16,
        emulate_wgmma=interpret is not None,
    )
    out, lse = attend_blocks(q, k, v, work, plan=plan, interpret=interpret)
    out, _ = hopper.repair(q, k, v, work, out, lse, plan, interpret)
    return (out,)


def _widths(lengths: np.ndarray, masks: bool) -> tuple[sm90.Width, ...]:
    """Full blocks and, where the last one is short, its own.

    Its own even where it is as wide as the others (120 tokens, say), unlike in
    `sm90_geometry`: no step of the others then has to look for masked keys.
    """
    last = int(lengths[-1])
    num_full = int((lengths == sm90.BLOCK).sum())
    full = sm90.Width(sm90.BLOCK, sm90.BLOCK, num_full, masks)
    if last == sm90.BLOCK:
        return (full,)
    width = -(-last // STEP) * STEP
    return full, sm90.Width(width, last, 1, masks or last < width)
