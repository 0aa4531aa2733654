"""Folders of Wan2.2's models, in both layouts, and what is loaded of them."""

import dataclasses
import json
import shutil
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import AttentionPlan, DraftConfig, SparsitySchedule
from models.checkpoints.memory_map import CheckpointError
from models.checkpoints.safetensors_io import save_safetensors
from models.diffusion.experts import ResidentExperts, expert_names
from models.diffusion.interfaces import ImageCondition
from models.diffusion.mesh import DeviceMesh
from models.diffusion.transformer.sharded import ShardedTransformer
from models.loading import find_family, load_pipeline
from models.wan.checkpoint import open_wan_parts
from models.wan.loading import describe_wan
from models.wan.pair import SchedulerWarning, named_in, note_named_adapters
from models.wan.sampling import a14b_sampling, ti2v_sampling
from models.wan.vae.config import WanVAEConfig
from tests.cases import mostly_nightly
from tests.wan_folders import FIXTURES, save_pair, save_text_or_image_to_video

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


@pytest.fixture(params=mostly_nightly(("original", "diffusers"), ("original",)))
def pair(request, tmp_path):
    return save_pair(tmp_path / "pair", request.param)


def weights_of(wan, expert):
    """One weight of an expert, by whichever name the layout has for it."""
    weights = wan.weights if expert == "high" else wan.low.weights
    (key,) = (key for key in weights if key.endswith(("0.self_attn.q.weight", KEY)))
    return np.asarray(weights[key])


KEY = "blocks.0.attn1.to_q.weight"


@pytest.mark.filterwarnings("ignore::models.wan.pair.SchedulerWarning")
def test_both_layouts_of_a_pair(pair):
    assert find_family(pair)[0].name == "Wan"
    info = describe_wan(pair)
    assert info.is_pair
    assert info.sampling == a14b_sampling()
    settings = info.sampling
    assert (settings.shift, settings.num_steps) == (12.0, 40)
    assert (settings.guidance, settings.low_guidance) == (4.0, 3.0)
    assert settings.boundary == 875.0
    assert info.sampling_at(480, 832).shift == 12.0
    wan = open_wan_parts(pair, parts=[])
    high, low = (weights_of(wan, expert) for expert in ("high", "low"))
    assert np.abs(high - low).max() > 0.1
    assert {file.parent for file in wan.files}.isdisjoint(
        file.parent for file in wan.low.files
    )


@pytest.mark.filterwarnings("ignore::models.wan.pair.SchedulerWarning")
@pytest.mark.nightly
def test_both_transformers_of_a_pair_are_read_to_a_mesh(tmp_path):
    folder = save_pair(tmp_path / "pair", "diffusers")
    pipeline = load_pipeline(folder, mesh=DeviceMesh())
    assert isinstance(pipeline.experts, ResidentExperts)
    for name in ("high", "low"):
        assert isinstance(pipeline.experts.take(name), ShardedTransformer), name


@pytest.mark.nightly
def test_a_pair_that_starts_from_an_image_needs_no_image_encoder(tmp_path):
    info = describe_wan(save_pair(tmp_path / "i2v", "original", from_image=True))
    assert info.config.takes_image
    assert info.config.image_dim is None
    assert info.sampling == a14b_sampling(task="image")
    assert (info.sampling.shift, info.sampling.guidance) == (5.0, 3.5)
    assert (info.sampling.low_guidance, info.sampling.boundary) == (3.5, 900.0)


@pytest.mark.nightly
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_other_settings_of_a_folder_are_noted(tmp_path, layout):
    folder = save_pair(tmp_path / "pair", layout)
    if layout == "original":
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            describe_wan(folder)
        return
    message = "has a shift of 3; Wan's own code has 12, which is taken"
    with pytest.warns(SchedulerWarning, match=message):
        describe_wan(folder)
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"boundary_ratio": 0.5}))
    with pytest.warns(SchedulerWarning, match=r"boundary_ratio=0.5; 0\.875 is taken"):
        describe_wan(folder)


