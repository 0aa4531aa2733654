"""A view of HunyuanVideo's attention: text in the sequence, its padding left out."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from draft_jax import AttentionPlan, DraftConfig
from models.diffusion.inspection import inspect_attention
from models.diffusion.interfaces import TextContext
from models.diffusion.pipeline import VideoPipeline
from models.hunyuan.transformer import HunyuanTransformer
from tests.models.hunyuan.test_bad_input import (
    CONFIG,
    POOLED,
    SAMPLING,
    TEXT,
    WIDTH,
    NoCodec,
)

VALID = 5  # of the text's tokens


class Encoder:
    """Contexts of random numbers, for any prompt."""

    def encode(self, prompts):
        rng = np.random.default_rng(0)
        rows = len(prompts)
        return TextContext(
            jnp.asarray(rng.normal(size=(rows, TEXT, WIDTH)), jnp.float32),
            jnp.full(rows, VALID, jnp.int32),
            pooled=jnp.asarray(rng.normal(size=(rows, POOLED)), jnp.float32),
        )


@pytest.fixture(scope="module")
def pipeline():
    model = HunyuanTransformer(CONFIG, rngs=nnx.Rngs(0))
    return VideoPipeline(model, Encoder(), NoCodec())


@pytest.mark.nightly
def test_shares_of_the_text(pipeline):
    """Against NumPy, for what the model captures of the first step."""
    attention = AttentionPlan.draft(DraftConfig.paper(sparsity=0.0))
    sampling = dataclasses.replace(SAMPLING, num_steps=1)
    view = inspect_attention(pipeline, "a ball", sampling, step=0, attention=attention)
    np.testing.assert_allclose(view.kept_mass, 1.0, rtol=1e-6)
    sampler, state, inputs = pipeline.start("a ball", sampling, attention=attention)
    model, grid = sampler.model, view.grid
    assert grid.text_length == TEXT
    given = model.step_inputs(
        state.latents,
        sampler.solver.timesteps[0],
        inputs.context,
        inputs.image,
        inputs.embedded_guidance,
    )
    q, k = model.capture_qk(
        given, attention=attention, step=sampler.step_plan(0), masks=state.masks
    )
    num_visual = grid.num_visual_tokens
    q, k = (np.float64(x)[:, 0, : num_visual + VALID] for x in (q, k))
    weights = np.exp(np.einsum("lqnd,lknd->lnqk", q, k) / np.sqrt(q.shape[-1]))
    weights /= weights.sum(-1, keepdims=True)
    on_text = weights[:, :, :num_visual, num_visual:].sum(-1)
    ends = np.cumsum(grid.block_lengths[grid.visual_blocks])
    expected = np.stack(
        [part.mean(-1) for part in np.split(on_text, ends[:-1], axis=-1)], axis=-1
    )
    np.testing.assert_allclose(view.text_share, expected, rtol=1e-4)
    of_text = weights[:, :, num_visual:].sum(-2)
    np.testing.assert_allclose(
        view.text_masses.sum((-1, -2)), np.full(of_text.shape[:2], VALID), rtol=1e-5
    )
    first_tile = of_text[..., : ends[0]].sum(-1)
    np.testing.assert_allclose(view.text_masses[..., 0].sum(-1), first_tile, rtol=1e-4)
