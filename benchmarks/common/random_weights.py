"""Models with random weights, made on the device."""

import concurrent.futures
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from models.float8.rows import FLOAT8

STANDARD_DEVIATION = 0.02
FLOAT8_DEVIATION = 80.0  # 448, the largest number, is 5.6 of them


def random_model[M: nnx.Module](
    make: Callable[[], M], seed: int = 0, mesh: Mesh | None = None
) -> M:
    """Returns a model of normal numbers whose norms multiply by 1.

    Weights in FP8 are normal numbers, too, which fill its range; their scales make them
    as small as others.

    Each leaf is made by rows of its first axis, which are layers where there are any:
    beside the model little memory is used. Their programs are compiled side by side.

    Args:
      make: Builds the model; only its shapes are looked at.
      seed: Of the numbers.
      mesh: Devices that each make all of it; JAX's default one if None.
    """
    structure, state = nnx.split(nnx.eval_shape(make))
    leaves, tree = jax.tree.flatten_with_path(state)
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), len(leaves))
    paths, shapes = zip(*leaves, strict=True)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        made = list(pool.map(functools.partial(_make, mesh), paths, list(keys), shapes))
    return nnx.merge(structure, jax.tree.unflatten(tree, made))


def _make(
    mesh: Mesh | None, path: tuple, key: jax.Array, leaf: jax.ShapeDtypeStruct
) -> jax.Array:
    """Makes a leaf."""
    where = None if mesh is None else NamedSharding(mesh, P())
    names = {getattr(part, "key", None) for part in path}
    if "scale" in names:
        return jnp.ones(leaf.shape, leaf.dtype, device=where)
    if "weight_scale" in names:
        scale = STANDARD_DEVIATION / FLOAT8_DEVIATION
        return jnp.full(leaf.shape, scale, leaf.dtype, device=where)
    deviation = FLOAT8_DEVIATION if leaf.dtype == FLOAT8 else STANDARD_DEVIATION
    make = functools.partial(
        _normal, shape=leaf.shape, dtype=leaf.dtype, deviation=deviation
    )
    if mesh is not None:
        make = jax.shard_map(
            make, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
        )
    return jax.jit(make)(key)


def _normal(
    key: jax.Array, *, shape: tuple[int, ...], dtype: jnp.dtype, deviation: float
) -> jax.Array:
    """Normal numbers of a standard deviation."""
    wide = jnp.float32 if dtype == FLOAT8 else dtype
    rows = shape[0] if len(shape) > 2 else 1
    size = (math.prod(shape) // rows,)

    def make(key: jax.Array) -> jax.Array:
        return (deviation * jax.random.normal(key, size, wide)).astype(dtype)

    return jax.lax.map(make, jax.random.split(key, rows)).reshape(shape)
