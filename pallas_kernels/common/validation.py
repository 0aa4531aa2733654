"""Checks of arguments shared by the public functions of this package."""

import functools
import math
import numbers
from collections.abc import Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common.arrays import AnyArray, Scale
from pallas_kernels.common.interfaces import (
    SUPPORTED_DTYPES,
    BlockGrid,
    BlockLists,
    Order,
)
from pallas_kernels.common.static import jit_once


def why_not_among(
    accepted: Sequence[object], value: object, what: str = "{}"
) -> str | None:
    """Returns why a kernel does not take a value, or None if it does.

    Args:
      accepted: What it takes.
      value: What it is given.
      what: How the accepted values are called, which stand in place of `{}`.
    """
    if value in accepted:
        return None
    *others, last = map(str, accepted)
    named = f"{', '.join(others)} and {last}" if others else last
    return f"it takes {what.format(named)}, not {value}"


def check_qkv(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    """Raises unless q, k and v are [B, T, N, D] of one shape and supported dtype."""
    check_alike({"q": q, "k": k, "v": v})


def check_qk(q: jax.Array, k: jax.Array) -> None:
    """Raises unless q and k are [B, T, N, D] of one shape and supported dtype."""
    check_alike({"q": q, "k": k})


def check_joint(
    video: tuple[jax.Array, ...], text: tuple[jax.Array, ...], grid: BlockGrid
) -> None:
    """Raises unless q, k and v of video and text fit each other and the grid."""
    parts = {"video": video, "text": text}
    for part, arrays in parts.items():
        names = (f"{part}.{name}" for name in "qkv")
        check_alike(dict(zip(names, arrays, strict=True)))
    if grid.text_length == 0:
        raise ValueError(
            f"text was given, but {grid} has none: give the grid its text_length"
        )
    lengths = (grid.num_tokens - grid.text_length, grid.text_length)
    batch, _, *heads = video[0].shape
    for (part, arrays), length in zip(parts.items(), lengths, strict=True):
        expected = (batch, length, *heads)
        if arrays[0].shape != expected:
            raise ValueError(
                f"{part}.q has shape {arrays[0].shape}; {grid} and the shape of "
                f"video.q, {video[0].shape}, need {expected}"
            )
    if text[0].dtype != video[0].dtype:
        raise TypeError(
            f"text.q has dtype {text[0].dtype.name}; it must equal video.q's dtype "
            f"{video[0].dtype.name}: cast one of them"
        )


def check_alike(arrays: dict[str, jax.Array]) -> None:
    """Raises unless arrays have the shape and the supported dtype of the first."""
    first, q = next(iter(arrays.items()))
    for name, array in arrays.items():
        check_axes(name, array)
        if array.dtype.name not in SUPPORTED_DTYPES:
            raise TypeError(
                f"{name} has dtype {array.dtype.name}; accepted are "
                f"{', '.join(SUPPORTED_DTYPES)}"
            )
    for name, array in arrays.items():
        if array.shape != q.shape:
            raise ValueError(
                f"{name} has shape {array.shape}; it must equal {first}'s shape "
                f"{q.shape}{_remedy(name, array.shape, q.shape)}"
            )
        if array.dtype != q.dtype:
            raise TypeError(
                f"{name} has dtype {array.dtype.name}; it must equal {first}'s dtype "
                f"{q.dtype.name}: cast one of them, such as by "
                f"{name}.astype({first}.dtype)"
            )


def check_axes(name: str, array: jax.Array) -> None:
    """Raises ValueError unless an array is [batch, tokens, heads, head_dim]."""
    if array.ndim == 4 and 0 not in array.shape:
        return
    unbatched = f". Without a batch, pass {name}[None] and take [0] of the result"
    raise ValueError(
        f"{name} has shape {array.shape}; expected [batch, tokens, heads, "
        "head_dim] with every size at least 1"
        f"{unbatched if array.ndim == 3 else ''}"
    )


def _remedy(name: str, shape: tuple[int, ...], of_q: tuple[int, ...]) -> str:
    """Returns what to do about an array whose shape differs from q's, if one knows."""
    differing = [axis for axis in range(4) if shape[axis] != of_q[axis]]
    if differing == [2] and of_q[2] % shape[2] == 0:
        return (
            ": attention has no grouped heads; repeat those of keys and values, "
            f"jnp.repeat({name}, {of_q[2] // shape[2]}, axis=2)"
        )
    if 1 in differing:
        return (
            ": this is self-attention only. jax.nn.dot_product_attention attends to "
            "keys of another length"
        )
    if differing == [0] and shape[0] == 1:
        return f": one item serves no batch; use jnp.broadcast_to({name}, q.shape)"
    if differing == [3] and name.endswith("v"):
        return ": pad the channels of the narrower ones with zeros"
    return ""


def check_tokens(q: jax.Array, grid: BlockGrid, name: str = "q") -> None:
    """Raises unless q, or what `name` says, has as many tokens as the grid."""
    if q.shape[1] != grid.num_tokens:
        raise ValueError(
            f"{name} has shape {q.shape}, {q.shape[1]} tokens; {grid} has "
            f"{grid.num_tokens}, text included"
        )


def check_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    grid: BlockGrid,
    order: str,
    scale: Scale | None,
    text_lengths: AnyArray | None,
) -> tuple[float | jax.Array, jax.Array | None]:
    """Raises unless these arguments of an attention function are acceptable.

    Returns:
      The scale and the text lengths, as `check_scale` and `check_text_lengths` do.
    """
    check_qkv(q, k, v)
    check_tokens(q, grid)
    scale = check_scale(scale, q.shape[-1])
    text_lengths = check_text_lengths(text_lengths, q, grid)
    check_order(order)
    return scale, text_lengths


