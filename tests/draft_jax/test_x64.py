"""With 64-bit types turned on everything is as before: lists stay int32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import (
    BlockMask,
    DraftConfig,
    VideoGrid,
    compute_mask,
    draft_attention,
    initial_mask,
)
from pallas_kernels.attention.sm90.schedule import launch_order
from tests.draft_jax import naive_draft
from tests.tolerances import ATTENTION

GRID = VideoGrid(2, 5, 7, tile=(2, 4), text_length=5)


@pytest.fixture
def qkv():
    shape = (3, 1, GRID.num_tokens, 2, 8)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.nightly
@pytest.mark.parametrize("selection", ["percentile", "row_topk", "top_p"])
def test_the_same_pairs_in_int32(qkv, selection):
    config = DraftConfig.paper(sparsity=0.6, selection=selection, top_p=0.5)
    q, k, v = qkv
    expected = compute_mask(*map(jnp.asarray, (q, k)), grid=GRID, config=config)
    with jax.enable_x64(True):
        mask = compute_mask(*map(jnp.asarray, (q, k)), grid=GRID, config=config)
        out = draft_attention(*map(jnp.asarray, qkv), grid=GRID, config=config)
    for got, want in zip(jax.tree.leaves(mask), jax.tree.leaves(expected), strict=True):
        assert got.dtype == want.dtype
    kept = np.asarray(expected.to_dense())
    np.testing.assert_array_equal(mask.to_dense(), kept)
    assert out.dtype == jnp.float32
    want = naive_draft.attention(q, k, v, kept, GRID)
    np.testing.assert_allclose(out, want, **ATTENTION["float32"])


MASKS = {
    "full": lambda: BlockMask.full(grid=GRID, batch=1, num_heads=2),
    "initial": lambda: initial_mask(GRID, DraftConfig.paper(), batch=1, num_heads=2),
    "dense": lambda: BlockMask.from_dense(
        jnp.ones((1, 2, GRID.num_blocks, GRID.num_blocks), bool), grid=GRID
    ),
}


@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS)
def test_masks_are_int32(make):
    with jax.enable_x64(True):
        mask = make()
        assert {leaf.dtype for leaf in jax.tree.leaves(mask)} == {np.dtype(np.int32)}


def test_the_order_of_a_launch_is_int32():
    with jax.enable_x64(True):
        order = launch_order(jnp.array([[3, 1, 2], [3, 3, 1]], jnp.int32), 2)
    assert order.dtype == jnp.int32
