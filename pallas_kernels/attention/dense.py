"""Exact dense attention with bounded memory: what sparse attention is compared to.

Long sequences on Hopper run the block-sparse kernel with full lists, which is faster
than cuDNN; else cuDNN's fused kernel on NVIDIA GPUs, or XLA over chunks of queries, so
that N x T x T logits never exist at once.
"""

import functools
import logging
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention.api import BackendChoice
from pallas_kernels.attention.sm90 import dense_backend as hopper_dense
from pallas_kernels.attention.sm90.plan import ALIGNMENT
from pallas_kernels.common import validation
from pallas_kernels.common.device import Device, current_device
from pallas_kernels.common.interfaces import BlockGrid
from pallas_kernels.common.slow_paths import warn_once

# Logits held at once by the chunked path. On two CPU cores, 2304 tokens and head_dim
# 128, chunks of 128, 256, 384 and 768 queries take 360, 345, 328 and 312 ms; a GPU
# needs more logits at a time to fill its cores.
CPU_CHUNK_LOGITS = 1 << 21
GPU_CHUNK_LOGITS = 1 << 27

DenseBackendName = Literal["auto", "xla"]

_logger = logging.getLogger(__name__)


def dense_attention(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    *,
    grid: BlockGrid | None = None,
    scale: float | None = None,
    text_lengths: Int[Array, " B"] | None = None,
    backend: DenseBackendName = "auto",
) -> Float[Array, "B T N D"]:
    """Softmax attention of every query over every valid key.

    The order of visual tokens does not matter. Differentiable in reverse mode, with
    memory linear in T. Which path runs is decided while tracing, from q's device or
    the default one: cuDNN can only be traced where it is installed, so the choice
    cannot be left to lowering.

    On a GPU, XLA instead of a fused kernel warns once, with the cause. So does cuDNN
    for a long sequence that the Hopper kernel would take but for its length modulo 8 or
    where its text stands. Below 4,096 tokens cuDNN is what should run: the Hopper
    kernel is not known to be faster there. Nor does cuDNN warn for inputs that no
    kernel of this package takes, such as a head dimension of 96.

    Args:
      q: Queries. float32, bfloat16 or float16; the softmax is float32. Products of
        float32 inputs follow `jax.default_matmul_precision`.
      k: Keys, like q.
      v: Values, like q.
      grid: Where the text stands; needed only with `text_lengths`.
      scale: Factor on the logits, a Python number; 1 / sqrt(D) by default.
      text_lengths: Valid text tokens of each batch item; None means all.
      backend: "auto", or "xla" for chunks of queries on any device, without a warning:
        for inputs that no fused kernel takes.

    Returns:
      The output in q's dtype. Text queries past `text_lengths` get zeros.

    Raises:
      ValueError: A shape, a text length, the scale or the backend is not acceptable.
      TypeError: A dtype or the scale's type is not acceptable.
    """
    validation.check_qkv(q, k, v)
    if grid is not None:
        validation.check_tokens(q, grid)
    scale = validation.check_scale(scale, q.shape[-1])
    text_lengths = validation.check_text_lengths(text_lengths, q, grid)
    device = current_device(q)
    valid, pads_before_video = None, False
    if grid is not None and text_lengths is not None:
        valid = _valid_tokens(grid, text_lengths)
        pads_before_video = grid.text_tokens.start == 0
    choice = choose(
        q.shape,
        q.dtype.name,
        device,
        pads_before_video=pads_before_video,
        backend=backend,
    )
    if choice.slower_because is not None:
        warn_once(
            f"dense_attention runs on backend {choice.name!r}: {choice.slower_because}"
        )
    _logger.debug("%s: %s", choice.name, choice.reason)
    if choice.name == "hopper":
        return _hopper_attention(grid, scale, q, k, v, text_lengths)
    if choice.name == "cudnn":
        out = _cudnn_attention(q, k, v, grid, scale, text_lengths)
    else:
        out = _chunked_attention(
            q,
            k,
            v,
            valid,
            scale=scale,
            chunk=_chunk_size(q.shape, device),
            one_head_at_a_time=device.platform == "cpu",
        )
    if valid is not None:
        out = jnp.where(valid[:, :, None, None], out, 0)
    return out