def check_order(order: str) -> None:
    """Raises ValueError unless `order` names an order of tokens."""
    if order not in get_args(Order):
        raise ValueError(f"{order=} must be one of {get_args(Order)}")


def check_mask(q: jax.Array, mask: BlockLists, grid: BlockGrid) -> None:
    """Raises unless the mask's lists fit q's batch and heads and the grid."""
    if not hasattr(mask, "row_offsets"):
        raise TypeError(
            f"mask is {type(mask).__name__}; expected a BlockMask: BlockMask."
            "from_dense and BlockMask.from_visual make one of a boolean map"
        )
    if mask.grid != grid:
        raise ValueError(f"mask.grid={mask.grid} must equal grid={grid}")
    batch, _, num_heads, _ = q.shape
    shapes = (
        ("row_offsets", (batch, num_heads, grid.num_blocks + 1), "[B, N, R + 1]"),
        ("block_ids", (batch, num_heads, *mask.block_ids.shape[2:]), "[B, N, M]"),
    )
    for name, expected, axes in shapes:
        array = getattr(mask, name)
        if array.shape != expected or array.ndim != 3:
            raise ValueError(
                f"mask.{name} has shape {array.shape}; q with batch {batch} and "
                f"{num_heads} heads and a grid of {grid.num_blocks} blocks need "
                f"{axes} = {expected}"
            )
        if array.dtype != jnp.int32:
            raise TypeError(f"mask.{name} has dtype {array.dtype.name}; expected int32")


def check_means(q: jax.Array, means: Any, grid: BlockGrid) -> None:
    """Raises unless the arrays of `Means` fit q, the grid and their sub-tiles."""
    cells = means.sub_tiles
    visual_tokens = grid.num_tokens - grid.text_length
    if (cells.tile, cells.num_tokens) != (grid.tile, visual_tokens):
        raise ValueError(
            f"means.sub_tiles={cells} has {cells.num_tokens} tokens in tiles of "
            f"{cells.tile}; {grid} has {visual_tokens} of the video in {grid.tile}"
        )
    batch, _, num_heads, head_dim = q.shape
    mean = (batch, cells.num_cells, num_heads, head_dim)
    columns = (batch, num_heads, grid.num_blocks, cells.num_columns)
    for name, expected, axes, dtype in (
        ("k", mean, "[B, M, N, D]", q.dtype),
        ("v", mean, "[B, M, N, D]", q.dtype),
        ("dropped", columns, "[B, N, R, C]", jnp.dtype(jnp.uint8)),
    ):
        array = getattr(means, name)
        if array.shape != expected:
            raise ValueError(
                f"means.{name} has shape {array.shape}; q of shape {q.shape} and "
                f"{cells} need {axes} = {expected}"
            )
        if array.dtype != dtype:
            raise TypeError(
                f"means.{name} has dtype {array.dtype.name}; expected {dtype.name}"
            )


