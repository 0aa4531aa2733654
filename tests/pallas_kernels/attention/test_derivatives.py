"""Forward mode and second derivatives, against matrices that jax differentiates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax.grid import VideoGrid
from pallas_kernels import block_sparse_attention_with_lse
from tests.pallas_kernels.attention.reference import (
    compress,
    matrix_attention,
    random_mask,
    random_qkv,
)
from tests.tolerances import SECOND_DERIVATIVE

GRID = VideoGrid(1, 3, 5, tile=(2, 2), text_length=5)  # short blocks, ragged text
LENGTHS = (4, 0)
DENSE = random_mask(GRID)  # with a row of no blocks
SHAPE = (2, GRID.num_tokens, 2, 4)


def sparse(order, backend, qkv):
    return block_sparse_attention_with_lse(
        *qkv,
        compress(DENSE, GRID),
        grid=GRID,
        order=order,
        text_lengths=jnp.asarray(LENGTHS),
        backend=backend,
    )


def matrices(order, qkv):
    if order == "raster":
        qkv = [x[:, GRID.tile_order] for x in qkv]
    out, lse = matrix_attention(*qkv, DENSE, GRID, text_lengths=LENGTHS, xp=jnp)
    if order == "raster":
        return out[:, GRID.raster_order], lse[:, :, GRID.raster_order]
    return out, lse


def loss(attend, qkv):
    """Curved in both results; rows without a key count by their zeros only."""
    out, lse = attend(qkv)
    weights = np.random.default_rng(5).normal(size=SHAPE[:2])[..., None, None]
    lse = jnp.where(jnp.isfinite(lse), lse, 0.0)
    return (weights * jnp.sin(out)).sum() + jnp.cos(lse).sum()


def directions(seed):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=SHAPE), jnp.float32) for _ in range(3))


def jvp(attend, qkv, u, w):
    return jax.jvp(attend, (qkv,), (u,))[1]


def linearize(attend, qkv, u, w):
    return jax.linearize(attend, qkv)[1](u)


def jvp_of_one(attend, qkv, u, w):
    q, k, v = qkv
    return jax.jvp(lambda k: attend((q, k, v)), (k,), (u[1],))[1]


def jvp_of_grad(attend, qkv, u, w):
    gradient = jax.grad(functools.partial(loss, attend))
    return jax.jvp(gradient, (qkv,), (u,))[1]


def grad_of_grad(attend, qkv, u, w):
    gradient = jax.grad(functools.partial(loss, attend))
    return jax.grad(lambda qkv: inner(gradient(qkv), u))(qkv)


def grad_of_jvp(attend, qkv, u, w):
    of_jvp = functools.partial(jax.jvp, functools.partial(loss, attend))
    return jax.grad(lambda qkv, u: of_jvp((qkv,), (u,))[1] ** 2, argnums=(0, 1))(qkv, u)


def jvp_of_jvp(attend, qkv, u, w):
    def along(qkv):
        return jvp(attend, qkv, u, None)

    return jax.jvp(along, (qkv,), (w,))[1]


def mapped(attend, qkv, u, w):
    """vmap over directions, some of whose arrays are not mapped."""
    both = jax.tree.map(lambda *x: jnp.stack(x), u, w)
    gradient = jax.grad(functools.partial(loss, attend))
    return jax.vmap(lambda u: jax.jvp(gradient, (qkv,), ((u, qkv[1], u),))[1])(both[0])


def third(attend, qkv, u, w):
    def along(qkv):
        return inner(jvp_of_grad(attend, qkv, u, None), w)

    return jax.grad(along)(qkv)


def inner(a, b):
    return sum(jax.tree.leaves(jax.tree.map(lambda x, y: (x * y).sum(), a, b)))


DERIVATIVES = [
    jvp,
    linearize,
    jvp_of_one,
    jvp_of_grad,
    grad_of_grad,
    grad_of_jvp,
    jvp_of_jvp,
    mapped,
    third,
]
QUICK = (jvp_of_one, grad_of_grad)  # of xla in raster order; they walk every list


def cases():
    for derivative in DERIVATIVES:
        for backend in ("xla", "oracle"):
            for order in ("raster", "tiled"):
                name = f"{derivative.__name__}-{backend}-{order}"
                is_quick = derivative in QUICK and (backend, order) == ("xla", "raster")
                marks = () if is_quick else pytest.mark.nightly
                yield pytest.param(derivative, backend, order, id=name, marks=marks)


@pytest.mark.parametrize(("derivative", "backend", "order"), [*cases()])
def test_derivatives_are_those_of_matrices(derivative, backend, order, assert_close):
    qkv = random_qkv(GRID, head_dim=SHAPE[-1])
    u, w = directions(1), directions(2)

    def run(attend):
        return jax.jit(functools.partial(derivative, attend))(qkv, u, w)

    got = run(functools.partial(sparse, order, backend))
    want = run(functools.partial(matrices, order))
    for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert_close("derivatives", x, y, SECOND_DERIVATIVE)
