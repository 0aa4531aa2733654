"""One step for one layer: what `DraftStep.for_layer` and `with_dense` accept."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import (
    DraftConfig,
    SparsitySchedule,
    VideoGrid,
    constant_step,
    initial_mask,
    scheduled_attention,
)
from tests.draft_jax import naive_draft
from tests.tolerances import ATTENTION

GRID = VideoGrid(2, 5, 7, tile=(2, 4), text_length=5)  # S = 12, 1 text block
CONFIG = DraftConfig.paper(sparsity=0.6)


def step_of(schedule):
    """The one step of a run with three layers."""
    timesteps = np.array([500.0])
    return schedule.plan(timesteps, num_layers=3, grid=GRID, config=CONFIG).step(0)


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_the_step_does_not_have(layer):
    step = step_of(SparsitySchedule())
    with pytest.raises(ValueError, match=rf"layer {layer} is not one of this step's"):
        step.for_layer(layer)


INDICES = {
    "python": int,
    "numpy": np.int64,
    "numpy array": np.asarray,
    "unsigned": np.uint8,
    "jax": jnp.asarray,
}


@pytest.mark.parametrize("make", INDICES.values(), ids=INDICES)
def test_for_layer_takes_any_integer(make):
    step = step_of(SparsitySchedule(dense_layers=(0,)))
    dense = [step.for_layer(make(layer)).dense for layer in range(3)]
    assert all(isinstance(flag, np.ndarray) for flag in dense), "known, hence NumPy's"
    assert [bool(flag) for flag in dense] == [True, False, False]


@pytest.mark.parametrize("where", ["scan", "jit", "traced step"])
def test_for_layer_takes_a_traced_integer(where):
    step = step_of(SparsitySchedule(dense_layers=(0,)))

    def look(layer, step=step):
        one = step.for_layer(layer)
        chex.assert_shape(one.dense, ())
        return one.dense

    layers = jnp.arange(3)
    if where == "scan":
        _, dense = jax.lax.scan(lambda carry, layer: (carry, look(layer)), 0, layers)
    elif where == "jit":
        dense = jnp.stack([jax.jit(look)(layer) for layer in layers])
    else:
        dense = jnp.stack([jax.jit(look)(layer, step) for layer in layers])
    np.testing.assert_array_equal(dense, [True, False, False])


@pytest.mark.nightly
def test_scan_over_layers_runs_layer_0_dense_and_layer_1_sparse():
    step = step_of(SparsitySchedule(dense_layers=(0,)))
    rng = np.random.default_rng(0)
    shape = (3, 1, GRID.num_tokens, 2, 16)
    q, k, v = rng.normal(size=shape).astype(np.float32)
    mask = initial_mask(GRID, CONFIG, batch=q.shape[0], num_heads=q.shape[2])

    @jax.jit
    def run(q, k, v, mask):
        def body(carry, layer):
            out, _ = scheduled_attention(
                q,
                k,
                v,
                grid=GRID,
                config=CONFIG,
                step=step.for_layer(layer),
                mask=mask,
            )
            return carry, out

        return jax.lax.scan(body, 0, jnp.arange(2))[1]

    outputs = run(q, k, v, mask)
    sparse = naive_draft.percentile_mask(q, k, GRID, CONFIG.sparsity)
    for out, kept in zip(outputs, (np.ones_like(sparse), sparse), strict=True):
        want = naive_draft.attention(q, k, v, kept, GRID)
        np.testing.assert_allclose(out, want, **ATTENTION["float32"])


FLAGS = {
    "python": bool,
    "numpy": np.bool,
    "numpy array": np.asarray,
    "jax": jnp.asarray,
}


@pytest.mark.parametrize("make", FLAGS.values(), ids=FLAGS)
def test_with_dense_takes_any_boolean(make):
    step = step_of(SparsitySchedule())
    assert [bool(step.with_dense(make(x)).dense) for x in (True, False)] == [1, 0]
    traced = jax.jit(lambda flag: step.with_dense(flag).dense)
    assert [bool(traced(make(flag))) for flag in (True, False)] == [True, False]


NOT_INDICES = {
    "flag": (True, TypeError, "dtype bool; expected an integer; a flag goes to with_d"),
    "numpy flag": (np.bool(True), TypeError, "index has dtype bool"),
    "jax flag": (jnp.asarray(True), TypeError, "index has dtype bool"),
    "float": (1.0, TypeError, "index has dtype float64; expected an integer"),
    "jax float": (jnp.float32(1), TypeError, "index has dtype float32"),
    "vector": (np.array([1]), ValueError, r"index has shape \(1,\); expected a scalar"),
}
NOT_FLAGS = {
    "index": (0, TypeError, "dtype int64; expected a boolean; an index goes to for_la"),
    "numpy index": (np.int32(1), TypeError, "flag has dtype int32"),
    "jax index": (jnp.int32(1), TypeError, "flag has dtype int32"),
    "float": (0.0, TypeError, "flag has dtype float64"),
    "vector": (np.array([True]), ValueError, r"flag has shape \(1,\)"),
}


@pytest.mark.usefixtures("without_annotations")
@pytest.mark.parametrize("traced", [False, True], ids=["known", "traced"])
@pytest.mark.parametrize(
    ("method", "value", "error", "message"),
    [
        pytest.param(method, *case, id=f"{method} {name}")
        for method, cases in (("for_layer", NOT_INDICES), ("with_dense", NOT_FLAGS))
        for name, case in cases.items()
    ],
)
def test_an_index_is_no_flag(method, value, error, message, traced):
    take = getattr(step_of(SparsitySchedule()), method)
    if traced:
        value = jnp.asarray(value)
        message = message.replace("64", "32")
        take = functools.partial(jax.eval_shape, take)
    with pytest.raises(error, match=message):
        take(value)


def test_a_step_of_one_layer_has_no_layers():
    with pytest.raises(ValueError, match=r"its dense has shape \(\)"):
        constant_step(GRID, CONFIG).for_layer(0)


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_values_outside_of_jit_stay_known_inside(make):
    step = jax.tree.map(make, step_of(SparsitySchedule(dense_layers=(2,))))

    @jax.jit
    def look(traced):
        assert [bool(step.for_layer(layer).dense) for layer in range(3)] == [0, 0, 1]
        assert isinstance(traced.for_layer(2).dense, jax.core.Tracer)
        return traced.for_layer(2).dense

    assert look(step)
