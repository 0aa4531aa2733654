"""The derivative of a change of order is the change back; nothing is scattered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import BlockMask, VideoGrid
from pallas_kernels import block_sparse_attention
from pallas_kernels.common import reorder_tokens

GRID = VideoGrid(2, 5, 7, tile=(2, 4), text_length=3)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("to", ["tiled", "raster"])
@pytest.mark.parametrize("kind", [jnp.float32, jnp.int32, np.float32], ids=str)
def test_tokens_move(to, axis, kind):
    """Against positions that are counted tile by tile."""
    tiled = []  # raster index of each token in tiled order
    for frame in range(2):
        for top in range(0, 5, 2):
            for left in range(0, 7, 4):
                for row in range(top, min(top + 2, 5)):
                    columns = range(left, min(left + 4, 7))
                    tiled += [35 * frame + 7 * row + column for column in columns]
    tiled += [70, 71, 72]
    moved = np.empty(73, int)
    moved[np.arange(73) if to == "tiled" else tiled] = (
        tiled if to == "tiled" else np.arange(73)
    )
    shape = [2, 2, 2]
    shape[axis] = 73
    x = np.arange(np.prod(shape)).reshape(shape)
    make = np.asarray if kind is np.float32 else jnp.asarray
    got = reorder_tokens(make(x, kind), GRID, to=to, axis=axis)
    np.testing.assert_array_equal(got, np.take(x, moved, axis))


@pytest.mark.parametrize("to", ["tiled", "raster"])
def test_derivatives_are_the_change_back(to):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=(2, 73, 2)), jnp.float32) for _ in range(2))
    move = functools.partial(reorder_tokens, grid=GRID, to=to, axis=1)
    other = {"tiled": "raster", "raster": "tiled"}[to]
    back = reorder_tokens(w, GRID, to=other, axis=1)
    np.testing.assert_array_equal(jax.vjp(move, x)[1](w)[0], back)
    np.testing.assert_array_equal(jax.jvp(move, (x,), (w,))[1], move(w))
    np.testing.assert_array_equal(jax.vmap(lambda x: move(x[None])[0])(x), move(x))
    twice = jax.grad(lambda x: (jax.grad(lambda x: (move(x) ** 3).sum())(x) * w).sum())
    np.testing.assert_allclose(twice(x), 6 * x * w, rtol=1e-6)


@pytest.mark.parametrize("derivative", ["grad", "jvp", "grad of grad"])
def test_gradient_of_raster_order_scatters_no_tokens(derivative):
    """One scatter of 75,600 tokens takes XLA for the CPU 53 seconds to fold."""
    mask = BlockMask.full(grid=GRID, batch=1, num_heads=1)

    def loss(q, k, v):
        options = {"grid": GRID, "order": "raster", "backend": "xla"}
        return block_sparse_attention(q, k, v, mask, **options).sum()

    x = jnp.ones((1, GRID.num_tokens, 1, 8))
    gradient = jax.grad(loss, argnums=(0, 1, 2))
    function = {
        "grad": gradient,
        "jvp": lambda *args: jax.jvp(loss, args, args),
        "grad of grad": jax.grad(lambda *args: sum(x.sum() for x in gradient(*args))),
    }[derivative]
    text = str(jax.make_jaxpr(function)(x, x, x))
    sizes = [line for line in text.splitlines() if "scatter" in line]
    # What is scattered are counts of lists, integers.
    assert not [line for line in sizes if "f32" in line or "bf16" in line]
