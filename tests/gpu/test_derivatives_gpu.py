"""Derivatives, padding and arrays as scales on a GPU, where kernels are fused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import DraftConfig, VideoGrid, draft_attention
from pallas_kernels import dense_attention
from tests.pallas_kernels.attention.reference import random_qkv

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::pallas_kernels.SlowBackendWarning"),
]
GRID = VideoGrid(4, 32, 32, text_length=8)  # 4,104 tokens: the dense kernel takes them
LENGTHS = (5,)


def draft(qkv, backend="auto", **options):
    config = DraftConfig.paper(sparsity=0.5)
    options = {"text_lengths": jnp.asarray(LENGTHS), **options}
    return draft_attention(*qkv, grid=GRID, config=config, backend=backend, **options)


def dense(qkv, backend="auto", **options):
    options = {"text_lengths": jnp.asarray(LENGTHS), **options}
    return dense_attention(*qkv, grid=GRID, backend=backend, **options)


@functools.lru_cache(maxsize=1)
def inputs():
    sizes = {"batch": 1, "num_heads": 2, "head_dim": 64, "dtype": "bfloat16"}
    return random_qkv(GRID, **sizes), random_qkv(GRID, **sizes, seed=1)


def flat(tree):
    arrays = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
    return np.concatenate(arrays)


def relative_error(got, want):
    got, want = (flat(tree) for tree in (got, want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def jvp(attend, qkv, moved):
    return jax.jvp(attend, (qkv,), (moved,))[1]


def loss(attend, qkv):
    return jnp.sin(attend(qkv).astype(jnp.float32)).sum()


def jvp_of_grad(attend, qkv, moved):
    return jax.jvp(jax.grad(functools.partial(loss, attend)), (qkv,), (moved,))[1]


def grad_of_grad(attend, qkv, moved):
    gradient = jax.grad(functools.partial(loss, attend))

    def along(qkv):
        pairs = zip(gradient(qkv), moved, strict=True)
        return sum((x.astype(jnp.float32) * y).sum() for x, y in pairs)

    return jax.grad(along)(qkv)


@pytest.mark.parametrize("derivative", [jvp, jvp_of_grad, grad_of_grad])
@pytest.mark.parametrize("attend", [draft, dense])
def test_every_derivative(attend, derivative, measured):
    """Against XLA's, at the precision of its bfloat16 products."""
    qkv, moved = inputs()
    run = jax.jit(derivative, static_argnums=0)
    got = run(attend, qkv, moved)
    want = run(functools.partial(attend, backend="xla"), qkv, moved)
    error = relative_error(got, want)
    measured(f"{attend.__name__} {derivative.__name__}", error)
    assert error < 2e-3  # at most 1.5e-3 on an H200


@pytest.mark.parametrize("attend", [draft, dense])
def test_padding_may_be_nan(attend):
    def padded(arrays, value):
        return tuple(x.at[:, 4096 + LENGTHS[0] :].set(value) for x in arrays)

    @jax.jit
    def run(qkv, moved):
        out, tangent = jax.jvp(attend, (qkv,), (moved,))
        return (attend(qkv), out, tangent), jax.vjp(attend, qkv)[1](moved[0])

    results = [
        run(*(padded(arrays, value) for arrays in inputs())) for value in (0, jnp.nan)
    ]
    outputs, gradients = zip(*results, strict=True)
    for zero, nan in zip(*map(jax.tree.leaves, outputs), strict=True):
        zero, nan = (np.asarray(x, np.float32) for x in (zero, nan))
        assert np.isfinite(zero).all()
        np.testing.assert_array_equal(nan, zero)
    assert np.isfinite(flat(gradients[1])).all()
    # cuDNN adds the parts of a gradient in any order; ours has one.
    assert relative_error(*gradients) <= (1e-3 if attend is dense else 0)


@pytest.mark.parametrize("attend", [draft, dense])
def test_scale_may_be_an_array(attend):
    """0.125 is a power of two: the product of q is exact."""
    qkv, _ = inputs()

    @functools.partial(jax.jit, static_argnums=2)
    def run(qkv, scale, known):
        scale = known if scale is None else scale
        return attend(qkv, scale=scale), jax.grad(
            lambda qkv: loss(functools.partial(attend, scale=scale), qkv)
        )(qkv)

    got, want = run(qkv, jnp.asarray(0.125), None), run(qkv, None, 0.125)
    np.testing.assert_array_equal(*(np.asarray(x[0], np.float32) for x in (got, want)))
    assert relative_error(got[1], want[1]) < 5e-3
    gradient = jax.grad(lambda s: loss(functools.partial(attend, scale=s), qkv))
    by_xla = jax.grad(
        lambda s: loss(functools.partial(attend, scale=s, backend="xla"), qkv)
    )
    np.testing.assert_allclose(gradient(0.125), by_xla(0.125), rtol=3e-2)
