"""Functions that are one operation each have JAX's derivatives, along any arguments."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common.linear_maps import sealed_kernel, sealed_with_derivatives
from pallas_kernels.common.sharding import Axes

AXES = Axes(
    operation="a test",
    operands=("x: B N", "y: B N", "index: B N"),
    results=("B N", "B N"),
)
INDEX = np.array([[0, 2, 1], [1, 1, 0]], np.int32)  # never moves


def function(x, y, index):
    taken = jnp.take_along_axis(y, index, axis=1)
    return jnp.sin(x) * jnp.exp(taken), x**3 * y


SEALED = {
    "derivatives": functools.partial(sealed_with_derivatives, function, AXES),
    "kernel": functools.partial(sealed_kernel, function, function, AXES),
}


def points(count):
    """Pairs of arrays: a point, and directions."""
    rng = np.random.default_rng(0)
    arrays = rng.normal(size=(count, 2, 2, 3)).astype(np.float32)
    return [tuple(map(jnp.asarray, pair)) for pair in arrays]


def product_of_gradient(run, at, u):
    def loss(*at):
        first, second = run(*at, jnp.asarray(INDEX))
        return (first * second).sum() + (second**2).sum()

    return jax.jvp(lambda *at: jax.grad(loss, argnums=(0, 1))(*at), at, u)[1]


def third(run, moves):
    """The gradient of a product of a gradient with some directions."""
    at, u, w = points(3)
    u = tuple(x if m else jnp.zeros_like(x) for x, m in zip(u, moves, strict=True))

    def along(*at):
        moved = product_of_gradient(run, at, u)
        return sum((a * b).sum() for a, b in zip(moved, w, strict=True))

    return jax.grad(along, argnums=(0, 1))(*at)


def along_directions(run, moves):
    """How a derivative moves with those of its directions that move."""
    at, u, w = points(3)
    chosen = [*itertools.compress(range(2), moves)]

    def along(*some):
        directions = list(u)
        for place, direction in zip(chosen, some, strict=True):
            directions[place] = direction
        return product_of_gradient(run, at, tuple(directions))

    some, moved = ([pair[i] for i in chosen] for pair in (u, w))
    return jax.jvp(along, some, moved)[1]


@pytest.mark.parametrize("moves", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("derivative", [third, along_directions])
@pytest.mark.parametrize("name", SEALED)
def test_derivatives_are_those_of_the_function(name, derivative, moves):
    run = jax.jit(derivative, static_argnums=(0, 1))
    for x, y in zip(run(SEALED[name], moves), run(function, moves), strict=True):
        scale = float(jnp.abs(y).max())
        assert scale > 0.1
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * scale)
