"""Both published layouts of a UMT5 checkpoint; parity is in test_umt5_encoder."""

import json

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from models.checkpoints.conversion import ConversionError
from models.umt5.config import UMT5Config
from models.umt5.convert import detect_layout, export_umt5_encoder, load_umt5_encoder
from tests.models.umt5.conftest import FIXTURES

SHARED, TIED = "shared.weight", "encoder.embed_tokens.weight"


@pytest.fixture(scope="module")
def published(cases):
    case = cases["wide_inner"]
    return {"transformers": case.weights, "original": case.original_weights()}


@pytest.fixture(scope="module")
def config(cases):
    return UMT5Config.from_dict(
        cases["wide_inner"].published, dtype="float32", param_dtype="float32"
    )


def assert_same_parameters(one, other):
    chex.assert_trees_all_equal(nnx.state(one), nnx.state(other), strict=True)


def problems(error):
    """All of them; the message lists the first."""
    return list(error.value.problems)


def test_the_fixture_names_every_key(published):
    names = json.loads((FIXTURES / "umt5_original_keys.json").read_text())
    assert published["transformers"].keys() == names.keys()
    assert len(set(names.values())) == len(names)


@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_layout_is_told_by_the_keys(published, layout):
    assert detect_layout(published[layout]) == layout


def test_both_layouts_give_the_same_model(published, config):
    one, other = (load_umt5_encoder(w, config) for w in published.values())
    assert_same_parameters(one, other)


@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_weights_round_trip(published, config, layout):
    model = load_umt5_encoder(published[layout], config)
    stored = export_umt5_encoder(model, layout=layout)
    assert stored.keys() == published[layout].keys()
    for key, value in published[layout].items():
        np.testing.assert_array_equal(stored[key], value)


def test_a_file_in_bfloat16(published, config, tmp_path):
    model = load_umt5_encoder(published["transformers"], config)
    narrow = export_umt5_encoder(model, dtype="bfloat16")
    safetensors.numpy.save_file(narrow, tmp_path / "model.safetensors")
    device = jax.devices("cpu")[0]
    read = load_umt5_encoder(tmp_path, config, device=device)
    kernel = read.blocks.ffn.fc1.kernel[...]
    expected = model.blocks.ffn.fc1.kernel[...].astype("bfloat16").astype("float32")
    np.testing.assert_array_equal(kernel, expected)
    assert kernel.devices() == {device}


@pytest.mark.parametrize("names", [(TIED,), (SHARED, TIED)], ids=["tied", "both"])
def test_either_name_of_the_token_table_is_read(published, config, names):
    weights = dict(published["transformers"])
    table = weights.pop(SHARED)
    weights |= dict.fromkeys(names, table)
    model = load_umt5_encoder(weights, config)
    assert_same_parameters(model, load_umt5_encoder(published["original"], config))


def test_token_tables_that_differ_are_refused(published, config):
    weights = dict(published["transformers"])
    weights[TIED] = weights[SHARED] + 1
    with pytest.raises(ConversionError, match=f"{SHARED} and {TIED} differ"):
        load_umt5_encoder(weights, config)


@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_every_missing_key_is_named(published, config, layout):
    keys = sorted(published[layout])
    for missing in (keys[::2], keys[1::2]):
        weights = {key: published[layout][key] for key in keys if key not in missing}
        with pytest.raises(ConversionError) as error:
            load_umt5_encoder(weights, config)
        lines = [line.split() for line in problems(error)]
        assert sorted(line[1] for line in lines) == missing
        assert {line[0] for line in lines} == {"missing:"}


@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_every_wrong_shape_is_named(published, config, layout):
    weights = {key: value[..., :-1] for key, value in published[layout].items()}
    with pytest.raises(ConversionError) as error:
        load_umt5_encoder(weights, config)
    assert sorted(line.split()[1] for line in problems(error)) == sorted(weights)
    assert all(line.startswith("shape: ") for line in problems(error))


def test_every_extra_key_is_named(published, config):
    extra = np.zeros(24, np.float32)
    weights = published["original"] | {
        "blocks.3.norm1.weight": extra,
        "decoder.norm.weight": extra,
    }
    with pytest.raises(ConversionError) as error:
        load_umt5_encoder(weights, config)
    assert problems(error) == [
        "extra: blocks.3.norm1.weight leads to blocks.3.norm1.scale, which the model "
        "lacks",
        "unmatched: no rule knows the key decoder.norm.weight",
    ]


@pytest.mark.parametrize("keys", [[], ["x", "y"]], ids=repr)
def test_unknown_layouts_are_refused(keys):
    with pytest.raises(ConversionError, match=f"cannot tell the layout of {len(keys)}"):
        detect_layout(keys)
