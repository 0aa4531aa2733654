"""Dense attention of long sequences on a Hopper GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax.grid import VideoGrid
from pallas_kernels import dense_attention
from pallas_kernels.attention.sm90.dense_backend import hopper_dense_attention
from pallas_kernels.common.device import current_device
from tests.pallas_kernels.attention.reference import random_qkv
from tests.tolerances import GPU_GRADIENT_ORDER, GPU_RELATIVE

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def only_on_hopper():
    device = current_device()
    if device.compute_capability != (9, 0):
        pytest.skip(f"needs a Hopper GPU (sm_90), not {device.kind}")


@jax.jit
def float32_attention(q, k, v, lengths):
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    with jax.default_matmul_precision("highest"):
        logits = jnp.einsum("btnd,bsnd->bnts", q, k) * q.shape[-1] ** -0.5
        is_key = jnp.arange(k.shape[1]) < lengths[:, None]
        logits = jnp.where(is_key[:, None, None], logits, -jnp.inf)
        out = jnp.einsum("bnts,bsnd->btnd", jax.nn.softmax(logits, -1), v)
    return jnp.where(is_key[:, :, None, None], out, 0)


def relative_error(x, want):
    x, want = (np.asarray(a, np.float64) for a in (x, want))
    return np.linalg.norm(x - want) / np.linalg.norm(want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("text", "head_dim"), [(8, 128), (72, 64), (128, 128)])
def test_matches_float32(text, head_dim, dtype):
    """Last blocks of 8, 72 and 128 tokens; then some of them padding."""
    grid = VideoGrid(2, 32, 64, text_length=text)  # 4096 video tokens
    for seed in range(3):
        q, k, v = random_qkv(grid, head_dim=head_dim, dtype=dtype, seed=seed)
        full = jnp.full(2, grid.num_tokens)
        out = jax.jit(dense_attention)(q, k, v)
        assert (
            relative_error(out, float32_attention(q, k, v, full))
            < (GPU_RELATIVE[dtype])
        )
        again = jax.jit(dense_attention)(q, k, v)
        np.testing.assert_array_equal(out, again)
        lengths = jnp.array([text - 3, 0], jnp.int32)
        run = jax.jit(lambda *x: dense_attention(*x[:3], grid=grid, text_lengths=x[3]))
        want = float32_attention(q, k, v, grid.num_visual_tokens + lengths)
        assert relative_error(run(q, k, v, lengths), want) < GPU_RELATIVE[dtype]


def test_gradients_are_those_of_cudnn():
    grid = VideoGrid(2, 32, 64)
    q, k, v = random_qkv(grid, head_dim=64, dtype="bfloat16")

    def gradient(attend):
        def loss(q, k, v):
            return jnp.sin(attend(q, k, v).astype(jnp.float32)).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    def cudnn(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")

    # Not equal to the bit: cuDNN adds up gradients of queries in any order.
    for got, want in zip(gradient(dense_attention), gradient(cudnn), strict=True):
        got, want = (x.astype(jnp.float32) for x in (got, want))
        assert relative_error(got, want) < GPU_GRADIENT_ORDER


def test_vmap_joins_the_batch():
    grid = VideoGrid(2, 32, 64)
    q, k, v = (x[:, None] for x in random_qkv(grid, head_dim=64, dtype="bfloat16"))

    def attend(q, k, v):
        return hopper_dense_attention(q, k, v, scale=0.125)

    got = jax.jit(jax.vmap(attend))(q, k, v)
    want = jax.jit(attend)(q[:, 0], k[:, 0], v[:, 0])
    np.testing.assert_array_equal(got[:, 0], want)
