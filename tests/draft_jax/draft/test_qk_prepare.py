"""norm_rope_pool and pooled values that attention is given."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import (
    DraftConfig,
    PooledTokens,
    QKNorm,
    VideoGrid,
    compute_mask,
    constant_step,
    draft_scores,
    initial_mask,
    kept_pairs_budget,
    norm_rope_pool,
    scheduled_attention,
)
from tests import tolerances
from tests.cases import mostly_nightly
from tests.draft_jax import naive_draft
from tests.pallas_kernels.pooling import naive_norm_rope

GRID = VideoGrid(1, 5, 6, tile=(2, 4), text_length=3)
BEFORE = VideoGrid(1, 3, 6, tile=(2, 4), text_length=4, text_side="before")
CONFIG = DraftConfig(sparsity=0.5, pooling="mean+max")
HEADS = (4, 64)
NORMS = {
    "heads": QKNorm(over="heads"),
    "head": QKNorm(over="head", eps=1e-5),
    "none": None,
}


def random_case(grid, norm, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    shape = (2, grid.num_tokens, *HEADS)
    q, k = (jnp.asarray(2 * rng.normal(size=shape), dtype) for _ in range(2))
    scales = None
    if norm is not None:
        width = HEADS[1] if norm.over == "head" else HEADS[0] * HEADS[1]
        scales = tuple(
            jnp.asarray(rng.uniform(0.5, 2, width), jnp.float32) for _ in range(2)
        )
    angles = rng.uniform(0, 7, (grid.num_visual_tokens, HEADS[1] // 2))
    rope = tuple(jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))
    return q, k, {"norm": norm, "scales": scales, "rope": rope}


@pytest.mark.parametrize("dtype", mostly_nightly(["float32", "bfloat16"], ["bfloat16"]))
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("grid", [GRID, BEFORE], ids=["after", "before"])
def test_xla_path_matches_loops(grid, name, dtype):
    norm = NORMS[name]
    q, k, options = random_case(grid, norm, dtype)
    got = norm_rope_pool(q, k, grid=grid, config=CONFIG, **options)
    cos, sin = options["rope"]
    for i, (x, mean, largest) in enumerate(
        ((q, got[2].q_mean, got[2].q_max), (k, got[2].k_mean, got[2].k_max))
    ):
        expected = naive_norm_rope.norm_rope(
            np.asarray(x, np.float64),
            over=None if norm is None else norm.over,
            eps=0.0 if norm is None else norm.eps,
            scale=None if norm is None else options["scales"][i],
            cos=cos,
            sin=sin,
            visual=grid.visual_tokens,
        )
        assert got[i].dtype == x.dtype
        written = np.asarray(got[i], np.float64)
        np.testing.assert_allclose(written, expected, **tolerances.NORM_ROPE[dtype])
        visual = written[:, grid.visual_tokens]
        means = naive_draft.pool(visual, grid)
        np.testing.assert_allclose(mean, means, **tolerances.POOLED)
        np.testing.assert_array_equal(largest, naive_draft.pool(visual, grid, np.max))


@pytest.mark.parametrize("order", ["raster", "tiled"])
@pytest.mark.parametrize("pooling", ["mean", "mean+max"])
def test_pooled_values_make_the_mask(pooling, order):
    """Pooled by loops, of the given tokens and of others: the mask is theirs."""
    config = DraftConfig(sparsity=0.5, pooling=pooling)
    q, k, _ = random_case(GRID, NORMS["none"])
    others = random_case(GRID, NORMS["none"], seed=1)[:2]
    given = [x if order == "raster" else x[:, GRID.tile_order] for x in (q, k)]
    mask_of = functools.partial(compute_mask, grid=GRID, config=config, order=order)
    plain = mask_of(*given)
    masks = []
    for pair in ((q, k), others):
        visual = [np.asarray(x, np.float64)[:, GRID.visual_tokens] for x in pair]
        reductions = [np.mean, np.max] if pooling == "mean+max" else [np.mean]
        pooled = PooledTokens.from_reductions(
            ("mean", "max")[: len(reductions)],
            tuple(
                jnp.asarray(naive_draft.pool(x, GRID, reduction), jnp.float32)
                for x in visual
                for reduction in reductions
            ),
        )
        maps = [naive_draft.draft_map(*visual, GRID, f) for f in reductions]
        budget = kept_pairs_budget(0.5, GRID.num_visual_blocks)
        kept = [
            [naive_draft.select_percentile(scores, budget) for scores in item]
            for item in np.mean(maps, axis=0)
        ]
        masks.append(naive_draft.add_text(np.array(kept), GRID))
        mask = mask_of(*given, pooled=pooled)
        np.testing.assert_array_equal(mask.to_dense(), masks[-1])
    assert (masks[0] != masks[1]).any()
    np.testing.assert_array_equal(plain.to_dense(), masks[0])


@pytest.mark.parametrize("state", ["refresh", "reuse", "dense"])
def test_scheduled_attention_takes_pooled_values(state):
    config = DraftConfig(sparsity=0.5)
    q, k, options = random_case(GRID, NORMS["heads"])
    q, k, pooled = norm_rope_pool(q, k, grid=GRID, config=config, **options)
    step = constant_step(GRID, config)
    step = dataclasses.replace(
        step,
        dense=np.asarray(state == "dense"),
        refresh=np.asarray(state == "refresh"),
    )
    mask = initial_mask(GRID, config, batch=2, num_heads=HEADS[0])
    run = functools.partial(
        scheduled_attention, q, k, q, grid=GRID, config=config, step=step, mask=mask
    )
    plain, given = jax.jit(run)(), jax.jit(lambda pooled: run(pooled=pooled))(pooled)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(given), strict=True):
        np.testing.assert_array_equal(a, b)
    if state == "refresh":  # the given values are what counts
        swapped = PooledTokens(q_mean=-pooled.q_mean, k_mean=pooled.k_mean)
        other = jax.jit(lambda pooled: run(pooled=pooled))(swapped)[1]
        assert (other.to_dense() != given[1].to_dense()).any()


def test_bad_pooled_values_are_named():
    q, k, options = random_case(GRID, NORMS["none"])
    q, k, pooled = norm_rope_pool(q, k, grid=GRID, config=DraftConfig(), **options)
    with pytest.raises(ValueError, match=r"pooled\.q_max is None, but .*mean\+max"):
        draft_scores(q, k, grid=GRID, config=CONFIG, pooled=pooled)
    short = PooledTokens(q_mean=pooled.q_mean[:, 1:], k_mean=pooled.k_mean[:, 1:])
    with pytest.raises(ValueError, match=r"pooled\.q_mean has shape \(2, 5, 4, 64\)"):
        compute_mask(q, k, grid=GRID, config=DraftConfig(), pooled=short)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": None}, "scales are None; give both or neither"),
        ({"norm": None}, "norm=None, but scales are given"),
        ({"norm": QKNorm(over="head")}, r"scale of q has shape \(256,\).*\(64,\)"),
        (
            {"rope": (jnp.zeros((33, 32)),) * 2},
            r"cosines of rope .*expected \(30, 32\)",
        ),
        ({"grid": BEFORE}, r"q has shape \(2, 33, 4, 64\), 33 tokens; "),
    ],
    ids=["no-scales", "no-norm", "scale-shape", "rope-shape", "grid"],
)
def test_bad_inputs_are_named(changes, message):
    q, k, options = random_case(GRID, NORMS["heads"])
    with pytest.raises(ValueError, match=message):
        norm_rope_pool(q, k, **{"grid": GRID, "config": None, **options, **changes})


def test_q_and_k_must_agree():
    q, k, options = random_case(GRID, NORMS["none"])
    with pytest.raises(TypeError, match="k has dtype bfloat16; it must equal q's"):
        norm_rope_pool(q, k.astype("bfloat16"), grid=GRID, config=None, **options)
