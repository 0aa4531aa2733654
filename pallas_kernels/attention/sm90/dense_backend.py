"""Dense attention with the block-sparse kernel for Hopper: every list is full.

No list is read. All query blocks of a head walk the same keys, so pairs of CTAs share
them. The order of tokens does not matter: blocks are 128 of them, one after another.
Few queries would leave most of the GPU idle: parts of the keys are then attended to
side by side, and joined by their log-sum-exp.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.sm90.backend import why_unsupported_shape
from pallas_kernels.attention.sm90.copies import RunAddresses, Runs
from pallas_kernels.attention.sm90.cta import Work
from pallas_kernels.attention.sm90.kernel import attend_blocks
from pallas_kernels.attention.sm90.plan import (
    BLOCK,
    KernelConfig,
    Plan,
    Width,
)
from pallas_kernels.attention.sm90.repair import repair
from pallas_kernels.attention.sm90.wgmma import STEP
from pallas_kernels.common.batching import fold_mapped_axes
from pallas_kernels.common.device import Device, num_multiprocessors
from pallas_kernels.common.lanes import ALIGNMENT
from pallas_kernels.common.linear_maps import sealed

# Timed at 32,760 tokens and more, where it beats cuDNN by 13 to 20 %. Shorter sequences
# have fewer query blocks than fill the GPU evenly; where cuDNN wins is not known.
LEAST_TOKENS = 4096
MOST_PARTS = 16  # of the keys of a few queries


def hopper_dense_attention(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    *,
    scale: float,
    lengths: Int[Array, " B"] | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Float[Array, "B T N D"]:
    """Computes attention of every token over the first `lengths`; forward only.

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
    run = functools.partial(_run, masks_queries=lengths is not None)
    return _attend(run, q, k, v, lengths, scale=scale, interpret=interpret)


