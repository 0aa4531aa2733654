"""Dense attention: the public function, and how its path is chosen.

It is exact, with bounded memory: what sparse attention is compared to.

Long sequences on Hopper run the block-sparse kernel with full lists, which is faster
than cuDNN; else cuDNN's fused kernel on NVIDIA GPUs, or XLA over chunks of queries, so
that N x T x T logits never exist at once.
"""

import functools
import logging
from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import sm90
from pallas_kernels.attention.api import BackendChoice
from pallas_kernels.attention.dense_fused import FusedAttention, attend
from pallas_kernels.attention.dense_xla import AXES, chunk_size, chunked_attention
from pallas_kernels.common import AnyArray, Scale, to_jax, validation
from pallas_kernels.common.device import Device, current_device
from pallas_kernels.common.interfaces import BlockGrid, clear_padding, valid_tokens
from pallas_kernels.common.sharding import over_explicit_axes
from pallas_kernels.common.slow_paths import warn_once
from pallas_kernels.common.static import fold_scale, jit_once, split_scale

DenseBackendName = Literal["auto", "xla"]

_logger = logging.getLogger(__name__)


def dense_attention(
    q: Float[AnyArray, "B T N D"],
    k: Float[AnyArray, "B T N D"],
    v: Float[AnyArray, "B T N D"],
    *,
    grid: BlockGrid | None = None,
    scale: Scale | None = None,
    text_lengths: Int[AnyArray, " B"] | None = None,
    backend: DenseBackendName = "auto",
) -> Float[Array, "B T N D"]:
    """Computes softmax attention of every query over every valid key.

    The order of visual tokens does not matter. Differentiable in every mode and order,
    with memory linear in T; fused kernels leave forward mode and second derivatives to
    XLA, which warns once. Which path runs is decided while tracing, from q's device or
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
      scale: Factor on the logits, 1 / sqrt(D) by default: a number, or a scalar array,
        which may be traced and is not checked. Kernels for GPUs multiply an array
        into q, rounded to its dtype; XLA multiplies in float32.
      text_lengths: Valid text tokens of each batch item; None means all.
      backend: "auto", or "xla" for chunks of queries on any device, without a warning:
        for inputs that no fused kernel takes.

    Returns:
      The output in q's dtype. Text queries past `text_lengths` get zeros.

    Raises:
      ValueError: A shape, a text length, the scale or the backend is not acceptable.
      TypeError: A dtype or the scale's type is not acceptable.
    """
    q, k, v = to_jax(q, k, v)
    validation.check_qkv(q, k, v)
    if grid is not None:
        validation.check_tokens(q, grid)
    scale = validation.check_scale(scale, q.shape[-1])
    text_lengths = validation.check_text_lengths(text_lengths, q, grid)
    return unchecked_dense_attention(
        q, k, v, grid=grid, scale=scale, text_lengths=text_lengths, backend=backend
    )


def unchecked_dense_attention(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    *,
    grid: BlockGrid | None,
    scale: Scale,
    text_lengths: Int[Array, " B"] | None,
    backend: DenseBackendName = "auto",
) -> Float[Array, "B T N D"]:
    """Computes `dense_attention` for a caller that checks arguments.

    Args:
      q: Queries.
      k: Keys.
      v: Values.
      grid: Where the text stands; needed only with `text_lengths`.
      scale: Factor on the logits.
      text_lengths: Valid text tokens as int32, within the grid's; None means all.
      backend: "auto" or "xla".

    Returns:
      The output in q's dtype.

    Raises:
      ValueError: The backend is unknown.
    """
    device = current_device(q)
    has_padding, pads_before_video = False, False
    if grid is not None and text_lengths is not None:
        has_padding, pads_before_video = True, grid.text_tokens.start == 0
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
    known_scale, scale_array = split_scale(scale)
    return _attend(
        q,
        k,
        v,
        text_lengths,
        scale_array,
        path=choice.name,
        grid=grid if has_padding else None,
        scale=known_scale,
        device=device,
    )


@functools.partial(jit_once, static_argnames=("path", "grid", "scale", "device"))
def _attend(*arrays, **options):
    """Runs the chosen path on the batch items and heads that each device has."""
    run = over_explicit_axes(
        functools.partial(_attend_where_arrays_are, **options),
        operation=AXES.operation,
        operands=(*AXES.operands, "scale:"),
        results=AXES.results[0],
    )
    return run(*arrays)


def _attend_where_arrays_are(
    q,
    k,
    v,
    text_lengths,
    scale_array,
    *,
    path: str,
    grid: BlockGrid | None,
    scale: float | None,
    device: Device,
):
    """Runs the chosen path; `grid` says where the text of the lengths stands."""
    scale = scale_array if scale is None else scale
    lengths: tuple[Array, ...] = ()
    valid = None
    if grid is not None:
        # Before all paths, so that NaN in padding reaches no gradient either.
        q, k, v = (clear_padding(x, grid, text_lengths) for x in (q, k, v))
        lengths, valid = (text_lengths,), valid_tokens(grid, text_lengths)
    if path != "xla":
        q, scale = fold_scale(q, scale)
        fused = FusedAttention(path=path, grid=grid, scale=scale, device=device)
        return attend(fused, q, k, v, *lengths)
    out = chunked_attention(
        q,
        k,
        v,
        valid,
        scale=scale,
        chunk=chunk_size(q.shape, device),
        one_head_at_a_time=device.platform == "cpu",
    )
    return out if valid is None else jnp.where(valid[:, :, None, None], out, 0)


def why_no_cudnn(dtype: str, head_dim: int, device: Device) -> str | None:
    """Returns why cuDNN's attention cannot be used, or None if it can."""
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
      shape: Shape of q, [B, T, N, D].
      dtype: Name of its dtype.
      device: The device that the call is compiled for.
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
    no_hopper = sm90.dense_backend.why_unsupported(shape, dtype, device)
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
        aligned = (batch, num_tokens - num_tokens % sm90.dense_backend.ALIGNMENT, *rest)
        can_be_fixed = (
            sm90.dense_backend.why_unsupported(aligned, dtype, device) is None
        )
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
