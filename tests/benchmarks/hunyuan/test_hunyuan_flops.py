"""The arithmetic by formula against what JAX traces and what XLA counts."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from benchmarks.hunyuan import run as hunyuan
from benchmarks.hunyuan.account import flops_outside_attention
from models.hunyuan import layers
from models.hunyuan.inputs import HunyuanInputs
from models.hunyuan.transformer import HunyuanTransformer

LATENT = (3, 8, 12, 16)
VIDEO_TOKENS = 3 * 4 * 6


def products(jaxpr) -> float:
    """Arithmetic of all products of a traced program; of a loop, all its turns."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            sizes = equation.invars[0].aval.shape
            inner = math.prod(sizes[axis] for axis in contracted)
            total += 2.0 * inner * math.prod(equation.outvars[0].aval.shape)
        turns = equation.params["length"] if equation.primitive.name == "scan" else 1
        assert equation.primitive.name not in ("while", "cond")
        total += turns * sum(map(products, jaxprs_in_params(equation.params)))
    return total


@pytest.fixture
def no_attention(monkeypatch):
    """Self-attention adds its inputs: none is dead code, and no product is left."""

    def add(q, k, v, *, mask, **_):
        return q + k + v, mask

    monkeypatch.setattr(layers, "self_attention", add)


def trace(config):
    """One call of a model, without its attention."""
    model = nnx.eval_shape(lambda: HunyuanTransformer(config, rngs=nnx.Rngs(0)))
    structure, state = nnx.split(model)
    inputs = HunyuanInputs(
        latents=jnp.zeros((1, *LATENT)),
        timesteps=jnp.zeros(1),
        context=jnp.zeros((1, config.text_length, config.text_dim)),
        context_mask=jnp.ones((1, config.text_length), bool),
        pooled=jnp.zeros((1, config.pooled_dim)),
        guidance=jnp.zeros(1) if config.guidance_embeds else None,
    )
    return jax.jit(lambda state: nnx.merge(structure, state)(inputs)[0]).trace(state)


CONFIGS = {
    "tiny": hunyuan.TINY,
    "not told of guidance": dataclasses.replace(hunyuan.TINY, guidance_embeds=False),
    "other sizes": dataclasses.replace(
        hunyuan.TINY, num_refiner_blocks=3, mlp_ratio=3.0, pooled_dim=5, text_dim=7
    ),
}


@pytest.mark.usefixtures("no_attention")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_formula_counts_every_product(config):
    parts = flops_outside_attention(config, VIDEO_TOKENS)
    traced = products(trace(config).jaxpr.jaxpr)
    # Rows of text go through the video's output layer, too, and are thrown away.
    unused = config.num_double_blocks * 2.0 * config.text_length * config.dim**2
    np.testing.assert_allclose(sum(parts.values()) + unused, traced, rtol=1e-12)


@pytest.mark.usefixtures("no_attention")
def test_xla_counts_little_more():
    """It counts norms, gates and activations too, and a loop's turns once."""
    config = dataclasses.replace(
        hunyuan.TINY,
        dim=256,
        rope_channels=(32, 48, 48),
        num_double_blocks=1,
        num_single_blocks=1,
        text_dim=64,
    )
    parts = flops_outside_attention(config, VIDEO_TOKENS)
    counted = trace(config).lower().cost_analysis()["flops"]
    assert 1.0 < counted / sum(parts.values()) < 1.1
