"""Sizes of HunyuanVideo, and what a published config.json may say."""

import dataclasses

import pytest

from models.hunyuan.config import HunyuanConfig

# The transformer/config.json of hunyuanvideo-community/HunyuanVideo.
DIFFUSERS = {
    "_class_name": "HunyuanVideoTransformer3DModel",
    "_diffusers_version": "0.32.0.dev0",
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 16,
    "mlp_ratio": 4.0,
    "num_attention_heads": 24,
    "num_layers": 20,
    "num_refiner_layers": 2,
    "num_single_layers": 40,
    "out_channels": 16,
    "patch_size": 2,
    "patch_size_t": 1,
    "pooled_projection_dim": 768,
    "qk_norm": "rms_norm",
    "rope_axes_dim": [16, 56, 56],
    "rope_theta": 256.0,
    "text_embed_dim": 4096,
}


@pytest.mark.parametrize("newer", [{}, {"image_condition_type": None}], ids=str)
def test_the_published_file_gives_the_preset(newer):
    config = HunyuanConfig.from_dict(DIFFUSERS | newer)
    assert config == HunyuanConfig.video_13b()
    assert (config.dim, config.head_dim, config.mlp_dim) == (3072, 128, 12288)
    assert config.num_layers == 60


def test_the_written_file_is_the_published_one():
    written = HunyuanConfig.video_13b().to_dict()
    expected = DIFFUSERS | {"image_condition_type": None}
    del expected["_diffusers_version"]
    assert written == expected
    assert HunyuanConfig.from_dict(written) == HunyuanConfig.video_13b()


def test_custom_embeds_no_guidance_and_has_the_tokens_of_an_image():
    config = HunyuanConfig.custom_13b()
    assert (config.guidance_embeds, config.reference_frames) == (False, 1)
    assert config.text_length == 831
    same = {"guidance_embeds": True, "reference_frames": 0, "text_length": 256}
    assert dataclasses.replace(config, **same) == HunyuanConfig.video_13b()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_condition_type": "token_replace"}, "from an image are not supported"),
        ({"qk_norm": None}, "qk_norm=None must be 'rms_norm'"),
        ({"vace_layers": [0]}, "unknown=.'vace_layers'."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_files_of_other_models_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        HunyuanConfig.from_dict(DIFFUSERS | changes)


def test_missing_keys_are_named():
    with pytest.raises(
        ValueError, match=r"missing=.'attention_head_dim', 'num_layers'"
    ):
        HunyuanConfig.from_dict({"num_attention_heads": 24})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 3000}, "must be even numbers whose sum"),
        ({"dim": 3071}, "must be a multiple of"),
        ({"rope_channels": (15, 57, 56)}, "must be even numbers"),
        ({"freq_dim": 3}, "must be even"),
        ({"guidance_rounding": "float16"}, "must be one of"),
        ({"reference_frames": 2}, "must be 0 or 1"),
        ({"mlp_ratio": 0.0}, "mlp_ratio=0.0 must be greater than 0"),
        ({"num_single_blocks": 0}, "num_single_blocks=0 must be a positive integer"),
        ({"tile": (0, 16)}, "must be a tuple of 2 positive integers"),
        ({"dtype": "float8"}, "must be one of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        HunyuanConfig.video_13b(**changes)


def test_patches_that_diffusers_cannot_say_are_not_written():
    with pytest.raises(ValueError, match="must be square"):
        HunyuanConfig.video_13b(patch_size=(1, 2, 3)).to_dict()
