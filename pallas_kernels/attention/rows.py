"""Exact attention of a few queries over all keys, to compare sparse rows with."""

import functools
from typing import Literal

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import sm90
from pallas_kernels.attention.dense_api import why_no_cudnn
from pallas_kernels.attention.dense_xla import chunk_size, chunked_attention
from pallas_kernels.common.arrays import Scale
from pallas_kernels.common.device import Device, current_device
from pallas_kernels.common.interfaces import (
    BlockGrid,
    clear_padding,
    valid_prefix,
    valid_tokens,
)
from pallas_kernels.common.linear_maps import on_own_shards
from pallas_kernels.common.sharding import over_explicit_axes
from pallas_kernels.common.static import fold_scale, jit_once, split_scale

Path = Literal["hopper", "cudnn", "xla"]


def unchecked_row_attention(
    rows: Float[Array, "B R N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    *,
    grid: BlockGrid,
    scale: Scale,
    text_lengths: Int[Array, " B"] | None,
) -> Float[Array, "B R N D"]:
    """Computes softmax attention of some queries over every valid key.

    By the Hopper kernel or cuDNN where they can be used and padding stands last, else
    by XLA, whose memory is that of R x T logits of a few heads. No gradient flows
    through it.

    Args:
      rows: Queries, fewer than keys.
      k: Keys of the whole sequence.
      v: Values, like k.
      grid: Where the text stands.
      scale: Factor on the logits.
      text_lengths: Valid text tokens as int32, within the grid's; None means all.

    Returns:
      The output in the dtype of the rows.
    """
    device = current_device(k)
    pads_first = text_lengths is not None and grid.text_tokens.start == 0
    known_scale, scale_array = split_scale(scale)
    return _attend(
        rows,
        k,
        v,
        text_lengths,
        scale_array,
        grid=grid if text_lengths is not None else None,
        scale=known_scale,
        device=device,
        path="xla" if pads_first else _fastest_path(k, device),
    )


def _fastest_path(k: Array, device: Device) -> Path:
    dtype = k.dtype.name
    if sm90.dense_backend.why_unsupported(k.shape, dtype, device) is None:
        return "hopper"
    return "xla" if why_no_cudnn(dtype, k.shape[-1], device) else "cudnn"


@functools.partial(jit_once, static_argnames=("grid", "scale", "device", "path"))
def _attend(
    rows, k, v, text_lengths, scale_array, *, grid: BlockGrid | None, **options
):
    """Attends on the batch items and heads that each device has."""
    if grid is not None:
        # Not below: JAX refuses the update there, under vmap over an explicit axis.
        clear = over_explicit_axes(
            lambda x, lengths: clear_padding(x, grid, lengths),
            operation="row_attention",
            operands=("x: B T N D", "text_lengths: B"),
            results="B T N D",
        )
        v = clear(v, text_lengths)
        if options["path"] != "hopper":  # which masks logits, whatever they are
            k = clear(k, text_lengths)

    def run(*arrays):
        return (_attend_where_arrays_are(*arrays, grid=grid, **options),)

    on_each = on_own_shards(
        run,
        operation="row_attention",
        operands=(
            *("rows: B R N D", "k: B T N D", "v: B T N D"),
            *("text_lengths: B", "scale:"),
        ),
        results=("B R N D",),
    )
    return on_each(rows, k, v, text_lengths, scale_array)[0]


def _attend_where_arrays_are(
    rows,
    k,
    v,
    text_lengths,
    scale_array,
    *,
    grid: BlockGrid | None,
    scale: float | None,
    device: Device,
    path: Path,
):
    scale = scale_array if scale is None else scale
    if path != "xla":
        keys = None if grid is None else valid_prefix(grid, text_lengths)
        rows, scale = fold_scale(rows, scale)
        if path == "hopper":
            return sm90.dense_backend.hopper_row_attention(
                rows, k, v, scale=scale, lengths=keys
            )
        return jax.nn.dot_product_attention(
            rows, k, v, scale=scale, key_value_seq_lengths=keys, implementation="cudnn"
        )
    valid = None if grid is None else valid_tokens(grid, text_lengths)
    is_cpu = device.platform == "cpu"
    chunk = min(chunk_size(k.shape, device), rows.shape[1])
    return chunked_attention(
        rows, k, v, valid, scale=scale, chunk=chunk, one_head_at_a_time=is_cpu
    )
