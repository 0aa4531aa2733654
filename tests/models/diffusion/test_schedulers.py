import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import DraftConfig, SparsitySchedule, VideoGrid
from models.diffusion.schedulers import FlowEuler, FlowUniPC, Solver, make_solver

# 768x1280: 81 frames, 129 frames, and 129 frames with a reference frame.
WAN = VideoGrid(21, 48, 80)
HUNYUAN = VideoGrid(33, 48, 80, text_length=256)
CUSTOM = VideoGrid(34, 48, 80, text_length=831)


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
    ("schedule", "grid", "num_layers", "num_steps", "shift", "dense_steps"),
    [
        (SparsitySchedule.wan_published(), WAN, 30, 50, 5.0, 15),
        (SparsitySchedule.wan_published(), WAN, 30, 50, 3.0, 10),
        (SparsitySchedule.hunyuan_published(), HUNYUAN, 60, 50, 7.0, 15),
        (SparsitySchedule.hunyuan_custom_published(), CUSTOM, 60, 30, 13.0, 8),
    ],
    ids=["wan", "wan-480p", "hunyuan", "hunyuan-custom"],
)
def test_dense_steps_of_the_published_rules(
    schedule, grid, num_layers, num_steps, shift, dense_steps
):
    """The first steps are dense, and then the first layers only."""
    plan = schedule.plan(
        FlowEuler(num_steps=num_steps, shift=shift).timesteps,
        num_layers=num_layers,
        grid=grid,
        config=DraftConfig.paper(sparsity=schedule.sparsity),
    )
    assert plan.dense[:dense_steps].all()
    always = 1 if grid is WAN else 2
    expected = np.arange(num_layers) < always
    np.testing.assert_array_equal(
        plan.dense[dense_steps:], np.tile(expected, (num_steps - dense_steps, 1))
    )


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
        ({"num_steps": 4, "grid": "karras"}, "grid='karras' must be one of"),
    ],
    ids=str,
)
@pytest.mark.parametrize("solver", [FlowEuler, FlowUniPC])
@pytest.mark.usefixtures("without_jaxtyping")
def test_bad_grids_are_named(solver, arguments, message):
    with pytest.raises(ValueError, match=message):
        solver(**arguments)


@pytest.mark.parametrize("index", [-1, 4])
def test_step_outside_the_grid_is_named(index):
    latents = jnp.zeros((1,))
    with pytest.raises(ValueError, match=rf"index={index} must be in 0 \.\. 3"):
        FlowEuler(num_steps=4).step(latents, latents, index)
    with pytest.raises(ValueError, match=rf"index={index} must be in 0 \.\. 3"):
        FlowUniPC(num_steps=4).coefficients(index)


def test_last_noise_levels_of_wan_and_diffusers():
    """Wan: s = 0.999 / 50; diffusers: 0.001 + 0.999 / 50; 5 s / (1 + 4 s)."""
    wan = FlowUniPC(num_steps=50, shift=5.0)
    assert wan.sigmas[-2] == pytest.approx(0.0999 / 1.07992, abs=1e-7)
    diffusers = FlowUniPC(num_steps=50, shift=5.0, grid="diffusers")
    assert diffusers.sigmas[-2] == pytest.approx(0.1049 / 1.08392, abs=1e-7)
    # 999 * 5 / 4.996 = 999.7998, and 1000 * (1 - 1e-6).
    assert wan.timesteps[0] == diffusers.timesteps[0] == 999
    assert np.abs(wan.timesteps - diffusers.timesteps).max() == 4


def test_unipc_of_one_step_is_the_predicted_clean_sample():
    latents, velocity = jnp.array([[0.5, -2.0]]), jnp.array([[1.0, 3.0]])
    solver = FlowUniPC(num_steps=1, shift=1.0)
    history = solver.initial_history(latents)
    got, _ = solver.update(latents, velocity, history, solver.coefficients(0))
    np.testing.assert_allclose(got, [[0.5 - 0.999, -2.0 - 2.997]], rtol=1e-6)


