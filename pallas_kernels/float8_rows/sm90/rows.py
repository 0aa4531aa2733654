"""Rows that the kernels for Hopper take, and how they round one."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float8e4m3fn

from pallas_kernels.common.validation import why_not_among
from pallas_kernels.float8_rows.interfaces import LARGEST, LEAST_MAXIMUM

DTYPES = ("float32", "bfloat16", "float16")
THREADS = 128  # of a warpgroup
LOAD_BYTES = 16  # of a thread at once, at most
STORE_CHANNELS = 4  # of a thread at once, at least: a word of FP8
MAX_CHANNELS = 128 * THREADS  # that registers hold

Rows = tuple[Float8e4m3fn[Array, "R K"], Float[Array, " R"]]


def why_unsupported(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> str | None:
    """Returns why the kernels take such rows on no device, or None.

    Args:
      shape: That of the rows.
      dtype: Of the rows.
    """
    if cause := why_not_among(DTYPES, jnp.dtype(dtype).name):
        return cause
    channels = shape[-1]
    if _vec(channels, dtype) is None or channels > MAX_CHANNELS:
        return (
            f"it takes a multiple of {THREADS * STORE_CHANNELS} channels up to "
            f"{MAX_CHANNELS}, not {channels}"
        )
    return None


def checked_vec(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> int:
    """Returns how many channels a thread loads together.

    Raises:
      ValueError: The kernels cannot take such rows on any device.
    """
    if cause := why_unsupported(shape, dtype):
        raise ValueError(f"the kernels for rows in FP8 cannot take them: {cause}")
    vec = _vec(shape[-1], dtype)
    assert vec is not None, "see why_unsupported"
    return vec


def _vec(channels: int, dtype: jax.typing.DTypeLike) -> int | None:
    widest = LOAD_BYTES // jnp.dtype(dtype).itemsize
    choices = (widest, STORE_CHANNELS)  # widest first
    fitting = (vec for vec in choices if channels and channels % (THREADS * vec) == 0)
    return next(fitting, None)


def largest_of(y) -> Any:
    """Returns the largest number of a row, by size, or the least maximum of rows."""
    return jnp.maximum(jnp.max(jnp.abs(y)), LEAST_MAXIMUM)


def store(y, largest, row, values_gmem, scale_gmem, layout, ops) -> None:
    """Rounds a row, by its largest number, and stores it with its scale."""
    values_gmem[row] = ops.to_float8(y * (LARGEST / largest), layout)
    scale_gmem[row] = largest * (1 / LARGEST)
