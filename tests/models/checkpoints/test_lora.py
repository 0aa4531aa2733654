"""Adapters against what PEFT merges (fixtures/make_lora_fixtures.py) and NumPy."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from models.checkpoints.conversion import ConversionError
from models.checkpoints.lora import MergedArray, merge_lora
from models.checkpoints.memory_map import CheckpointError
from models.checkpoints.safetensors_io import load_safetensors
from models.wan.convert import (
    export_wan_transformer,
    load_wan_transformer,
    lora_names,
)
from tests.cases import mostly_nightly
from tests.published_wan import CONFIG, FIXTURES, ORIGINAL_KEYS, load_published

# Float32 products of rank 3, added to weights of size one: measured 1.2e-7.
MERGED = {"rtol": 0, "atol": 1e-6}
pytestmark = pytest.mark.filterwarnings("ignore:.*does not say its alpha:UserWarning")


@pytest.fixture(scope="module")
def weights():
    """Published weights by layout."""
    return load_published("divided")


def random_array(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_file_of_diffusers_merges_as_peft_does(weights, layout):
    """Ranks, alphas and their exceptions stand in the file's metadata."""
    merged = merge_lora(
        weights[layout],
        FIXTURES / "lora_peft.safetensors",
        lora_names(weights[layout]),
        scale=0.75,
    )
    expected = load_safetensors(FIXTURES / "lora_peft_merged.safetensors")
    changed = {key for key in merged if isinstance(merged[key], MergedArray)}
    original_keys = ORIGINAL_KEYS["divided"]
    names = {
        key: original_keys[key] if layout == "original" else key for key in expected
    }
    assert changed == set(names.values())
    assert list(merged) == list(weights[layout])
    for key, value in expected.items():
        array = merged[names[key]]
        assert array.shape == value.shape
        np.testing.assert_allclose(np.asarray(array), value, **MERGED, err_msg=key)


def test_adapters_are_merged_at_load(weights):
    source = weights["diffusers"]
    lora = FIXTURES / "lora_peft.safetensors"
    merged = merge_lora(source, lora, lora_names(source), scale=0.75)
    saved = export_wan_transformer(load_wan_transformer(merged, CONFIG))
    expected = source | dict(
        load_safetensors(FIXTURES / "lora_peft_merged.safetensors")
    )
    assert saved.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(saved[key], value, **MERGED, err_msg=key)


# Spelling of the first block's query projection, its key and one half's ending each.
SPELLINGS = {
    "diffusers": ("transformer.blocks.1.attn1.to_q", "lora_A.weight", "lora_B.weight"),
    "peft": (
        "base_model.model.blocks.1.attn1.to_q",
        "lora_A.default.weight",
        "lora_B.default.weight",
    ),
    "old diffusers": (
        "transformer.blocks.1.attn1.to_q",
        "lora.down.weight",
        "lora.up.weight",
    ),
    "original": (
        "diffusion_model.blocks.1.self_attn.q",
        "lora_down.weight",
        "lora_up.weight",
    ),
    "original, peft": (
        "diffusion_model.blocks.1.self_attn.q",
        "lora_A.weight",
        "lora_B.weight",
    ),
    "kohya": (
        "lora_unet_blocks_1_self_attn_q",
        "lora_down.weight",
        "lora_up.weight",
    ),
    "bare": ("blocks.1.self_attn.q", "lora_down.weight", "lora_up.weight"),
}


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("alpha", mostly_nightly([None, 2.0], [2.0]))
def test_every_spelling(weights, layout, spelling, alpha):
    module, down_name, up_name = SPELLINGS[spelling]
    down, up = random_array((4, 24)), random_array((24, 4), 1)
    lora = {f"{module}.{down_name}": down, f"{module}.{up_name}": up}
    if alpha is not None:
        lora[f"{module}.alpha"] = np.float32(alpha)
    source = weights[layout]
    merged = merge_lora(source, lora, lora_names(source), scale=0.5)
    key = {
        "diffusers": "blocks.1.attn1.to_q.weight",
        "original": "blocks.1.self_attn.q.weight",
    }[layout]
    factor = 0.5 * (1.0 if alpha is None else alpha / 4)
    expected = source[key].astype(np.float64) + factor * (
        up.astype(np.float64) @ down.astype(np.float64)
    )
    np.testing.assert_allclose(np.asarray(merged[key]), expected, rtol=0, atol=5e-6)
    others = [other for other in merged if isinstance(merged[other], MergedArray)]
    assert others == [key]


