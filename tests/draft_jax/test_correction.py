"""The correction of sparse attention against float64 NumPy, and what holds of it.

Where nothing else is said, sparse attention itself is taken as it is: other tests hold
it against loops.
"""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import (
    Correction,
    DraftConfig,
    VideoGrid,
    constant_step,
    draft_attention,
    extra_work,
    initial_mask,
    scheduled_attention,
)
from draft_jax.config import num_samples
from draft_jax.correction import correct, fit, sampled_tokens
from tests.cases import mostly_nightly
from tests.draft_jax import naive_draft
from tests.pallas_kernels.attention.reference import attention_of_rows, valid_keys
from tests.tolerances import CORRECTION

SIZES = (3, 18, 20)  # 1,080 tokens of the video, 33 samples; tiles are cut off
AFTER = VideoGrid(*SIZES, tile=(4, 8), text_length=5)
BEFORE = VideoGrid(*SIZES, tile=(4, 8), text_length=5, text_side="before")
NO_TEXT = VideoGrid(*SIZES, tile=(4, 8))
CORRECTED = Correction(prior=40.0)
CONFIG = DraftConfig.paper(sparsity=0.8, correction=CORRECTED)
SPARSE = DraftConfig.paper(sparsity=0.8)
SCALE = 0.5  # instead of 1 / sqrt(8)

fitted = jax.jit(fit, static_argnums=2)
attend = jax.jit(
    draft_attention, static_argnames=("grid", "config", "order", "backend")
)


def random_qkv(grid, batch=2, heads=2, dim=8, dtype="float32"):
    """Values that follow their keys: the error of what is skipped follows queries."""
    rng = np.random.default_rng(0)
    q, k, noise = rng.normal(size=(3, batch, grid.num_tokens, heads, dim))
    v = k @ rng.normal(size=(dim, dim)) / np.sqrt(dim) + 0.3 * noise
    return [jnp.asarray(x, dtype) for x in (q, k, v)]


def in_float64(*arrays):
    return [np.asarray(x).astype(np.float64) for x in arrays]


