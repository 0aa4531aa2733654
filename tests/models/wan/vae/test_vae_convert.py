"""Both published layouts of the autoencoder; parity is in test_vae_parity."""

import json
import math

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from models.checkpoints.conversion import ConversionError
from models.checkpoints.rules import Lookup
from models.wan.vae.config import WanVAEConfig
from models.wan.vae.convert import (
    detect_layout,
    export_wan_vae,
    load_wan_vae,
    make_rules,
)
from tests import tiny_vae
from tests.cases import mostly_nightly

CASE = "small"
# Original key, diffusers key, shape, from the models themselves.
PUBLISHED = {
    name: json.loads((tiny_vae.FIXTURES / f"vae_{name}_keys.json").read_text())
    for name in ("wan2_1", "wan2_2")
}
PRESETS = {name: getattr(WanVAEConfig, name)() for name in PUBLISHED}


def both_layouts(name):
    return {
        "diffusers": tiny_vae.make_weights(name),
        "original": export_wan_vae(tiny_vae.make_model(name), layout="original"),
    }


@pytest.fixture(scope="module")
def published():
    """Weights in both layouts; those of the original by the names written out."""
    return both_layouts(CASE)


@pytest.mark.parametrize("model", mostly_nightly(PUBLISHED, ("wan2_1",)))
@pytest.mark.parametrize(("layout", "column"), [("original", 0), ("diffusers", 1)])
def test_keys_and_shapes_are_the_published(layout, column, model):
    expected = {row[column]: tuple(row[2]) for row in PUBLISHED[model]}
    assert tiny_vae.checkpoint_shapes(PRESETS[model], layout) == expected
    assert detect_layout(expected, PRESETS[model]) == layout


@pytest.mark.parametrize("model", mostly_nightly(PUBLISHED, ("wan2_1",)))
def test_each_weight_has_its_own_two_keys(model):
    """The pairs of keys, not only both sets: original to ours to diffusers."""
    config = PRESETS[model]

    tables = {
        name: Lookup(make_rules(config, name)) for name in ("original", "diffusers")
    }
    for original, diffusers, _ in PUBLISHED[model]:
        (((path,), _),) = tables["original"].of_key(original)
        assert [key for key, _ in tables["diffusers"].of_path(path)] == [diffusers]


@pytest.mark.parametrize(
    ("model", "parameters"), [("wan2_1", 126_892_531), ("wan2_2", 704_688_668)]
)
def test_presets_have_the_published_number_of_parameters(model, parameters):
    shapes = tiny_vae.checkpoint_shapes(PRESETS[model], "original")
    assert sum(map(math.prod, shapes.values())) == parameters


@pytest.mark.parametrize("name", mostly_nightly((CASE, "averages_small"), (CASE,)))
def test_both_layouts_give_the_same_model(name):
    models = [
        load_wan_vae(weights, tiny_vae.make_config(name))
        for weights in both_layouts(name).values()
    ]
    one, other = (dict(nnx.to_flat_state(nnx.state(model))) for model in models)
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        np.testing.assert_array_equal(leaf[...], other[path][...], err_msg=str(path))


def test_weights_are_written_as_they_were_read(published, tmp_path):
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    safetensors.numpy.save_file(published["diffusers"], file)
    for source in (file, tmp_path):
        model = load_wan_vae(source, tiny_vae.make_config(CASE))
        written = export_wan_vae(model)
        assert written.keys() == published["diffusers"].keys()
        for key, value in published["diffusers"].items():
            np.testing.assert_array_equal(written[key], value)


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_every_offender_is_named(published, layout):
    weights = dict(published[layout])
    missing, short, integer, *_ = sorted(weights)
    del weights[missing]
    weights[short] = weights[short][..., :-1]
    weights[integer] = np.zeros(weights[integer].shape, np.int32)
    weights["decoder.extra.weight"] = np.zeros(1, np.float32)
    with pytest.raises(ConversionError) as error:
        load_wan_vae(weights, tiny_vae.make_config(CASE))
    first, *lines = str(error.value).splitlines()
    assert first == f"4 problems in {len(weights)} weights:"
    problems = dict(line.split()[:2] for line in lines)
    assert problems.pop("unmatched:") == "no"  # "no rule knows the key ..."
    assert problems == {"missing:": missing, "shape:": short, "dtype:": integer}


@pytest.mark.parametrize("keys", [[], ["x"], ["encoder.conv1.scale"]], ids=repr)
def test_unknown_layouts_are_refused(keys):
    with pytest.raises(ConversionError, match=f"cannot tell the layout of {len(keys)}"):
        detect_layout(keys, WanVAEConfig.wan2_1())
