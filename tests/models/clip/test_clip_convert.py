"""Weights that are left out of a CLIP checkpoint; parity is in test_clip_encoder."""

import dataclasses
import re

import numpy as np
import pytest
import safetensors.numpy

from models.checkpoints.conversion import ConversionError
from models.clip.convert import detect_layout, load_clip_vision_encoder

LAYOUTS = ("original", "transformers", "transformers_5")


@pytest.fixture(scope="module")
def case(cases):
    return cases["exact"]


def problems(error):
    """All of them; the message lists the first."""
    return list(error.value.problems)


def used(keys):
    """Keys whose arrays are used, written out; layer 2 of 0 to 2 is the last."""
    unused = (".2.", "post_norm", "post_layernorm", "head", "textual", "log_scale")
    return [
        key
        for key in keys
        if not any(part in key.replace("mlp.2.", "mlp.") for part in unused)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_told_by_the_keys(case, layout):
    assert detect_layout(case.weights[layout]) == layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_without_the_unused_weights(case, layout, tmp_path):
    """One array of the last layer is left, which tells the depth."""
    weights = case.weights[layout]
    last = next(key for key in weights if re.search(r"\.2\.(layer_)?norm1", key))
    keys = [*used(weights), last]
    narrow = {key: weights[key].astype("float16") for key in keys}
    safetensors.numpy.save_file(narrow, tmp_path / "model.safetensors")
    read = load_clip_vision_encoder(tmp_path, case.config())
    kernel = case.model().transformer.attn.to_v.kernel[...]
    assert kernel.shape == (2, 24, 24)
    expected = kernel.astype("float16").astype("float32")
    np.testing.assert_array_equal(read.transformer.attn.to_v.kernel[...], expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_missing_key_is_named(case, layout):
    keys = sorted(used(case.weights[layout]))
    for missing in (keys[::2], keys[1::2]):
        weights = dict(case.weights[layout])
        for key in missing:
            del weights[key]
        with pytest.raises(ConversionError) as error:
            load_clip_vision_encoder(weights, case.config())
        lines = [line.split() for line in problems(error)]
        assert sorted({line[1].partition("/")[0] for line in lines}) == missing
        assert {line[0] for line in lines} == {"missing:"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_wrong_shape_is_named(case, layout):
    weights = {
        key: value[..., :-1] if value.ndim else value
        for key, value in case.weights[layout].items()
    }
    with pytest.raises(ConversionError) as error:
        load_clip_vision_encoder(weights, case.config())
    lines = [line.split() for line in problems(error)]
    named = {line[1].partition("/")[0] for line in lines}
    assert sorted(named) == sorted(used(weights))
    assert {line[0] for line in lines} == {"shape:"}


def test_fused_rows_that_are_not_thirds_are_refused(case):
    key = "visual.transformer.1.attn.to_qkv.weight"
    weights = dict(case.weights["original"])
    weights[key] = np.concatenate([weights[key], weights[key][:1]])
    with pytest.raises(ConversionError, match=r"to_qkv\.weight/q is \(25, 24\); exp"):
        load_clip_vision_encoder(weights, case.config())


def test_every_extra_key_is_named(case):
    extra = np.zeros(24, np.float32)
    weights = case.weights["original"] | {
        "visual.transformer.3.norm1.weight": extra,
        "visual.patch_embedding.bias": extra,
    }
    with pytest.raises(ConversionError) as error:
        load_clip_vision_encoder(weights, case.config())
    assert problems(error) == [
        "extra: visual.transformer.3.norm1.weight leads to transformer.3.norm1.scale, "
        "which the model lacks",
        "unmatched: no rule knows the key visual.patch_embedding.bias",
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_wrong_depth_is_refused(case, layout):
    deeper = dataclasses.replace(case.config(), num_layers=4)
    with pytest.raises(ConversionError, match=r"no key .*3\.\.\..*num_layers=4 must"):
        load_clip_vision_encoder(case.weights[layout], deeper)
    shallower = dataclasses.replace(case.config(), num_layers=2)
    with pytest.raises(ConversionError) as error:
        load_clip_vision_encoder(case.weights["original"], shallower)
    norm = "extra: visual.transformer.2.norm1.weight leads to"
    assert any(problem.startswith(norm) for problem in problems(error))


@pytest.mark.parametrize("keys", [[], ["x", "y"]], ids=repr)
def test_unknown_layouts_are_refused(keys):
    with pytest.raises(ConversionError, match=f"cannot tell the layout of {len(keys)}"):
        detect_layout(keys)
