"""norm_rope_pool and pooled values that attention is given."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from draft_jax import (
    QKV,
    DraftConfig,
    PooledTokens,
    QKNorm,
    VideoGrid,
    compute_mask,
    constant_step,
    draft_scores,
    initial_mask,
    joint_norm_rope_pool,
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
CONFIG = DraftConfig.paper(sparsity=0.5, pooling="mean+max")
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


def loops(x, grid, norm, scale, text_scale, rope):
    """Norm and rotation by loops, the text's tokens with their own factors."""
    x = np.asarray(x, np.float64)
    run = functools.partial(
        naive_norm_rope.norm_rope,
        x,
        over=None if norm is None else norm.over,
        eps=0.0 if norm is None else norm.eps,
        cos=rope[0],
        sin=rope[1],
        visual=grid.visual_tokens,
    )
    out, text = run(scale=scale), grid.text_tokens
    out[:, text] = run(scale=text_scale)[:, text]
    return out


def segments(grid, norm, seed=0):
    """Joint q, k and v, the two parts, and factors of the channels of both."""
    q, k, options = random_case(grid, norm, seed=seed)
    v = random_case(grid, norm, seed=seed + 100)[0]
    text_scales = random_case(grid, norm, seed=seed + 200)[2]["scales"]
    video, text = (
        QKV(*(x[:, tokens] for x in (q, k, v)))
        for tokens in (grid.visual_tokens, grid.text_tokens)
    )
    return (q, k, v), (video, text), {**options, "text_scales": text_scales}


@pytest.mark.parametrize("name", mostly_nightly(NORMS, ["heads", "head"]))
@pytest.mark.parametrize("grid", [GRID, BEFORE], ids=["after", "before"])
def test_segments_match_loops(grid, name):
    """Video and text in one array and apart, with their own factors."""
    norm = NORMS[name]
    joint, parts, options = segments(grid, norm)
    own = (options["scales"] or (None,) * 2, options["text_scales"] or (None,) * 2)
    expected = [
        loops(x, grid, norm, scale, text_scale, options["rope"])
        for x, scale, text_scale in zip(joint[:2], *own, strict=True)
    ]
    *got, v, pooled = joint_norm_rope_pool(*parts, grid=grid, config=CONFIG, **options)
    np.testing.assert_array_equal(v, joint[2])
    *of_one_array, same_pooled = norm_rope_pool(
        *joint[:2], grid=grid, config=CONFIG, **options
    )
    for a, b, want in zip(got, of_one_array, expected, strict=True):
        np.testing.assert_allclose(a, want, **tolerances.NORM_ROPE["float32"])
        np.testing.assert_allclose(b, want, **tolerances.NORM_ROPE["float32"])
    for one in (pooled, same_pooled):
        means = naive_draft.pool(expected[0][:, grid.visual_tokens], grid)
        np.testing.assert_allclose(one.q_mean, means, **tolerances.POOLED)


@pytest.mark.parametrize("grid", [GRID, BEFORE], ids=["after", "before"])
def test_text_takes_the_scales_of_the_video_where_it_has_none(grid):
    joint, parts, options = segments(grid, NORMS["head"])
    options["text_scales"] = None
    expected = loops(
        joint[1], grid, NORMS["head"], *(options["scales"][1],) * 2, options["rope"]
    )
    _, k, _, pooled = joint_norm_rope_pool(*parts, grid=grid, config=None, **options)
    np.testing.assert_allclose(k, expected, **tolerances.NORM_ROPE["float32"])
    assert pooled is None


def test_gradients_of_the_parts():
    """That of v is a slice; the others are checked against differences."""
    _, (video, text), options = segments(GRID, NORMS["head"])
    weights = random_case(GRID, None, seed=7)[0]

    def loss(video, text):
        q, k, v, _ = joint_norm_rope_pool(
            video, text, grid=GRID, config=CONFIG, **options
        )
        return ((q + 2 * k + 3 * v) * weights).sum()

    got = jax.grad(loss, (0, 1))(video, text)
    for part, tokens in zip(got, (GRID.visual_tokens, GRID.text_tokens), strict=True):
        np.testing.assert_allclose(part.v, 3 * weights[:, tokens], rtol=1e-6)
    check_grads(loss, (video, text), order=1, modes=("rev",), rtol=2e-2, atol=2e-2)


def test_parts_under_vmap():
    _, (video, text), options = segments(GRID, NORMS["heads"])
    run = functools.partial(joint_norm_rope_pool, grid=GRID, config=CONFIG, **options)
    mapped = jax.vmap(run)(*jax.tree.map(lambda x: x[:, None], (video, text)))
    pairs = zip(jax.tree.leaves(mapped), jax.tree.leaves(run(video, text)), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a[:, 0], b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", ["raster", "tiled"])
@pytest.mark.parametrize("pooling", ["mean", "mean+max"])
def test_pooled_values_make_the_mask(pooling, order):
    """Pooled by loops, of the given tokens and of others: the mask is theirs."""
    config = DraftConfig.paper(sparsity=0.5, pooling=pooling)
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
    config = DraftConfig.paper(sparsity=0.5)
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
    q, k, pooled = norm_rope_pool(
        q, k, grid=GRID, config=DraftConfig.paper(), **options
    )
    with pytest.raises(ValueError, match=r"pooled\.q_max is None, but .*mean\+max"):
        draft_scores(q, k, grid=GRID, config=CONFIG, pooled=pooled)
    short = PooledTokens(q_mean=pooled.q_mean[:, 1:], k_mean=pooled.k_mean[:, 1:])
    with pytest.raises(ValueError, match=r"pooled\.q_mean has shape \(2, 5, 4, 64\)"):
        compute_mask(q, k, grid=GRID, config=DraftConfig.paper(), pooled=short)


@pytest.mark.usefixtures("without_jaxtyping")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": None}, "scales are None; give both or neither"),
        ({"norm": None}, "norm=None, but scales are given"),
        ({"norm": None, "scales": None, "text_scales": ()}, "text_scales are given"),
        (
            {"text_scales": (jnp.ones(64),) * 2},
            r"the text scale of q has shape \(64,\)",
        ),
        ({"norm": QKNorm(over="head")}, r"scale of q has shape \(256,\).*\(64,\)"),
        (
            {"rope": (jnp.zeros((33, 32)),) * 2},
            r"cosines of rope .*expected \(30, 32\)",
        ),
        ({"grid": BEFORE}, r"q has shape \(2, 33, 4, 64\), 33 tokens; "),
    ],
    ids=[
        "no-scales",
        "no-norm",
        "only-text",
        "text-shape",
        "scale-shape",
        "rope-shape",
        "grid",
    ],
)
def test_bad_inputs_are_named(changes, message):
    q, k, options = random_case(GRID, NORMS["heads"])
    with pytest.raises(ValueError, match=message):
        norm_rope_pool(q, k, **{"grid": GRID, "config": None, **options, **changes})


