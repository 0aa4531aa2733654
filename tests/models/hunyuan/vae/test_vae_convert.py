"""The published keys of the autoencoder; parity is in test_vae_parity."""

import json
import math

import numpy as np
import pytest
import safetensors.numpy

from models.checkpoints.conversion import ConversionError
from models.checkpoints.memory_map import CheckpointError
from models.hunyuan.vae.config import HunyuanVAEConfig
from models.hunyuan.vae.convert import export_hunyuan_vae, load_hunyuan_vae
from tests import tiny_hunyuan_vae

CASE = "long"
PUBLISHED = json.loads(
    tiny_hunyuan_vae.FIXTURE.with_name("vae_hunyuan_keys.json").read_text()
)


def test_keys_and_shapes_are_those_published():
    shapes = tiny_hunyuan_vae.checkpoint_shapes(HunyuanVAEConfig.video())
    assert shapes == {key: tuple(shape) for key, shape in PUBLISHED.items()}
    assert sum(map(math.prod, shapes.values())) == 246_478_803


@pytest.mark.parametrize("prefix", ["", "vae.", "state_dict.", "state_dict.vae."])
def test_weights_are_written_as_they_were_read(prefix, tmp_path):
    weights = tiny_hunyuan_vae.make_weights(CASE)
    file = tmp_path / "vae.safetensors"
    safetensors.numpy.save_file({prefix + k: v for k, v in weights.items()}, file)
    model = load_hunyuan_vae(file, tiny_hunyuan_vae.make_config(CASE))
    written = export_hunyuan_vae(model)
    assert written.keys() == weights.keys()
    for key, value in weights.items():
        np.testing.assert_array_equal(written[key], value)


def test_files_of_several_models_are_refused(tmp_path):
    weights = tiny_hunyuan_vae.make_weights(CASE)
    weights = {f"vae.{key}": value for key, value in weights.items()}
    file = tmp_path / "all.safetensors"
    safetensors.numpy.save_file(weights | {"text.weight": np.zeros(1)}, file)
    with pytest.raises(CheckpointError, match=r"1 others, text.weight"):
        load_hunyuan_vae(file, tiny_hunyuan_vae.make_config(CASE))


def test_every_offender_is_named():
    weights = dict(tiny_hunyuan_vae.make_weights(CASE))
    missing, short, integer, *_ = sorted(weights)
    del weights[missing]
    weights[short] = weights[short][..., :-1]
    weights[integer] = np.zeros(weights[integer].shape, np.int32)
    weights["decoder.extra.weight"] = np.zeros(1, np.float32)
    with pytest.raises(ConversionError) as error:
        load_hunyuan_vae(weights, tiny_hunyuan_vae.make_config(CASE))
    kinds = sorted(problem.split(":")[0] for problem in error.value.problems)
    assert kinds == ["dtype", "missing", "shape", "unmatched"]
    for name in (missing, short, integer, "decoder.extra.weight"):
        assert name in str(error.value)
