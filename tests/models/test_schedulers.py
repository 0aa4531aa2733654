import jax.numpy as jnp
import numpy as np
import pytest

from models.schedulers import FlowEuler


def test_sigmas_of_a_hand_worked_grid():
    # linspace is 1, 3/4, 1/2, 1/4, 0; shift 3 maps s to 3 s / (1 + 2 s).
    scheduler = FlowEuler(num_steps=4, shift=3.0)
    np.testing.assert_allclose(scheduler.sigmas, [1, 0.9, 0.75, 0.5, 0], atol=1e-15)
    np.testing.assert_allclose(scheduler.timesteps, [1000, 900, 750, 500])
    np.testing.assert_allclose(scheduler.step_sizes, [-0.1, -0.15, -0.25, -0.5])


def test_shift_one_is_linear():
    scheduler = FlowEuler(num_steps=5)
    np.testing.assert_allclose(scheduler.sigmas, [1, 0.8, 0.6, 0.4, 0.2, 0], atol=1e-15)


def test_hunyuan_grid_ends_at_one_eighth():
    # s = 1/50: 7 s / (1 + 6 s) = 0.14 / 1.12.
    sigmas = FlowEuler(num_steps=50, shift=7.0).sigmas
    assert sigmas[-1] == 0.0
    assert sigmas[-2] == pytest.approx(0.125, abs=1e-15)


@pytest.mark.parametrize(
    ("num_steps", "shift", "threshold", "dense_steps"),
    [(50, 5.0, 925, 15), (50, 3.0, 925, 10), (50, 7.0, 945, 15), (30, 13.0, 975, 8)],
    ids=["wan", "wan-480p", "hunyuan", "hunyuan-custom"],
)
def test_steps_above_the_published_thresholds(num_steps, shift, threshold, dense_steps):
    timesteps = FlowEuler(num_steps=num_steps, shift=shift).timesteps
    assert (timesteps > threshold).sum() == dense_steps


def test_steps_reach_the_clean_sample_of_a_straight_path():
    rng = np.random.default_rng(0)
    clean, noise = rng.normal(size=(2, 3, 5)).astype(np.float32)
    scheduler = FlowEuler(num_steps=7, shift=4.0)
    latents = jnp.asarray(noise)
    for index in range(7):
        expected = (1 - scheduler.sigmas[index]) * clean + (
            scheduler.sigmas[index] * noise
        )
        np.testing.assert_allclose(latents, expected, atol=1e-6)
        latents = scheduler.step(latents, jnp.asarray(noise - clean), index)
    np.testing.assert_allclose(latents, clean, atol=1e-6)


def test_step_keeps_the_dtype():
    latents = jnp.ones((2, 3), jnp.float32)
    velocity = jnp.ones((2, 3), jnp.bfloat16)
    assert FlowEuler(num_steps=3).step(latents, velocity, 0).dtype == jnp.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "num_steps=0 must be a positive integer"),
        ({"num_steps": True}, "num_steps=True must be a positive integer"),
        ({"num_steps": 4, "shift": 0.0}, "shift=0.0 must be a positive"),
        ({"num_steps": 4, "shift": float("nan")}, "shift=nan must be a positive"),
        ({"num_steps": 4, "shift": float("inf")}, "shift=inf must be a positive"),
    ],
    ids=str,
)
def test_bad_grids_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        FlowEuler(**arguments)


@pytest.mark.parametrize("index", [-1, 4])
def test_step_outside_the_grid_is_named(index):
    latents = jnp.zeros((1,))
    with pytest.raises(ValueError, match=rf"index={index} must be in 0 \.\. 3"):
        FlowEuler(num_steps=4).step(latents, latents, index)