def check_lists(mask: BlockLists) -> None:
    """Raises if the mask's lists would have a kernel read past an array's ends.

    The values are checked where they are known; under a transformation they are not.
    Entries past a head's last offset are unspecified, and any value will do. Shapes
    must have been checked. A mask whose maker vouches for it, by a true
    `lists_are_valid`, is not looked at: nothing then waits for its arrays.

    The lists of a long video take 100 MB. They are reduced where they lie, in the time
    of reading them once, and one byte comes to the host; they come only to say what is
    wrong. That waits for the mask, which a call outside jit can afford.
    """
    if getattr(mask, "lists_are_valid", False):
        return
    lists = (mask.row_offsets, mask.block_ids)
    if any(isinstance(array, jax.core.Tracer) for array in lists):
        return
    with jax.ensure_compile_time_eval():  # a known mask inside a traced function
        has_fault = _has_fault(*lists)
        # Under shard_map outside jit it is traced all the same.
        if isinstance(has_fault, jax.core.Tracer) or not jax.device_get(has_fault):
            return
    offsets, ids = jax.device_get(lists)
    num_blocks, capacity = offsets.shape[-1] - 1, ids.shape[-1]
    accepted = {
        "first": "the first offset must be 0",
        "falling": "offsets must not decrease",
        "past_capacity": f"block_ids holds {capacity} entries of each head",
        "not_a_block": f"accepted are 0 to {num_blocks - 1}, mask.grid's blocks",
    }
    for cause, where in _faults(offsets, ids, np).items():
        if not where.any():
            continue
        index = tuple(map(int, np.argwhere(where)[0]))
        name, array = "row_offsets", offsets
        if cause == "not_a_block":
            name, array = "block_ids", ids
        value, place = array[index], ", ".join(map(str, index))
        raise ValueError(f"mask.{name}[{place}] is {value}; {accepted[cause]}")


def _faults(row_offsets, block_ids, xp=jnp) -> dict[str, jax.Array | np.ndarray]:
    """Finds wrong entries of the lists: the first three of offsets, then of ids."""
    row = xp.arange(row_offsets.shape[-1])
    before = xp.concatenate([row_offsets[..., :1], row_offsets[..., :-1]], axis=-1)
    is_used = xp.arange(block_ids.shape[-1]) < row_offsets[..., -1:]
    is_block = (block_ids >= 0) & (block_ids < row_offsets.shape[-1] - 1)
    return {
        "first": (row == 0) & (row_offsets != 0),
        "falling": row_offsets < before,
        "past_capacity": row_offsets > block_ids.shape[-1],
        "not_a_block": is_used & ~is_block,
    }


@jit_once
def _has_fault(row_offsets, block_ids):
    faults = _faults(row_offsets, block_ids).values()
    return functools.reduce(jnp.logical_or, [where.any() for where in faults])


def check_scale(scale: Scale | None, head_dim: int) -> float | jax.Array:
    """Returns the factor on the logits, 1 / sqrt(head_dim) by default.

    A number becomes a constant of compiled programs. An array of jax stays one: it may
    be traced, and reading its value would wait for its device.
    """
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if isinstance(scale, (jax.Array, np.ndarray)):
        if scale.shape or not jnp.issubdtype(scale.dtype, jnp.floating):
            raise TypeError(
                f"scale is an array of shape {scale.shape} and dtype "
                f"{scale.dtype.name}; expected a number or a floating-point scalar"
            )
        if isinstance(scale, jax.Array):
            return scale.astype(jnp.float32)
        scale = float(scale)
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(
            f"scale={scale!r} must be a number, a scalar array or None, not "
            f"{type(scale).__name__}"
        )
    if not math.isfinite(scale):
        raise ValueError(f"{scale=} must be finite")
    return float(scale)


def check_text_lengths(
    text_lengths: AnyArray | None, q: jax.Array, grid: BlockGrid | None
) -> jax.Array | None:
    """Returns valid text tokens per batch item as int32 [B], or None.

    The values are checked where they are known; under a transformation a length
    outside 0 to text_length acts like the nearest one inside.
    """
    if text_lengths is None:
        return None
    if grid is None:
        raise ValueError("text_lengths needs grid, which says where the text stands")
    if grid.text_length == 0:
        raise ValueError(f"text_lengths was given, but {grid} has no text")
    is_traced = isinstance(text_lengths, jax.core.Tracer)
    # What comes from a device is asked for: a transfer guard lets it pass.
    lengths = text_lengths if is_traced else np.asarray(jax.device_get(text_lengths))
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"text_lengths has dtype {lengths.dtype}; expected integers")
    if lengths.shape != (q.shape[0],):
        raise ValueError(
            f"text_lengths has shape {lengths.shape}; expected [batch] = "
            f"({q.shape[0]},)"
        )
    if is_traced:
        return jnp.clip(lengths.astype(jnp.int32), 0, grid.text_length)
    if not ((lengths >= 0) & (lengths <= grid.text_length)).all():
        raise ValueError(
            f"text_lengths={lengths.tolist()} must lie in 0 to {grid.text_length}, "
            "the grid's text_length"
        )
    return jnp.asarray(text_lengths, jnp.int32)
