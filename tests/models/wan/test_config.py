"""Sizes of the published models, and what a published config.json may say."""

import dataclasses

import pytest

from models.wan import config
from models.wan.config import WanConfig

# The config.json of Wan-AI/Wan2.1-T2V-1.3B and of its -Diffusers twin.
ORIGINAL_1_3B = {
    "_class_name": "WanModel",
    "_diffusers_version": "0.30.0",
    "dim": 1536,
    "eps": 1e-06,
    "ffn_dim": 8960,
    "freq_dim": 256,
    "in_dim": 16,
    "model_type": "t2v",
    "num_heads": 12,
    "num_layers": 30,
    "out_dim": 16,
    "text_len": 512,
}
DIFFUSERS_1_3B = {
    "_class_name": "WanTransformer3DModel",
    "_diffusers_version": "0.33.0.dev0",
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "ffn_dim": 8960,
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 16,
    "num_attention_heads": 12,
    "num_layers": 30,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}


# What differs in the files of Wan-AI/Wan2.1-I2V-14B-480P and its -Diffusers twin.
ORIGINAL_I2V = ORIGINAL_1_3B | {
    "dim": 5120,
    "ffn_dim": 13824,
    "in_dim": 36,
    "model_type": "i2v",
    "num_heads": 40,
    "num_layers": 40,
}
DIFFUSERS_I2V = DIFFUSERS_1_3B | {
    "added_kv_proj_dim": 5120,
    "ffn_dim": 13824,
    "image_dim": 1280,
    "in_channels": 36,
    "num_attention_heads": 40,
    "num_layers": 40,
    "pos_embed_seq_len": None,
}


@pytest.mark.parametrize("published", [ORIGINAL_I2V, DIFFUSERS_I2V])
def test_published_image_to_video_files_give_the_preset(published):
    config = WanConfig.from_dict(published)
    assert config == WanConfig.i2v_14b()
    assert (config.in_channels, config.out_channels, config.image_dim) == (36, 16, 1280)
    assert WanConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("published", [ORIGINAL_1_3B, DIFFUSERS_1_3B])
def test_published_files_give_the_preset(published):
    assert WanConfig.from_dict(published) == WanConfig.t2v_1_3b()


def test_preset_of_14b():
    config = WanConfig.t2v_14b()
    sizes = (config.dim, config.num_heads, config.head_dim, config.num_layers)
    assert sizes == (5120, 40, 128, 40)
    assert config.ffn_dim == 13824


def test_changes_override_the_file():
    config = WanConfig.from_dict(DIFFUSERS_1_3B, dtype="float32", tile=(4, 8))
    assert (config.dtype, config.tile) == ("float32", (4, 8))


def test_to_dict_and_back():
    config = WanConfig.mini(qk_norm=False, cross_attn_norm=False)
    again = WanConfig.from_dict(config.to_dict(), text_length=32, tile=(4, 8))
    assert again == config


def test_configurations_are_hashable_and_frozen():
    one, same = (WanConfig.mini(tile=(2, 4)) for _ in range(2))
    assert hash(one) == hash(same)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.dim = 3


def test_wan2_2_is_read():
    """The 5B model's config.json, and what an expert of I2V-A14B has of Wan2.1's."""
    sizes = {"dim": 3072, "ffn_dim": 14336, "num_heads": 24, "num_layers": 30}
    channels = {"in_dim": 48, "out_dim": 48, "model_type": "ti2v"}
    published = ORIGINAL_1_3B | sizes | channels
    assert WanConfig.from_dict(published) == WanConfig.ti2v_5b()
    expert = WanConfig.from_dict(ORIGINAL_I2V, image_dim=None)
    assert expert == WanConfig.i2v_a14b()