def hopper_row_attention(
    rows: Float[Array, "B R N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    *,
    scale: float,
    lengths: Int[Array, " B"] | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Float[Array, "B R N D"]:
    """Computes attention of a few queries over the first `lengths` keys; forward only.

    Args:
      rows: Queries, bfloat16 or float16.
      k: Keys; T is a multiple of 8 and at least 128.
      v: Values, finite also past the lengths.
      scale: Factor on the logits.
      lengths: Valid keys of each batch item, at least one; None means all.
      interpret: Run the kernel on the CPU in GPU interpret mode.

    Returns:
      The output in the dtype of the rows.
    """
    return _attend(_run_rows, rows, k, v, lengths, scale=scale, interpret=interpret)


def _attend(run: Callable, q, k, v, lengths, **options):
    """Runs a function as one operation; it is told whether there are lengths."""
    masks = lengths is not None
    if lengths is None:
        lengths = jnp.full(k.shape[0], k.shape[1], jnp.int32)
    run = functools.partial(run, masks=masks, **options)
    return sealed(fold_mapped_axes(run), q, k, v, lengths)[0]


def why_unsupported(
    shape: tuple[int, ...], dtype: str, device: Device, least_tokens: int = LEAST_TOKENS
) -> str | None:
    """Returns why the kernel is not used for k of this shape on a device, or None."""
    if cause := device.why_not_hopper():
        return cause
    _, num_tokens, _, head_dim = shape
    if num_tokens < least_tokens or num_tokens % ALIGNMENT:
        return (
            f"it takes a multiple of {ALIGNMENT} tokens, at least {least_tokens}, "
            f"not {num_tokens}"
        )
    return why_unsupported_shape(dtype, head_dim, BLOCK)


@functools.partial(jax.jit, static_argnames=("scale", "masks", "interpret"))
def _run_rows(rows, k, v, lengths, *, scale, masks, interpret):
    batch, num_rows, num_heads, head_dim = rows.shape
    num_tokens = k.shape[1]
    query_blocks = batch * num_heads * -(-num_rows // BLOCK)
    parts = num_parts(query_blocks, num_tokens, num_multiprocessors())

    def cut(x):  # a part is a batch item
        return x.reshape(batch * parts, num_tokens // parts, num_heads, head_dim)

    def joined(x):
        return x.reshape(batch, parts, *x.shape[1:])

    padded = jnp.pad(rows, ((0, 0), (0, -num_rows % BLOCK), (0, 0), (0, 0)))
    starts = np.arange(parts, dtype=np.int32) * (num_tokens // parts)
    own = jnp.clip(lengths[:, None] - starts, 0, num_tokens // parts)
    out, lse = _run(
        jnp.repeat(padded, parts, axis=0),
        cut(k),
        cut(v),
        own.ravel(),
        scale=scale,
        masks=masks,
        masks_queries=False,
        interpret=interpret,
    )
    # Every item has a valid key, so no weights are 0 / 0.
    weights = jax.nn.softmax(joined(lse), axis=1)
    total = jnp.einsum("bprnd,bpnr->brnd", joined(out).astype(jnp.float32), weights)
    return (total[:, :num_rows].astype(rows.dtype),)


def num_parts(query_blocks: int, num_tokens: int, multiprocessors: int) -> int:
    """Returns into how many equal parts the keys of a few queries are cut.

    CTAs all take as long, so that a last wave that is not full costs a whole one: the
    fewest parts are taken that leave less than a tenth idle, else the best ones.

    Args:
      query_blocks: Of all batch items and heads.
      num_tokens: Keys of one, a multiple of ALIGNMENT.
      multiprocessors: CTAs that run at a time.
    """

    def busy(parts: int) -> float:
        waves = query_blocks * parts / multiprocessors
        return waves / math.ceil(waves)

    most = max(1, min(MOST_PARTS, num_tokens // LEAST_TOKENS))
    fitting = [n for n in range(1, most + 1) if num_tokens % (n * ALIGNMENT) == 0]
    enough = (n for n in fitting if busy(n) > 0.9)
    return next(enough, max(fitting, key=busy))


@functools.partial(
    jax.jit, static_argnames=("scale", "masks", "masks_queries", "interpret")
)
def _run(q, k, v, lengths, *, scale, masks, masks_queries, interpret):
    """Returns the output, and the log-sum-exp of each query, [B, N, blocks of q]."""
    batch, num_queries, num_heads, head_dim = q.shape
    num_lists, num_blocks = batch * num_heads, -(-num_queries // BLOCK)
    num_query_blocks = num_lists * num_blocks
    starts, key_lengths = _blocks(k.shape[1])
    _, query_lengths = _blocks(num_queries)
    unused = jnp.zeros((1, 1), jnp.int32)
    work = Work(
        row_offsets=jnp.zeros((num_lists, 1), jnp.int32),
        block_ids=unused,
        width_ends=unused[None],
        full_list=jnp.arange(len(starts), dtype=jnp.int32),
        launch_order=jnp.arange(num_query_blocks, dtype=jnp.int32),
        num_query_blocks=jnp.full(1, num_query_blocks, jnp.int32),
        addresses=RunAddresses(
            first_unit=jnp.asarray(starts // ALIGNMENT), units_to_next_run=unused[0]
        ),
        lengths=jnp.asarray(query_lengths),
        valid=jnp.clip(lengths[:, None] - starts, 0, key_lengths),
    )
    plan = Plan(
        config=KernelConfig.for_head_dim(head_dim),
        num_blocks=num_blocks,
        num_key_blocks=len(starts),
        num_heads=num_heads,
        head_dim=head_dim,
        num_ctas=num_query_blocks,
        persistent=False,
        pairs=num_query_blocks % 2 == 0,
        is_dense=True,
        scale=scale,
        copies=Runs(BLOCK, start_at_multiples=True),
        widths=_widths(key_lengths, masks),
        masks_queries=masks_queries,
        has_short_blocks=bool(query_lengths[-1] < BLOCK),
        grows=q.dtype == jnp.float16,
        interpreted=interpret is not None,
    )
    out, lse = attend_blocks(q, k, v, work, plan=plan, interpret=interpret)
    out, lse = repair(q, k, v, work, out, lse, plan=plan, interpret=interpret)
    return out, lse.reshape(batch, num_heads, num_blocks * BLOCK)


def _blocks(num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first token of each block, and its length."""
    starts = np.arange(0, num_tokens, BLOCK, dtype=np.int32)
    return starts, np.minimum(BLOCK, num_tokens - starts).astype(np.int32)


def _widths(lengths: np.ndarray, masks: bool) -> tuple[Width, ...]:
    """Returns the width of full blocks and, where the last one is short, its own.

    Its own even where it is as wide as the others (120 tokens, say), unlike in
    `geometry`: no step of the others then has to look for masked keys.
    """
    last = int(lengths[-1])
    num_full = int((lengths == BLOCK).sum())
    full = Width(BLOCK, BLOCK, num_full, masks)
    if last == BLOCK:
        return (full,)
    width = -(-last // STEP) * STEP
    return full, Width(width, last, 1, masks or last < width)
