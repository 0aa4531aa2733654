"""The Hopper backend's derivatives around its kernel, for which NumPy stands in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax.block_mask import BlockMask
from draft_jax.grid import VideoGrid
from pallas_kernels.attention.sm90 import backend as hopper
from tests.pallas_kernels.attention.reference import (
    matrix_attention,
    numpy_attention,
    random_mask,
    random_qkv,
)
from tests.tolerances import GRADIENT_RELATIVE

# Blocks of 128 tokens, of which the last of each row of tiles are short.
GRID = VideoGrid(1, 13, 24, text_length=11)
LENGTHS = (11, 4)
DENSE = random_mask(GRID, num_heads=1)


@pytest.fixture(params=["tiled", "raster"])
def order(request, monkeypatch):
    """An order of tokens; the kernel's results are NumPy's in this order."""
    places = slice(None) if request.param == "tiled" else GRID.raster_order
    back = slice(None) if request.param == "tiled" else GRID.tile_order

    def run(static, q, k, v, *lists):
        qkv = (np.asarray(x)[:, back] for x in (q, k, v))
        out, lse = numpy_attention(*qkv, DENSE, GRID, text_lengths=LENGTHS)
        return out[:, places].astype(q.dtype), lse[..., places].astype(np.float32)

    def traced(static, q, k, v, *lists):
        batch, tokens, heads, _ = q.shape
        lse = jax.ShapeDtypeStruct((batch, heads, tokens), jnp.float32)
        shapes = (jax.ShapeDtypeStruct(q.shape, q.dtype), lse)
        return jax.pure_callback(lambda *x: run(static, *x), shapes, q, k, v, *lists)

    monkeypatch.setattr(hopper, "_run", traced)
    return request.param


def test_gradients_in_any_order_are_those_of_matrices(order):
    places = slice(None) if order == "tiled" else GRID.raster_order
    qkv = random_qkv(GRID, num_heads=1, head_dim=64, dtype="float16")
    rng = np.random.default_rng(1)
    out_weights = rng.normal(size=qkv[0].shape)
    lse_weights = rng.normal(size=(2, 1, GRID.num_tokens))

    def weighted(out, lse, at=slice(None)):
        lse = jnp.where(jnp.isfinite(lse), lse, 0.0)
        return (out * out_weights[:, at]).sum() + (lse * lse_weights[..., at]).sum()

    def loss(q, k, v):
        mask = BlockMask.from_dense(DENSE, grid=GRID)
        out = hopper.hopper_attention(
            *(q, k, v, mask),
            grid=GRID,
            order=order,
            scale=0.125,
            text_lengths=jnp.asarray(LENGTHS),
        )
        return weighted(*out, places)

    def expected_loss(q, k, v):
        return weighted(
            *matrix_attention(q, k, v, DENSE, GRID, text_lengths=LENGTHS, xp=jnp)
        )

    got = jax.jit(jax.grad(loss, (0, 1, 2)))(*(x[:, places] for x in qkv))
    with jax.default_matmul_precision("highest"):
        want = jax.jit(jax.grad(expected_loss, (0, 1, 2)))(
            *(x.astype(jnp.float32) for x in qkv)
        )
    for x, y in zip(got, want, strict=True):
        difference = np.asarray(x, np.float32) - y[:, places]
        error = np.linalg.norm(difference) / np.linalg.norm(y)
        assert error < GRADIENT_RELATIVE["float16"]
