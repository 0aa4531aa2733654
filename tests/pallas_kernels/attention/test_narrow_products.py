"""Products of narrow inputs are summed in float32, on XLA as in the kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax.block_mask import BlockMask
from draft_jax.grid import VideoGrid
from pallas_kernels.attention.blocks import ChunkConfig
from pallas_kernels.attention.dense_xla import chunked_attention
from pallas_kernels.attention.xla import xla_attention
from tests.matrix_products import products

GRID = VideoGrid(1, 4, 8, tile=(2, 4))  # 4 blocks of 8 tokens
# A GPU's: products of narrow inputs on its tensor cores.
CONFIG = ChunkConfig(group_tokens=16, step_tokens=8, upcast=False)


def sparse(q, k, v):
    mask = BlockMask.full(grid=GRID, batch=1, num_heads=1)
    options = {"grid": GRID, "scale": 1.0, "text_lengths": None, "config": CONFIG}
    return xla_attention(q, k, v, mask, **options)[0]


def dense(q, k, v):
    options = {"scale": 1.0, "chunk": 8, "one_head_at_a_time": False}
    return chunked_attention(q, k, v, None, **options)


def summed_in(function, dtype):
    """Dtypes that the program's products of narrow arrays are summed in."""
    x = jax.ShapeDtypeStruct((1, GRID.num_tokens, 1, 8), dtype)
    found = products(jax.make_jaxpr(function)(x, x, x).jaxpr)
    return [
        equation.outvars[0].aval.dtype
        for equation in found
        if all(variable.aval.dtype == dtype for variable in equation.invars)
    ]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("attend", "num_products", "num_of_gradient"), [(sparse, 2, 9), (dense, 2, 4)]
)
def test_every_product_is_summed_in_float32(
    attend, num_products, num_of_gradient, dtype
):
    def loss(q, k, v):
        return attend(q, k, v).astype(jnp.float32).sum()

    gradient = jax.grad(loss, argnums=(0, 1, 2))
    for function, at_least in ((attend, num_products), (gradient, num_of_gradient)):
        dtypes = summed_in(function, dtype)
        assert len(dtypes) >= at_least
        assert set(dtypes) == {np.dtype(np.float32)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_large_values_that_cancel_leave_the_small_ones(dtype):
    """Sums of a block's values, 2048.5 and -2047.5, are no numbers of these dtypes."""
    q = jnp.zeros((1, GRID.num_tokens, 1, 8), dtype)
    block = np.array([512, 512, 512, 512, 0.125, 0.125, 0.125, 0.125])
    values = np.concatenate([block, block, *[np.where(block > 1, -block, block)] * 2])
    v = jnp.broadcast_to(jnp.asarray(values, dtype)[None, :, None, None], q.shape)
    out = sparse(q, q, v)
    np.testing.assert_array_equal(out.astype(jnp.float32), 2 / 32)
