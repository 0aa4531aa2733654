"""Sizes of the published tower, and what a published config.json may say."""

import dataclasses
import json

import pytest

from models.clip.config import CLIPVisionConfig
from tests.models.clip.conftest import FIXTURES

PUBLISHED = json.loads((FIXTURES / "clip_vit_h_14.json").read_text())["config"]


def test_the_published_file_gives_the_preset():
    config = CLIPVisionConfig.from_dict(PUBLISHED)
    assert config == CLIPVisionConfig.vit_h_14()
    assert config.num_tokens == 257


def test_changes_override_the_file():
    config = CLIPVisionConfig.from_dict(PUBLISHED, dtype="float16", num_layers=2)
    assert (config.dtype, config.num_layers, config.dim) == ("float16", 2, 1280)


def test_configurations_are_hashable_and_frozen():
    assert hash(CLIPVisionConfig.vit_h_14()) == hash(CLIPVisionConfig.vit_h_14())
    with pytest.raises(dataclasses.FrozenInstanceError):
        CLIPVisionConfig.vit_h_14().dim = 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "siglip_vision_model"}, "this port needs .*clip_vision_model"),
        ({"num_channels": 4}, r"has {'num_channels': 4}.* {'num_channels': 3}"),
        ({"hidden_act": None}, r"lacks the keys \['hidden_act'\]"),
        ({"hidden_act": "gelu_new"}, "activation='gelu_new' must be one of .*'gelu'"),
    ],
    ids=["siglip", "channels", "missing", "activation"],
)
def test_other_published_files_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CLIPVisionConfig.from_dict(PUBLISHED | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, "dim=0 must be a positive integer"),
        ({"image_size": [224, 224]}, r"image_size=\(224, 224\) must be a positive int"),
        ({"num_layers": 1}, "num_layers=1 must be at least 2"),
        ({"num_heads": 12}, "dim=1280 must be a multiple of num_heads=12"),
        ({"patch_size": 15}, "image_size=224 must be a multiple of patch_size=15"),
        ({"eps": 0.0}, r"eps=0\.0 must be positive"),
        ({"dtype": "float64"}, "dtype='float64' must be one of"),
        ({"param_dtype": "int8"}, "param_dtype='int8' must be one of"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.usefixtures("without_jaxtyping")
def test_bad_sizes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        CLIPVisionConfig.vit_h_14(**changes)
