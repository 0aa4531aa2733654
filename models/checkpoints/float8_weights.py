"""Weights for matrix products in FP8, out of a checkpoint of any precision."""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from models.float8.rows import FLOAT8, ScaledRows, quantise_rows


@runtime_checkable
class HasScaledRows(Protocol):
    """A weight that a checkpoint may hold in FP8, with scales."""

    def scaled_rows(self) -> ScaledRows | None:
        """Returns the weight as it is stored; None if that is no row in e4m3."""


def read_scaled_rows(weight: Any) -> ScaledRows:
    """Reads a weight, [out, in], as rows in FP8.

    What is stored in e4m3, with a scale for the whole or for each row or without one,
    stays as it is. All else is rounded, row by row.
    """
    rows = weight.scaled_rows() if isinstance(weight, HasScaledRows) else None
    if rows is not None:
        return rows
    array = jnp.asarray(weight)
    if array.dtype == FLOAT8:
        return ScaledRows(array, jnp.ones(len(array), jnp.float32))
    return _quantise(array)


_quantise = jax.jit(quantise_rows)
