"""Errors of a model in FP8, on a tiny model."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.float8 import sensitivity
from models.mini.pipeline import pipeline_of
from tests.tiny_model import SAMPLING, make_checkpoint


def test_records_of_a_tiny_model():
    pipeline = dataclasses.replace(
        pipeline_of(make_checkpoint()),
        sampling=dataclasses.replace(SAMPLING, num_steps=2),
    )
    record = {}
    sensitivity.measure(pipeline, ["a red ball"], [0.5], record.update)
    (level,) = record["levels"]
    assert 0 < level["step"] < 0.1
    layers = level["layers"]
    assert len(layers) == 3
    # The first block has the wide model's input in both.
    assert layers[0]["output"] == pytest.approx(layers[0]["accumulated"], rel=1e-4)
    assert all(layer["update"] > layer["output"] > 0 for layer in layers)
    assert "blocks.attn1.to_q" in record["only"]
    assert not [kind for kind in record["only"] if not kind.startswith("blocks.")]
    assert all(0 < error < 0.1 for error in record["only"].values())
    assert {"float8", "sparsity_0.5"} < record["videos"].keys()
    assert record["videos"]["float8"]["psnr_db_min"] > 20


def test_errors_are_over_the_norm_of_what_is_expected():
    found, expected = {"a": jnp.asarray([3.0, 4.0])}, {"a": jnp.asarray([3.0, 0.0])}
    assert sensitivity.relative(found, expected) == pytest.approx(4 / 3)
    of = {"a": np.asarray([0.0, 2.0])}
    assert sensitivity.relative(found, expected, of=of) == pytest.approx(2)
