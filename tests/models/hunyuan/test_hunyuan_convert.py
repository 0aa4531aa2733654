"""Both published layouts of a HunyuanVideo checkpoint."""

import dataclasses
import math

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from models.checkpoints.conversion import ConversionError
from models.hunyuan.config import HunyuanConfig
from models.hunyuan.convert import (
    detect_layout,
    export_hunyuan_transformer,
    load_hunyuan_transformer,
    save_hunyuan_transformer,
)
from models.hunyuan.transformer import HunyuanTransformer
from tests.cases import mostly_nightly
from tests.published_hunyuan import config_of, load_published

NAME = "divided"
CONFIG = config_of(NAME)
LAYOUTS = ("original", "diffusers")


@pytest.fixture(scope="module")
def published():
    return load_published(NAME)


def assert_same_parameters(one, other):
    chex.assert_trees_all_equal(nnx.state(one), nnx.state(other), strict=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_told_by_the_keys(published, layout):
    assert detect_layout(published[layout]) == layout


def test_both_layouts_give_the_same_model(published):
    one, other = (load_hunyuan_transformer(w, CONFIG) for w in published.values())
    assert_same_parameters(one, other)


@pytest.mark.parametrize("layout", mostly_nightly(LAYOUTS, ("original",)))
def test_files_round_trip(published, layout, tmp_path):
    other = LAYOUTS[1 - LAYOUTS.index(layout)]
    model = load_hunyuan_transformer(published[other], CONFIG)
    files = save_hunyuan_transformer(
        model, tmp_path, layout=layout, dtype=None, max_shard_bytes=100_000
    )
    assert len(files) > 1
    stored = {}
    for file in files:
        stored |= safetensors.numpy.load_file(file)
    assert stored.keys() == published[layout].keys()
    for key, value in published[layout].items():
        np.testing.assert_array_equal(stored[key], value, err_msg=key)
    stem = "diffusion_pytorch_model"
    loaded = load_hunyuan_transformer(tmp_path, CONFIG, stem=stem)
    assert_same_parameters(loaded, model)


def test_wrappers_of_the_original_are_taken_away(published, tmp_path):
    """The published file is a dictionary with one entry, `module`."""
    wrapped = {f"module.{key}": v for key, v in published["original"].items()}
    safetensors.numpy.save_file(wrapped, tmp_path / "model.safetensors")
    model = load_hunyuan_transformer(tmp_path / "model.safetensors", CONFIG)
    expected = load_hunyuan_transformer(published["original"], CONFIG)
    assert_same_parameters(model, expected)


@pytest.mark.nightly
def test_few_weights_stay_wide(published):
    config = dataclasses.replace(CONFIG, param_dtype="bfloat16")
    model = load_hunyuan_transformer(published["original"], config)
    wide = {
        ".".join(map(str, path))
        for path, leaf in nnx.to_flat_state(nnx.state(model))
        if leaf.dtype == "float32"
    }
    assert all("norm_" in name or "time_text_embed" in name for name in wide)
    assert "transformer_blocks.attn.norm_added_k.scale" in wide
    assert "transformer_blocks.norm1.linear.kernel" not in wide


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_missing_key_is_named(published, layout):
    keys = sorted(published[layout])
    for missing in (keys[::2], keys[1::2]):
        weights = {key: published[layout][key] for key in keys if key not in missing}
        with pytest.raises(ConversionError) as error:
            load_hunyuan_transformer(weights, CONFIG)
        lines = [line.split() for line in error.value.problems]
        assert sorted(line[1] for line in lines) == missing
        assert {line[0] for line in lines} == {"missing:"}


@pytest.mark.parametrize("layout", mostly_nightly(LAYOUTS, ("original",)))
@pytest.mark.parametrize("part", ["rows", "columns"])
def test_every_wrong_shape_is_named(published, layout, part):
    weights = {
        key: value[:-1] if part == "rows" else value[..., :-1]
        for key, value in published[layout].items()
    }
    with pytest.raises(ConversionError) as error:
        load_hunyuan_transformer(weights, CONFIG)
    lines = error.value.problems
    assert sorted(line.split()[1] for line in lines) == sorted(weights)
    assert all(line.startswith("shape: ") for line in lines)


def test_a_block_too_many_is_named_with_all_it_leads_to(published):
    key = "single_blocks.3.linear1.weight"
    weights = published["original"] | {key: np.zeros((168, 24), np.float32)}
    with pytest.raises(ConversionError) as error:
        load_hunyuan_transformer(weights, CONFIG)
    (line,) = error.value.problems
    block = "single_transformer_blocks.3"
    assert line == (
        f"extra: {key} leads to {block}.attn.to_q.kernel, {block}.attn.to_k.kernel, "
        f"{block}.attn.to_v.kernel, {block}.proj_mlp.kernel, which the model lacks"
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (HunyuanConfig.video_13b(), 12_821_012_544),
        (HunyuanConfig.custom_13b(), 12_810_782_784),
    ],
    ids=["video", "custom"],
)
def test_presets_have_the_published_number_of_parameters(config, expected):
    model = nnx.eval_shape(lambda: HunyuanTransformer(config, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == expected


def test_exported_weights_are_narrow_where_asked(published):
    model = load_hunyuan_transformer(published["diffusers"], CONFIG)
    exported = export_hunyuan_transformer(model, layout="original", dtype="bfloat16")
    assert {value.dtype.name for value in exported.values()} == {"bfloat16"}
