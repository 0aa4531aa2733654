"""Dense attention in plain XLA, over chunks of queries, with bounded memory."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.common.device import Device
from pallas_kernels.common.linear_maps import sealed_with_derivatives
from pallas_kernels.common.sharding import Axes

AXES = Axes(
    operation="dense_attention",
    operands=("q: B T N D", "k: B T N D", "v: B T N D", "text_lengths: B"),
    results=("B T N D",),
)

# Logits held at once by the chunked path. On two CPU cores, 2304 tokens and head_dim
# 128, chunks of 128, 256, 384 and 768 queries take 360, 345, 328 and 312 ms; a GPU
# needs more logits at a time to fill its cores.
CPU_CHUNK_LOGITS = 1 << 21
GPU_CHUNK_LOGITS = 1 << 27


def chunk_size(shape: tuple[int, ...], device: Device) -> int:
    """Returns how many queries' logits are held at once; all chunks are equal."""
    batch, num_tokens, num_heads, _ = shape
    if device.platform == "cpu":
        queries = CPU_CHUNK_LOGITS // num_tokens
    else:
        queries = GPU_CHUNK_LOGITS // (num_tokens * batch * num_heads)
    queries = min(max(queries, 16), num_tokens)
    return math.ceil(num_tokens / math.ceil(num_tokens / queries))


@functools.partial(jax.jit, static_argnames=("chunk", "one_head_at_a_time"))
def chunked_attention(
    q: Float[Array, "B R N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    valid: Bool[Array, "B T"] | None,
    *,
    scale: float | Float[Array, ""],
    chunk: int,
    one_head_at_a_time: bool,
) -> Float[Array, "B R N D"]:
    """Loops over chunks of queries, and on CPU over batch items and heads too.

    XLA's CPU matmul is 1.6 times faster without batch dimensions; a GPU is only
    filled by all heads together.

    Args:
      q: Queries of all tokens, or of R of them.
      k: Keys.
      v: Values.
      valid: Tokens that are not padding; None means all.
      scale: Factor on the logits, also a traced one.
      chunk: Queries whose logits are held at once.
      one_head_at_a_time: Loop over batch items and heads.

    Returns:
      The output in q's dtype; that of padded queries is not zeroed.
    """
    # One for each head: gradients are added up where all heads are seen.
    scales = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), q.shape[::2])
    masks = () if valid is None else (valid,)
    run = functools.partial(
        _of_whole_heads, chunk=chunk, one_head_at_a_time=one_head_at_a_time
    )
    # T where it is that of keys, as messages call it tokens.
    rows = "B T N D" if q.shape == k.shape else "B R N D"
    masked = ("valid: B T" for _ in masks)
    operands = (f"q: {rows}", *AXES.operands[1:3], "scale: B N", *masked)
    axes = dataclasses.replace(AXES, operands=operands, results=(rows,))
    (out,) = sealed_with_derivatives(run, axes, q, k, v, scales, *masks)
    return out


def _of_whole_heads(
    q: Float[Array, "B R N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    scales: Float[Array, "B N"],
    *masks: Bool[Array, "B T"],
    chunk: int,
    one_head_at_a_time: bool,
) -> tuple[Float[Array, "B R N D"]]:
    """Attends; there is one mask of tokens, or none."""
    batch, num_rows, num_heads, head_dim = q.shape
    scales = scales.reshape(-1, 1, 1)
    valid_keys = jnp.repeat(masks[0], num_heads, axis=0) if masks else None
    if one_head_at_a_time:  # the CPU: it has no fast matmul of narrow dtypes
        q_heads, k_heads, v_heads = (
            _heads_first(x).astype(jnp.float32) for x in (q, k, v)
        )
        out = jax.lax.map(
            lambda args: _attend_in_chunks(*args, chunk=chunk),
            (q_heads, k_heads, v_heads, valid_keys, scales),
        )
    else:
        q_heads, k_heads, v_heads = (_heads_first(x) for x in (q, k, v))
        if valid_keys is not None:
            valid_keys = valid_keys[:, None]
        out = _attend_in_chunks(
            q_heads, k_heads, v_heads, valid_keys, scales, chunk=chunk
        )
    out = out.reshape(batch, num_heads, num_rows, head_dim)
    return (out.transpose(0, 2, 1, 3).astype(q.dtype),)


def _heads_first(x: Float[Array, "B T N D"]) -> Float[Array, "B*N T D"]:
    batch, num_tokens, num_heads, head_dim = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch * num_heads, num_tokens, head_dim)


def _attend_in_chunks(
    q: Float[Array, "*L R D"],
    k: Float[Array, "*L T D"],
    v: Float[Array, "*L T D"],
    valid_keys: Bool[Array, "... T"] | None,
    scale: Float[Array, "*L 1 1"],
    *,
    chunk: int,
) -> Float[Array, "*L R D"]:
    """Computes consecutive chunks of queries, one after the other."""
    num_rows, head_dim = q.shape[-2:]
    num_chunks = math.ceil(num_rows / chunk)
    padding = [(0, 0)] * (q.ndim - 2) + [(0, num_chunks * chunk - num_rows), (0, 0)]
    chunks = jnp.pad(q, padding).reshape(*q.shape[:-2], num_chunks, chunk, head_dim)

    # Recomputed in the backward pass: kept probabilities would be T x T numbers.
    @jax.checkpoint
    def attend(q_chunk):
        logits = scale * jnp.einsum(
            "...cd,...sd->...cs", q_chunk, k, preferred_element_type=jnp.float32
        )
        if valid_keys is not None:
            logits = jnp.where(valid_keys, logits, -jnp.inf)
        weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
        out = jnp.einsum(
            "...cs,...sd->...cd",
            weights.astype(v.dtype),
            v,
            preferred_element_type=jnp.float32,
        )
        return (out / weights.sum(-1, keepdims=True)).astype(q.dtype)

    out = jax.lax.map(attend, jnp.moveaxis(chunks, -3, 0))
    out = jnp.moveaxis(out, 0, -3)
    return out.reshape(*q.shape[:-2], num_chunks * chunk, head_dim)[..., :num_rows, :]
