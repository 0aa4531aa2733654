"""Sizes of the published encoder, and what a published config.json may say."""

import dataclasses

import pytest

from models.umt5.config import UMT5Config

# text_encoder/config.json of Wan-AI/Wan2.1-T2V-1.3B-Diffusers.
PUBLISHED = {
    "architectures": ["UMT5EncoderModel"],
    "classifier_dropout": 0.0,
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "umt5",
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "scalable_attention": True,
    "tie_word_embeddings": False,
    "tokenizer_class": "T5Tokenizer",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 256384,
}


def test_the_published_file_gives_the_preset():
    assert UMT5Config.from_dict(PUBLISHED) == UMT5Config.xxl()


def test_changes_override_the_file():
    config = UMT5Config.from_dict(PUBLISHED, dtype="float32", num_layers=2)
    assert (config.dtype, config.num_layers, config.dim) == ("float32", 2, 4096)


def test_configurations_are_hashable_and_frozen():
    assert hash(UMT5Config.xxl()) == hash(UMT5Config.xxl())
    with pytest.raises(dataclasses.FrozenInstanceError):
        UMT5Config.xxl().dim = 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "t5"}, r"has {'model_type': 't5'}; .* {'model_type': 'umt5'}"),
        ({"feed_forward_proj": "relu", "is_gated_act": False}, "'is_gated_act': False"),
        ({"d_kv": None}, r"lacks the keys \['d_kv'\]"),
    ],
    ids=["t5", "relu", "missing"],
)
def test_other_published_files_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        UMT5Config.from_dict(PUBLISHED | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, "dim=0 must be a positive integer"),
        ({"num_layers": 2.0}, r"num_layers=2\.0 must be a positive integer"),
        ({"vocab_size": True}, "vocab_size=True must be a positive integer"),
        ({"num_buckets": 30}, "num_buckets=30 must be a multiple of 4"),
        ({"max_distance": 8}, "max_distance=8 must be greater than 8"),
        ({"eps": 0.0}, r"eps=0\.0 must be positive"),
        ({"eps": float("nan")}, "eps=nan must be positive"),
        ({"dtype": "float16"}, "dtype='float16' must be one of .* overflow"),
        ({"param_dtype": "int8"}, "param_dtype='int8' must be one of"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.usefixtures("without_jaxtyping")
def test_bad_sizes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        UMT5Config.xxl(**changes)