def dense(q, k, v, grid, lengths=None, scale=None):
    """Softmax attention over all valid keys; also of padding."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return attention_of_rows(q, k, v, valid_keys(grid, lengths, len(q)), scale)


def naive_places(grid, count):
    """Raster positions of the samples, walking over the tiles."""
    blocks = naive_draft.block_members(grid)[grid.visual_blocks]
    tokens = [token for block in blocks for token in block]
    golden = (5**0.5 - 1) / 2
    part = len(tokens) / count
    return [tokens[int((i + i * golden % 1) * part)] for i in range(count)]


def ridge(rows, error, prior):
    """Least squares with rows for the penalty: rows, error [R, D] -> [D, D], [D]."""
    dim = rows.shape[-1]
    penalty = np.sqrt(prior * rows.var(0).mean())
    equations = np.block(
        [
            [rows, np.ones((len(rows), 1))],
            [penalty * np.eye(dim), np.zeros((dim, 1))],
        ]
    )
    wanted = np.concatenate([error, np.zeros((dim, dim))])
    solution = np.linalg.lstsq(equations, wanted)[0]
    return solution[:dim], solution[dim]


def naive_maps(out, q, k, v, grid, count, prior, lengths=None, scale=None):
    """Matrix and offset of each batch item and head, from raster arrays."""
    places = naive_places(grid, count)
    exact = dense(q, k, v, grid, lengths, scale)[:, places]
    rows, sparse = (x[:, places] for x in in_float64(q, out))
    return {
        (b, n): ridge(rows[b, :, n], (exact - sparse)[b, :, n], prior)
        for b, n in np.ndindex(q.shape[0], q.shape[2])
    }


def naive_corrected(out, q, maps, grid):
    """Sparse output and the maps of its queries; text as it is."""
    out, q = in_float64(out, q)
    for (b, n), (matrix, offset) in maps.items():
        visual = q[b, grid.visual_tokens, n]
        out[b, grid.visual_tokens, n] += visual @ matrix + offset
    return out


def relative_error(got, want):
    (got,) = in_float64(got)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


# ------------------------------------------------------------------------ the samples


@pytest.mark.parametrize(
    ("correction", "num_tokens", "count"),
    [
        (Correction(), 1023, 0),
        (Correction(), 1024, 32),
        (Correction(), 8191, 255),
        (Correction(), 8192, 256),
        (Correction(), 100_000, 256),
        (Correction(samples=64), 100_000, 64),
        (Correction(samples=1000), 8192, 256),
        (None, 100_000, 0),
    ],
)
def test_number_of_samples(correction, num_tokens, count):
    config = DraftConfig.paper(correction=correction)
    grid = VideoGrid(1, 1, num_tokens, text_length=num_tokens)
    assert num_samples(grid, config) == count
    assert extra_work(grid, config) == count / (2 * num_tokens)


@pytest.mark.parametrize("count", [32, 33, 256, 540])
@pytest.mark.parametrize(
    "grid", [NO_TEXT, AFTER, BEFORE], ids=["no", "after", "before"]
)
def test_one_sample_in_each_part_of_the_video(grid, count):
    tiled = sampled_tokens(grid, count, "tiled")
    first = grid.visual_tokens.start
    parts = [
        range(i * 1080 // count, -(-(i + 1) * 1080 // count)) for i in range(count)
    ]
    assert len({*tiled.tolist()}) == count
    for place, part in zip(tiled - first, parts, strict=True):
        assert place in part
    blocks = naive_draft.block_members(grid)
    sequence = [token for block in blocks for token in block]
    raster = sampled_tokens(grid, count, "raster")
    np.testing.assert_array_equal(raster, np.array(sequence)[tiled])


def test_samples_are_not_at_one_place_of_their_tiles():
    """256 of 256 whole tiles: they stand in all eighths of a tile, about as often."""
    grid = VideoGrid(16, 32, 64)
    places = sampled_tokens(grid, 256, "tiled") % 128
    counts = np.bincount(places // 16, minlength=8)
    assert counts.min() >= 30
    assert counts.max() <= 34


# ---------------------------------------------------------------------------- the fit


def random_rows(rng, count=50, dim=6):
    """Queries of two items and three heads of very different size."""
    rows = rng.normal(size=(2, count, 3, dim)) @ rng.normal(size=(dim, dim))
    return (rows * [[0.05], [1.0], [30.0]] + 2.0).astype(np.float32)


@pytest.mark.parametrize("prior", [0.5, 160.0])
def test_fit_is_ridge_regression(prior):
    rng = np.random.default_rng(1)
    rows = random_rows(rng)
    error = rng.normal(size=rows.shape).astype(np.float32)
    matrix, offset = fitted(jnp.asarray(rows), jnp.asarray(error), prior)
    for b, n in np.ndindex(2, 3):
        want = ridge(*in_float64(rows[b, :, n], error[b, :, n]), prior)
        scale = np.abs(want[0]).max()
        np.testing.assert_allclose(matrix[b, n] / scale, want[0] / scale, **CORRECTION)
        np.testing.assert_allclose(offset[b, n], want[1], rtol=0, atol=5e-4)


def test_fit_recovers_what_is_affine():
    rng = np.random.default_rng(2)
    rows = random_rows(rng)[:, :, 1:2]
    want, shift = rng.normal(size=(6, 6)), rng.normal(size=6)
    error = (rows @ want + shift).astype(np.float32)
    matrix, offset = fitted(jnp.asarray(rows), jnp.asarray(error), 1e-6)
    for item in range(2):
        np.testing.assert_allclose(matrix[item, 0], want, rtol=0, atol=1e-3)
        np.testing.assert_allclose(offset[item, 0], shift, rtol=0, atol=1e-2)


@pytest.mark.parametrize("prior", [1e-12, 1e-3])
def test_fit_of_fewer_rows_than_channels_is_finite_without_a_prior(prior):
    """Moments are singular, and of float32's rounding negative."""
    rng = np.random.default_rng(5)
    rows = (rng.normal(size=(1, 40, 2, 128)) * 30.0 + 5.0).astype(np.float32)
    error = rng.normal(size=rows.shape).astype(np.float32)
    matrix, offset = fitted(jnp.asarray(rows), jnp.asarray(error), prior)
    told = np.einsum("brnd,bnde->brne", rows, matrix) + offset[:, None]
    np.testing.assert_allclose(told, error, atol=0.05)  # rows are passed through