def why_no_cudnn(dtype: str, head_dim: int, device: Device) -> str | None:
    """Why cuDNN's attention cannot be used, or None if it can."""
    if device.compute_capability is None:
        return f"{device.platform} ({device.kind}) is not an NVIDIA GPU"
    if device.compute_capability < (8, 0):
        return f"{device.kind} is older than Ampere"
    if dtype not in ("bfloat16", "float16"):
        return f"cuDNN attention takes bfloat16 and float16, not {dtype}"
    # 256 works forward only, and only since Hopper; backward stops at 128.
    if head_dim > 128 or head_dim % 8:
        return f"{head_dim=} must be a multiple of 8 up to 128"
    return None


def choose(
    shape: tuple[int, ...],
    dtype: str,
    device: Device,
    *,
    pads_before_video: bool = False,
    backend: str = "auto",
) -> BackendChoice:
    """Says which of "hopper", "cudnn" and "xla" runs, and why.

    Args:
      shape: Of q, [B, T, N, D].
      dtype: Of q.
      device: What the call is compiled for.
      pads_before_video: Whether text with lengths stands before the video.
      backend: As passed to `dense_attention`.

    Returns:
      The path, and in `slower_because` what the caller can change or should know.

    Raises:
      ValueError: The backend is unknown.
    """
    if backend not in get_args(DenseBackendName):
        raise ValueError(f"{backend=} must be one of {get_args(DenseBackendName)}")
    if backend == "xla":
        return BackendChoice(name="xla", reason="named by the caller")
    no_hopper = hopper_dense.why_unsupported(shape, dtype, device)
    if no_hopper is None and pads_before_video:
        no_hopper = (
            "padding of text before the video is not at the end of the keys; a grid "
            'with text_side="after" puts it there'
        )
    if no_hopper is None:
        return BackendChoice(name="hopper", reason="a long sequence on Hopper")
    no_hopper = f"'hopper': {no_hopper}"
    no_cudnn = why_no_cudnn(dtype, shape[-1], device)
    if no_cudnn is None:
        batch, num_tokens, *rest = shape
        aligned = (batch, num_tokens - num_tokens % ALIGNMENT, *rest)
        can_be_fixed = hopper_dense.why_unsupported(aligned, dtype, device) is None
        return BackendChoice(
            name="cudnn",
            reason=no_hopper,
            slower_because=no_hopper if can_be_fixed else None,
        )
    passed_over = f"{no_hopper}; 'cudnn': {no_cudnn}"
    return BackendChoice(
        name="xla",
        reason=passed_over,
        slower_because=passed_over if device.platform == "gpu" else None,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _hopper_attention(grid, scale, q, k, v, text_lengths):
    lengths = None
    if text_lengths is not None:
        lengths = grid.num_tokens - grid.text_length + text_lengths
    return hopper_dense.hopper_dense_attention(q, k, v, scale=scale, lengths=lengths)


def _cudnn_forward(grid, scale, q, k, v, text_lengths):
    """With gradients all of it is cuDNN's, whose backward pass is the fast one."""

    def attend(q, k, v):
        out = _cudnn_attention(q, k, v, grid, scale, text_lengths)
        if text_lengths is None:
            return out
        return jnp.where(_valid_tokens(grid, text_lengths)[:, :, None, None], out, 0)

    return jax.vjp(attend, q, k, v)


def _cudnn_backward(grid, scale, pullback, cotangent):
    return *pullback(cotangent), None


_hopper_attention.defvjp(_cudnn_forward, _cudnn_backward)


def _cudnn_attention(q, k, v, grid, scale, text_lengths):
    """cuDNN takes the length of a valid prefix of keys, so text goes last.

    The order of keys does not change attention: rolling K and V is enough.
    """
    lengths = None
    if text_lengths is not None:
        num_visual_tokens = grid.num_tokens - grid.text_length
        lengths = num_visual_tokens + text_lengths
        if grid.text_tokens.start == 0:
            k, v = (jnp.roll(x, -grid.text_length, axis=1) for x in (k, v))
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, key_value_seq_lengths=lengths, implementation="cudnn"
    )


