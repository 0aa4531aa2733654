"""The selection kernels in GPU interpret mode with race detection.

PTX cannot run there: `emulated` stands in for it. Everything around it is tested:
grids, who works on which row, thresholds, offsets, cuts. `tests/gpu` runs the PTX.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from draft_jax import DraftConfig, VideoGrid, select_blocks
from draft_jax.config import static_budget
from pallas_kernels.ranking.sm90 import backend, maps
from pallas_kernels.ranking.sm90 import rows as row_kernel
from tests.cases import mostly_nightly
from tests.draft_jax import naive_draft
from tests.draft_jax.draft import sorted_selection
from tests.pallas_kernels.ranking.row_selection import (
    any_bits,
    check_mask,
    check_rows,
    equal,
    few_values,
    huge,
    minus_infinity,
    softmax,
    unpack,
)

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
CONFIGS = {
    "percentile": DraftConfig.paper(sparsity=0.8),
    "row_topk": DraftConfig.paper(
        sparsity=0.8, selection="row_topk", keep_own_tile=True
    ),
    "top_p": DraftConfig.paper(sparsity=0.5, selection="top_p", keep_first_frame=True),
}


pytestmark = pytest.mark.usefixtures("no_races")


@pytest.mark.parametrize("digit", maps.DIGITS, ids=str)
def test_count_digits(monkeypatch, digit):
    monkeypatch.setattr(maps, "NUM_CTAS", 4)  # so that a CTA walks 3 or 4 rows
    rng = np.random.default_rng(digit.shift)
    keys = rng.integers(1, 2**32, (2, 7, 140), dtype=np.uint32)
    keys[1] &= 0x7FFF  # so that the first digit is the same, 0
    keys |= 1
    prefix = np.array([keys[0, 0, 0], 0], np.uint64) >> (digit.shift + digit.bits)
    prefix = prefix.astype(np.uint32)
    counts = maps.count_digits(
        jnp.asarray(keys), jnp.asarray(prefix), digit, interpret=INTERPRET
    )
    for i in range(2):
        wide = keys[i].astype(np.uint64).ravel()
        own = wide[wide >> (digit.shift + digit.bits) == prefix[i]]
        values = own >> digit.shift & (digit.num_values - 1)
        want = np.bincount(values.astype(np.int64), minlength=digit.num_values)
        np.testing.assert_array_equal(counts[i], want)
        assert want.sum() > 0


@pytest.mark.parametrize("columns", [5, 128, 200])
def test_pack_rows(columns):
    rng = np.random.default_rng(columns)
    keys = rng.integers(1, 9, (2, 3, columns), dtype=np.uint32)
    threshold = rng.integers(1, 9, (2, 3), dtype=np.uint32)
    above, tied, best = maps.pack_rows(
        jnp.asarray(keys), jnp.asarray(threshold), interpret=INTERPRET
    )
    at = threshold[..., None]
    np.testing.assert_array_equal(unpack(above, columns), keys > at)
    np.testing.assert_array_equal(unpack(tied, columns), keys == at)
    want = keys == keys.max(-1, keepdims=True)
    np.testing.assert_array_equal(unpack(best, columns), want)
    for words in (above, tied, best):
        assert not unpack(words, words.shape[-1] * 32)[..., columns:].any()


@pytest.mark.parametrize(
    "capacity",
    [30, pytest.param(700, marks=pytest.mark.nightly)],
    ids=["cut", "roomy"],
)
def test_write_lists(capacity):
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, (2, 256), dtype=np.uint32)
    words &= np.where(rng.random((2, 256)) < 0.1, 0x90000801, 0).astype(np.uint32)
    columns = (np.arange(256, dtype=np.int32) * 40) % 1000
    num = np.bitwise_count(words).astype(np.int32)
    ends = num.cumsum(-1, dtype=np.int32)
    got = maps.write_lists(
        *(jnp.asarray(x) for x in (words, ends - num, ends[:, -1])),
        columns,
        capacity,
        interpret=INTERPRET,
    )
    for i in range(2):
        want = [
            columns[w] + bit
            for w in range(256)
            for bit in range(32)
            if words[i, w] >> np.uint32(bit) & 1
        ]
        assert len(want) > 30
        want = (want + [0] * capacity)[:capacity]
        np.testing.assert_array_equal(got[i], want)


MAPS = {
    "softmax": softmax,
    "few-values": few_values,
    "equal": equal,
    "minus-infinity": minus_infinity,
    "huge": huge,
    "any-bits": any_bits,
}


@pytest.mark.nightly
@pytest.mark.parametrize("has_forced", [False, True], ids=["free", "forced"])
@pytest.mark.parametrize("team", [1, 4], ids=["warp", "warpgroup"])
@pytest.mark.parametrize("name", MAPS)
def test_select_in_rows_by_count(monkeypatch, name, team, has_forced):
    """Maps of 5 rows: the last step of teams of one warp has two rows of four."""
    monkeypatch.setattr(row_kernel, "WARP_COLUMNS", 1024 if team == 1 else 0)
    rng = np.random.default_rng(0)
    scores = MAPS[name](rng, (2, 5, 70))
    forced = rng.random((5, 70)) < 0.1 * has_forced
    budget = rng.integers(1, 71, 5).astype(np.int32)
    count = np.maximum(budget, forced.sum(-1)).astype(np.int32)
    want = sorted_selection.row_topk(scores, forced, budget)
    check_rows(scores, count, count, forced, want, None, INTERPRET)


@pytest.mark.nightly
@pytest.mark.parametrize("has_forced", [False, True], ids=["free", "forced"])
@pytest.mark.parametrize("team", [1, 4], ids=["warp", "warpgroup"])
@pytest.mark.parametrize("name", MAPS)
def test_select_in_rows_by_mass(monkeypatch, name, team, has_forced):
    monkeypatch.setattr(row_kernel, "WARP_COLUMNS", 1024 if team == 1 else 0)
    rng = np.random.default_rng(1)
    scores = MAPS[name](rng, (2, 5, 70))
    scores[0, 0] = 0
    scores[0, 0, [3, 60]] = 1.0, np.nan
    scores[1, 2] = np.where(rng.random(70) < 0.5, 1 / 64, 1 / 128)
    forced = rng.random((5, 70)) < 0.1 * has_forced
    least = np.maximum(forced.sum(-1), 1).astype(np.int32)
    most = np.maximum(40, least)
    want = sorted_selection.top_p(scores, forced, 40, 0.7)
    check_rows(scores, least, most, forced, want, round(0.7 * 2**30), INTERPRET)


@pytest.fixture
def kernels_on_cpu(monkeypatch):
    """Selection takes its kernels, in interpret mode."""
    monkeypatch.setattr(backend, "why_unsupported", lambda columns, device: None)
    for module, names in (
        (maps, ("count_digits", "pack_rows", "write_lists")),
        (row_kernel, ("select_in_rows",)),
    ):
        for name in names:
            kernel = functools.partial(getattr(module, name), interpret=INTERPRET)
            monkeypatch.setattr(module, name, kernel)


@pytest.mark.parametrize(
    "side", [pytest.param("before", marks=pytest.mark.nightly), "after"]
)
@pytest.mark.parametrize("name", mostly_nightly(CONFIGS, ["percentile", "top_p"]))
@pytest.mark.usefixtures("kernels_on_cpu")
def test_selection_by_kernels(name, side):
    """All of it: an edge grid, a mapped axis, a batch, a traced budget."""
    grid = VideoGrid(2, 7, 18, tile=(4, 8), text_length=40, text_side=side)  # S = 12
    config, size = CONFIGS[name], grid.num_visual_blocks
    scores = softmax(np.random.default_rng(2), (2, 2, 1, size, size))
    scores[1, 0] = 1 / size
    budget = static_budget(config.sparsity, grid, config) - 1
    forced = np.eye(size, dtype=bool) & config.keep_own_tile
    forced[:, : size // 2] |= config.keep_first_frame
    select = functools.partial(select_blocks, grid=grid, config=config)
    mask = jax.jit(jax.vmap(lambda x, n: select(x, budget=n), (0, None)))(
        jnp.asarray(scores), jnp.asarray(budget)
    )
    reference = getattr(sorted_selection, name)
    mass = (config.top_p,) if name == "top_p" else ()
    for i in range(2):
        kept = reference(scores[i], forced, budget, *mass)
        item = jax.tree.map(lambda x: x[i], mask)  # noqa: B023
        check_mask(item, naive_draft.add_text(kept, grid))