@pytest.mark.parametrize(
    ("published", "message"),
    [
        (
            ORIGINAL_I2V | {"model_type": "flf2v"},
            r"model_type='flf2v' must be one of \('t2v', 'i2v', 'ti2v'\): models of "
            "videos between two images are not supported$",
        ),
        (
            DIFFUSERS_I2V | {"pos_embed_seq_len": 514},
            "pos_embed_seq_len=514 must be null: models of videos between two images",
        ),
        (
            ORIGINAL_1_3B | {"model_type": "vace", "vace_layers": [0, 2]},
            "'ti2v'\\): VACE, which edits videos, is not supported$",
        ),
        (
            DIFFUSERS_1_3B | {"vace_layers": [0, 2], "vace_in_channels": 96},
            r"vace_layers=\[0, 2\] must be left out: VACE, which edits videos, is not",
        ),
        (
            ORIGINAL_1_3B | {"model_type": "ti2v", "in_dim": 36},
            "holds_first_frame=True needs as many channels in as out, not 36 and 16",
        ),
        (ORIGINAL_1_3B | {"model_type": "s2v"}, "'s2v' must be one of .*'ti2v'\\)$"),
        (DIFFUSERS_1_3B | {"image_dim": 1280}, "added_kv_proj_dim=None must be 1536"),
        (DIFFUSERS_1_3B | {"added_kv_proj_dim": 1536}, "=1536 must be None, for image"),
        (DIFFUSERS_1_3B | {"qk_norm": "layer_norm"}, "qk_norm='layer_norm' must be"),
        (ORIGINAL_1_3B | {"window": 4}, r"unknown=\['window'\] and missing=\[\]"),
        (
            {k: v for k, v in ORIGINAL_1_3B.items() if k not in ("dim", "ffn_dim")},
            r"unknown=\[\] and missing=\['ffn_dim', 'dim'\]",
        ),
        (
            {k: v for k, v in DIFFUSERS_1_3B.items() if k != "attention_head_dim"},
            r"missing=\['attention_head_dim'\]",
        ),
        ({}, r"missing=\['ffn_dim', 'num_layers', 'dim', 'num_heads'\]"),
    ],
    ids=[
        "two-images",
        "positions",
        "vace",
        "vace-diffusers",
        "ti2v",
        "kind",
        "image",
        "added",
        "norm",
        "unknown",
        "missing",
        "no-head-dim",
        "empty",
    ],
)
def test_other_published_files_are_refused(published, message):
    with pytest.raises(ValueError, match=message):
        WanConfig.from_dict(published)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, "dim=0 must be a positive integer"),
        ({"num_layers": 2.0}, "num_layers=2.0 must be a positive integer"),
        ({"text_length": True}, "text_length=True must be a positive integer"),
        ({"num_heads": 5}, r"dim=384 must be a multiple of self\.num_heads=5"),
        ({"dim": 12, "num_heads": 3}, r"head_dim=4 must be even and at least 6"),
        ({"image_dim": 0}, "image_dim=0 must be a positive integer"),
        ({"freq_dim": 255}, "freq_dim=255 must be even"),
        ({"patch_size": (2, 2)}, r"patch_size=\(2, 2\) must be a tuple of 3"),
        ({"tile": (0, 8)}, r"tile=\(0, 8\) must be a tuple of 2"),
        ({"eps": 0.0}, "eps=0.0 must be positive"),
        ({"rope_theta": 1.0}, "rope_theta=1.0 must be greater than 1"),
        ({"dtype": "float64"}, "dtype='float64' must be one of"),
        ({"param_dtype": "int8"}, "param_dtype='int8' must be one of"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.usefixtures("without_jaxtyping")
def test_bad_sizes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        WanConfig.mini(**changes)


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_the_5b_model_has_a_tile_of_its_own(monkeypatch, layout):
    """The constant is read wherever the model is described, and nowhere else."""
    monkeypatch.setattr(config, "TI2V_TILE", (5, 7))
    published = {"dim": 24, "ffn_dim": 32, "num_heads": 2, "num_layers": 1}
    changes = {}
    if layout == "diffusers":
        published |= {"num_attention_heads": 2, "attention_head_dim": 12}
        del published["dim"], published["num_heads"]
        changes = {"holds_first_frame": True}
    held = published if changes else published | {"model_type": "ti2v"}
    for made in (WanConfig.from_dict(held, **changes), WanConfig.ti2v_5b()):
        assert (made.tile, made.turns_tile) == ((5, 7), True)
    for asked in (
        WanConfig.from_dict(held, **changes, tile=(2, 4)),
        WanConfig.ti2v_5b(tile=(2, 4)),
    ):
        assert (asked.tile, asked.turns_tile) == ((2, 4), False)
    assert WanConfig.from_dict(published).tile == WanConfig.t2v_14b().tile == (8, 16)