def test_a_strong_prior_leaves_the_mean_error():
    rng = np.random.default_rng(3)
    rows = random_rows(rng)
    error = rng.normal(size=rows.shape).astype(np.float32)
    matrix, offset = fitted(jnp.asarray(rows), jnp.asarray(error), 1e9)
    np.testing.assert_allclose(matrix, 0.0, atol=1e-4)
    np.testing.assert_allclose(offset, error.mean(1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 3.0, 1e4])
def test_equal_queries_explain_nothing(value):
    rng = np.random.default_rng(4)
    error = rng.normal(size=(1, 40, 2, 6)).astype(np.float32)
    matrix, offset = fitted(jnp.full(error.shape, value), jnp.asarray(error), 160.0)
    np.testing.assert_array_equal(matrix, 0.0)
    np.testing.assert_allclose(offset, error.mean(1), rtol=0, atol=1e-6)


# ------------------------------------------------------------------- the whole method

CASES = {  # grid, text lengths, order, scale, dtype
    "no text": (NO_TEXT, None, "raster", None, "float32"),
    "text after": (AFTER, (3, 0), "raster", None, "float32"),
    "text after, tiled": (AFTER, (3, 0), "tiled", None, "float32"),
    "text before, tiled": (BEFORE, (0, 4), "tiled", None, "float32"),
    "scale": (BEFORE, None, "raster", SCALE, "float32"),
    "bfloat16, tiled": (BEFORE, (0, 4), "tiled", None, "bfloat16"),
}
CONFIGS = {
    "paper": CONFIG,
    "compensated": DraftConfig(sparsity=0.8, correction=CORRECTED),
}


@pytest.mark.parametrize(
    "case",
    mostly_nightly(
        [(case, name) for case in CASES for name in CONFIGS],
        [("text after", "paper"), ("bfloat16, tiled", "paper")],
    ),
    ids=", ".join,
)
def test_draft_attention_adds_the_map_of_numpy(case, assert_close):
    """To the video alone: the output of text has the same bits."""
    grid, lengths, order, scale, dtype = CASES[case[0]]
    config = CONFIGS[case[1]]
    without = dataclasses.replace(config, correction=None)
    q, k, v = random_qkv(grid, dtype=dtype)
    tokens = grid.tile_order if order == "tiled" else np.arange(grid.num_tokens)
    options = {
        "grid": grid,
        "order": order,
        "scale": scale,
        "text_lengths": None if lengths is None else np.array(lengths),
    }
    given = [x[:, tokens] for x in (q, k, v)]
    sparse, got = (attend(*given, config=c, **options) for c in (without, config))
    assert got.dtype == dtype
    text = grid.text_tokens
    np.testing.assert_array_equal(got[:, text], sparse[:, text])
    back = np.argsort(tokens)
    sparse, got = (np.asarray(x)[:, back] for x in (sparse, got))
    maps = naive_maps(sparse, q, k, v, grid, 33, 40.0, lengths, scale)
    want = naive_corrected(sparse, q, maps, grid)
    tolerance = {"bfloat16": {"rtol": 2**-8, "atol": 4e-3}}.get(dtype, CORRECTION)
    assert_close(f"{dtype} with a correction", got, want, tolerance)


def test_the_error_falls():
    """Values follow keys: much of what is skipped is proportional to the query."""
    q, k, v = random_qkv(AFTER)
    lengths, config = (3, 0), CONFIGS["compensated"]
    want = dense(q, k, v, AFTER, lengths)[:, AFTER.visual_tokens]
    run = functools.partial(
        attend, q, k, v, grid=AFTER, text_lengths=jnp.asarray(lengths)
    )
    without, corrected = (
        relative_error(run(config=c)[:, AFTER.visual_tokens], want)
        for c in (dataclasses.replace(config, correction=None), config)
    )
    assert without > 0.5  # measured: 0.540, 0.329
    assert corrected < 0.35


