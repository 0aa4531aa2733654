"""NaN in padded text reaches neither outputs nor derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import DraftConfig, VideoGrid, draft_attention
from pallas_kernels import block_sparse_attention_with_lse, dense_attention
from pallas_kernels.attention import dense_api
from pallas_kernels.common.device import Device
from tests.pallas_kernels.attention.reference import compress, random_mask, random_qkv

LENGTHS = (4, 0)


def grid_of(side):
    return VideoGrid(1, 3, 5, tile=(2, 2), text_length=5, text_side=side)


def sparse(backend, grid, q, k, v):
    out, lse = block_sparse_attention_with_lse(
        q,
        k,
        v,
        compress(random_mask(grid), grid),
        grid=grid,
        order="raster",
        text_lengths=jnp.asarray(LENGTHS),
        backend=backend,
    )
    return out, jnp.where(jnp.isneginf(lse), 0.0, lse)


def dense(grid, q, k, v):
    return dense_attention(q, k, v, grid=grid, text_lengths=jnp.asarray(LENGTHS))


def draft(grid, q, k, v):
    config = DraftConfig.paper(sparsity=0.5)
    lengths = jnp.asarray(LENGTHS)
    return draft_attention(q, k, v, grid=grid, config=config, text_lengths=lengths)


def dense_on_gpu(grid, q, k, v):
    """XLA's way on a GPU: all heads together."""
    with pytest.MonkeyPatch.context() as patch:
        gpu = Device(platform="gpu", kind="other", compute_capability=None)
        patch.setattr(dense_api, "current_device", lambda array: gpu)
        return dense_attention(
            q, k, v, grid=grid, text_lengths=jnp.asarray(LENGTHS), backend="xla"
        )


ATTENTIONS = {
    "xla": functools.partial(sparse, "xla"),
    "oracle": functools.partial(sparse, "oracle"),
    "dense": dense,
    "dense-gpu": dense_on_gpu,
    "draft": draft,
}


def padded(grid, x, value):
    """Sets the tokens past the text lengths, counted from where the text begins."""
    start = 0 if grid.text_side == "before" else 15
    for item, length in enumerate(LENGTHS):
        x = x.at[item, start + length : start + 5].set(value)
    return x


@pytest.mark.parametrize(
    ("name", "side"),
    [(name, "after") for name in ATTENTIONS]
    + [pytest.param(name, "before", marks=pytest.mark.nightly) for name in ATTENTIONS],
)
def test_padding_may_be_nan(name, side):
    """Equal to zeros in its place, bit for bit; tangents and cotangents may be too."""
    grid = grid_of(side)
    attend = functools.partial(ATTENTIONS[name], grid)

    @jax.jit
    def run(qkv, tangents):
        out, tangent = jax.jvp(attend, qkv, tangents)
        _, pull_back = jax.vjp(attend, *qkv)
        cotangent = jax.tree.map(jnp.ones_like, out)
        first = cotangent[0] if isinstance(out, tuple) else cotangent
        first = padded(grid, first, tangents[0][1, 0 if side == "before" else 15, 0, 0])
        cotangent = (first, cotangent[1]) if isinstance(out, tuple) else first
        return out, tangent, pull_back(cotangent)

    results = []
    for value in (0.0, jnp.nan):
        qkv = tuple(padded(grid, x, value) for x in random_qkv(grid))
        moved = tuple(padded(grid, x, value) for x in random_qkv(grid, seed=1))
        results.append(run(qkv, moved))
    for zero, nan in zip(*map(jax.tree.leaves, results), strict=True):
        assert np.isfinite(zero).all()
        assert np.any(zero)
        np.testing.assert_array_equal(nan, zero)
