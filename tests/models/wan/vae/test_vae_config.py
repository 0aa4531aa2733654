"""Sizes of the autoencoder, and a published file of them."""

import dataclasses

import pytest

from models.wan.vae.config import WanVAEConfig

# The fields of `vae/config.json` of Wan-AI/Wan2.1-T2V-1.3B-Diffusers.
PUBLISHED = {
    "_class_name": "AutoencoderKLWan",
    "_diffusers_version": "0.33.0.dev0",
    "attn_scales": [],
    "base_dim": 96,
    "dim_mult": [1, 2, 4, 4],
    "dropout": 0.0,
    "latents_mean": list(WanVAEConfig.wan2_1().latents_mean),
    "latents_std": list(WanVAEConfig.wan2_1().latents_std),
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "z_dim": 16,
}
# What `vae/config.json` of Wan-AI/Wan2.2-TI2V-5B-Diffusers has in other values.
OF_WAN2_2 = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "in_channels": 12,
    "is_residual": True,
    "latents_mean": list(WanVAEConfig.wan2_2().latents_mean),
    "latents_std": list(WanVAEConfig.wan2_2().latents_std),
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "scale_factor_temporal": 4,
    "z_dim": 48,
}


def test_the_published_file_is_the_preset():
    assert WanVAEConfig.from_dict(PUBLISHED) == WanVAEConfig.wan2_1()
    narrow = WanVAEConfig.from_dict(PUBLISHED, dtype="bfloat16")
    assert narrow == WanVAEConfig.wan2_1(dtype="bfloat16")
    assert WanVAEConfig.from_dict(PUBLISHED | OF_WAN2_2) == WanVAEConfig.wan2_2()
    other = WanVAEConfig.from_dict(PUBLISHED | OF_WAN2_2, convolution="3d")
    assert other == WanVAEConfig.wan2_2(convolution="3d")


def test_the_preset():
    config = WanVAEConfig.wan2_1()
    assert config.stride == (4, 8, 8)
    assert config.channels == (96, 192, 384, 384)
    assert len(config.latents_mean) == len(config.latents_std) == 16
    # First and last of the values in Wan2.1's wan/modules/vae.py.
    assert config.latents_mean[0] == -0.7571
    assert config.latents_mean[-1] == -0.2921
    assert config.latents_std[0] == 2.8184
    assert config.latents_std[-1] == 1.9160
    assert hash(config) == hash(WanVAEConfig.wan2_1())


def test_the_preset_of_wan2_2():
    config = WanVAEConfig.wan2_2()
    assert config.stride == (4, 16, 16)
    assert config.convolution == "2d"
    assert config.latent_shape(frames=121, height=704, width=1280) == (31, 44, 80, 48)
    # Channels in and out of each level, and the factors in time and in space.
    encoder = [(160, 160, 1, 2), (160, 320, 2, 2), (320, 640, 2, 2), (640, 640, 1, 1)]
    assert [(*level[:2], *level.factors) for level in config.encoder_levels] == encoder
    decoder = [(1024, 1024, 2, 2), (1024, 1024, 2, 2), (1024, 512, 1, 2)]
    decoder.append((512, 256, 1, 1))
    assert [(*level[:2], *level.factors) for level in config.decoder_levels] == decoder
    # First and last of the values in Wan2.2's wan/modules/vae2_2.py.
    assert (config.latents_mean[0], config.latents_mean[-1]) == (-0.2289, -0.0667)
    assert (config.latents_std[0], config.latents_std[-1]) == (0.4765, 0.7744)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropout": 0.1}, "only the autoencoders of Wan2.1 and Wan2.2.*dropout"),
        ({"patch_size": 2}, "in_channels=3 must be 12, the colours of 2 x 2 pixels"),
        ({"out_channels": 4}, "out_channels=4 must be 3"),
        ({"decoder_base_dim": 0}, "decoder_base_dim=0 must be a positive integer"),
        ({"attn_scales": [1.0]}, "attn_scales"),
        ({"act_fn": "silu"}, r"unknown=\['act_fn'\] and missing=\[\]"),
        ({"z_dim": None}, "latent_channels=None"),
    ],
    ids=str,
)
def test_other_models_are_refused(changes, message, without_jaxtyping):
    with pytest.raises(ValueError, match=message):
        WanVAEConfig.from_dict(PUBLISHED | changes)


def test_odd_channels_are_fine_where_nothing_halves_them():
    assert WanVAEConfig.wan2_1(base_dim=3).channels == (3, 6, 12, 12)


def test_every_missing_field_is_named():
    with pytest.raises(ValueError, match=r"missing=\['base_dim', 'z_dim'"):
        WanVAEConfig.from_dict({"_class_name": "AutoencoderKLWan"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_dim": 0}, "base_dim=0 must be a positive integer"),
        ({"base_dim": True}, "base_dim=True must be"),
        ({"num_res_blocks": 1.5}, "num_res_blocks=1.5 must be"),
        ({"dim_mult": ()}, r"dim_mult=\(\) must be"),
        ({"dim_mult": (1, 2, 0, 4)}, r"dim_mult=\(1, 2, 0, 4\) must be"),
        ({"base_dim": 3, "dim_mult": (2, 1, 2, 2)}, "must be even"),
        ({"averages": True, "dim_mult": (1, 2, 4, 3)}, "encoder has 288 .* divide 384"),
        ({"averages": True, "dim_mult": (1, 1, 8, 8)}, "decoder has 96 .* of 768"),
        ({"temporal_downsample": (True,)}, "must be a tuple of 3"),
        ({"temporal_downsample": (True, True, 1)}, "must hold booleans"),
        ({"spatial_downsample": (True,)}, "spatial_downsample=.* a tuple of 3"),
        ({"spatial_downsample": (True, True, 1)}, "must hold booleans"),
        ({"latents_mean": (0.0,)}, "latents_mean=.* must be a tuple of 16"),
        ({"latents_std": (0.0,) * 16}, "must hold positive numbers"),
        ({"dtype": "float64"}, "dtype='float64' must be one of"),
        ({"param_dtype": "int8"}, "param_dtype='int8' must be one of"),
        ({"attention_dtype": "int8"}, "attention_dtype='int8' must be None or one of"),
        ({"convolution": "4d"}, r"'4d' must be one of \('3d', '2d'\)"),
    ],
    ids=str,
)
def test_bad_sizes_are_named(changes, message, without_jaxtyping):
    values = dataclasses.asdict(WanVAEConfig.wan2_1()) | changes
    with pytest.raises(ValueError, match=message):
        WanVAEConfig(**values)
