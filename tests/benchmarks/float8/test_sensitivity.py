"""Errors of a model in FP8, on a tiny model."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.float8 import sensitivity
from models.hunyuan.transformer import HunyuanTransformer
from models.mini.pipeline import pipeline_of
from tests.hunyuan_folders import CONFIG
from tests.tiny_model import SAMPLING, make_checkpoint

PROJECTIONS = [f"attn.to_{x}" for x in "qkv"]


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
    attention = [f"blocks.attn{n}.to_{x}" for n in (1, 2) for x in ("qkv", "out")]
    network = [f"blocks.ffn.linear_{n}" for n in (1, 2)]
    assert sorted(record["only"]) == sorted([*attention, *network])
    assert all(0 < error < 0.1 for error in record["only"].values())
    assert {"float8", "sparsity_0.5"} < record["videos"].keys()
    assert record["videos"]["float8"]["psnr_db_min"] > 20


def test_layers_that_read_one_input_are_one_kind():
    """Two stacks of HunyuanVideo: a network stands beside the projections in one."""
    model = HunyuanTransformer(CONFIG, rngs=nnx.Rngs(0))
    kinds = sensitivity.kinds_of(model)
    single = {f"single_transformer_blocks.{x}" for x in (*PROJECTIONS, "proj_mlp")}
    assert set(kinds["single_transformer_blocks.attn.to_qkv"]) == single
    double = {f"transformer_blocks.{x}" for x in PROJECTIONS}
    assert set(kinds["transformer_blocks.attn.to_qkv"]) == double
    added = {f"transformer_blocks.attn.add_{x}_proj" for x in "qkv"}
    assert set(kinds["transformer_blocks.attn.add_qkv_proj"]) == added
    others = [paths for kind, paths in kinds.items() if "qkv" not in kind]
    assert all(len(paths) == 1 for paths in others)


def test_errors_are_over_the_norm_of_what_is_expected():
    found, expected = {"a": jnp.asarray([3.0, 4.0])}, {"a": jnp.asarray([3.0, 0.0])}
    assert sensitivity.relative(found, expected) == pytest.approx(4 / 3)
    of = {"a": np.asarray([0.0, 2.0])}
    assert sensitivity.relative(found, expected, of=of) == pytest.approx(2)
