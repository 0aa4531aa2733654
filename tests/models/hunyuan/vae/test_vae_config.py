"""Sizes of the autoencoder, and published files of them."""

import dataclasses

import pytest

from models.hunyuan.vae.config import HunyuanVAEConfig

# The fields of `vae/config.json` of hunyuanvideo-community/HunyuanVideo.
DIFFUSERS = {
    "_class_name": "AutoencoderKLHunyuanVideo",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["HunyuanVideoDownBlock3D"] * 4,
    "in_channels": 3,
    "latent_channels": 16,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "scaling_factor": 0.476986,
    "spatial_compression_ratio": 8,
    "temporal_compression_ratio": 4,
    "up_block_types": ["HunyuanVideoUpBlock3D"] * 4,
}
# Of the original, which names a ratio and the blocks otherwise.
ORIGINAL = {
    "_class_name": "AutoencoderKLCausal3D",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlockCausal3D"] * 4,
    "in_channels": 3,
    "latent_channels": 16,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 256,
    "sample_tsize": 64,
    "scaling_factor": 0.476986,
    "time_compression_ratio": 4,
    "up_block_types": ["UpDecoderBlockCausal3D"] * 4,
}


@pytest.mark.parametrize(
    "published", [DIFFUSERS, ORIGINAL], ids=["diffusers", "original"]
)
def test_the_published_files_are_the_preset(published):
    assert HunyuanVAEConfig.from_dict(published) == HunyuanVAEConfig.video()
    narrow = HunyuanVAEConfig.from_dict(published, dtype="bfloat16")
    assert narrow == HunyuanVAEConfig.video(dtype="bfloat16")


def test_the_preset():
    config = HunyuanVAEConfig.video()
    assert config.stride == (4, 8, 8)
    assert config.temporal_steps == (False, True, True)
    assert config.latent_shape(frames=129, height=768, width=1280) == (33, 96, 160, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "relu"}, "only the autoencoder of HunyuanVideo.*act_fn"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention"),
        ({"up_block_types": ["Other"]}, "up_block_types"),
        ({"patch_size": 2}, r"unknown=\['patch_size'\] and missing=\[\]"),
    ],
    ids=str,
)
def test_other_models_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        HunyuanVAEConfig.from_dict(DIFFUSERS | changes)


def test_every_missing_field_is_named():
    with pytest.raises(ValueError, match=r"'block_out_channels', 'latent_channels'"):
        HunyuanVAEConfig.from_dict({"_class_name": "AutoencoderKLHunyuanVideo"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_channels": 0}, "latent_channels=0 must be a positive integer"),
        ({"block_out_channels": ()}, r"block_out_channels=\(\) must be"),
        ({"block_out_channels": (16, 32, 32, 32)}, "multiples of norm_num_groups=32"),
        ({"spatial_compression_ratio": 4}, "must be 8"),
        ({"temporal_compression_ratio": 3}, "=3 must be a power of two up to 8"),
        ({"temporal_compression_ratio": 16}, "=16 must be a power of two up to 8"),
        ({"scaling_factor": 0.0}, "must be positive"),
        ({"dtype": "float64"}, "dtype='float64' must be one of"),
        ({"convolution": "4d"}, r"'4d' must be one of \('3d', '2d'\)"),
    ],
    ids=str,
)
def test_bad_sizes_are_named(changes, message, without_jaxtyping):
    values = dataclasses.asdict(HunyuanVAEConfig.video()) | changes
    with pytest.raises(ValueError, match=message):
        HunyuanVAEConfig(**values)
