"""Both published layouts of a Wan checkpoint; parity is in test_wan_parity."""

import dataclasses
import math

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from models.checkpoints.conversion import ConversionError
from models.wan.config import WanConfig
from models.wan.convert import (
    detect_layout,
    export_wan_transformer,
    load_wan_transformer,
    save_wan_transformer,
)
from models.wan.transformer import WanTransformer
from tests.published_wan import CONFIG, load_published

IMAGE_CONFIG = dataclasses.replace(CONFIG, in_channels=12, image_dim=6)


@pytest.fixture(scope="module")
def published():
    return load_published("divided")


def assert_same_parameters(one, other):
    chex.assert_trees_all_equal(nnx.state(one), nnx.state(other), strict=True)


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_layout_is_told_by_the_keys(published, layout):
    assert detect_layout(published[layout]) == layout


def test_both_layouts_give_the_same_model(published):
    one, other = (load_wan_transformer(w, CONFIG) for w in published.values())
    assert_same_parameters(one, other)


def test_image_to_video_models_in_both_layouts():
    weights = load_published("image")
    one, other = (load_wan_transformer(w, IMAGE_CONFIG) for w in weights.values())
    assert_same_parameters(one, other)
    for layout, expected in weights.items():
        exported = export_wan_transformer(one, layout=layout)
        assert exported.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_array_equal(exported[key], value, err_msg=key)


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("max_shard_bytes", [None, 30_000], ids=["whole", "shards"])
def test_files_round_trip(published, layout, max_shard_bytes, tmp_path):
    model = load_wan_transformer(published[layout], CONFIG)
    files = save_wan_transformer(
        model, tmp_path, layout=layout, dtype=None, max_shard_bytes=max_shard_bytes
    )
    assert (len(files) > 1) == (max_shard_bytes is not None)
    stored = {}
    for file in files:
        stored |= safetensors.numpy.load_file(file)
    assert stored.keys() == published[layout].keys()
    for key, value in published[layout].items():
        np.testing.assert_array_equal(stored[key], value)
    assert_same_parameters(load_wan_transformer(tmp_path, CONFIG), model)


def test_weights_are_stored_in_bfloat16_by_default(published, tmp_path):
    model = load_wan_transformer(published["original"], CONFIG)
    save_wan_transformer(model, tmp_path)
    narrow = load_wan_transformer(
        tmp_path, dataclasses.replace(CONFIG, param_dtype="bfloat16")
    )
    wide = load_wan_transformer(tmp_path, CONFIG)
    assert narrow.proj_out.kernel.dtype == "bfloat16"
    assert wide.proj_out.kernel.dtype == "float32"
    assert_same_parameters(narrow, wide)
    difference = wide.proj_out.kernel[...] - model.proj_out.kernel[...]
    assert 0 < np.abs(difference).max() < 2**-8 * np.abs(model.proj_out.kernel).max()


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_every_missing_key_is_named(published, layout):
    keys = sorted(published[layout])
    for missing in (keys[::2], keys[1::2]):
        weights = {key: published[layout][key] for key in keys if key not in missing}
        with pytest.raises(ConversionError) as error:
            load_wan_transformer(weights, CONFIG)
        lines = [line.split() for line in error.value.problems]
        assert sorted(line[1] for line in lines) == missing
        assert {line[0] for line in lines} == {"missing:"}


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_every_wrong_shape_is_named(published, layout):
    weights = {key: value[..., :-1] for key, value in published[layout].items()}
    with pytest.raises(ConversionError) as error:
        load_wan_transformer(weights, CONFIG)
    lines = error.value.problems
    assert sorted(line.split()[1] for line in lines) == sorted(weights)
    assert all(line.startswith("shape: ") for line in lines)


def test_every_extra_key_is_named(published):
    weights = published["diffusers"] | {
        "blocks.2.norm2.bias": np.zeros(24, np.float32),
        "blocks.0.attn2.add_k_proj.weight": np.zeros((24, 24), np.float32),
        "blocks.0.attn2.add_q_proj.weight": np.zeros((24, 24), np.float32),
    }
    with pytest.raises(ConversionError) as error:
        load_wan_transformer(weights, CONFIG)
    assert [line.strip() for line in str(error.value).splitlines()] == [
        f"3 problems in {len(weights)} weights:",
        "extra: blocks.0.attn2.add_k_proj.weight leads to "
        "blocks.0.attn2.add_k_proj.kernel, which the model lacks",
        "extra: blocks.2.norm2.bias leads to blocks.2.norm2.bias, which the model "
        "lacks",
        "unmatched: no rule knows the key blocks.0.attn2.add_q_proj.weight",
    ]


@pytest.mark.parametrize("keys", [[], ["x"], ["patch_embedding.bias"]], ids=repr)
def test_unknown_layouts_are_refused(keys):
    with pytest.raises(ConversionError, match=f"cannot tell the layout of {len(keys)}"):
        detect_layout(keys)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (WanConfig.t2v_1_3b(), 1_418_996_800),
        (WanConfig.t2v_14b(), 14_288_491_584),
        (WanConfig.i2v_14b(), 16_394_878_784),
    ],
    ids=["1.3B", "14B", "I2V-14B"],
)
def test_presets_have_the_published_number_of_parameters(config, expected):
    model = nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == expected
    assert {leaf.dtype.name for leaf in leaves} == {"float32"}


def test_the_shipped_size_fits_its_limit():
    """10 to 30 million parameters, at most 48 MB as bfloat16."""
    model = nnx.eval_shape(lambda: WanTransformer(WanConfig.mini(), rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    count = sum(math.prod(leaf.shape) for leaf in leaves)
    assert 10e6 < count < 30e6
    assert 2 * count < 48e6
