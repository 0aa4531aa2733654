"""Means for what is skipped, from keys to outputs, against NumPy loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from draft_jax import (
    BlockMask,
    Compensation,
    Correction,
    DraftAttention,
    DraftConfig,
    VideoGrid,
    compute_mask,
    constant_step,
    draft_attention,
    draft_attention_fn,
    extra_work,
    initial_mask,
    make_means,
    scheduled_attention,
)
from draft_jax.draft.one_pass import pool_draft
from draft_jax.draft.selection import select_from_draft
from pallas_kernels import block_sparse_attention, dense_attention
from tests.cases import mostly_nightly
from tests.draft_jax import naive_draft

# Largest error measured against float64 loops: 6e-7.
F32 = {"rtol": 1e-5, "atol": 3e-6}
TEXT = VideoGrid(3, 5, 7, tile=(2, 4), text_length=5, text_side="before")
EVEN = VideoGrid(2, 4, 8, tile=(2, 4))
COMPENSATIONS = {
    "sub-tiles, two frames": Compensation(sub_tile=(1, 3), frames=2),
    "whole tiles, all frames": Compensation(sub_tile=(8, 16), frames=9),
    "each place": Compensation(sub_tile=(1, 1), frames=3),
}
SELECTIONS = ("percentile", "row_topk", "top_p")


def random_qkv(grid, dim=8):
    rng = np.random.default_rng(0)
    return rng.normal(size=(3, 2, grid.num_tokens, 2, dim)).astype(np.float32)


def config_of(name, selection="row_topk"):
    return DraftConfig.paper(
        selection=selection,
        sparsity=0.6,
        draft_tile=(1, 2),
        compensation=COMPENSATIONS[name],
        ranking="spread",
    )


@pytest.mark.parametrize(
    "case",
    mostly_nightly(
        [
            (grid, name, selection)
            for grid in (TEXT, EVEN)
            for name in COMPENSATIONS
            for selection in SELECTIONS
        ],
        quick=[(TEXT, "sub-tiles, two frames", "row_topk")],
    ),
    ids=lambda case: f"{case[0].height}, {case[1]}, {case[2]}",
)
def test_the_whole_method_matches_loops(case):
    """Both orders, ragged text."""
    grid, name, selection = case
    config, (q, k, v) = config_of(name, selection), random_qkv(grid)
    lengths = np.array([3, 0]) if grid.text_length else None
    attend = functools.partial(
        draft_attention, grid=grid, config=config, text_lengths=lengths
    )
    kept = np.asarray(compute_mask(q, k, grid=grid, config=config).to_dense())
    comp = config.compensation
    want = naive_draft.compensated_attention(
        q, k, v, kept, grid, comp.sub_tile, comp.frames, lengths
    )
    np.testing.assert_allclose(attend(q, k, v), want, **F32)
    tiled = attend(*(x[:, grid.tile_order] for x in (q, k, v)), order="tiled")
    np.testing.assert_allclose(tiled, want[:, grid.tile_order], **F32)


def test_means_match_loops():
    """Also those of the frames whose block is kept count in a mean."""
    comp = COMPENSATIONS["sub-tiles, two frames"]
    _, k, v = random_qkv(TEXT)
    rng = np.random.default_rng(1)
    kept = rng.random((2, 2, 18, 18)) < 0.5
    means = make_means(k, v, BlockMask.from_visual(kept, grid=TEXT), compensation=comp)
    cells = naive_draft.cell_members(TEXT, comp.sub_tile, comp.frames)
    shift = TEXT.visual_tokens.start
    for name, x in (("k", k), ("v", v)):
        want = [
            x[:, [shift + token for token in cell]].mean(1) if cell else 0 * x[:, 0]
            for cell in cells
        ]
        np.testing.assert_allclose(
            getattr(means, name), np.stack(want, 1), rtol=1e-5, atol=1e-6
        )
    frames = ~kept.reshape(2, 2, 18, 3, 6)
    want = np.stack([frames[..., :2, :].sum(-2), frames[..., 2:, :].sum(-2)], axis=-2)
    text = TEXT.num_text_blocks
    np.testing.assert_array_equal(
        means.dropped[:, :, text:], want.reshape(2, 2, 18, 12)
    )
    assert not means.dropped[:, :, :text].any()


@pytest.mark.nightly
def test_a_full_mask_is_dense_attention():
    q, k, v = random_qkv(TEXT)
    config = DraftConfig.paper(sparsity=0.0, compensation=Compensation())
    out = draft_attention(q, k, v, grid=TEXT, config=config)
    np.testing.assert_allclose(out, dense_attention(q, k, v, grid=TEXT), **F32)


@pytest.mark.nightly
def test_means_of_single_tokens_are_dense_attention():
    """Each token is a mean of itself: nothing is left out."""
    q, k, v = random_qkv(EVEN)
    comp = Compensation(sub_tile=(1, 1), frames=1)
    config = DraftConfig.paper(sparsity=0.8, compensation=comp)
    out = draft_attention(q, k, v, grid=EVEN, config=config)
    np.testing.assert_allclose(out, dense_attention(q, k, v, grid=EVEN), **F32)
    assert extra_work(EVEN, config) == 1.0


@pytest.mark.nightly
def test_flax_layers_pass_it_on():
    """Both kinds of layers: single tokens as means leave nothing out."""
    comp = Compensation(sub_tile=(1, 1), frames=1)
    sparse = DraftConfig.paper(sparsity=0.8, compensation=comp, ranking="spread")
    x = random_qkv(EVEN)[0].reshape(2, -1, 16)
    made = functools.partial(DraftAttention, 2, 16)
    layers = [made(config=c, rngs=nnx.Rngs(0)) for c in (sparse, DraftConfig.paper())]
    got, left_out = (layer(x, grid=EVEN) for layer in layers)
    qkv = layers[0].project(x)
    want = layers[0].out(dense_attention(*qkv, grid=EVEN))
    np.testing.assert_allclose(got, want, **F32)
    assert np.abs(left_out - want).max() > 1e-3
    by_function = draft_attention_fn(EVEN, sparse)(*qkv)
    np.testing.assert_allclose(layers[0].out(by_function), want, **F32)


@pytest.mark.nightly
@pytest.mark.parametrize("order", ["raster", "tiled"])
def test_gradients_flow_through_means(order):
    """Against the oracle, with the mask held: all tokens of a cell move its mean."""
    q, k, v = map(jnp.asarray, random_qkv(TEXT))
    config = config_of("sub-tiles, two frames")
    mask = compute_mask(q, k, grid=TEXT, config=config, order=order)

    def loss(attend, q, k, v):
        return jnp.sin(attend(q, k, v)).sum()

    def whole(q, k, v):
        return draft_attention(q, k, v, grid=TEXT, config=config, order=order)

    def oracle(q, k, v):
        means = make_means(k, v, mask, compensation=config.compensation, order=order)
        return block_sparse_attention(
            q, k, v, mask, grid=TEXT, order=order, means=means, backend="oracle"
        )

    got, want = (
        jax.jit(jax.grad(functools.partial(loss, f), (0, 1, 2)))(q, k, v)
        for f in (whole, oracle)
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("is_traced", [False, True], ids=["known", "traced"])
def test_a_reused_mask_has_means_of_new_keys(is_traced):
    """A schedule's mask says what was skipped; keys and values are the step's."""
    q, k, v = random_qkv(EVEN)
    config = config_of("sub-tiles, two frames")
    run = functools.partial(scheduled_attention, grid=EVEN, config=config)
    if is_traced:
        run = jax.jit(run)
    step = constant_step(EVEN, config)
    mask = initial_mask(EVEN, config, batch=2, num_heads=2)
    _, mask = run(q, k, v, step=step, mask=mask)
    reuse = type(step)(dense=step.dense, budget=step.budget, refresh=np.asarray(False))
    out, _ = run(q, k[::-1], v[::-1], step=reuse, mask=mask)
    comp = config.compensation
    want = naive_draft.compensated_attention(
        q,
        k[::-1],
        v[::-1],
        np.asarray(mask.to_dense()),
        EVEN,
        comp.sub_tile,
        comp.frames,
    )
    np.testing.assert_allclose(out, want, **F32)


@pytest.mark.nightly
def test_transformations_and_numpy_agree():
    grid = VideoGrid(2, 3, 4, tile=(2, 2), text_length=3)
    q, k, v = random_qkv(grid)
    config = config_of("sub-tiles, two frames")
    attend = functools.partial(draft_attention, grid=grid, config=config)
    want = attend(q, k, v)
    with jax.disable_jit():
        np.testing.assert_allclose(attend(q, k, v), want, **F32)
    np.testing.assert_allclose(jax.jit(attend)(q, k, v), want, **F32)
    mapped = jax.vmap(attend)(*(jnp.stack([x, x[::-1]]) for x in (q, k, v)))
    np.testing.assert_allclose(mapped[0], want, **F32)
    np.testing.assert_allclose(mapped[1], want[::-1], **F32)


@pytest.mark.nightly
@pytest.mark.parametrize("grid", [TEXT, EVEN], ids=["text", "even"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_new_masks_say_what_they_drop(selection, grid):
    """Counted from the mask's lists, frame by frame."""
    q, k, _ = map(jnp.asarray, random_qkv(grid))
    config = config_of("sub-tiles, two frames", selection)
    draft = pool_draft(q, k, grid=grid, config=config)
    options = {"grid": grid, "config": config, "budget": None, "scale": None}
    mask, dropped = select_from_draft(draft, **options, counts_dropped=True)
    assert select_from_draft(draft, **options).dropped is None
    tiles = grid.num_visual_blocks // grid.frames
    want = np.zeros(dropped.shape, np.uint8)
    start, ids = np.asarray(mask.row_offsets), np.asarray(mask.block_ids)
    first = grid.visual_blocks.start
    for b, n, row in np.ndindex(2, 2, grid.num_visual_blocks):
        own = slice(*start[b, n, first + row : first + row + 2])
        for tile in {*range(first, first + grid.num_visual_blocks)} - {*ids[b, n, own]}:
            frame, place = divmod(tile - first, tiles)
            want[b, n, first + row, frame // 2 * tiles + place] += 1
    assert dropped.dtype == np.uint8
    np.testing.assert_array_equal(dropped, want)


def test_extra_work_is_the_share_of_pairs_with_means():
    config = DraftConfig.paper(compensation=Compensation(sub_tile=(2, 8), frames=4))
    grid = VideoGrid(33, 48, 80)  # the last group has one frame: 9 groups
    assert extra_work(grid, config) == 9 * (48 * 80 // 16) / grid.num_tokens
    assert extra_work(grid, DraftConfig.paper()) == 0.0
    # Text neither has means nor sees any: 2 groups of 12 sub-tiles have tokens.
    text = VideoGrid(5, 4, 6, tile=(4, 4), text_length=8)
    small = DraftConfig.paper(compensation=Compensation(sub_tile=(1, 2), frames=4))
    assert extra_work(text, small) == pytest.approx(2 * 12 * 120 / 128**2)


def test_exact_rows_are_extra_work():
    """Rows see all tokens, text too; a video of few tokens has fewer, or none."""
    config = DraftConfig.paper(correction=Correction(samples=64))
    assert extra_work(VideoGrid(8, 32, 64), config) == 64 / 16384
    text = VideoGrid(4, 18, 16, text_length=48)  # 1,152 tokens of video: 36 rows
    assert extra_work(text, config) == pytest.approx(36 / 1200)
    assert extra_work(VideoGrid(1, 32, 31), config) == 0.0  # 31 would be too few


def test_presets():
    paper = DraftConfig.paper(sparsity=0.9)
    assert (paper.selection, paper.sparsity, paper.ranking) == (
        "percentile",
        0.9,
        "mass",
    )
    assert paper.compensation is paper.draft_tile is None
    assert DraftConfig.compensated() == DraftConfig()
    config = DraftConfig.compensated(sparsity=0.95)
    assert (config.selection, config.sparsity, config.ranking) == (
        "row_topk",
        0.95,
        "spread",
    )
    # A mean for 32 keys, and 256 exact rows of 16,384 tokens.
    assert extra_work(VideoGrid(8, 32, 64), config) == 1 / 32 + 1 / 64


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"k": np.zeros((2, 3, 2, 8), np.float32)}, ValueError, "k has shape"),
        ({"v": np.zeros((2, 64, 2, 4), np.float32)}, ValueError, "v has shape"),
        ({"order": "zigzag"}, ValueError, "order='zigzag'"),
    ],
    ids=["tokens", "channels", "order"],
)
@pytest.mark.usefixtures("without_jaxtyping")
def test_make_means_refuses(change, error, text):
    _, k, v = random_qkv(EVEN)
    arguments = {"k": k, "v": v} | change
    if "k" in change:
        arguments["v"] = change["k"]
    mask = initial_mask(EVEN, DraftConfig.paper(), batch=2, num_heads=2)
    with pytest.raises(error, match=text):
        make_means(**arguments, mask=mask, compensation=Compensation())
