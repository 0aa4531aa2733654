"""Models with random weights, made on the device."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

STANDARD_DEVIATION = 0.02


def random_model[M: nnx.Module](make: Callable[[], M], seed: int = 0) -> M:
    """Returns a model of normal numbers whose norms multiply by 1.

    Leaves are made one after the other, and each by rows of its first axis, which are
    layers where there are any: beside the model little memory is used.

    Args:
      make: Builds the model; only its shapes are looked at.
      seed: Of the numbers.
    """
    structure, state = nnx.split(nnx.eval_shape(make))
    leaves, tree = jax.tree.flatten_with_path(state)
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), len(leaves))
    made = [
        jnp.ones(leaf.shape, leaf.dtype)
        if _is_scale(path)
        else _normal(key, leaf.shape, leaf.dtype)
        for (path, leaf), key in zip(leaves, keys, strict=True)
    ]
    return nnx.merge(structure, jax.tree.unflatten(tree, made))


def _is_scale(path: tuple) -> bool:
    return any(getattr(part, "key", None) == "scale" for part in path)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Normal numbers of a small standard deviation."""
    rows = shape[0] if len(shape) > 2 else 1
    size = (math.prod(shape) // rows,)

    def make(key: jax.Array) -> jax.Array:
        return STANDARD_DEVIATION * jax.random.normal(key, size, dtype)

    return jax.lax.map(make, jax.random.split(key, rows)).reshape(shape)
