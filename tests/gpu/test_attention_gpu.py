"""The XLA backend and dense attention on an NVIDIA GPU, at moderate sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax.grid import VideoGrid
from pallas_kernels import (
    block_sparse_attention,
    block_sparse_attention_with_lse,
    dense_attention,
    why_no_cudnn,
)
from pallas_kernels.common.device import current_device
from tests.pallas_kernels.attention.reference import (
    compress,
    matrix_attention,
    random_mask,
    random_qkv,
)
from tests.tolerances import GPU_ATTENTION, GPU_GRADIENT, GPU_LSE

pytestmark = pytest.mark.gpu

GRIDS = {
    "divisible": (VideoGrid(4, 16, 32), None),
    "edge-text-after": (VideoGrid(3, 15, 26, text_length=40), (40, 7)),
    "edge-text-before": (
        VideoGrid(3, 15, 26, text_length=40, text_side="before"),
        (0, 33),
    ),
}
TYPES = [("float32", 64), ("bfloat16", 64), ("bfloat16", 128), ("float16", 128)]

every_grid = pytest.mark.parametrize("case", GRIDS)
every_type = pytest.mark.parametrize(("dtype", "head_dim"), TYPES)


@pytest.fixture(autouse=True)
def exact_float32():
    """TF32, the default on a GPU, would hide errors of float32."""
    with jax.default_matmul_precision("highest"):
        yield


def inputs(case, dtype, head_dim):
    grid, lengths = GRIDS[case]
    q, k, v = random_qkv(grid, dtype=dtype, head_dim=head_dim)
    return grid, lengths, (q, k, v)


def as_array(lengths):
    return None if lengths is None else jnp.asarray(lengths, jnp.int32)


def full_mask(grid):
    return np.ones((2, 2, grid.num_blocks, grid.num_blocks), bool)


@every_type
@every_grid
def test_xla_matches_numpy(case, dtype, head_dim, assert_close):
    grid, lengths, qkv = inputs(case, dtype, head_dim)
    dense = random_mask(grid)
    mask = compress(dense, grid)

    @jax.jit
    def run(q, k, v, mask):  # a closed-over mask would be folded for a minute
        return block_sparse_attention_with_lse(
            q,
            k,
            v,
            mask,
            grid=grid,
            order="tiled",
            text_lengths=as_array(lengths),
            backend="xla",
        )

    out, lse = run(*qkv, mask)
    want_out, want_lse = matrix_attention(*qkv, dense, grid, text_lengths=lengths)
    assert out.dtype == dtype
    assert_close(f"GPU_ATTENTION {dtype}", out, want_out, GPU_ATTENTION[dtype])
    assert_close("GPU_LSE", lse, want_lse, GPU_LSE)
    jax.tree.map(np.testing.assert_array_equal, run(*qkv, mask), (out, lse))


@every_type
@every_grid
def test_dense_matches_numpy(case, dtype, head_dim, assert_close):
    grid, lengths, qkv = inputs(case, dtype, head_dim)
    cause = why_no_cudnn(dtype, head_dim, current_device(qkv[0]))
    assert (cause is None) == (dtype != "float32")

    @jax.jit
    def run(q, k, v):
        return dense_attention(q, k, v, grid=grid, text_lengths=as_array(lengths))

    want, _ = matrix_attention(*qkv, full_mask(grid), grid, text_lengths=lengths)
    assert_close(f"GPU_ATTENTION {dtype}", run(*qkv), want, GPU_ATTENTION[dtype])


@pytest.mark.parametrize("kind", ["xla", "dense"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_match_those_of_float32_matrices(kind, dtype):
    case = "edge-text-after"
    grid, lengths, qkv = inputs(case, dtype, 64)
    dense = random_mask(grid) if kind == "xla" else full_mask(grid)
    weight = np.random.default_rng(7).normal(size=qkv[0].shape)

    def attend(q, k, v, mask):
        text = {"grid": grid, "text_lengths": as_array(lengths)}
        if kind == "dense":
            return dense_attention(q, k, v, **text)
        return block_sparse_attention(
            q, k, v, mask, order="tiled", backend="xla", **text
        )

    def plain(q, k, v, mask):
        return matrix_attention(q, k, v, dense, grid, text_lengths=lengths, xp=jnp)[0]

    def gradient(function, *qkv):
        def loss(*arguments):
            return (function(*arguments).astype(jnp.float32) * weight).sum()

        mask = compress(dense, grid)
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*qkv, mask)

    got = gradient(attend, *qkv)
    want = gradient(plain, *(x.astype(jnp.float32) for x in qkv))
    for x, y in zip(got, want, strict=True):
        error = np.linalg.norm(x.astype(jnp.float32) - y) / np.linalg.norm(y)
        assert error < GPU_GRADIENT[dtype]
