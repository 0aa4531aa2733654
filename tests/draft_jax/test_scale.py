"""A scale counts twice: in the draft, which ranks pairs, and in the attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import (
    DraftConfig,
    VideoGrid,
    compute_mask,
    constant_step,
    draft_attention,
    initial_mask,
    scheduled_attention,
)
from tests.draft_jax import naive_draft
from tests.tolerances import ATTENTION

GRID = VideoGrid(2, 5, 7, tile=(2, 4), text_length=5)  # S = 12, 1 text block
CONFIG = DraftConfig.paper(sparsity=0.6)
SCALE = 2.0  # instead of 1 / sqrt(8)


@pytest.fixture(scope="module")
def case():
    """q, k, v, and the pairs kept at this scale, which others would not keep."""
    shape = (3, 1, GRID.num_tokens, 2, 8)
    qkv = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    q, k, _ = qkv
    kept = naive_draft.percentile_mask(q, k, GRID, 0.6, scale=SCALE)
    usual = naive_draft.percentile_mask(q, k, GRID, 0.6)
    assert (kept != usual).sum() > 10
    return [*map(jnp.asarray, qkv)], kept


def test_compute_mask(case):
    (q, k, _), kept = case
    mask = compute_mask(q, k, grid=GRID, config=CONFIG, scale=SCALE)
    np.testing.assert_array_equal(mask.to_dense(), kept)


def test_draft_attention(case):
    (q, k, v), kept = case
    out = draft_attention(q, k, v, grid=GRID, config=CONFIG, scale=SCALE)
    expected = naive_draft.attention(
        *map(np.asarray, (q, k, v)), kept, GRID, scale=SCALE
    )
    np.testing.assert_allclose(out, expected, **ATTENTION["float32"])


@pytest.mark.parametrize("is_known", [True, False], ids=["known step", "traced step"])
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_scheduled_attention(case, dense, is_known):
    (q, k, v), kept = case
    step = constant_step(GRID, CONFIG, dense=dense)
    mask = initial_mask(GRID, CONFIG, batch=1, num_heads=2)
    attend = functools.partial(
        scheduled_attention, q, k, v, grid=GRID, config=CONFIG, mask=mask, scale=SCALE
    )
    run = functools.partial(attend, step=step) if is_known else attend
    out, new = jax.jit(run)() if is_known else jax.jit(run)(step=step)
    pairs = np.ones_like(kept) if dense else kept
    expected = naive_draft.attention(
        *map(np.asarray, (q, k, v)), pairs, GRID, scale=SCALE
    )
    np.testing.assert_allclose(out, expected, **ATTENTION["float32"])
    np.testing.assert_array_equal(new.to_dense(), mask.to_dense() if dense else kept)
