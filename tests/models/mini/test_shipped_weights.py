"""The weights in the repository: they load, and they are a trained model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from draft_jax import AttentionPlan, DraftConfig
from models.diffusion.caches import MagCache
from models.diffusion.calibration import measure_ratios
from models.diffusion.sampling import Sampling
from models.media.metrics import psnr
from models.mini.captions import SAMPLE_PROMPTS
from models.mini.checkpoint import RATIOS, SHIPPED, MiniCheckpoint, MiniTextEncoder
from models.mini.family import describe_mini
from models.mini.pipeline import load_mini, pipeline_of
from models.mini.samples import draw_sheet
from models.mini.scenes import all_captions
from models.mini.text import Vocabulary
from models.wan.config import WanConfig


@pytest.fixture(scope="module")
def shipped() -> MiniCheckpoint:
    return MiniCheckpoint.load(dtype="float32")


def test_files_fit_in_the_repository():
    sizes = {file.name: file.stat().st_size for file in SHIPPED.iterdir()}
    assert sum(sizes.values()) <= 45_000_000
    assert max(sizes.values()) < 16 * 2**20


def test_parameters(shipped):
    modules = (shipped.transformer, shipped.text_embedding)
    leaves = [leaf for part in modules for leaf in jax.tree.leaves(nnx.state(part))]
    assert 10e6 < sum(leaf.size for leaf in leaves) < 30e6
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert shipped.transformer.config == WanConfig.mini(dtype="float32")


def test_ratios_are_of_the_settings_that_generate_takes():
    info = describe_mini()
    ratios = info.mag_ratios(info.sampling, from_image=False)
    assert ratios.num_steps == info.sampling.num_steps
    assert ratios.num_layers == WanConfig.mini().num_layers
    solver = info.sampling.make_solver()
    assert (
        MagCache(ratios=ratios).notes(solver, AttentionPlan.draft(DraftConfig())) == []
    )


@pytest.mark.nightly
def test_ratios_are_of_the_weights():
    """Another prompt moves a ratio by 1e-2, other weights by more."""
    info = describe_mini()
    stored = info.mag_ratios(info.sampling, from_image=False)
    prompt = json.loads((SHIPPED / RATIOS).read_text())["prompt"]
    measured = measure_ratios(
        load_mini(),
        prompt,
        model="shipped",
        attention=AttentionPlan.draft(DraftConfig()),
    )
    np.testing.assert_allclose(measured.values, stored.values, atol=1e-3)


def test_a_video_of_the_shipped_size_has_13_latent_frames(shipped):
    pipeline = pipeline_of(shipped)
    assert (pipeline.sampling.frames, describe_mini().sampling.frames) == (25, 25)
    assert pipeline.latent_shape(pipeline.sampling) == (13, 24, 32, 16)


@pytest.mark.nightly
def test_codec_restores_a_picture(shipped):
    """A red disc over a grey slope, with an edge that is sharp."""
    y, x = np.mgrid[:96, :128] / 96
    disc = np.hypot(y - 0.5, x - 0.6)[..., None] < 0.25
    picture = np.where(disc, [0.85, 0.15, 0.12], 0.3 + 0.4 * y[..., None])
    video = np.broadcast_to(2 * picture - 1, (1, 5, 96, 128, 3)).astype(np.float32)
    latents = shipped.codec.encode(video)
    restored = np.asarray(shipped.codec.decode(latents))
    assert psnr(restored[0] / 2 + 0.5, video[0] / 2 + 0.5) > 28.0
    assert 0.3 < float(jnp.std(latents)) < 3.0


def test_vocabulary_is_of_the_scenes(shipped):
    assert shipped.vocabulary == Vocabulary.from_captions(all_captions(), max_length=32)
    encoder = MiniTextEncoder(shipped.vocabulary, shipped.text_embedding)
    for prompt in SAMPLE_PROMPTS:
        assert not encoder.unknown_words(prompt)


@pytest.mark.nightly
def test_samples_follow_the_prompt(shipped, tmp_path):
    """Three latent frames in four steps: enough for the colours of a background."""
    prompts = ["waves roll over the blue sea", "a red brick wall"]
    sampling = Sampling(frames=5, height=96, width=128, num_steps=4)
    videos = pipeline_of(shipped).generate(prompts, sampling).video
    sea, wall = videos.mean((1, 2, 3))  # mean colours
    assert sea[2] > sea[0] + 0.1
    assert wall[0] > wall[2] + 0.1
    assert videos.std((1, 2, 3, 4)).min() > 0.05
    upper, lower = videos[0][:, :30].mean(), videos[0][:, 60:].mean()
    assert upper > lower + 0.1  # the sky is lighter than the sea
    draw_sheet(tmp_path / "sheet.png", prompts, videos)
    assert (tmp_path / "sheet.png").stat().st_size > 1000