def test_the_first_step_of_unipc_gives_its_history_no_weight():
    solver = FlowUniPC(num_steps=4)
    latents, velocity = jnp.array([[0.5, -2.0]]), jnp.array([[1.0, 3.0]])
    nothing = solver.initial_history(latents)
    other = type(nothing)(*(jnp.full_like(latents, n) for n in (5.0, 7.0, 11.0)))
    got, expected = (
        solver.update(latents, velocity, history, solver.coefficients(0))[0]
        for history in (other, nothing)
    )
    np.testing.assert_array_equal(got, expected)


def test_unipc_reaches_the_clean_sample_of_a_straight_path():
    """Weights of clean samples sum to what keeps a constant prediction exact."""
    clean, noise = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    solver = FlowUniPC(num_steps=7, shift=4.0)
    sigma = solver.sigmas[0]
    latents = jnp.asarray((1 - sigma) * clean + sigma * noise)
    history = solver.initial_history(latents)
    for index, sigma in enumerate(solver.sigmas[:-1]):
        expected = (1 - sigma) * clean + sigma * noise
        np.testing.assert_allclose(latents, expected, rtol=0, atol=2e-6)
        latents, history = solver.update(
            latents, jnp.asarray(noise - clean), history, solver.coefficients(index)
        )
    np.testing.assert_allclose(latents, clean, rtol=0, atol=2e-6)


def test_unipc_is_closer_than_euler_to_the_exact_solution():
    """dx/dsigma = x has the solution x(0) = x(1) / e."""
    errors = {}
    for name in ("euler", "unipc"):
        for steps in (8, 16):  # the last of the grid's steps bounds UniPC's order
            solver = make_solver(name, num_steps=steps, shift=1.0)
            x = jnp.full((1, 1), np.exp(solver.sigmas[0]), jnp.float32)
            history = solver.initial_history(x)
            for index in range(steps):
                x, history = solver.update(x, x, history, solver.coefficients(index))
            errors[name, steps] = abs(float(x[0, 0]) - 1.0)
    assert 1.8 < errors["euler", 8] / errors["euler", 16] < 2.2
    assert errors["unipc", 8] < errors["euler", 8] / 10
    assert errors["unipc", 16] < errors["euler", 16] / 10


@pytest.mark.parametrize(
    "arguments",
    [{"num_steps": 4, "shift": 1e6}, {"num_steps": 100_000, "shift": 300.0}],
    ids=["shift", "steps"],
)
def test_noise_levels_that_float32_cannot_tell_apart_are_refused(arguments):
    with pytest.raises(ValueError, match="float32 cannot tell from each other"):
        FlowUniPC(**arguments)


@pytest.mark.parametrize("name", ["euler", "unipc"])
def test_solvers_by_name(name):
    solver = make_solver(name, num_steps=4, shift=3.0)
    assert isinstance(solver, Solver)
    assert (solver.num_steps, solver.shift) == (4, 3.0)
    assert hash(solver) == hash(make_solver(name, num_steps=4, shift=3.0))
    other = make_solver(name, num_steps=4, shift=3.0, grid="diffusers")
    assert (other.grid, solver.grid) in [("diffusers", "linear"), ("diffusers", "wan")]


@pytest.mark.usefixtures("without_jaxtyping")
def test_unknown_solvers_are_named():
    with pytest.raises(ValueError, match="solver='heun' must be one of"):
        make_solver("heun", num_steps=4, shift=3.0)


@pytest.mark.parametrize("solver", [FlowEuler, FlowUniPC])
def test_arrays_that_are_kept_cannot_be_written(solver):
    scheduler = solver(num_steps=4, shift=3.0)
    for name in ("sigmas", "timesteps"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(scheduler, name)[0] = 0.5


def test_the_default_shift_is_that_of_wan():
    """Wan2.1's `generate.py` takes 5.0, but for images at 480p."""
    assert FlowUniPC(num_steps=4).shift == 5.0