def test_an_affine_error_vanishes():
    q, k, v = random_qkv(AFTER)
    rng = np.random.default_rng(5)
    matrix, offset = rng.normal(size=(2, 2, 8, 8)), rng.normal(size=(2, 2, 8))
    want = dense(q, k, v, AFTER, (3, 5))
    maps = {at: (-matrix[at], -offset[at]) for at in np.ndindex(2, 2)}
    out = naive_corrected(want, q, maps, AFTER)
    got = correct(
        jnp.asarray(out, jnp.float32),
        q,
        k,
        v,
        grid=AFTER,
        config=DraftConfig(correction=Correction(prior=1e-5)),
        scale=8**-0.5,
        text_lengths=jnp.asarray([3, 5]),
        order="raster",
    )
    assert np.abs(out - want).max() > 5.0
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-4)


def test_short_videos_are_left_alone():
    grid = VideoGrid(1, 31, 33, tile=(4, 8))  # 1,023 tokens
    q, k, v = random_qkv(grid, batch=1, heads=1)
    options = {"grid": grid, "scale": 0.3, "text_lengths": None, "order": "raster"}
    assert correct(v, q, k, v, config=CONFIG, **options) is v
    assert num_samples(grid, CONFIG) == 0


def test_the_paper_has_no_correction():
    assert DraftConfig.paper().correction is None
    assert DraftConfig().correction == Correction(samples=256, prior=160.0)


# ------------------------------------------------------ items, heads, padding and NaN


ragged = functools.partial(  # a program that a test above has compiled
    attend,
    grid=AFTER,
    config=CONFIG,
    order="raster",
    scale=None,
    text_lengths=np.array([3, 0]),
)


def test_items_and_heads_do_not_influence_each_other():
    q, k, v = random_qkv(AFTER)
    clean = ragged(q, k, v)
    place = naive_places(AFTER, 33)[4]
    out = np.array(
        ragged(q.at[1, place, 0].set(jnp.nan), k.at[0, 7, 1].set(jnp.inf), v)
    )
    for item, head in ((1, 0), (0, 1)):
        assert np.isnan(out[item, AFTER.visual_tokens, head]).all()
        out[item, :, head] = clean[item, :, head]
    np.testing.assert_array_equal(out, clean)


def test_padding_changes_nothing():
    qkv = random_qkv(AFTER)
    bad = []
    for x in qkv:
        x = x.at[0, AFTER.text_tokens.start + 3 :].set(jnp.nan)
        bad.append(x.at[1, AFTER.text_tokens].set(jnp.nan))
    np.testing.assert_array_equal(ragged(*bad), ragged(*qkv))


# -------------------------------------------------------------------- transformations


@pytest.mark.nightly
def test_eager_numpy_and_traced_scale_agree_with_jit():
    qkv = random_qkv(AFTER)
    want = attend(*qkv, grid=AFTER, config=CONFIG)
    run = functools.partial(draft_attention, grid=AFTER, config=CONFIG)
    for got in (
        run(*qkv),
        run(*map(np.asarray, qkv)),
        attend(*qkv, grid=AFTER, config=CONFIG, scale=jnp.float32(8**-0.5)),
    ):
        np.testing.assert_allclose(got, want, **CORRECTION)


@pytest.mark.nightly
def test_vmap_and_disabled_jit_agree_with_jit():
    q, k, v = random_qkv(AFTER)
    want = attend(q, k, v, grid=AFTER, config=CONFIG)
    run = functools.partial(draft_attention, grid=AFTER, config=CONFIG)
    mapped = jax.jit(jax.vmap(lambda *item: run(*(x[None] for x in item))))(q, k, v)
    np.testing.assert_allclose(mapped[:, 0], want, **CORRECTION)
    with jax.disable_jit():
        np.testing.assert_allclose(run(q, k, v), want, **CORRECTION)
    with jax.enable_x64(True):
        wide = run(q, k, v)
    assert wide.dtype == jnp.float32
    np.testing.assert_allclose(wide, want, **CORRECTION)


def test_a_second_eager_call_compiles_nothing():
    qkv = random_qkv(AFTER)
    run = functools.partial(draft_attention, *qkv, grid=AFTER, config=CONFIG)
    jax.block_until_ready(run())
    events = collections.Counter()

    def count(event, duration, **_):
        events[event.rpartition("/")[2]] += 1

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        jax.block_until_ready(run())
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert events["backend_compile_duration"] == 0
    assert events["jaxpr_trace_duration"] == 0