def test_narrow_weights_are_merged_in_float32():
    """A change smaller than a step of bfloat16 is not lost before the last cast."""
    weight = np.ones((2, 2), ml_dtypes.bfloat16)
    lora = {
        "x.lora_A.weight": np.full((1, 2), 2.0**-5, ml_dtypes.bfloat16),
        "x.lora_B.weight": np.full((2, 1), 2.0**-5, ml_dtypes.bfloat16),
    }
    once = merge_lora({"x.weight": weight}, lora, {"x": "x"})
    eight = once
    for _ in range(7):
        eight = merge_lora(eight, lora, {"x": "x"})
    assert once["x.weight"].dtype == np.float32
    np.testing.assert_array_equal(np.asarray(once["x.weight"]), 1 + 2.0**-10)
    np.testing.assert_array_equal(np.asarray(eight["x.weight"]), 1 + 2.0**-7)
    assert jnp.asarray(eight["x.weight"]).dtype == jnp.float32


def test_convolutions_biases_and_tables():
    weights = {
        "conv.weight": random_array((6, 3, 1, 2, 2)),
        "conv.bias": random_array(6, 1),
        "table": random_array((1, 6, 4), 2),
    }
    lora = {
        "diffusion_model.conv.lora_down.weight": random_array((2, 3, 1, 2, 2), 3),
        "diffusion_model.conv.lora_up.weight": random_array((6, 2, 1, 1, 1), 4),
        "diffusion_model.conv.diff_b": random_array(6, 5),
        "diffusion_model.table.diff": random_array((1, 6, 4), 6),
    }
    names = {"conv": "conv", "table": "table"}
    merged = merge_lora(weights, lora, names, scale=2.0)
    down, up, bias, table = lora.values()
    expected = np.zeros((6, 3, 1, 2, 2))
    for out, into, rank in np.ndindex(6, 3, 2):
        expected[out, into] += up[out, rank, 0, 0, 0] * down[rank, into]
    expected = weights["conv.weight"] + 2.0 * expected
    np.testing.assert_allclose(np.asarray(merged["conv.weight"]), expected, atol=5e-6)
    for key, difference in (("conv.bias", bias), ("table", table)):
        np.testing.assert_allclose(
            np.asarray(merged[key]), weights[key] + 2.0 * difference, atol=1e-6
        )


@pytest.mark.parametrize("order", [1, -1], ids=["low rank first", "difference first"])
def test_a_difference_and_a_low_rank_part_of_one_weight_add(order):
    weights = {"x.weight": random_array((4, 3)), "x.bias": random_array(4, 1)}
    down, up = random_array((2, 3), 2), random_array((4, 2), 3)
    difference, bias = random_array((4, 3), 4), random_array(4, 5)
    lora = {
        "x.lora_down.weight": down,
        "x.lora_up.weight": up,
        "x.diff": difference,
        "x.diff_b": bias,
    }
    lora = dict(list(lora.items())[::order])
    merged = merge_lora(weights, lora, {"x": "x"}, scale=0.5)
    expected = weights["x.weight"] + 0.5 * (up @ down + difference)
    np.testing.assert_allclose(np.asarray(merged["x.weight"]), expected, **MERGED)
    expected = weights["x.bias"] + 0.5 * bias
    np.testing.assert_allclose(np.asarray(merged["x.bias"]), expected, **MERGED)


def settings(**values):
    return {
        "lora_adapter_metadata": json.dumps(
            {f"transformer.{key}": value for key, value in values.items()}
        )
    }


@pytest.mark.parametrize(
    ("metadata", "factor"),
    [
        ({}, 1.0),
        (settings(r=4, lora_alpha=8), 2.0),
        (settings(lora_alpha=8, use_rslora=True), 4.0),
        (settings(lora_alpha=8, alpha_pattern={"b.x": 2.0}), 2.0),
        (settings(lora_alpha=8, alpha_pattern={"a.x": 2.0}), 0.5),
        (settings(lora_alpha=8, alpha_pattern={"x": 4}), 1.0),
    ],
    ids=["none", "alpha", "root", "other", "pattern", "suffix"],
)
def test_settings_of_peft(tmp_path, metadata, factor):
    file = tmp_path / "lora.safetensors"
    lora = {"a.x.lora_A.weight": np.ones((4, 3)), "a.x.lora_B.weight": np.ones((2, 4))}
    lora = {key: value.astype(np.float32) for key, value in lora.items()}
    safetensors.numpy.save_file(lora, file, metadata)
    weights = {"a.x.weight": np.zeros((2, 3), np.float32)}
    merged = merge_lora(weights, file, {"a.x": "a.x"})
    np.testing.assert_array_equal(np.asarray(merged["a.x.weight"]), 4 * factor)


