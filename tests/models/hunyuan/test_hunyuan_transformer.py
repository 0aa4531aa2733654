"""What the transformer promises beside parity: guidance, captured layers, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from draft_jax import AttentionPlan, Compensation, DraftConfig
from models.hunyuan.config import HunyuanConfig
from models.hunyuan.convert import load_hunyuan_transformer
from models.hunyuan.embeddings import guidance_level
from tests.published_hunyuan import config_of, inputs_of, load_published


def make_model():
    weights = load_published("divided")["diffusers"]
    return load_hunyuan_transformer(weights, config_of("divided"))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("scale", "level"), [(6.0, 6016), (7.0, 7008), (5.0, 4992), (1.0, 1000)]
)
def test_guidance_is_rounded_as_published(scale, level, compiled):
    """Products of bfloat16 in torch: see HunyuanVideo's pipeline."""
    config = HunyuanConfig.video_13b()
    run = jax.jit(guidance_level, static_argnums=1) if compiled else guidance_level
    assert run(jnp.float32(scale), config) == level
    plain = HunyuanConfig.video_13b(guidance_rounding="none")
    assert run(jnp.float32(scale), plain) == 1000 * scale


@pytest.mark.nightly
def test_captured_layers_are_those_of_both_stacks():
    model, inputs = make_model(), inputs_of("divided")
    q, k = nnx.jit(lambda model, inputs: model.capture_qk(inputs))(model, inputs)
    grid = model.grid(inputs.latents.shape)
    assert q.shape == k.shape == (5, 2, grid.num_tokens, 2, 12)
    assert len({float(jnp.abs(layer).sum()) for layer in q}) == 5


@pytest.mark.nightly
def test_means_of_single_tokens_give_the_dense_velocity():
    """Nothing is left out then, beside text of ragged lengths."""
    model, inputs = make_model(), inputs_of("divided")
    config = DraftConfig.paper(
        sparsity=0.7,
        draft_tile=(1, 2),
        compensation=Compensation(sub_tile=(1, 1), frames=1),
        ranking="spread",
    )
    run = nnx.jit(
        lambda model, inputs, attention: model(inputs, attention=attention)[0],
        static_argnums=2,
    )
    got = run(model, inputs, AttentionPlan.draft(config))
    expected = run(model, inputs, AttentionPlan.dense())
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.nightly
def test_gradients_with_blocks_that_are_recomputed():
    structure, parameters = nnx.split(make_model())

    def loss(parameters, remat):
        velocity, _ = nnx.merge(structure, parameters)(
            inputs_of("divided"), remat=remat
        )
        return jnp.square(velocity).mean()

    got, expected = (
        jax.jit(jax.grad(loss), static_argnums=1)(parameters, remat)
        for remat in (True, False)
    )
    for ours, theirs in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        scale = max(1.0, float(jnp.abs(theirs).max()))
        np.testing.assert_allclose(ours / scale, theirs / scale, rtol=0, atol=1e-5)
        assert np.isfinite(theirs).all()
