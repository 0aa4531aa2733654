"""Changes of the order of tokens, whose derivatives are changes back."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from pallas_kernels.common.arrays import AnyArray, to_jax
from pallas_kernels.common.interfaces import BlockGrid, Order
from pallas_kernels.common.linear_maps import LinearMap


def reorder_tokens(
    x: Shaped[AnyArray, "..."], grid: BlockGrid, *, to: Order, axis: int
) -> Shaped[Array, "..."]:
    """Permutes tokens from tiled to raster order, or from raster to tiled.

    The derivative of a permutation is its inverse. JAX would scatter in place of that:
    a scatter of a whole video is slow to compile, and on a GPU to run.

    Args:
      x: An array with the tokens of the grid along one axis.
      grid: Geometry of the blocks.
      to: The order of the result; the tokens of x are in the other one.
      axis: The axis of tokens.

    Returns:
      The same tokens in the other order.
    """
    (x,) = to_jax(x)
    order, inverse = grid.tile_order, grid.raster_order
    if to == "raster":
        order, inverse = inverse, order
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return _take(order, axis, x)
    there = functools.partial(_take_linear, order, axis)
    back = functools.partial(_take_linear, inverse, axis)
    (result,) = LinearMap(apply=there, transpose=back)((), (x,))
    return result


def _take_linear(order: np.ndarray, axis: int, _: Any, linear: tuple[Any, ...]):
    return tuple(_take(order, axis, x) for x in linear)


def _take(order: np.ndarray, axis: int, x: Any) -> jax.Array:
    return jnp.take(x, order, axis=axis, unique_indices=True, mode="clip")
