"""A scale may be an array, known or traced."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import BlockMask, DraftConfig, VideoGrid, compute_mask
from pallas_kernels import block_sparse_attention, dense_attention
from pallas_kernels.common.static import fold_scale
from tests.pallas_kernels.attention.reference import (
    compress,
    matrix_attention,
    random_mask,
    random_qkv,
)
from tests.tolerances import ATTENTION, GRADIENT

GRID = VideoGrid(1, 3, 5, tile=(2, 2), text_length=5)
DENSE = random_mask(GRID)


def sparse(backend, qkv, scale):
    mask = compress(DENSE, GRID)
    options = {"grid": GRID, "order": "tiled", "backend": backend}
    return block_sparse_attention(*qkv, mask, scale=scale, **options)


def dense(qkv, scale):
    return dense_attention(*qkv, scale=scale)


ATTENTIONS = {
    "xla": (functools.partial(sparse, "xla"), DENSE),
    "oracle": (functools.partial(sparse, "oracle"), DENSE),
    "dense": (dense, np.ones_like(DENSE)),
}


def matrices(kept, qkv, scale):
    """The reference's own scale is 1 / sqrt(D)."""
    q, k, v = qkv
    q = q * (scale * q.shape[-1] ** 0.5)
    return matrix_attention(q, k, v, kept, GRID, xp=jnp)[0]


@pytest.mark.parametrize("name", ATTENTIONS)
def test_values_and_derivatives(name):
    attend, kept = ATTENTIONS[name]
    qkv = random_qkv(GRID)
    scales = jnp.asarray([0.7, 0.0])

    @functools.partial(jax.jit, static_argnums=0)
    def run(attend, scales):
        def loss(qkv, scale):
            return jnp.sin(attend(qkv, scale)).sum()

        gradient = jax.grad(loss, argnums=(0, 1))
        outs = jax.vmap(functools.partial(attend, qkv))(scales)
        return outs, jax.vmap(functools.partial(gradient, qkv))(scales)

    got = run(attend, scales)
    want = run(functools.partial(matrices, kept), scales)
    np.testing.assert_allclose(got[0], want[0], **ATTENTION["float32"])
    leaves = (jax.tree.leaves(results[1]) for results in (got, want))
    for x, y in zip(*leaves, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-6, atol=GRADIENT["float32"]["atol"])


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize(
    "kind",
    [jnp.float32, np.float32, np.float64, np.asarray],
    ids=["jax", "float32", "float64", "array"],
)
def test_known_scalars_are_numbers(name, kind):
    attend, kept = ATTENTIONS[name]
    qkv = random_qkv(GRID)
    want = matrices(kept, qkv, 0.7)
    np.testing.assert_allclose(attend(qkv, kind(0.7)), want, **ATTENTION["float32"])


def test_narrow_inputs_keep_their_dtype_and_precision():
    """XLA multiplies an array in float32: as close as a constant's output."""
    qkv = random_qkv(GRID, dtype="bfloat16")
    want = sparse("xla", qkv, 0.3)
    got = sparse("xla", qkv, jnp.asarray(0.3))
    assert got.dtype == want.dtype
    np.testing.assert_allclose(
        got.astype("float32"), want.astype("float32"), **ATTENTION["bfloat16"]
    )


def test_kernels_round_the_product():
    q = jnp.asarray([1.0, 1.0078125, -3.0], jnp.bfloat16)
    same, scale = fold_scale(q, 0.3)
    assert same is q
    assert scale == 0.3
    exact, scale = fold_scale(q, jnp.asarray(0.25))
    assert scale == 1.0
    np.testing.assert_array_equal(exact.astype("float32"), [0.25, 0.251953125, -0.75])
    rounded, _ = fold_scale(q, jnp.asarray(1 / 3))
    assert rounded.dtype == jnp.bfloat16
    # Multiples of 2^-9 from 0.25 to 0.5, of 2^-7 from 1 to 2.
    np.testing.assert_array_equal(rounded.astype("float32"), [171 / 512, 172 / 512, -1])


def test_the_draft_takes_it_and_stops_its_gradient():
    q, k, v = random_qkv(GRID)
    config = DraftConfig.paper(selection="top_p", top_p=0.7, sparsity=0.1)
    compute = functools.partial(compute_mask, q, k, grid=GRID, config=config)

    def loss(scale):
        mask = compute(scale=scale)
        assert isinstance(mask, BlockMask)
        options = {"grid": GRID, "order": "raster", "backend": "xla"}
        return block_sparse_attention(q, k, v, mask, **options).sum(), mask

    gradient, mask = jax.jit(jax.grad(loss, has_aux=True))(2.0)
    assert gradient == 0
    jax.tree.map(np.testing.assert_array_equal, mask, compute(scale=2.0))
    counts = [compute(scale=scale).row_offsets[..., -1].sum() for scale in (0.1, 2.0)]
    assert counts[0] != counts[1]
