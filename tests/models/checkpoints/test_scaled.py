"""FP8 weights with scales against a decoder of FP8 that is written out here."""

import json
import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from models.checkpoints.memory_map import CheckpointError
from models.checkpoints.safetensors_io import load_safetensors
from models.checkpoints.scaled import apply_scales

# Bits of exponent and of fraction.
FORMATS = {"float8_e4m3fn": (4, 3), "float8_e5m2": (5, 2)}


def decode(codes, name):
    """The numbers that bytes stand for, by the definition of the formats."""
    exponent_bits, fraction_bits = FORMATS[name]
    bias = 2 ** (exponent_bits - 1) - 1
    sign = 1.0 - 2.0 * (codes >> 7)
    exponent = (codes >> fraction_bits) & (2**exponent_bits - 1)
    fraction = (codes & (2**fraction_bits - 1)) / 2.0**fraction_bits
    size = np.where(
        exponent == 0,
        fraction * 2.0 ** (1 - bias),
        (1.0 + fraction) * 2.0 ** (exponent.astype(float) - bias),
    )
    return sign * size


def make_codes(name, shape=(6, 8)):
    codes = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    # Not the codes of NaN and infinity.
    return np.where((codes & 0x7F) >= 0x78, codes & 0x8F, codes)


def fp8(codes, name):
    return codes.view(getattr(ml_dtypes, name))


SCALES = {
    "scalar": np.float32(0.013),
    "one": np.float32([0.7]),
    "rows": np.float32([3.0, 0.1, 0.7, 1e-3, 2.5, 9.0]),
    "columns of one": np.float32([[3.0], [0.1], [0.7], [1e-3], [2.5], [9.0]]),
    "blocks": np.random.default_rng(1).uniform(0.1, 2, (6, 2, 1)).astype(np.float32),
}


