"""What only the XLA backend promises: memory, and any group and step size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax.block_mask import BlockMask
from draft_jax.grid import VideoGrid
from pallas_kernels import block_sparse_attention
from pallas_kernels.attention.blocks import ChunkConfig
from pallas_kernels.attention.xla import xla_attention
from tests.pallas_kernels.attention.reference import (
    CASES,
    compress,
    numpy_attention,
    random_mask,
    random_qkv,
)
from tests.tolerances import ATTENTION, LSE


def test_holds_no_map_of_all_pairs():
    """Forward and backward, for a mask that keeps everything."""
    grid = VideoGrid(4, 64, 64)
    qkv = (jax.ShapeDtypeStruct((1, grid.num_tokens, 1, 64), jnp.float32),) * 3
    mask = jax.eval_shape(lambda: BlockMask.full(grid=grid, batch=1, num_heads=1))
    attend = functools.partial(
        block_sparse_attention, grid=grid, order="tiled", backend="xla"
    )

    def loss(q, k, v, mask):
        return attend(q, k, v, mask).sum()

    one_map = grid.num_tokens**2 * 4
    for function in (attend, jax.grad(loss, argnums=(0, 1, 2))):
        memory = jax.jit(function).lower(*qkv, mask).compile().memory_analysis()
        assert memory.temp_size_in_bytes < one_map / 8


def test_memory_is_linear_in_tokens():
    used = []
    for frames in (2, 8):
        grid = VideoGrid(frames, 32, 64)
        qkv = (jax.ShapeDtypeStruct((1, grid.num_tokens, 1, 64), jnp.float32),) * 3
        mask = jax.eval_shape(
            lambda grid=grid: BlockMask.from_dense(
                jnp.ones((1, 1, grid.num_blocks, grid.num_blocks), bool),
                grid=grid,
                capacity=8 * grid.num_blocks,
            )
        )
        attend = functools.partial(
            block_sparse_attention, grid=grid, order="tiled", backend="xla"
        )
        memory = jax.jit(attend).lower(*qkv, mask).compile().memory_analysis()
        used.append(memory.temp_size_in_bytes)
    assert used[1] < 4.5 * used[0]


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("group_tokens", "step_tokens", "upcast"),
    [(1, 1, True), (24, 8, False), (40, 40, True), (10**6, 10**6, False)],
    ids=["smallest", "three rows", "uneven", "all at once"],
)
def test_any_config_gives_the_same(group_tokens, step_tokens, upcast):
    grid, lengths = CASES["text-before-ragged"]
    q, k, v = random_qkv(grid)
    dense = random_mask(grid)
    config = ChunkConfig(
        group_tokens=group_tokens, step_tokens=step_tokens, upcast=upcast
    )
    out, lse = xla_attention(
        q,
        k,
        v,
        compress(dense, grid),
        grid=grid,
        scale=0.25,
        text_lengths=jnp.asarray(lengths),
        config=config,
    )
    want_out, want_lse = numpy_attention(
        q, k, v, dense, grid, scale=0.25, text_lengths=lengths
    )
    np.testing.assert_allclose(out, want_out, **ATTENTION["float32"])
    np.testing.assert_allclose(lse, want_lse, **LSE["float32"])


def test_a_nan_is_not_hidden():
    """Rows without keys become zeros; rows with NaN must not."""
    grid = VideoGrid(1, 4, 8, tile=(2, 4))
    q, k, v = random_qkv(grid)
    mask = BlockMask.full(grid=grid, batch=2, num_heads=2)
    options = {"grid": grid, "order": "tiled", "backend": "xla"}
    clean = block_sparse_attention(q, k, v, mask, **options)
    out = block_sparse_attention(q.at[1, 3, 0].set(jnp.nan), k, v, mask, **options)
    assert jnp.isnan(out[1, 3, 0]).all()
    np.testing.assert_array_equal(out.at[1, 3, 0].set(0), clean.at[1, 3, 0].set(0))
