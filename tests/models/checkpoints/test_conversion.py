"""The rule table, on a model made up for these tests."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from models.checkpoints.conversion import (
    ConversionError,
    load_parameters,
    save_parameters,
)
from models.checkpoints.rules import Rule, conv_3d, drop_batch_axis, transpose
from models.checkpoints.safetensors_io import load_safetensors

NUM_LAYERS = 3


class Layer(nnx.Module):
    def __init__(self, *, rngs):
        self.linear = nnx.Linear(2, 5, rngs=rngs)


class Model(nnx.Module):
    """Three stacked layers, a table and a convolution's kernel."""

    def __init__(self, *, rngs):
        @nnx.split_rngs(splits=NUM_LAYERS)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs):
            return Layer(rngs=rngs)

        self.layers = stack(rngs)
        self.table = nnx.Param(jnp.zeros((6, 4)))
        self.patch = nnx.Param(jnp.zeros((1, 2, 3, 4, 5), jnp.bfloat16))


RULES = (
    Rule("layer{}.w", "layers.{}.linear.kernel", transpose),
    Rule("layer{}.b", "layers.{}.linear.bias"),
    Rule("table", "table", drop_batch_axis),
    Rule("patch.weight", "patch", conv_3d),
)


def make_model():
    return Model(rngs=nnx.Rngs(0))


def make_source():
    """Makes arrays as PyTorch stores them: [out, in] and [out, in, f, h, w]."""
    rng = np.random.default_rng(0)
    source = {"table": rng.normal(size=(1, 6, 4)).astype(np.float32)}
    source["patch.weight"] = rng.normal(size=(5, 4, 1, 2, 3)).astype(np.float32)
    for layer in range(NUM_LAYERS):
        source[f"layer{layer}.w"] = rng.normal(size=(5, 2)).astype(np.float32)
        source[f"layer{layer}.b"] = rng.normal(size=5).astype(np.float32)
    return source


def load(source, rules=RULES):
    return load_parameters(make_model, source, rules, stacked=("layers",))


def problems(source, rules=RULES):
    """The lines of the error, without its head."""
    with pytest.raises(ConversionError) as error:
        load(source, rules)
    head, *lines = str(error.value).splitlines()
    assert head == f"{len(lines)} problems in {len(source)} weights:"
    return [line.strip() for line in lines]


def test_every_array_lands_in_its_place():
    source = make_source()
    model = load(source)
    for layer in range(NUM_LAYERS):
        for out, into in np.ndindex(5, 2):
            kernel = model.layers.linear.kernel[layer, into, out]
            assert kernel == source[f"layer{layer}.w"][out, into]
        np.testing.assert_array_equal(
            model.layers.linear.bias[layer], source[f"layer{layer}.b"]
        )
    np.testing.assert_array_equal(model.table[...], source["table"][0])
    assert model.patch.dtype == jnp.bfloat16
    for frame, row, column, into, out in np.ndindex(1, 2, 3, 4, 5):
        expected = source["patch.weight"][out, into, frame, row, column]
        got = float(model.patch[frame, row, column, into, out])
        assert got == float(expected.astype(ml_dtypes.bfloat16))


class Unread:
    """Has a shape and a dtype, and fails when it is read."""

    def __init__(self, value):
        self.shape, self.dtype = value.shape, value.dtype

    def __jax_array__(self):
        raise AssertionError("read before everything was checked")

    __array__ = __jax_array__


def test_nothing_is_read_before_everything_is_checked():
    source = {key: Unread(value) for key, value in make_source().items()}
    with pytest.raises(AssertionError, match="read before"):
        load(source)
    del source["layer2.b"]
    source["table"].shape = (1, 6, 5)
    assert problems(source) == [
        "missing: layer2.b for parameter layers.2.linear.bias, shape (5,)",
        "shape: table is (1, 6, 5); expected (1, 6, 4)",
    ]


def test_chosen_parameters_stay_in_float32():
    source = make_source()
    model = load_parameters(
        make_model, source, RULES, stacked=("layers",), float32=("patch",)
    )
    assert model.patch.dtype == jnp.float32
    expected = source["patch.weight"].transpose(2, 3, 4, 1, 0)
    np.testing.assert_array_equal(model.patch[...], expected)


def test_weights_do_not_alias_the_source(tmp_path):
    """On CPU a device's memory is the host's: a file may change after loading."""
    source = make_source()
    before = {key: value.copy() for key, value in source.items()}
    reader = {key: np.broadcast_to(value, value.shape) for key, value in source.items()}
    model = load(reader)
    for value in source.values():
        value[...] = 0
    np.testing.assert_array_equal(model.table[...], before["table"][0])
    np.testing.assert_array_equal(model.layers.linear.bias[1], before["layer1.b"])


