"""Rows of numbers in FP8, each with a scale.

FP8 is e4m3 here: four bits of exponent, three of fraction, and 448 as the largest
number. A row is divided by its scale before it is rounded, so that its largest value
becomes 448. The same function rounds weights, whose rows are output channels, and
activations, whose rows are tokens.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float8e4m3fn

from pallas_kernels.float8_rows import LARGEST, LEAST_MAXIMUM

FLOAT8 = jnp.dtype(jnp.float8_e4m3fn)


class ScaledRows(NamedTuple):
    """Rows in FP8 and their scales; what they stand for is the product of both."""

    values: Float8e4m3fn[Array, "*rows K"]
    scale: Float[Array, "*rows"]  # float32


def quantise_rows(x: Float[Array, "*rows K"]) -> ScaledRows:
    """Rounds each row to FP8, to nearest and ties to even.

    What is not finite makes its row not finite. There is one pass over `x` for the
    maxima and one for the values; XLA makes both part of what computes `x`.

    Args:
      x: Rows along the last axis.

    Returns:
      Values up to 448, and scales in float32.
    """
    wide = x.astype(jnp.float32)
    return _divide(wide, _largest(wide))


def quantise_made(
    make: Callable[[Any], Float[Array, "*rows K"]], arrays: Any
) -> ScaledRows:
    """Rounds rows that are made twice, for their maxima and for their values.

    To XLA the second making is another one than the first. Else it would write the rows
    out when it takes the maxima, and read them again.

    Args:
      make: Makes the rows, in float32.
      arrays: A tree of arrays for it.

    Returns:
      What `quantise_rows` returns of the rows.
    """
    largest = _largest(make(arrays))
    arrays, largest = jax.lax.optimization_barrier((arrays, largest))
    return _divide(make(arrays), largest)


def _largest(rows: Float[Array, "*rows K"]) -> Float[Array, "*rows"]:
    return jnp.maximum(jnp.abs(rows).max(axis=-1), LEAST_MAXIMUM)


def _divide(
    rows: Float[Array, "*rows K"], largest: Float[Array, "*rows"]
) -> ScaledRows:
    values = rows * (LARGEST / largest)[..., None]
    return ScaledRows(values.astype(FLOAT8), largest * (1 / LARGEST))


def widen_rows(rows: ScaledRows) -> Float[Array, "*rows K"]:
    """Returns the numbers that rows stand for, in float32."""
    return rows.values.astype(jnp.float32) * rows.scale[..., None]
