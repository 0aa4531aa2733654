"""The XLA backend and cuDNN dense attention on an NVIDIA GPU, at moderate sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax.grid import VideoGrid
from pallas_kernels import block_sparse_attention, dense_attention
from pallas_kernels.dense_attention import why_no_cudnn
from pallas_kernels.interfaces import current_device
from tests.pallas_kernels.reference import compress, random_mask, random_qkv
from tests.tolerances import GPU_ATTENTION

pytestmark = pytest.mark.gpu

GRIDS = {
    "divisible": (VideoGrid(4, 16, 32), None),
    "edge-text-after": (VideoGrid(3, 15, 26, text_length=40), (40, 7)),
    "edge-text-before": (
        VideoGrid(3, 15, 26, text_length=40, text_side="before"),
        (0, 33),
    ),
}
DTYPES = ["float32", "bfloat16", "float16"]


def inputs(case, dtype, head_dim):
    grid, lengths = GRIDS[case]
    q, k, v = random_qkv(grid, dtype=dtype, head_dim=head_dim)
    return grid, None if lengths is None else jnp.asarray(lengths), (q, k, v)


def check(got, want, dtype):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, **GPU_ATTENTION[dtype])


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", GRIDS)
def test_xla_matches_oracle(case, dtype, head_dim):
    grid, lengths, qkv = inputs(case, dtype, head_dim)
    mask = compress(random_mask(grid), grid)

    def run(backend, *qkv):
        def loss(*qkv):
            out, lse = block_sparse_attention(
                *qkv,
                mask,
                grid=grid,
                text_lengths=lengths,
                backend=backend,
                return_lse=True,
            )
            return jnp.sin(out.astype(jnp.float32)).sum(), (out, lse)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*qkv)

    with jax.default_matmul_precision("highest"):
        got = run("xla", *qkv)
        again = run("xla", *qkv)
        want = run("oracle", *(x.astype(jnp.float32) for x in qkv))
    check(got, want, dtype)
    jax.tree.map(np.testing.assert_array_equal, got, again)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", GRIDS)
def test_dense_matches_oracle(case, dtype, head_dim):
    grid, lengths, qkv = inputs(case, dtype, head_dim)
    cause = why_no_cudnn(dtype, head_dim, current_device(qkv[0]))
    assert (cause is None) == (dtype != "float32")
    mask = compress(np.ones((2, 2, grid.num_blocks, grid.num_blocks), bool), grid)

    def dense(*qkv):
        out = dense_attention(*qkv, grid=grid, text_lengths=lengths)
        return jnp.sin(out.astype(jnp.float32)).sum(), out

    def oracle(*qkv):
        out = block_sparse_attention(
            *qkv, mask, grid=grid, text_lengths=lengths, backend="oracle"
        )
        return jnp.sin(out).sum(), out

    with jax.default_matmul_precision("highest"):
        got = jax.jit(jax.grad(dense, argnums=(0, 1, 2), has_aux=True))(*qkv)
        want = jax.jit(jax.grad(oracle, argnums=(0, 1, 2), has_aux=True))(
            *(x.astype(jnp.float32) for x in qkv)
        )
    check(got, want, dtype)