def _valid_tokens(
    grid: BlockGrid, text_lengths: Int[Array, " B"]
) -> Bool[Array, "B T"]:
    token = jnp.arange(grid.num_tokens)
    text = grid.text_tokens
    is_padding = (token >= text.start + text_lengths[:, None]) & (token < text.stop)
    return ~is_padding


def _chunk_size(shape: tuple[int, ...], device: Device) -> int:
    """Queries whose logits are held at once; chunks of one call are equal."""
    batch, num_tokens, num_heads, _ = shape
    if device.platform == "cpu":
        queries = CPU_CHUNK_LOGITS // num_tokens
    else:
        queries = GPU_CHUNK_LOGITS // (num_tokens * batch * num_heads)
    queries = min(max(queries, 16), num_tokens)
    return math.ceil(num_tokens / math.ceil(num_tokens / queries))


@functools.partial(jax.jit, static_argnames=("scale", "chunk", "one_head_at_a_time"))
def _chunked_attention(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    valid: Bool[Array, "B T"] | None,
    *,
    scale: float,
    chunk: int,
    one_head_at_a_time: bool,
) -> Float[Array, "B T N D"]:
    """Loops over chunks of queries, and on CPU over batch items and heads too.

    XLA's CPU matmul is 1.6 times faster without batch dimensions; a GPU is only
    filled by all heads together.
    """
    batch, num_tokens, num_heads, head_dim = q.shape
    valid_keys = None if valid is None else jnp.repeat(valid, num_heads, axis=0)
    if one_head_at_a_time:  # the CPU: it has no fast matmul of narrow dtypes
        q_heads, k_heads, v_heads = (
            _heads_first(x).astype(jnp.float32) for x in (q, k, v)
        )
        out = jax.lax.map(
            lambda args: _attend_in_chunks(*args, scale=scale, chunk=chunk),
            (q_heads, k_heads, v_heads, valid_keys),
        )
    else:
        q_heads, k_heads, v_heads = (_heads_first(x) for x in (q, k, v))
        if valid_keys is not None:
            valid_keys = valid_keys[:, None]
        out = _attend_in_chunks(
            q_heads, k_heads, v_heads, valid_keys, scale=scale, chunk=chunk
        )
    out = out.reshape(batch, num_heads, num_tokens, head_dim)
    return out.transpose(0, 2, 1, 3).astype(q.dtype)


def _heads_first(x: Float[Array, "B T N D"]) -> Float[Array, "B*N T D"]:
    batch, num_tokens, num_heads, head_dim = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch * num_heads, num_tokens, head_dim)


def _attend_in_chunks(
    q: Float[Array, "*L T D"],
    k: Float[Array, "*L T D"],
    v: Float[Array, "*L T D"],
    valid_keys: Bool[Array, "*L #T T"] | None,
    *,
    scale: float,
    chunk: int,
) -> Float[Array, "*L T D"]:
    """Attention of consecutive chunks of queries, one after the other."""
    num_tokens, head_dim = q.shape[-2:]
    num_chunks = math.ceil(num_tokens / chunk)
    padding = [(0, 0)] * (q.ndim - 2) + [(0, num_chunks * chunk - num_tokens), (0, 0)]
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
    return out.reshape(*q.shape[:-2], num_chunks * chunk, head_dim)[..., :num_tokens, :]
