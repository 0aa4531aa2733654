"""EasyCache's decisions and velocities against the published loop."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import AttentionPlan
from models.diffusion.caches import EasyCache
from models.diffusion.schedulers import FlowEuler
from tests.published_caches import easycache_run

# Relative to velocities of size one; measured: 2e-7.
ROUNDING = 1e-5


def velocities(x, step):
    """Of prompts and negative prompts: two smooth functions of latents and time."""
    return np.stack([np.tanh(x + 0.05 * step), 0.5 * x - 0.02 * step])


def no_model(residual):
    raise AssertionError("a skipped step does without the model")


def our_run(rule, x, num_steps, step_size):
    latents = jnp.asarray(x, jnp.float32)
    state = rule.initial_state(latents, rows=2 * len(x), residual=None)
    skippable = rule.skippable(num_steps)
    skipped, found = [], []
    for step in range(num_steps):
        skip = bool(skippable[step]) and rule.allows(np.asarray(state.score))
        if skip:
            velocity = rule.reuse(state.kept, latents, no_model)
        else:
            both = velocities(np.asarray(latents, np.float64), step)
            velocity = jnp.asarray(both.reshape(-1, *x.shape[1:]), jnp.float32)
            state = rule.after_computing(state, latents, velocity, None)
        skipped.append(skip)
        found.append(np.asarray(velocity).reshape(2, *x.shape))
        positive, negative = velocity[: len(x)], velocity[len(x) :]
        after = latents + step_size * (negative + 3.0 * (positive - negative))
        score = rule.after_moving(state, latents, after)
        state = dataclasses.replace(state, score=score)
        latents = after
    return np.array(skipped), np.stack(found)


@pytest.mark.parametrize(
    ("threshold", "first_steps", "batch"),
    [(0.05, 10, 1), (0.1, 5, 2), (0.2, 1, 1), (1e-6, 2, 1), (50.0, 3, 3)],
    ids=str,
)
def test_run_follows_the_published_loop(threshold, first_steps, batch):
    """Decisions are equal, and velocities of skipped steps up to rounding."""
    x = np.random.default_rng(3).normal(size=(batch, 2, 3, 4, 5))
    x = x.astype(np.float32).astype(np.float64)
    rule = EasyCache(threshold=threshold, first_steps=first_steps)
    expected, wanted, _ = easycache_run(
        velocities,
        lambda x, both, _: x - 0.02 * (both[1] + 3.0 * (both[0] - both[1])),
        x,
        num_steps=30,
        threshold=threshold,
        first_steps=first_steps,
    )
    skipped, found = our_run(rule, x, 30, -0.02)
    np.testing.assert_array_equal(skipped, expected)
    if threshold > 1e-3:
        assert expected.any()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=ROUNDING)
    assert not skipped[0]
    assert not skipped[-1]


def test_nothing_is_skipped_until_two_steps_were_computed():
    rule = EasyCache(threshold=1e6, first_steps=1)
    x = np.random.default_rng(0).normal(size=(1, 1, 2, 2, 3))
    skipped, _ = our_run(rule, x, 6, -0.1)
    np.testing.assert_array_equal(skipped, [0, 0, 1, 1, 1, 0])


def test_experts_start_with_a_computed_step():
    rule = EasyCache(first_steps=2)
    may = rule.skippable(8, expert_starts=(0, 5))
    np.testing.assert_array_equal(may, [0, 0, 1, 1, 1, 0, 1, 0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"threshold": -1.0}, "threshold=-1.0 must be a positive"),
        ({"threshold": float("inf")}, "threshold=inf must be"),
        ({"first_steps": 0}, "first_steps=0 must be an integer >= 1"),
        ({"first_steps": 2.5}, "first_steps=2.5 must be an integer"),
    ],
)
@pytest.mark.usefixtures("without_jaxtyping")
def test_bad_constants(fields, message):
    with pytest.raises(ValueError, match=message):
        EasyCache(**fields)


def test_note_where_nothing_can_be_skipped():
    rule = EasyCache()
    solver = FlowEuler(num_steps=11)
    (note,) = rule.notes(solver, AttentionPlan.dense())
    assert "first 10 steps and the last" in note
    assert rule.notes(FlowEuler(num_steps=12), AttentionPlan.dense()) == []