def test_save_gives_back_what_was_loaded():
    source = make_source()
    source["patch.weight"] = source["patch.weight"].astype(ml_dtypes.bfloat16)
    saved = save_parameters(load(source), RULES, stacked=("layers",))
    assert list(saved) == sorted(source)
    for key, value in source.items():
        assert saved[key].dtype == value.dtype
        assert saved[key].flags.c_contiguous
        np.testing.assert_array_equal(saved[key], value)


def test_save_casts():
    saved = save_parameters(
        load(make_source()), RULES, stacked=("layers",), dtype=jnp.bfloat16
    )
    assert {value.dtype.name for value in saved.values()} == {"bfloat16"}


@pytest.mark.parametrize("missing", sorted(make_source()))
def test_each_missing_key_is_named(missing):
    source = make_source()
    del source[missing]
    (line,) = problems(source)
    assert line.startswith(f"missing: {missing} for parameter ")


@pytest.mark.parametrize("key", sorted(make_source()))
def test_each_wrong_shape_is_named(key):
    source = make_source()
    expected = source[key].shape
    source[key] = np.concatenate([source[key]] * 2)
    assert problems(source) == [
        f"shape: {key} is {source[key].shape}; expected {expected}"
    ]


def test_all_offenders_are_listed_at_once():
    source = make_source()
    del source["layer1.b"]
    source["layer2.w"] = source["layer2.w"].T
    source["table"] = np.zeros((1, 6, 4), np.int32)
    source["layer3.b"] = np.zeros(5, np.float32)
    source["head"] = np.zeros(3, np.float32)
    assert problems(source) == [
        "dtype: table is int32; expected floating-point numbers",
        "extra: layer3.b leads to layers.3.linear.bias, which the model lacks",
        "missing: layer1.b for parameter layers.1.linear.bias, shape (5,)",
        "shape: layer2.w is (2, 5); expected (5, 2)",
        "unmatched: no rule knows the key head",
    ]


def test_the_file_of_each_offender_is_named(tmp_path):
    source = make_source()
    source["layer2.w"] = source["layer2.w"].T
    source["table"] = np.zeros((1, 6, 4), np.int32)
    source["layer3.b"] = np.zeros(5, np.float32)
    source["head"] = np.zeros(3, np.float32)
    names = ("a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors")
    first = {key: source.pop(key) for key in ("table", "head")}
    for name, tensors in zip(names, (first, source), strict=True):
        arrays = {key: np.ascontiguousarray(array) for key, array in tensors.items()}
        save_file(arrays, tmp_path / name)
    assert problems(load_safetensors(tmp_path)) == [
        f"dtype: table in {names[0]} is int32; expected floating-point numbers",
        f"extra: layer3.b in {names[1]} leads to layers.3.linear.bias, which the "
        "model lacks",
        f"shape: layer2.w in {names[1]} is (2, 5); expected (5, 2)",
        f"unmatched: no rule knows the key head in {names[0]}",
    ]


def test_keys_must_match_whole():
    source = make_source()
    source["x.table"] = source["table"]
    source["table.x"] = source["table"]
    assert problems(source) == [
        "unmatched: no rule knows the key table.x",
        "unmatched: no rule knows the key x.table",
    ]


def test_two_rules_for_one_key_are_told():
    rules = (*RULES, Rule("layer2.b", "layers.2.linear.bias"))
    assert problems(make_source(), rules) == [
        "ambiguous: layer2.b matches the rules ['layer{}.b', 'layer2.b']",
        "missing: layer2.b or layer2.b for parameter layers.2.linear.bias, shape (5,)",
    ]
    with pytest.raises(ConversionError, match=r"2\.linear\.bias is named by 2 keys"):
        save_parameters(load(make_source()), rules, stacked=("layers",))


def test_two_keys_for_one_parameter_are_told():
    source = make_source()
    source["old_table"] = source["table"]
    rules = (*RULES, Rule("old_table", "table", drop_batch_axis))
    assert problems(source, rules) == ["twice: table and old_table both fill table"]


def test_parameters_without_a_rule_are_told():
    with pytest.raises(ConversionError, match=r"parameter patch is named by 0 keys"):
        save_parameters(load(make_source()), RULES[:-1], stacked=("layers",))
    with pytest.raises(ConversionError) as error:
        save_parameters(load(make_source()), RULES[:2], stacked=("layers",))
    assert str(error.value).splitlines()[1:] == [
        "  parameter patch is named by 0 keys: []",
        "  parameter table is named by 0 keys: []",
    ]