@pytest.mark.parametrize("ending", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_multiplied_by_their_scales(name, kind, ending):
    codes, scale = make_codes(name), SCALES[kind]
    source = {"a.weight": fp8(codes, name), f"a.{ending}": scale, "b": np.float32([1])}
    weights = apply_scales(source)
    assert set(weights) == {"a.weight", "b"}
    assert len(weights) == 2
    wide = np.asarray(scale, np.float64)
    if kind == "rows":
        wide = wide[:, None]
    elif kind == "blocks":
        wide = np.repeat(wide[..., 0], 4, axis=1)
    expected = (decode(codes, name) * wide).astype(np.float32)
    got = weights["a.weight"]
    assert (got.shape, got.dtype) == ((6, 8), np.float32)
    np.testing.assert_array_equal(jnp.asarray(got), expected)
    np.testing.assert_array_equal(np.asarray(got), expected)
    with pytest.raises(KeyError):
        weights[f"a.{ending}"]


def described(name):
    text = json.dumps({"format": name, "full_precision_matrix_mult": True}).encode()
    return np.frombuffer(text, np.uint8)


@pytest.mark.parametrize(
    "beside",
    [
        {"scaled_fp8": np.zeros(2, np.uint8)},
        {"a.comfy_quant": described("float8_e4m3fn")},
        {"a.input_scale": np.float32(3.0)},
        {"a.scale_input": np.float32(1.0)},
    ],
    ids=lambda beside: next(iter(beside)),
)
def test_what_stands_beside_weights_is_no_weight(beside):
    codes = make_codes("float8_e4m3fn")
    source = {
        "a.weight": fp8(codes, "float8_e4m3fn"),
        "a.weight_scale": np.float32(0.5),
        **beside,
    }
    weights = apply_scales(source)
    assert list(weights) == ["a.weight"]
    expected = 0.5 * decode(codes, "float8_e4m3fn")
    np.testing.assert_array_equal(jnp.asarray(weights["a.weight"]), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_without_scales_fp8_is_only_narrow(name):
    codes = make_codes(name)
    source = {"a.weight": fp8(codes, name)}
    assert apply_scales(source) is source
    got = jnp.asarray(source["a.weight"]).astype(jnp.float32)
    np.testing.assert_array_equal(got, decode(codes, name))


EIGHT = fp8(make_codes("float8_e4m3fn"), "float8_e4m3fn")
ONE = np.float32(1.0)
WRONG = {
    "no weight": ({"a.scale_weight": ONE}, "a.scale_weight is a scale without its "),
    "wide weight": (
        {"a.weight": np.zeros((6, 8), np.float32), "a.weight_scale": ONE},
        "a.weight_scale scales a.weight, which is float32; expected",
    ),
    "no scale": (
        {"a.weight": EIGHT, "a.weight_scale": ONE, "b.weight": EIGHT},
        "b.weight is float8_e4m3fn without a scale, in a file with scales",
    ),
    "marker alone": (
        {"a.weight": EIGHT, "scaled_fp8": np.zeros(0, np.float32)},
        "a.weight is float8_e4m3fn without a scale",
    ),
    "two scales": (
        {"a.weight": EIGHT, "a.weight_scale": ONE, "a.scale_weight": ONE},
        "a.scale_weight and a.weight_scale are scales of one weight",
    ),
    "columns": (
        {"a.weight": EIGHT, "a.weight_scale": np.ones(8, np.float32)},
        "a.weight_scale of shape (8,) does not fit a.weight of shape (6, 8)",
    ),
    "blocks": (
        {"a.weight": EIGHT, "a.scale_weight": np.ones((6, 3, 1), np.float32)},
        "a.scale_weight of shape (6, 3, 1) does not fit",
    ),
    "whole scale": (
        {"a.weight": EIGHT, "a.weight_scale": np.int32(2)},
        "a.weight_scale is int32; expected floating-point",
    ),
    "input": (
        {"a.weight": EIGHT, "a.input_scale": ONE},
        "a.input_scale belongs to no scaled weight",
    ),
    "format": (
        {"a.weight": EIGHT, "a.weight_scale": ONE, "a.comfy_quant": described("nvfp4")},
        "a.comfy_quant is in the format 'nvfp4'; expected",
    ),
    "damaged": (
        {"a.weight": EIGHT, "a.weight_scale": ONE, "a.comfy_quant": np.uint8([91])},
        "a.comfy_quant is damaged: ",
    ),
    "long": (
        {"a.comfy_quant": np.zeros(10**6, np.uint8)},
        "a.comfy_quant is no description of a format",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_named(tmp_path, case):
    tensors, message = WRONG[case]
    file = tmp_path / "odd.safetensors"
    arrays = {key: np.asarray(value) for key, value in tensors.items()}
    safetensors.numpy.save_file(arrays, file)
    expected = rf"odd\.safetensors has scaled .*\n.*{re.escape(message)}"
    with pytest.raises(CheckpointError, match=expected):
        apply_scales(load_safetensors(file))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            {"layers": {"a": {"format": "int8_tensorwise"}}},
            "a is in the format 'int8_tensorwise'; expected",
        ),
        ({"layers": {"a": {}}}, "_quantization_metadata is damaged"),
        ([], "_quantization_metadata is damaged"),
    ],
    ids=["format", "layer", "list"],
)
def test_formats_in_the_metadata_are_looked_at(metadata, message):
    source = {"a.weight": EIGHT, "a.weight_scale": ONE}
    good = {"layers": {"a": {"format": "float8_e4m3fn"}}}
    texts = {"_quantization_metadata": json.dumps(good)}
    assert list(apply_scales(source, metadata=texts)) == ["a.weight"]
    texts = {"_quantization_metadata": json.dumps(metadata)}
    with pytest.raises(CheckpointError, match=message):
        apply_scales(source, metadata=texts)


def test_tables_have_no_scale():
    source = {"a.weight": EIGHT, "a.weight_scale": ONE, "table.weight": EIGHT}
    weights = apply_scales(source, tables=["table.weight"])
    assert weights["table.weight"] is EIGHT


def test_nothing_is_read_before_it_is_asked_for():
    class Unread:
        shape, dtype = (6, 8), np.dtype(ml_dtypes.float8_e4m3fn)

        def __array__(self, *_, **__):
            raise AssertionError("read")

    weights = apply_scales({"a.weight": Unread(), "a.weight_scale": ONE})
    assert weights["a.weight"].shape == (6, 8)
    with pytest.raises(AssertionError, match="read"):
        np.asarray(weights["a.weight"])
