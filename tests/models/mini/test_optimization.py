"""AdamW and Muon against NumPy, on a few small parameters."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.mini.muon import orthogonalize
from models.mini.optimization import (
    OptimizerConfig,
    load_state,
    make_optimizer,
    optimizer_kinds,
    save_state,
)

SHAPES = {
    "blocks": {
        "to_q": {"kernel": (2, 8, 8), "bias": (2, 8)},
        "linear_1": {"kernel": (2, 8, 20), "bias": (2, 20)},
        "linear_2": {"kernel": (2, 20, 8)},
        "table": (2, 6, 8),
    },
    "head": {"kernel": (8, 5), "bias": (5,)},
    "words": {"embedding": (7, 8)},
}
MATRICES = ("to_q", "linear_1", "linear_2")  # kernels of blocks


def is_shape(x) -> bool:
    return isinstance(x, tuple)


def normal(seed: int):
    """Values for all parameters; the kernels of `linear_1` have far larger ones."""
    rng = np.random.default_rng(seed)
    made = jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32),
        SHAPES,
        is_leaf=is_shape,
    )
    made["blocks"]["linear_1"]["kernel"] *= 1e3
    return made


def last_update(config, gradients):
    """Returns the update of the last step; the parameters stay what they are."""
    optimizer, parameters = make_optimizer(config), normal(0)
    state, update = optimizer.init(parameters), jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, parameters)
    return jax.device_get(updates)


def clipped(gradient, most):
    norm = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(gradient)))
    return jax.tree.map(lambda x: x * min(1.0, most / norm), gradient)


def adamw(gradients, config):
    """The updates of AdamW at the last step, in NumPy."""
    b1, b2 = config.betas
    first = second = jax.tree.map(np.zeros_like, gradients[0])
    for gradient in gradients:
        g = clipped(gradient, config.clip)
        first = jax.tree.map(lambda m, x: b1 * m + (1 - b1) * x, first, g)
        second = jax.tree.map(lambda v, x: b2 * v + (1 - b2) * x * x, second, g)
    n = len(gradients)

    def update(path, m, v, value):
        decay = config.weight_decay if "kernel" in str(path) else 0.0
        m, v = m / (1 - b1**n), v / (1 - b2**n)
        return m / (np.sqrt(v) + 1e-8) + decay * value

    return jax.tree_util.tree_map_with_path(update, first, second, normal(0))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_adamw_equals_numpy(kind):
    config = OptimizerConfig(kind=kind, weight_decay=0.1, clip=20.0)
    gradients = [normal(seed) for seed in (1, 2, 3)]
    expected = adamw(gradients, config)
    got = last_update(config, gradients)
    if kind == "muon":  # all but the kernels of blocks
        for name in MATRICES:
            del got["blocks"][name]["kernel"], expected["blocks"][name]["kernel"]
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-6)


def test_muon_steps_along_the_polar_factor_of_the_momentum():
    config = OptimizerConfig(kind="muon", weight_decay=0.1, momentum=0.8, clip=20.0)
    gradients = [normal(seed) for seed in (1, 2, 3)]
    first, second, third = (clipped(g, config.clip) for g in gradients)
    got = last_update(config, gradients)
    for name in MATRICES:
        # Nesterov's momentum looks one step ahead.
        g1, g2, g3 = (g["blocks"][name]["kernel"] for g in (first, second, third))
        momentum = g3 + 0.8 * (g3 + 0.8 * (g2 + 0.8 * g1))
        value = normal(0)["blocks"][name]["kernel"]
        update = got["blocks"][name]["kernel"] - 0.1 * value
        u, _, v = np.linalg.svd(momentum, full_matrices=False)
        scaled = update / (0.2 * np.sqrt(max(update.shape[-2:])))
        core = u.swapaxes(1, 2) @ scaled @ v.swapaxes(1, 2)
        values = np.diagonal(core, axis1=1, axis2=2)
        assert values.min() > 0.65, name
        assert values.max() < 1.25, name
        # Nothing lies outside the singular vectors.
        np.testing.assert_allclose(scaled, (u * values[:, None]) @ v, atol=2e-3)


def test_zeros_stay_zeros():
    matrices = jnp.zeros((2, 3, 4)).at[0].set(1.0)
    got = jax.jit(orthogonalize)(matrices)
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got[1], 0.0)


def test_muon_without_blocks_is_refused():
    with pytest.raises(ValueError, match="use kind='adamw'"):
        optimizer_kinds({"layer": {"kernel": jnp.ones((2, 2))}})


def test_state_of_muon_is_stored(tmp_path):
    optimizer, parameters = make_optimizer(OptimizerConfig(kind="muon")), normal(0)
    start = optimizer.init(parameters)
    _, state = jax.jit(optimizer.update)(normal(1), start, parameters)
    save_state(tmp_path, state, {"steps": 1})
    loaded, progress = load_state(tmp_path, start)
    chex.assert_trees_all_equal(loaded, state, strict=True)
    assert progress == {"steps": 1}
    with pytest.raises(ValueError, match="belongs to another configuration"):
        load_state(tmp_path, make_optimizer(OptimizerConfig()).init(parameters))
