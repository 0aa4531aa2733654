"""Block masses against NumPy, and a view of a tiny model."""

import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import AttentionPlan, DraftConfig, SparsitySchedule, VideoGrid
from models.diffusion.inspection import block_masses, inspect_attention, mass_shares
from models.loading import load_pipeline
from tests import tiny_model


def numpy_masses(q, k, grid):
    """Token by token in raster order, with a dictionary from token to tile."""
    rows, columns = grid.tile
    tiles_high, tiles_wide = -(-grid.height // rows), -(-grid.width // columns)
    tile = [
        (f * tiles_high + h // rows) * tiles_wide + w // columns
        for f, h, w in np.ndindex(grid.frames, grid.height, grid.width)
    ]
    count = grid.frames * tiles_high * tiles_wide
    masses = np.zeros((q.shape[0], q.shape[2], count, count))
    for item, head in np.ndindex(q.shape[0], q.shape[2]):
        logits = q[item, :, head] @ k[item, :, head].T / np.sqrt(q.shape[-1])
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        np.add.at(masses[item, head], (np.array(tile)[:, None], tile), weights)
    return masses


@pytest.mark.parametrize("size", [(2, 4, 8), (2, 5, 7), (1, 1, 3)], ids=str)
def test_block_masses_match_numpy(size):
    grid = VideoGrid(*size, tile=(2, 4))
    rng = np.random.default_rng(0)
    q, k = 2 * rng.normal(size=(2, 2, grid.num_tokens, 3, 8))
    tiled = (jnp.float32(x[:, grid.tile_order]) for x in (q, k))
    got = block_masses(*tiled, grid)
    np.testing.assert_allclose(got, numpy_masses(q, k, grid), rtol=0, atol=2e-5)
    sums = np.broadcast_to(grid.block_lengths, got.shape[:3])
    np.testing.assert_allclose(got.sum(-1), sums, rtol=1e-5)


@pytest.mark.parametrize("side", ["after", "before"])
def test_block_masses_of_a_joint_sequence(side):
    """Padding is left out, as if it were not there."""
    lengths = (3, 0)
    grid = VideoGrid(2, 3, 5, tile=(2, 4), text_length=11, text_side=side)
    rng = np.random.default_rng(1)
    q, k = 2 * rng.normal(size=(2, 2, grid.num_tokens, 3, 8))
    blocks = np.repeat(np.arange(grid.num_blocks), grid.block_lengths)
    padding = np.full((2, grid.num_tokens), False)
    expected = np.zeros((2, 3, grid.num_blocks, grid.num_blocks))
    for item, length in enumerate(lengths):
        padding[item, grid.text_tokens.start + length : grid.text_tokens.stop] = True
        (own,) = np.nonzero(~padding[item])
        for head in range(3):
            logits = q[item, own, head] @ k[item, own, head].T / np.sqrt(8)
            weights = np.exp(logits)
            weights /= weights.sum(-1, keepdims=True)
            where = (blocks[own][:, None], blocks[own])
            np.add.at(expected[item, head], where, weights)
    q[padding], k[padding] = np.nan, np.nan
    got = block_masses(jnp.float32(q), jnp.float32(k), grid, jnp.array(lengths))
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)


def test_shares_of_mass_with_text():
    """Hand-worked: two tiles and a text block, of which a head is the mirror."""
    grid = VideoGrid(1, 2, 8, tile=(2, 4), text_length=4)
    masses = jnp.array([[5.0, 1.0, 2.0], [3.0, 1.0, 4.0], [1.0, 1.0, 2.0]])
    kept = jnp.array([[1, 0, 1], [0, 1, 1], [1, 1, 1]], bool)
    got = mass_shares(
        jnp.stack([masses, masses[::-1, ::-1]])[None],
        jnp.stack([kept, kept])[None],
        grid,
    )
    # Pairs with text: 2 + 4 + 1 + 1 + 2 = 10 of 20; tiles' diagonal: 5 + 1.
    # Mirrored, the text block is [2, 1, 5] and the column of text [1, 3, 5].
    np.testing.assert_allclose(got["kept_mass"], [[16 / 20, 15 / 20]], rtol=1e-6)
    np.testing.assert_allclose(got["top_mass"], [[15 / 20, 16 / 20]], rtol=1e-6)
    expected = [[[2 / 8, 4 / 8], [1 / 4, 3 / 8]]]
    np.testing.assert_allclose(got["text_share"], expected, rtol=1e-6)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    return load_pipeline(tiny_model.save_checkpoint(folder))


@pytest.mark.nightly
@pytest.mark.parametrize("step", [0, 2])
def test_view(pipeline, step):
    steps_run = []
    view = inspect_attention(
        pipeline,
        "a red ball",
        tiny_model.SAMPLING,
        step=step,
        attention=AttentionPlan.draft(
            DraftConfig.paper(sparsity=0.5),
            SparsitySchedule(dense_fraction=0.25, dense_layers=(1,)),
        ),
        callback=lambda report: steps_run.append(report.index),
    )
    assert steps_run == list(range(step))
    shape = (3, 2, tiny_model.NUM_TILES, tiny_model.NUM_TILES)
    assert view.draft_maps.shape == view.masks.shape == shape
    np.testing.assert_allclose(view.draft_maps.sum(-1), 1.0, rtol=1e-5)
    pairs = view.masks.sum((-1, -2))
    assert (pairs >= 32).all()  # half of 8 x 8, and one for each row left empty
    assert (pairs <= 39).all()
    assert view.masks.any(-1).all()
    # The strongest 10 % hold more than 10 %; half of the pairs, chosen well, hold
    # more than those do.
    assert (view.top_mass > 6 / 64).all()
    assert (view.kept_mass > view.top_mass).all()
    assert (view.kept_mass <= 1.0).all()
    assert view.timestep == pytest.approx([1000, 900, 750, 500][step])
    np.testing.assert_array_equal(view.is_dense, [step == 0, True, step == 0])


@pytest.mark.nightly
def test_the_strongest_pairs_are_kept(pipeline):
    attention = AttentionPlan.draft(DraftConfig.paper(sparsity=0.5))
    view = inspect_attention(
        pipeline, "a ball", tiny_model.SAMPLING, step=0, attention=attention
    )
    for draft_map, mask in zip(
        view.draft_maps.reshape(-1, 64), view.masks.reshape(-1, 64), strict=True
    ):
        strongest = np.argsort(-draft_map, kind="stable")[:32]
        assert mask[strongest].all()


@pytest.mark.nightly
def test_sparsity_zero_keeps_all_mass(pipeline):
    attention = AttentionPlan.draft(DraftConfig.paper(sparsity=0.0))
    view = inspect_attention(
        pipeline, "a ball", tiny_model.SAMPLING, step=0, attention=attention
    )
    assert view.masks.all()
    np.testing.assert_allclose(view.kept_mass, 1.0, rtol=1e-6)
    assert not view.text_share.any()
    assert view.text_masses.shape == (3, 2, 0, tiny_model.NUM_TILES)


def test_dense_attention_has_nothing_to_look_at(pipeline):
    with pytest.raises(ValueError, match="has no masks to look at; pass AttentionPlan"):
        inspect_attention(
            pipeline,
            "a ball",
            tiny_model.SAMPLING,
            step=0,
            attention=AttentionPlan.dense(),
        )