@pytest.mark.nightly
def test_gradients_flow_through_the_mapped_query_and_not_through_the_fit():
    """To those of sparse attention the map adds its transpose, for queries alone."""
    qkv = random_qkv(AFTER)
    weights = np.random.default_rng(6).normal(size=qkv[0].shape).astype(np.float32)
    run = functools.partial(draft_attention, grid=AFTER)

    def loss(config, *qkv):
        return (run(*qkv, config=config) * weights).sum()

    grad = jax.jit(jax.grad(loss, (1, 2, 3)), static_argnums=0)
    (dq, *others), (sparse_dq, *sparse_others) = (
        grad(config, *qkv) for config in (CONFIG, SPARSE)
    )
    for got, want in zip(others, sparse_others, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    maps = naive_maps(run(*qkv, config=SPARSE), *qkv, AFTER, 33, 40.0)
    back = {at: (matrix.T, np.zeros(8)) for at, (matrix, _) in maps.items()}
    want = naive_corrected(sparse_dq, weights, back, AFTER)
    np.testing.assert_allclose(dq, want, rtol=0, atol=2e-5)


@pytest.mark.nightly
def test_forward_mode_moves_the_mapped_query_and_not_the_fit():
    qkv = tuple(random_qkv(AFTER))
    moved = tuple(x[::-1] for x in qkv)

    def along(config, *qkv):
        run = functools.partial(draft_attention, grid=AFTER, config=config)
        return jax.jvp(run, qkv, moved)

    along = jax.jit(along, static_argnums=0)
    (sparse, sparse_tangent), (_, got) = (along(c, *qkv) for c in (SPARSE, CONFIG))
    maps = naive_maps(sparse, *qkv, AFTER, 33, 40.0)
    linear = {at: (matrix, np.zeros(8)) for at, (matrix, _) in maps.items()}
    want = naive_corrected(sparse_tangent, moved[0], linear, AFTER)
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-5)


# -------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    "case",
    mostly_nightly(
        [
            (kind, is_traced)
            for kind in ("dense", "sparse", "reuse")
            for is_traced in (False, True)
        ],
        quick=[("reuse", False)],
    ),
    ids=lambda case: f"{case[0]}, {'traced' if case[1] else 'known'}",
)
def test_a_schedule_corrects_sparse_steps_alone(case):
    """A reused mask keeps other pairs than a new one: its error is fitted anew."""
    kind, is_traced = case
    q, k, v = random_qkv(NO_TEXT, batch=1)
    step = dataclasses.replace(
        constant_step(NO_TEXT, CONFIG, dense=kind == "dense"),
        refresh=np.asarray(kind == "sparse"),
    )
    mask = initial_mask(NO_TEXT, CONFIG, batch=1, num_heads=2)

    def run(config, step):
        return scheduled_attention(
            q, k, v, grid=NO_TEXT, config=config, step=step, mask=mask
        )[0]

    if is_traced:
        run = jax.jit(run, static_argnums=0)
    sparse, got = (run(config, step) for config in (SPARSE, CONFIG))
    if kind == "dense":
        np.testing.assert_array_equal(got, sparse)
        return
    maps = naive_maps(sparse, q, k, v, NO_TEXT, 33, 40.0)
    want = naive_corrected(sparse, q, maps, NO_TEXT)
    np.testing.assert_allclose(got, want, **CORRECTION)


# ---------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("samples", value) for value in (0, -1, 31, 64.0, True, None, "all")),
        *(("prior", value) for value in (0, -1.0, np.inf, np.nan, True, None, "160")),
    ],
)
@pytest.mark.usefixtures("without_annotations")
def test_bad_fields_are_named_with_their_value(field, value):
    with pytest.raises(ValueError, match=re.escape(f"{field}={value!r} must be")):
        Correction(**{field: value})


@pytest.mark.parametrize("value", [True, 256, {}, Correction], ids=str)
@pytest.mark.usefixtures("without_annotations")
def test_a_config_takes_a_correction_or_none(value):
    with pytest.raises(ValueError, match=r"correction=.* must be a Correction or None"):
        DraftConfig(correction=value)
