"""Rows of numbers in FP8, each with a scale.

FP8 is e4m3 here: four bits of exponent, three of fraction, and 448 as the largest
number. A row is divided by its scale before it is rounded, so that its largest value
becomes 448. The same function rounds weights, whose rows are output channels, and
activations, whose rows are tokens.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float8e4m3fn

FLOAT8 = jnp.dtype(jnp.float8_e4m3fn)
LARGEST = float(jnp.finfo(FLOAT8).max)
# Rows of zeros, or nearly so, would else be divided by a scale that is none.
_LEAST_MAXIMUM = 2.0**-100


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
    largest = jnp.maximum(jnp.abs(wide).max(axis=-1), _LEAST_MAXIMUM)
    values = wide * (LARGEST / largest)[..., None]
    return ScaledRows(values.astype(FLOAT8), largest * (1 / LARGEST))


def widen_rows(rows: ScaledRows) -> Float[Array, "*rows K"]:
    """Returns the numbers that rows stand for, in float32."""
    return rows.values.astype(jnp.float32) * rows.scale[..., None]
