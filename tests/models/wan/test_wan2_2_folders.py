"""Folders of Wan2.2's models, in both layouts, and what is loaded of them."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import AttentionPlan, DraftConfig, SparsitySchedule
from models.diffusion.interfaces import ImageCondition
from models.loading import load_pipeline
from models.wan.loading import describe_wan
from models.wan.sampling import ti2v_sampling
from models.wan.vae.config import WanVAEConfig
from tests.wan_folders import FIXTURES, save_text_or_image_to_video

ORIGINAL = FIXTURES / "wan_folders" / "original"


def make_original(folder):
    """The original layout of the 5B model, whose tensors are those of another."""
    shutil.copytree(ORIGINAL, folder)
    tokenizer = folder / "google" / "umt5-xxl"
    shutil.copytree(FIXTURES / "wan_folders" / "diffusers" / "tokenizer", tokenizer)
    (folder / "Wan2.1_VAE.pth").rename(folder / "Wan2.2_VAE.pth")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "ti2v"}))
    return folder


def test_the_original_layout_of_the_5b_model(tmp_path):
    info = describe_wan(make_original(tmp_path / "5b"))
    assert info.config.holds_first_frame
    assert info.codec == WanVAEConfig.wan2_2()
    assert info.sampling == ti2v_sampling()
    settings = info.sampling
    assert (settings.frames, settings.height, settings.width) == (121, 704, 1280)
    assert (settings.num_steps, settings.shift, settings.guidance) == (50, 5.0, 5.0)
    assert info.sampling_at(1280, 704).shift == 5.0
    assert info.conditioning.side_multiples(info.codec) == (32, 32)
    for given in (True, False):
        info.conditioning.check_image(given=given)


@pytest.mark.nightly
def test_the_diffusers_layout_of_the_5b_model(tmp_path):
    """An image stays the first latent frame; without one the frame is made."""
    pipeline = load_pipeline(save_text_or_image_to_video(tmp_path / "5b"))
    assert pipeline.model.config.holds_first_frame
    assert pipeline.codec.stride == (4, 16, 16)
    assert pipeline.sampling == ti2v_sampling(shift=3.0, grid="diffusers")
    assert pipeline.fps == 24.0
    settings = dataclasses.replace(
        pipeline.sampling, frames=5, height=64, width=96, num_steps=3
    )
    image = np.linspace(-1, 1, 64 * 96 * 3, dtype=np.float32).reshape(64, 96, 3)
    first = pipeline.codec.encode(jnp.asarray(image[None, None]))
    plan = AttentionPlan.draft(
        DraftConfig(sparsity=0.5), SparsitySchedule(dense_fraction=0.34)
    )
    for attention in (AttentionPlan.dense(), plan):
        result = pipeline.generate("a cat", settings, image=image, attention=attention)
        np.testing.assert_allclose(result.latents[:, :1], first, rtol=0, atol=1e-6)
        assert np.abs(result.latents[:, 1:] - first).max() > 0.1
    free = pipeline.generate("a cat", settings)
    assert np.abs(free.latents[:, :1] - first).max() > 0.1
    wrong = ImageCondition(jnp.zeros((1, 2, 4, 6, 4)), None)
    with pytest.raises(ValueError, match=r"expected 1 or 1 of shape \(1, 4, 6, 4\)"):
        pipeline.generate("a cat", settings, image=wrong)
