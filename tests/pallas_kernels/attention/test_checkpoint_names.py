"""Policies of `jax.checkpoint` by name keep what gradients need of the forward pass."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from draft_jax import BlockMask, VideoGrid
from pallas_kernels import RESIDUAL_NAMES, block_sparse_attention_with_lse

GRID = VideoGrid(1, 4, 8, tile=(2, 4))


def attend(q, k, v):
    mask = BlockMask.full(grid=GRID, batch=1, num_heads=1)
    options = {"grid": GRID, "order": "raster", "backend": "xla"}
    return block_sparse_attention_with_lse(q, k, v, mask, **options)


def count(jaxpr, name):
    """Operations of a name in a program, those of inner ones too."""
    return sum(
        (equation.primitive.name == name)
        + sum(count(inner, name) for inner in jaxprs_in_params(equation.params))
        for equation in jaxpr.eqns
    )


NAMED = jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES)


@pytest.mark.parametrize(
    ("policy", "runs"), [(NAMED, 1), (None, 2)], ids=["named", "nothing"]
)
def test_forward_pass_runs_once(policy, runs):
    """Only the forward pass takes a logarithm: that of its sums, at the end."""

    @functools.partial(jax.checkpoint, policy=policy)
    def layer(x, w):
        q, k, v = (jnp.tanh(x * scale) for scale in w)
        out, lse = attend(q, k, v)
        return jnp.sin(out).sum() + jnp.sin(lse).sum()

    x = jnp.ones((1, GRID.num_tokens, 1, 8))
    gradient = jax.value_and_grad(layer, argnums=(0, 1))
    jaxpr = jax.make_jaxpr(gradient)(x, jnp.ones(3)).jaxpr
    assert count(jaxpr, "log") == runs