def test_q_and_k_must_agree():
    q, k, options = random_case(GRID, NORMS["none"])
    with pytest.raises(TypeError, match="k has dtype bfloat16; it must equal q's"):
        norm_rope_pool(q, k.astype("bfloat16"), grid=GRID, config=None, **options)


def test_scales_of_text_need_text():
    grid = dataclasses.replace(GRID, text_length=0)
    q, k, options = random_case(grid, NORMS["head"])
    with pytest.raises(ValueError, match=r"text_scales were given, but .* has no text"):
        norm_rope_pool(
            q, k, grid=grid, config=None, text_scales=options["scales"], **options
        )


def changed(part, **arrays):
    return part._replace(
        **{name: change(getattr(part, name)) for name, change in arrays.items()}
    )


@pytest.mark.usefixtures("without_jaxtyping")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda video, text: (changed(video, v=lambda v: v[:, 1:]), text),
            ValueError,
            r"video\.v has shape \(2, 29, 4, 64\); it must equal video\.q's shape",
        ),
        (
            lambda video, text: (video, changed(text, k=lambda k: k[0])),
            ValueError,
            r"text\.k has shape \(3, 4, 64\); expected \[batch, tokens",
        ),
        (
            lambda video, text: (text, video),
            ValueError,
            r"video\.q has shape \(2, 3, 4, 64\); .* need \(2, 30, 4, 64\)",
        ),
        (
            lambda video, text: (video, QKV(*(x[:1] for x in text))),
            ValueError,
            r"text\.q has shape \(1, 3, 4, 64\); .* need \(2, 3, 4, 64\)",
        ),
        (
            lambda video, text: (video, QKV(*(x.astype("bfloat16") for x in text))),
            TypeError,
            r"text\.q has dtype bfloat16; it must equal video\.q's dtype float32",
        ),
        (
            lambda video, text: (video, changed(text, v=lambda v: v.astype("int32"))),
            TypeError,
            r"text\.v has dtype int32; accepted are float32",
        ),
        (
            lambda video, text: (tuple(video), text),
            TypeError,
            r"video is tuple; expected QKV\(q, k, v\)",
        ),
    ],
    ids=["v", "no-batch", "swapped", "batch", "dtypes", "integers", "tuple"],
)
def test_bad_parts_are_named(change, error, message):
    _, parts, options = segments(GRID, NORMS["heads"])
    with pytest.raises(error, match=message):
        joint_norm_rope_pool(*change(*parts), grid=GRID, config=None, **options)


def test_parts_need_a_grid_with_text():
    _, parts, options = segments(GRID, NORMS["heads"])
    grid = dataclasses.replace(GRID, text_length=0)
    with pytest.raises(ValueError, match=r"text was given, but .*give the grid its"):
        joint_norm_rope_pool(*parts, grid=grid, config=None, **options)


def test_heads_of_a_device_are_normed_with_the_mean_squares_of_all():
    norm = NORMS["heads"]
    q, k, options = random_case(GRID, norm)
    squares = tuple(np.square(np.asarray(x)).mean((2, 3)) for x in (q, k))
    scales = [s.reshape(HEADS) for s in options["scales"]]
    halves = []
    for heads in (slice(0, 1), slice(1, None)):
        own = options | {"scales": tuple(s[heads].ravel() for s in scales)}
        parts = (x[:, :, heads] for x in (q, k))
        halves.append(
            norm_rope_pool(
                *parts, grid=GRID, config=CONFIG, mean_squares=squares, **own
            )[:2]
        )
    for i, x in enumerate((q, k)):
        expected = loops(
            x, GRID, norm, options["scales"][i], options["scales"][i], options["rope"]
        )
        got = np.concatenate([half[i] for half in halves], axis=2)
        np.testing.assert_allclose(got, expected, **tolerances.NORM_ROPE["float32"])


@pytest.mark.parametrize(
    ("norm", "tokens", "message"),
    [
        ("head", 33, "norm over heads, but norm=.*'head'"),
        ("heads", 32, r"the mean squares of q have shape \(2, 32\); .*\(2, 33\)"),
    ],
    ids=["norm", "shape"],
)
@pytest.mark.usefixtures("without_annotations")
def test_mean_squares_that_do_not_fit(norm, tokens, message):
    q, k, options = random_case(GRID, NORMS[norm])
    squares = (jnp.ones((2, tokens)),) * 2
    with pytest.raises(ValueError, match=message):
        norm_rope_pool(q, k, grid=GRID, config=CONFIG, mean_squares=squares, **options)
