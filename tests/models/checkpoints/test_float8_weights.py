"""Weights for products in FP8, read from checkpoints of any precision."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from models.checkpoints.conversion import (
    ConversionError,
    load_parameters,
    save_parameters,
)
from models.checkpoints.lora import merge_lora
from models.checkpoints.rules import Rule, transpose
from models.checkpoints.scaled import apply_scales
from models.diffusion.transformer.float8 import use_float8_linears

E4M3 = ml_dtypes.float8_e4m3fn
LAYERS, WIDTH, HIDDEN = 3, 8, 12


class Layer(nnx.Module):
    def __init__(self, *, rngs):
        self.to_q = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.to_k = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)


class Model(nnx.Module):
    """Stacked layers, joined in the checkpoint, and two that stand alone."""

    def __init__(self, linears="float8"):
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs):
            return Layer(rngs=rngs)

        rngs = nnx.Rngs(0)
        self.layers = stack(rngs)
        self.alone = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.last = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        if linears == "float8":
            use_float8_linears(self, leave=["last"])


RULES = (
    Rule(
        "layer{}.qk.weight",
        "layers.{}.to_q.kernel",
        transpose,
        ("layers.{}.to_k.kernel",),
    ),
    Rule("layer{}.qk.bias", "layers.{}.to_q.bias", others=("layers.{}.to_k.bias",)),
    Rule("alone.weight", "alone.kernel", transpose),
    Rule("alone.bias", "alone.bias"),
    Rule("last.weight", "last.kernel", transpose),
    Rule("last.bias", "last.bias"),
)


def make_source():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    source = {}
    for layer in range(LAYERS):
        source[f"layer{layer}.qk.weight"] = normal(WIDTH + HIDDEN, WIDTH)
        source[f"layer{layer}.qk.bias"] = normal(WIDTH + HIDDEN)
    for name, rows in (("alone", HIDDEN), ("last", WIDTH)):
        source[f"{name}.weight"], source[f"{name}.bias"] = (
            normal(rows, WIDTH),
            normal(rows),
        )
    return source


def load(source):
    return load_parameters(Model, source, RULES, stacked=["layers"])


def rounded(weight):
    """Codes and scales of a weight in e4m3, row by row."""
    largest = np.abs(np.asarray(weight, np.float32)).max(axis=1)
    codes = weight * (np.float32(448) / largest)[:, None]
    return codes.astype(E4M3), largest * np.float32(1 / 448)


def assert_holds(layer, codes, scale):
    """Checks bits: e4m3 has two zeros, which compare as equal."""
    got = np.asarray(layer.weight[...])
    assert got.dtype == E4M3
    np.testing.assert_array_equal(got.view(np.uint8), codes.view(np.uint8))
    np.testing.assert_array_equal(layer.weight_scale[...], scale)


def layer_of(model, index, name):
    stack = getattr(model.layers, name)

    class Slice:
        weight = np.asarray(stack.weight[...])[index]
        weight_scale = np.asarray(stack.weight_scale[...])[index]

    return Slice


def test_weights_are_rounded_while_they_are_read():
    """Joined and stacked ones, too; what is no linear layer in FP8 stays."""
    source = make_source()
    model = load(source)
    assert_holds(model.alone, *rounded(source["alone.weight"]))
    for index in range(LAYERS):
        codes, scale = rounded(source[f"layer{index}.qk.weight"])
        assert_holds(layer_of(model, index, "to_q"), codes[:WIDTH], scale[:WIDTH])
        assert_holds(layer_of(model, index, "to_k"), codes[WIDTH:], scale[WIDTH:])
        bias = np.asarray(model.layers.to_k.bias[...])[index]
        np.testing.assert_array_equal(bias, source[f"layer{index}.qk.bias"][WIDTH:])
    np.testing.assert_array_equal(model.last.kernel[...], source["last.weight"].T)


def test_rounding_is_that_of_bfloat16_weights_where_they_are_stored_so():
    source = {k: v.astype(ml_dtypes.bfloat16) for k, v in make_source().items()}
    assert_holds(load(source).alone, *rounded(source["alone.weight"]))


SCALES = {
    "tensor": (np.float32(0.01), np.full(HIDDEN, 0.01, np.float32)),
    "rows": (np.linspace(0.01, 3, HIDDEN, dtype=np.float32),) * 2,
    "columns of one": (
        np.linspace(0.01, 3, HIDDEN, dtype=np.float32)[:, None],
        np.linspace(0.01, 3, HIDDEN, dtype=np.float32),
    ),
    "none": (None, np.ones(HIDDEN, np.float32)),
}


@pytest.mark.parametrize("kind", SCALES)
def test_fp8_of_a_file_stays_as_it_is(kind):
    stored, expected = SCALES[kind]
    source = make_source()
    codes = source["alone.weight"].astype(E4M3)
    source["alone.weight"] = codes
    if stored is not None:
        source["alone.weight_scale"] = stored
    assert_holds(load(apply_scales(source)).alone, codes, expected)


@pytest.mark.parametrize("kind", ["e5m2", "blocks"])
def test_other_fp8_is_rounded_anew(kind):
    source = make_source()
    weight = source["alone.weight"].astype(
        ml_dtypes.float8_e5m2 if kind == "e5m2" else E4M3
    )
    scale = np.linspace(0.5, 2, HIDDEN * 2, dtype=np.float32).reshape(HIDDEN, 2, 1)
    scale = scale[:, :1, 0] if kind == "e5m2" else scale
    source |= {"alone.weight": weight, "alone.weight_scale": scale}
    wide = weight.astype(np.float32).reshape(HIDDEN, -1, WIDTH // scale[0].size)
    wide = (wide * scale.reshape(HIDDEN, -1, 1)).reshape(HIDDEN, WIDTH)
    assert_holds(load(apply_scales(source)).alone, *rounded(wide))


def test_adapters_are_merged_before_weights_are_rounded():
    """Those of an FP8 file, too; what no adapter changes keeps its bits."""
    source = make_source()
    codes = source["alone.weight"].astype(E4M3)
    source |= {"alone.weight": codes, "alone.weight_scale": np.float32(0.5)}
    rng = np.random.default_rng(1)
    down, up = rng.normal(size=(2, WIDTH)), rng.normal(size=(WIDTH + HIDDEN, 2))
    lora = {
        "layer1.qk.lora_A.weight": down.astype(np.float32),
        "layer1.qk.lora_B.weight": up.astype(np.float32),
        "layer1.qk.alpha": np.float32(2),
    }
    names = {"layer1.qk": "layer1.qk"}
    merged = merge_lora(apply_scales(source), lora, names)
    model = load(merged)
    assert_holds(model.alone, codes, np.full(HIDDEN, 0.5, np.float32))
    whole = np.asarray(merged["layer1.qk.weight"])
    exact = source["layer1.qk.weight"] + up @ down
    np.testing.assert_allclose(whole, exact, rtol=1e-5, atol=1e-5)
    codes, scale = rounded(whole)
    assert_holds(layer_of(model, 1, "to_k"), codes[WIDTH:], scale[WIDTH:])


def test_weights_are_written_wide():
    source = make_source()
    saved = save_parameters(load(source), RULES, stacked=["layers"])
    assert saved.keys() == source.keys()
    for key, value in source.items():
        expected = value
        if value.ndim == 2 and key != "last.weight":
            codes, scale = rounded(value)
            expected = codes.astype(np.float32) * scale[:, None]
        np.testing.assert_array_equal(saved[key], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alone.weight": None}, r"missing: alone\.weight for parameter alone\.kernel"),
        (
            {"alone.weight": jnp.zeros((WIDTH, HIDDEN))},
            r"shape: alone\.weight is \(8, 12\); expected \(12, 8\)",
        ),
    ],
    ids=["missing", "shape"],
)
def test_what_does_not_fit_is_named_as_with_other_weights(change, message):
    source = {k: v for k, v in (make_source() | change).items() if v is not None}
    with pytest.raises(ConversionError, match=message):
        load(source)