@pytest.mark.nightly
def test_pairs_that_are_none_are_refused(pair):
    places = {
        side: next(
            pair / name
            for name in (f"{side}_noise_model", second)
            if (pair / name).is_dir()
        )
        for side, second in (("high", "transformer"), ("low", "transformer_2"))
    }
    file = next(places["low"].glob("*.safetensors"))
    content = file.read_bytes()
    file.write_bytes(next(places["high"].glob("*.safetensors")).read_bytes())
    with pytest.raises(CheckpointError, match="for high and low noise are equal"):
        open_wan_parts(pair, parts=[])
    swapped = pytest.raises(CheckpointError, match="names the other: the two are swap")
    elsewhere = pair.parent / "high_noise_model"
    elsewhere.mkdir()
    (elsewhere / file.name).write_bytes(content)
    (pair.parent / "Wan2_2-T2V-A14B_HIGH_fp8.safetensors").write_bytes(content)
    for target in (elsewhere / file.name, next(pair.parent.glob("*.safetensors"))):
        file.unlink()
        file.symlink_to(target)
        with swapped:
            open_wan_parts(pair, parts=[])
    file.unlink()
    file.write_bytes(content)
    config = places["low"] / "config.json"
    stored = json.loads(config.read_text())
    config.write_text(json.dumps(stored | {"_name_or_path": "x/high_noise_model"}))
    with swapped:
        open_wan_parts(pair, parts=[])
    config.write_text(json.dumps(stored | {"eps": 1e-5}))
    with pytest.raises(CheckpointError, match="has other sizes than"):
        open_wan_parts(pair, parts=[])
    shutil.rmtree(places["low"])
    with pytest.raises(CheckpointError, match=r"lacks .*/config\.json \(transformer_2"):
        open_wan_parts(pair, parts=[])


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors", "low"),
        ("Wan2_2-T2V-A14B_HIGH_fp8_e4m3fn.safetensors", "high"),
        ("Wan22-lowNoise.safetensors", "low"),
        ("high_noise_for_low_vram.safetensors", "high"),
        ("high_and_low.safetensors", None),
        ("slow_highlights.safetensors", None),
        ("diffusion_pytorch_model-00001-of-00006.safetensors", None),
    ],
)
def test_names_that_say_one_of_a_pair(name, expert):
    assert named_in(name) == expert


@pytest.mark.parametrize(
    ("given", "noted"),
    [
        ("low:x_high_noise.safetensors", True),
        ("x_HIGH.safetensors", True),
        ("high:x_HIGH.safetensors", False),
        ("x.safetensors", False),
    ],
)
def test_adapters_named_for_the_other_are_noted(given, noted):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        note_named_adapters([(given, 1.0)])
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == noted
    assert all("high:x_" in text for text in texts)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:the adapter .* does not say its alpha")
def test_adapters_are_for_one_expert_or_for_both(pair, tmp_path):
    """By hand: an adapter of rank one adds the outer product of its two vectors."""
    plain = open_wan_parts(pair, parts=[])
    before = {expert: weights_of(plain, expert) for expert in ("high", "low")}
    up, down = np.arange(24.0, dtype=np.float32)[:, None], np.ones((1, 24), np.float32)
    module = f"diffusion_model.{KEY.removesuffix('.weight')}".replace(
        "attn1.to_q", "self_attn.q"
    )
    adapter = {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    (file,) = save_safetensors(adapter, tmp_path / "lora", stem="adapter")
    added = up @ down
    for prefix, changed in (("high:", "high"), ("low:", "low"), ("", "high low")):
        wan = open_wan_parts(pair, parts=[], loras=[(f"{prefix}{file}", 0.5)])
        for expert, weight in before.items():
            expected = weight + 0.5 * added * (expert in changed)
            np.testing.assert_allclose(weights_of(wan, expert), expected, rtol=1e-6)
    one = FIXTURES / "wan_folders" / "diffusers"
    with pytest.raises(
        ValueError, match=r"for one of two transformers, but .* has one"
    ):
        open_wan_parts(one, parts=[], loras=[(f"high:{file}", 1.0)])


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::models.wan.pair.SchedulerWarning")
def test_a_pair_makes_videos(tmp_path):
    pipeline = load_pipeline(save_pair(tmp_path / "pair", "diffusers"))
    assert pipeline.experts.boundary == 875.0
    assert pipeline.fps == 16.0
    settings = dataclasses.replace(
        pipeline.sampling, frames=5, height=32, width=48, num_steps=4
    )
    result = pipeline.generate("a cat", settings)
    assert result.video.shape == (1, 5, 32, 48, 3)
    assert set(expert_names(result.timesteps, 875.0)) == {"high", "low"}
