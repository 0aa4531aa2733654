"""`scheduled_attention` without a mask to keep, against the NumPy method."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from draft_jax import (
    DraftAttention,
    DraftConfig,
    SparsitySchedule,
    VideoGrid,
    constant_step,
    scheduled_attention,
)
from tests.draft_jax import naive_draft

GRID = VideoGrid(1, 4, 6, tile=(2, 3), text_length=5)  # S = 4, 29 tokens
CONFIG = DraftConfig.paper(sparsity=0.5)
STEP = constant_step(GRID, CONFIG)
F32 = {"rtol": 1e-5, "atol": 5e-6}


def random_qkv():
    shape = (3, 1, GRID.num_tokens, 2, 8)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@functools.cache
def expected(dense):
    q, k, v = random_qkv()
    kept = naive_draft.percentile_mask(q, k, GRID, 0.0 if dense else 0.5)
    return naive_draft.attention(q, k, v, kept, GRID)


def attend(step, q, k, v):
    return scheduled_attention(q, k, v, grid=GRID, config=CONFIG, step=step, mask=None)


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "sparse"])
@pytest.mark.parametrize("traced", [True, False], ids=["traced", "known"])
def test_a_step_runs_without_a_mask(dense, traced):
    step = constant_step(GRID, CONFIG, dense=dense)
    run = attend if traced else functools.partial(attend, step)
    out, mask = jax.jit(run)(*[step] * traced, *random_qkv())
    assert mask is None
    np.testing.assert_allclose(out, expected(dense), **F32)


def test_dense_layers_of_a_foreign_scan():
    """A dense step refreshes nothing; the index of the layer is the scan's."""
    plan = SparsitySchedule(dense_fraction=0.5).plan(
        np.array([900, 100]), num_layers=3, grid=GRID, config=CONFIG
    )
    q, k, v = random_qkv()

    @jax.jit
    def all_layers(q, k, v, kind):
        step = kind.step(plan.budget[0])

        def layer(carry, index):
            out, mask = attend(step.for_layer(index), q, k, v)
            return carry + out, mask

        return jax.lax.scan(layer, jnp.zeros_like(q), jnp.arange(3))

    for index, dense in enumerate([True, False]):
        kind = plan.kind(index)
        assert kind.refresh != dense, "there is nothing to refresh"
        total, masks = all_layers(q, k, v, kind)
        assert masks is None
        np.testing.assert_allclose(total, 3 * expected(dense), rtol=1e-5, atol=2e-5)


def test_a_reuse_without_a_mask_is_refused():
    reuse = dataclasses.replace(STEP, refresh=np.asarray(False))
    with pytest.raises(ValueError, match=r"mask=None, but the step reuses one.*mask_r"):
        jax.eval_shape(functools.partial(attend, reuse), *random_qkv())


def test_the_layer_takes_no_mask():
    layer = DraftAttention(2, 12, config=CONFIG, rngs=nnx.Rngs(0))
    x = jax.ShapeDtypeStruct((1, GRID.num_tokens, 12), jnp.float32)
    run = functools.partial(layer.scheduled, grid=GRID, step=STEP, mask=None)
    out, mask = jax.eval_shape(run, x)
    assert out == x
    assert mask is None
