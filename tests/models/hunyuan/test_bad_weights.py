"""Checkpoints that do not fit a HunyuanVideo transformer: all offenders are named."""

import pytest

from models.checkpoints.conversion import ConversionError
from models.hunyuan.config import HunyuanConfig
from models.hunyuan.convert import load_hunyuan_transformer
from tests.tiny_hunyuan import read_fixture, seeded_weights


def fixture_weights():
    """Weights of the tiny pipeline, and their configuration."""
    _, metadata = read_fixture("hunyuan_pipeline")
    config = HunyuanConfig.from_dict(metadata["transformer_config"], tile=(2, 4))
    return seeded_weights(metadata["transformer_shapes"]), config


def test_every_key_that_does_not_fit_is_named():
    weights, config = fixture_weights()
    missing = "transformer_blocks.1.attn.norm_added_q.weight"
    misshaped = "single_transformer_blocks.0.proj_mlp.weight"
    unknown = "blocks.0.self_attn.q.weight"  # of Wan
    del weights[missing]
    weights[misshaped] = weights[misshaped][:-1]
    weights[unknown] = weights["proj_out.bias"]
    with pytest.raises(ConversionError) as caught:
        load_hunyuan_transformer(weights, config)
    for key in (missing, misshaped, unknown):
        assert key in str(caught.value)
