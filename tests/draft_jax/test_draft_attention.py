"""The whole method against NumPy loops, and what holds of it under transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draft_jax import (
    BlockMask,
    DraftConfig,
    VideoGrid,
    check_finite,
    compute_mask,
    draft_attention,
)
from pallas_kernels import block_sparse_attention
from tests.draft_jax import naive_draft

# Largest error measured against float64 loops: 6e-7.
F32 = {"rtol": 1e-5, "atol": 3e-6}

GRID = VideoGrid(2, 5, 7, tile=(2, 4), text_length=11)  # S = 12, 2 text blocks
CONFIG = DraftConfig.paper(sparsity=0.6)

attend = jax.jit(
    draft_attention,
    static_argnames=("grid", "config", "order", "scale", "backend"),
)
mask_of = jax.jit(
    functools.partial(compute_mask, config=CONFIG), static_argnames=("grid", "order")
)


def random_qkv(grid, seed=0, batch=2, heads=2, dim=8):
    rng = np.random.default_rng(seed)
    shape = (3, batch, grid.num_tokens, heads, dim)
    return np.asarray(rng.normal(size=shape), np.float32)


def random_mask(grid, seed=0, batch=2, heads=2, density=0.4):
    rng = np.random.default_rng(seed)
    blocks = grid.num_visual_blocks
    return rng.random((batch, heads, blocks, blocks)) < density


@pytest.mark.parametrize(
    ("lengths", "side", "backend"),
    [
        (None, "after", "xla"),
        ((11, 3), "after", "xla"),
        ((11, 3), "after", "oracle"),
        pytest.param(None, "before", "oracle", marks=pytest.mark.nightly),
        pytest.param((0, 8), "before", "xla", marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_whole_method_matches_loops(lengths, side, backend):
    grid = VideoGrid(2, 5, 7, tile=(2, 4), text_length=11, text_side=side)
    q, k, v = random_qkv(grid)
    out = attend(
        q,
        k,
        v,
        grid=grid,
        config=CONFIG,
        text_lengths=None if lengths is None else jnp.asarray(lengths),
        backend=backend,
    )
    kept = naive_draft.percentile_mask(q, k, grid, 0.6)
    np.testing.assert_array_equal(mask_of(q, k, grid=grid).to_dense(), kept)
    expected = naive_draft.attention(q, k, v, kept, grid, lengths)
    np.testing.assert_allclose(out, expected, **F32)


@given(
    sizes=st.sampled_from([(1, 3, 3), (3, 4, 6), (2, 7, 5), (1, 9, 10)]),
    tile=st.sampled_from([(2, 3), (4, 4), (1, 5)]),
    text=st.sampled_from([0, 1, 9]),
    side=st.sampled_from(["before", "after"]),
    batch=st.integers(1, 3),
    density=st.sampled_from([0.0, 0.2, 0.7]),
    data=st.data(),
)
@settings(max_examples=6, deadline=None, derandomize=True)
@pytest.mark.nightly
def test_random_masks_match_loops(sizes, tile, text, side, batch, density, data):
    grid = VideoGrid(*sizes, tile=tile, text_length=text, text_side=side)
    seed = data.draw(st.integers(0, 99))
    q, k, v = random_qkv(grid, seed, batch)
    kept = random_mask(grid, seed, batch, density=density)
    lengths = None
    if text and data.draw(st.booleans()):
        lengths = np.random.default_rng(seed).integers(0, text + 1, batch)
    out = block_sparse_attention(
        *map(jnp.asarray, (q, k, v)),
        BlockMask.from_visual(kept, grid=grid),
        grid=grid,
        order="raster",
        text_lengths=None if lengths is None else jnp.asarray(lengths),
    )
    kept = naive_draft.add_text(kept, grid)
    expected = naive_draft.attention(q, k, v, kept, grid, lengths)
    np.testing.assert_allclose(out, expected, **F32)


def test_raster_and_tiled_order_agree_exactly():
    q, k, v = random_qkv(GRID)
    raster = attend(q, k, v, grid=GRID, config=CONFIG)
    tiled_qkv = [x[:, GRID.tile_order] for x in (q, k, v)]
    tiled = attend(*tiled_qkv, grid=GRID, config=CONFIG, order="tiled")
    np.testing.assert_array_equal(raster[:, GRID.tile_order], tiled)
    masks = [
        mask_of(q, k, grid=GRID),
        mask_of(*tiled_qkv[:2], grid=GRID, order="tiled"),
    ]
    np.testing.assert_array_equal(*(mask.to_dense() for mask in masks))


@pytest.mark.parametrize("selection", ["percentile", "row_topk"])
def test_sparsity_zero_is_dot_product_attention(selection):
    config = DraftConfig.paper(selection=selection, sparsity=0.0)
    q, k, v = random_qkv(GRID)
    out = attend(q, k, v, grid=GRID, config=config)
    expected = jax.nn.dot_product_attention(*map(jnp.asarray, (q, k, v)))
    np.testing.assert_allclose(out, expected, **F32)


def test_batch_items_and_heads_do_not_influence_each_other():
    q, k, v = random_qkv(GRID)
    out = attend(q, k, v, grid=GRID, config=CONFIG)
    other = random_qkv(GRID, seed=7)
    other[:, 0, :, 1] = (q[0, :, 1], k[0, :, 1], v[0, :, 1])
    got = attend(*other, grid=GRID, config=CONFIG)
    np.testing.assert_array_equal(got[0, :, 1], out[0, :, 1])
    assert not np.allclose(got[1], out[1])


def test_nan_stays_in_its_batch_item_and_head():
    q, k, v = random_qkv(GRID)
    clean = attend(q, k, v, grid=GRID, config=CONFIG)
    q[0, 5, 1] = np.nan
    k[0, 9, 1] = np.inf
    out = np.array(attend(q, k, v, grid=GRID, config=CONFIG))
    assert np.isnan(out[0, :, 1]).any()
    out[0, :, 1] = clean[0, :, 1]
    np.testing.assert_array_equal(out, clean)


def test_permuting_frames_permutes_the_output():
    grid = VideoGrid(4, 5, 7, tile=(2, 4), text_length=3)
    q, k, v = random_qkv(grid)
    order = [2, 0, 3, 1]
    tokens = np.arange(grid.num_tokens)
    tokens[grid.visual_tokens] = (
        tokens[grid.visual_tokens].reshape(4, -1)[order].ravel()
    )
    out = attend(q, k, v, grid=grid, config=CONFIG)
    got = attend(*(x[:, tokens] for x in (q, k, v)), grid=grid, config=CONFIG)
    np.testing.assert_allclose(got, out[:, tokens], **F32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types_accumulate_in_float32(dtype):
    qkv = [jnp.asarray(x, dtype) for x in random_qkv(GRID)]
    out = attend(*qkv, grid=GRID, config=CONFIG)
    assert out.dtype == dtype
    rounded = [np.asarray(x, np.float32) for x in qkv]
    kept = naive_draft.percentile_mask(*rounded[:2], GRID, 0.6)
    mask = mask_of(*qkv[:2], grid=GRID)
    np.testing.assert_array_equal(mask.to_dense(), kept)
    expected = naive_draft.attention(*rounded, kept, GRID)
    # Rounding of the output (8 and 11 bits) and of the probabilities.
    error = np.abs(np.asarray(out, np.float32) - expected).max()
    assert error < {"bfloat16": 2e-2, "float16": 2.5e-3}[dtype]


def test_gradient_is_that_of_attention_with_the_mask_held_fixed():
    q, k, v = map(jnp.asarray, random_qkv(GRID, batch=1))
    kept = naive_draft.percentile_mask(np.asarray(q), np.asarray(k), GRID, 0.6)
    allowed = jnp.asarray(
        [[naive_draft.token_mask(head, GRID) for head in item] for item in kept]
    )
    weights = jnp.asarray(random_qkv(GRID, seed=5, batch=1)[0])

    def sparse_loss(q, k, v):
        return (draft_attention(q, k, v, grid=GRID, config=CONFIG) * weights).sum()

    def dense_loss(q, k, v):
        out = jax.nn.dot_product_attention(q, k, v, mask=allowed)
        return (out * weights).sum()

    got = jax.jit(jax.grad(sparse_loss, (0, 1, 2)))(q, k, v)
    expected = jax.jit(jax.grad(dense_loss, (0, 1, 2)))(q, k, v)
    for got_one, expected_one in zip(got, expected, strict=True):
        np.testing.assert_allclose(got_one, expected_one, rtol=1e-4, atol=2e-5)


def test_vmap_over_items_equals_a_batch():
    qkv = random_qkv(GRID)
    batched = attend(*qkv, grid=GRID, config=CONFIG)

    def one_item(q, k, v):
        return draft_attention(q[None], k[None], v[None], grid=GRID, config=CONFIG)

    out = jax.jit(jax.vmap(one_item))(*qkv)
    np.testing.assert_allclose(out[:, 0], batched, **F32)


def test_remat_and_scan_over_layers():
    q, k, v = map(jnp.asarray, random_qkv(GRID, batch=1))
    scales = jnp.asarray([1.0, 0.5, 2.0])

    def layer(x, scale):
        out = draft_attention(x * scale, k, v, grid=GRID, config=CONFIG)
        return x + out, None

    def scanned(x):
        return jax.lax.scan(jax.checkpoint(layer), x, scales)[0].sum()

    def looped(x):
        for scale in scales:
            x, _ = layer(x, scale)
        return x.sum()

    got, got_grad = jax.jit(jax.value_and_grad(scanned))(q)
    expected, expected_grad = jax.jit(jax.value_and_grad(looped))(q)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    np.testing.assert_allclose(got_grad, expected_grad, rtol=1e-4, atol=2e-5)


def test_a_new_mask_or_text_length_does_not_recompile():
    q, k, v = map(jnp.asarray, random_qkv(GRID))

    @jax.jit
    def run(kept, lengths):
        mask = BlockMask.from_visual(kept, grid=GRID)
        return block_sparse_attention(
            q, k, v, mask, grid=GRID, text_lengths=lengths, order="raster"
        )

    for seed, lengths in enumerate([(11, 11), (0, 4)]):
        run(jnp.asarray(random_mask(GRID, seed)), jnp.asarray(lengths))
    assert run._cache_size() == 1


def test_check_finite_names_the_first_bad_value():
    q, k, v = map(jnp.asarray, random_qkv(GRID))
    check_finite(q=q, k=k, v=v)
    for name, value in (("q", jnp.nan), ("k", jnp.inf), ("v", -jnp.inf)):
        bad = {"q": q, "k": k, "v": v}
        bad[name] = bad[name].at[1, 4, 0, 2].set(value)
        with pytest.raises(ValueError, match=rf"{name}\[1, 4, 0, 2\] is -?(nan|inf)"):
            check_finite(**bad)
    with pytest.raises(ValueError, match="check_finite cannot look into traced keys"):
        jax.jit(lambda x: check_finite(q=q, keys=x))(k)
