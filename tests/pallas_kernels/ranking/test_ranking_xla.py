"""The XLA path of the ranking, and its reference, against sorts in NumPy."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ranking
from pallas_kernels.ranking import reference, xla
from tests.cases import mostly_nightly
from tests.draft_jax.draft import sorted_selection
from tests.pallas_kernels.ranking.row_selection import equal, huge, softmax, unpack

SHAPE = (2, 3, 5, 70)
MAPS = {"softmax": softmax, "equal": equal, "huge": huge}


def few_values(rng, shape):
    """Ties everywhere, both zeros, both infinities, NaN; nothing denormal."""
    values = [-np.inf, -1.5, -0.0, 0.0, 0.25, 0.5, 3e38, np.inf, np.nan]
    return np.array(values, np.float32)[rng.integers(0, len(values), shape)]


MAPS["few-values"] = few_values


@pytest.mark.parametrize("bits", [1, 2])
def test_kth_largest_by_digits(bits):
    """A CPU takes 1 bit in a pass and a GPU without the kernels 2."""
    rng = np.random.default_rng(bits)
    keys = rng.integers(0, 2**32, (2, 3, 5, 7), dtype=np.uint32)
    keys[1] >>= 29  # ties
    for k in (1, 9, 35):
        got = xla.kth_largest_of_map(jnp.asarray(keys), jnp.int32(k), digit_bits=bits)
        want = np.sort(keys.reshape(2, 3, -1), axis=-1)[..., -k]
        np.testing.assert_array_equal(got, want)
    for k in (1, 4, 7):
        got = xla.kth_largest_of_row(jnp.asarray(keys), jnp.full(5, k), digit_bits=bits)
        np.testing.assert_array_equal(got, np.sort(keys, axis=-1)[..., -k])


@pytest.mark.parametrize(
    "case",
    mostly_nightly(
        itertools.product(MAPS, ["free", "forced"]),
        [("softmax", "free"), ("few-values", "forced")],
    ),
    ids="-".join,
)
def test_selection_agrees_with_a_sort(case):
    name, has_forced = case[0], case[1] == "forced"
    rng = np.random.default_rng(0)
    values = MAPS[name](rng, SHAPE)
    scores = jnp.asarray(values)
    forced = rng.random(SHAPE[2:]) < 0.1 * has_forced
    budget = rng.integers(1, 71, 5).astype(np.int32)
    count = np.maximum(budget, forced.sum(-1)).astype(np.int32)
    least = np.maximum(forced.sum(-1), 1).astype(np.int32)
    most = np.maximum(40, least)
    total = jnp.int32(max(90, forced.sum()))
    in_rows, by_mass = jnp.asarray(count), (jnp.asarray(least), jnp.asarray(most))
    for select, arguments, options, want in (
        (
            "select_in_maps",
            (total,),
            {},
            sorted_selection.percentile(values, forced, 90),
        ),
        (
            "select_in_rows",
            (in_rows,),
            {},
            sorted_selection.row_topk(values, forced, budget),
        ),
        (
            "select_to_mass",
            by_mass,
            {"mass": 0.7},
            sorted_selection.top_p(values, forced, 40, 0.7),
        ),
    ):
        words = getattr(ranking, select)(scores, *arguments, forced=forced, **options)
        np.testing.assert_array_equal(unpack(words, 70), want)
        kept = getattr(reference, select)(scores, *arguments, forced=forced, **options)
        np.testing.assert_array_equal(kept, want)


@pytest.mark.parametrize("capacity", [30, 700], ids=["cut", "roomy"])
def test_compress_rows(capacity):
    rng = np.random.default_rng(0)
    flags = rng.random((2, 9, 70)) < 0.3
    words = ranking.pack(jnp.asarray(flags))
    np.testing.assert_array_equal(unpack(words, 70), flags)
    np.testing.assert_array_equal(ranking.unpack(words, 70), flags)
    offsets, columns = ranking.compress_rows(words, np.array([0, 32, 64]), capacity)
    for i in range(2):
        ends = np.minimum(np.cumsum(flags[i].sum(-1)), capacity)
        np.testing.assert_array_equal(offsets[i], [0, *ends])
        want = [*np.nonzero(flags[i])[1], *[0] * capacity][:capacity]
        np.testing.assert_array_equal(columns[i], want)


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 64, 70])
def test_all_set(columns):
    words = ranking.all_set(columns)
    assert unpack(words, columns).all()
    assert np.bitwise_count(words).sum() == columns


def test_a_row_without_any_keeps_its_best_in_each_map():
    """Whatever the same row of another map keeps."""
    scores = jnp.array([[[9.0, 8.0], [1.0, 2.0]], [[3.0, 4.0], [7.0, 6.0]]])[None]
    want = [[[True, True], [False, True]], [[False, True], [True, True]]]
    none = np.zeros((2, 2), bool)
    kept = reference.select_in_maps(scores, jnp.int32(2), forced=none)
    np.testing.assert_array_equal(kept[0], want)
    words = ranking.select_in_maps(scores, jnp.int32(2), forced=none)
    np.testing.assert_array_equal(unpack(words, 2)[0], want)
