"""Large maps are made a few heads at a time, with the same result and less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import DraftConfig, VideoGrid, compute_mask
from draft_jax.draft import head_chunks

GRID = VideoGrid(3, 5, 7, tile=(2, 4), text_length=9)  # S = 18
HEAD_BYTES = 4 * 18 * 18


@pytest.mark.parametrize(
    ("total", "limit", "expected"),
    [(24, 24, 24), (24, 23, 12), (24, 7, 6), (24, 1, 1), (24, 0, 1), (7, 6, 1)],
    ids=str,
)
def test_chunks_are_the_largest_that_fit(total, limit, expected):
    sizes = []

    def function(x):
        sizes.append(x.shape[:2])
        return x + 1

    x = jnp.arange(total * 5.0).reshape(1, total, 5)
    got = head_chunks.map_heads(function, x, map_size=25, max_bytes=100 * limit + 99)
    np.testing.assert_array_equal(got, np.asarray(x) + 1)
    assert {batch * heads for batch, heads in sizes} == {expected}


def test_of_no_heads_there_are_no_results():
    x = jnp.zeros((0, 3, 5))
    got = head_chunks.map_heads(lambda x: x + 1, x, map_size=25, max_bytes=100)
    assert got.shape == (0, 3, 5)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("selection", "pooling"),
    [("percentile", "mean"), ("row_topk", "mean"), ("top_p", "mean+max")],
)
def test_masks_are_the_same(monkeypatch, selection, pooling):
    """Two items of six heads, four heads at a time: a chunk lies across the items."""
    rng = np.random.default_rng(0)
    shape = (2, GRID.num_tokens, 6, 16)
    q, k = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    config = DraftConfig.paper(selection=selection, pooling=pooling, keep_own_tile=True)
    budget = jnp.asarray(5)
    compute = functools.partial(compute_mask, grid=GRID, config=config)
    whole = jax.jit(lambda q, k, n: compute(q, k, budget=n))(q, k, budget)
    monkeypatch.setattr(head_chunks, "MAX_CHUNK_BYTES", 5 * HEAD_BYTES)
    cut = jax.jit(lambda q, k, n: compute(q, k, budget=n))(q, k, budget)
    mapped = jax.jit(jax.vmap(lambda q, k, n: compute(q, k, budget=n), (0, 0, None)))(
        q[:, None], k[:, None], budget
    )
    for a, b, c in zip(
        *(jax.tree.leaves(x) for x in (whole, cut, mapped)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c[:, 0])


@pytest.mark.parametrize(("selection", "maps"), [("percentile", 3), ("top_p", 6)])
def test_memory_is_that_of_a_chunk(monkeypatch, selection, maps):
    """Measured: 2.7 maps of one head, 5.7 for top_p; uncut 33.7 and 81.7."""
    grid = VideoGrid(2, 64, 128, tile=(4, 8))  # S = 512
    map_bytes = 4 * grid.num_visual_blocks**2
    monkeypatch.setattr(head_chunks, "MAX_CHUNK_BYTES", map_bytes)
    config = DraftConfig.paper(selection=selection, sparsity=0.9)
    q = jax.ShapeDtypeStruct((1, grid.num_tokens, 16, 8), jnp.bfloat16)
    compute = functools.partial(compute_mask, grid=grid, config=config)
    compiled = jax.jit(compute).lower(q, q).compile()
    temp = compiled.memory_analysis().temp_size_in_bytes
    assert temp < maps * map_bytes


def test_vmap_keeps_the_chunks():
    """The mapped axis joins the batch; shared arrays that are mapped go one by one."""
    sizes = []

    def function(arrays, offset):
        sizes.append(arrays[0].shape[:2])
        return arrays[0] + arrays[1] + offset

    def run(x, y, offset):
        return head_chunks.map_heads(
            function, (x, y), offset, map_size=25, max_bytes=299
        )

    rng = np.random.default_rng(0)
    x, y = (
        rng.normal(size=(*size, 2, 3, 5)).astype("float32") for size in ((4, 2), ())
    )
    twice = jax.vmap(jax.vmap(run, (0, None, None)), (0, None, None))
    got = jax.jit(twice)(x, y, 0.5)
    np.testing.assert_array_equal(got, x + y + np.float32(0.5))
    offsets = np.arange(4, dtype="float32")
    got = jax.jit(jax.vmap(run, (0, None, 0)))(x[:, 0], y, offsets)
    np.testing.assert_array_equal(got, x[:, 0] + y + offsets[:, None, None, None])
    assert {batch * heads for batch, heads in sizes} == {2}


def test_memory_under_vmap_is_that_of_a_chunk(monkeypatch):
    """Measured for eight mapped items of two heads: 3.4 maps of one head."""
    grid = VideoGrid(2, 64, 128, tile=(4, 8))  # S = 512
    map_bytes = 4 * grid.num_visual_blocks**2
    monkeypatch.setattr(head_chunks, "MAX_CHUNK_BYTES", map_bytes)
    config = DraftConfig.paper(sparsity=0.9)
    q = jax.ShapeDtypeStruct((8, 1, grid.num_tokens, 2, 8), jnp.bfloat16)
    compute = functools.partial(compute_mask, grid=grid, config=config)
    compiled = jax.jit(jax.vmap(compute)).lower(q, q).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * map_bytes