@pytest.mark.parametrize(
    "text", ["{", "[]", settings(lora_alpha="x"), settings(alpha_pattern={"(": 1})]
)
def test_damaged_settings_are_named(tmp_path, text):
    file = tmp_path / "lora.safetensors"
    metadata = text if isinstance(text, dict) else {"lora_adapter_metadata": text}
    safetensors.numpy.save_file({"x.diff": np.zeros(2)}, file, metadata)
    with pytest.raises(
        CheckpointError, match=r"lora\.safetensors has damaged settings"
    ):
        merge_lora({"x": np.zeros(2)}, file, {"x": "x"})


def test_every_wrong_key_is_listed(weights):
    source = weights["original"]
    block = "diffusion_model.blocks.0.self_attn"
    lora = {
        f"{block}.q.lora_down.weight": random_array((4, 23)),
        f"{block}.q.lora_up.weight": random_array((24, 5)),
        f"{block}.k.lora_down.weight": random_array((4, 24)),
        f"{block}.v.alpha": np.float32(1),
        f"{block}.o.lora_A.weight": random_array((4, 24)),
        f"{block}.o.lora_B.weight": random_array((24, 4)),
        f"{block}.o.lora_down.weight": random_array((4, 24)),
        "transformer.blocks.0.attn1.to_out.0.alpha": np.float32(1),
        f"{block}.o.alpha": np.float32(1),
        f"{block}.o.oft_blocks": random_array(24),
        "diffusion_model.head.head.lora_A.weight": np.float32(1),
        "diffusion_model.head.head.lora_B.weight": np.zeros((16, 0), np.float32),
        "text_encoder.layers.0.q.lora_A.weight": random_array((4, 24)),
        "diffusion_model.blocks.0.norm3.lora_A.weight": random_array((4, 24)),
        "diffusion_model.blocks.0.norm3.lora_B.weight": random_array((24, 4)),
        "diffusion_model.blocks.0.norm3.diff_b": random_array(23),
        "diffusion_model.blocks.0.modulation.diff_b": random_array(23),
        "diffusion_model.head.modulation.diff": np.zeros((1, 2, 24), np.int32),
    }
    with pytest.raises(ConversionError) as error:
        merge_lora(source, lora, lora_names(source))
    head, *lines = str(error.value).splitlines()
    assert head == ("the adapter does not fit the weights; 14 problems in 18 keys:")
    kinds = [line.strip() for line in lines]
    expected = [
        "dtype: diffusion_model.head.modulation.diff is int32; expected "
        "floating-point numbers",
        f"half: {block}.k.lora_down.weight stands without its other matrix",
        f"half: {block}.v.alpha stands without its matrices",
        f"shape: {block}.q.lora_down.weight is (4, 23); expected (4, 24)",
        f"shape: {block}.q.lora_up.weight is (24, 5); expected (24, 4)",
        "shape: diffusion_model.blocks.0.norm3.diff_b is (23,); expected (24,)",
        f"twice: {block}.o.lora_A.weight and {block}.o.lora_down.weight mean the same",
        f"twice: transformer.blocks.0.attn1.to_out.0.alpha and {block}.o.alpha mean "
        "the same",
        "shape: diffusion_model.head.head.lora_A.weight is (); expected (1, 24)",
        "shape: diffusion_model.head.head.lora_B.weight is (16, 0); expected (16, 1)",
        f"other method: {block}.o.oft_blocks is of a method that is not merged here: "
        "OFT",
        "unmatched: diffusion_model.blocks.0.modulation.diff_b belongs to no weight "
        "of the model",
        "unmatched: diffusion_model.blocks.0.norm3.lora_A.weight belongs to no matrix "
        "of the model",
        "unmatched: text_encoder.layers.0.q.lora_A.weight belongs to no weight of "
        "the model",
    ]
    assert sorted(kinds) == sorted(expected)


@pytest.mark.parametrize("alpha", [np.zeros(2, np.float32), np.float32("nan")])
def test_alpha_must_be_a_number(alpha):
    lora = {
        "x.lora_down.weight": np.zeros((1, 2), np.float32),
        "x.lora_up.weight": np.zeros((2, 1), np.float32),
        "x.alpha": alpha,
    }
    weights = {"x.weight": np.zeros((2, 2), np.float32)}
    with pytest.raises(ConversionError, match=r"alpha: x\.alpha must be one finite"):
        merge_lora(weights, lora, {"x": "x"})


def test_empty_adapters_and_bad_scales_are_refused(tmp_path):
    weights = {"x.weight": np.zeros((2, 2), np.float32)}
    with pytest.raises(ConversionError, match="it holds nothing"):
        merge_lora(weights, {}, {"x": "x"})
    with pytest.raises(ValueError, match="scale=nan must be a finite number"):
        merge_lora(weights, {}, {"x": "x"}, scale=float("nan"))
    with pytest.raises(CheckpointError, match="absent does not exist"):
        merge_lora(weights, tmp_path / "absent", {"x": "x"})
