"""Adapters that PEFT and LyCORIS wrote, against what these tools compute with them.

Made by fixtures/make_lora_method_fixtures.py.
"""

import functools
import json

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from models.checkpoints.lora import merge_lora
from tests.published_wan import FIXTURES

FILE = FIXTURES / "lora_methods.safetensors"
# Two float32 computations of numbers up to 40: measured 8e-6.
CLOSE = {"rtol": 1e-6, "atol": 1e-5}


@functools.cache
def cases():
    """Settings by case."""
    with safetensors.safe_open(FILE, "np") as stored:
        return json.loads(stored.metadata()["settings"])


@functools.cache
def tensors():
    return safetensors.numpy.load_file(FILE)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("case", cases())
def test_merged_as_the_tool_computes(tmp_path, case):
    prefix = f"{case}/lora/"
    lora = {
        key.removeprefix(prefix): value
        for key, value in tensors().items()
        if key.startswith(prefix)
    }
    file = tmp_path / "adapter_model.safetensors"
    safetensors.numpy.save_file(lora, file, cases()[case].get("header"))
    if (config := cases()[case].get("config")) is not None:
        file.with_name("adapter_config.json").write_text(json.dumps(config))
    weights = {"x.weight": tensors()[f"{case}/base"]}
    merged = np.asarray(merge_lora(weights, file, {"x": "x"})["x.weight"])
    expected = tensors()[f"{case}/merged"]
    assert np.abs(expected - weights["x.weight"]).max() > 0.1
    np.testing.assert_allclose(merged, expected, **CLOSE)
