"""Whole loops against diffusers; see tests/fixtures/make_scheduler_fixtures."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from models.diffusion.schedulers import FlowEuler, FlowUniPC
from tests import tolerances
from tests.cases import mostly_nightly

FIXTURES = Path(__file__).parents[2] / "fixtures"
TENSORS = safetensors.numpy.load_file(FIXTURES / "schedulers.safetensors")
CASES = sorted({key.split("/")[0] for key in TENSORS if "/" in key})
UNIPC_CASES = [case for case in CASES if case.startswith("unipc")]
QUICK = ("euler_linear_3_5", "unipc_wan_20_5")  # the second fits UNIPC_CASES, too


def velocity(sample, timestep):
    """The formula of the fixture script, once more."""
    return (
        jnp.sin(2.0 * sample + timestep / 300.0)
        + 0.5 * (timestep / 1000.0) * jnp.tanh(sample[..., ::-1])
        - 0.2
    )


def make_solver(case):
    name, grid, steps, shift = case.split("_")
    solver = {"euler": FlowEuler, "unipc": FlowUniPC}[name]
    return solver(num_steps=int(steps), shift=float(shift), grid=grid)


def run_loop(solver, noise, step=None):
    """The sample before every step and after the last, in the dtype of `noise`."""
    if step is None:
        step = jax.jit(step_of(solver))
    sample = jnp.asarray(noise)
    history, samples = solver.initial_history(sample), [np.asarray(sample)]
    for index, timestep in enumerate(solver.timesteps):
        coefficients = jax.tree.map(
            lambda value: jnp.asarray(value, noise.dtype), solver.coefficients(index)
        )
        timestep = jnp.asarray(timestep, noise.dtype)
        sample, history = step(sample, timestep, history, coefficients)
        samples.append(np.asarray(sample))
    return np.stack(samples)


def step_of(solver):
    def step(sample, timestep, history, coefficients):
        return solver.update(sample, velocity(sample, timestep), history, coefficients)

    return step


def test_there_are_fixtures():
    assert len(CASES) == 37
    assert len(UNIPC_CASES) == 18


def hunyuan_loop(num_steps, shift, noise):
    """Levels, timesteps and samples of the original's formulas, in its float32."""
    one, shift = np.float32(1), np.float32(shift)
    levels = np.linspace(1, 0, num_steps + 1, dtype=np.float32)
    levels = (shift * levels) / (one + (shift - one) * levels)
    timesteps = levels[:-1] * np.float32(1000)
    samples = [noise]
    for index, timestep in enumerate(timesteps):
        x = samples[-1]
        wave = np.sin(np.float32(2) * x + timestep / np.float32(300))
        pull = np.float32(0.5) * (timestep / np.float32(1000)) * np.tanh(x[..., ::-1])
        velocity = wave + pull - np.float32(0.2)
        samples.append(x + velocity * (levels[index + 1] - levels[index]))
    return levels, timesteps, np.stack(samples)


@pytest.mark.parametrize(
    ("num_steps", "shift"), [(50, 7.0), (30, 13.0)], ids=["hunyuan", "hunyuan-custom"]
)
def test_loop_matches_the_original_formulas_of_hunyuan(num_steps, shift):
    levels, timesteps, samples = hunyuan_loop(num_steps, shift, TENSORS["noise"])
    assert samples.dtype == np.float32
    solver = FlowEuler(num_steps=num_steps, shift=shift)  # the default grid
    np.testing.assert_allclose(solver.sigmas, levels, rtol=0, atol=2e-7)
    np.testing.assert_allclose(solver.timesteps, timesteps, rtol=0, atol=2e-4)
    got = run_loop(solver, TENSORS["noise"])
    np.testing.assert_allclose(got, samples, **tolerances.SCHEDULER_LOOP)


@pytest.mark.parametrize("case", CASES)
def test_noise_levels_match(case):
    solver = make_solver(case)
    sigmas, timesteps = TENSORS[f"{case}/sigmas"], TENSORS[f"{case}/timesteps"]
    if case in UNIPC_CASES:
        np.testing.assert_array_equal(solver.sigmas, sigmas)
        np.testing.assert_array_equal(solver.timesteps, timesteps)
    else:  # ours are not rounded to float32
        np.testing.assert_allclose(solver.sigmas, sigmas, rtol=0, atol=2e-7)
        np.testing.assert_allclose(solver.timesteps, timesteps, rtol=0, atol=2e-4)


@pytest.mark.parametrize("case", mostly_nightly(CASES, QUICK))
def test_loop_matches(case):
    got = run_loop(make_solver(case), TENSORS["noise"])
    assert got.dtype == np.float32
    expected = TENSORS[f"{case}/float32"]
    np.testing.assert_allclose(got, expected, **tolerances.SCHEDULER_LOOP)


@pytest.mark.parametrize("case", mostly_nightly(UNIPC_CASES, QUICK[1:]))
def test_loop_matches_in_double_precision(case):
    with jax.enable_x64(True):
        got = run_loop(make_solver(case), TENSORS["noise"].astype(np.float64))
    assert got.dtype == np.float64
    expected = TENSORS[f"{case}/float64"]
    np.testing.assert_allclose(got, expected, **tolerances.SCHEDULER_LOOP_FLOAT64)


@pytest.mark.parametrize("solver", [FlowEuler, FlowUniPC])
def test_one_compilation_serves_all_steps_and_grids(solver):
    solvers = [solver(num_steps=n, shift=3.0) for n in (1, 2, 7)]
    solvers.append(solver(num_steps=7, shift=5.0, grid="diffusers"))
    traces = []

    @jax.jit
    def step(*arguments):
        traces.append(arguments)
        return step_of(solvers[0])(*arguments)

    noise = TENSORS["noise"]
    shared = [run_loop(each, noise, step) for each in solvers]
    assert len(traces) == 1
    own = [run_loop(each, noise) for each in solvers]
    for one, other in zip(shared, own, strict=True):
        np.testing.assert_array_equal(one, other)
