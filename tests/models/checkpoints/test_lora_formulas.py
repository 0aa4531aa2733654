"""What adapters of every method add, against NumPy in float64.

The formulas are those of the tools that write the files: PEFT (`DoraLinearVariant`),
LyCORIS (`locon`, `lokr`, `loha`) and ComfyUI (`weight_adapter`).
"""

import ml_dtypes
import numpy as np
import pytest

from models.checkpoints.conversion import ConversionError
from models.checkpoints.lora import merge_lora

# Float32 sums and products of numbers of size one: measured 1.5e-6.
CLOSE = {"rtol": 0, "atol": 5e-6}
pytestmark = pytest.mark.filterwarnings("ignore:.*does not say its alpha:UserWarning")


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def merge(weight, lora, scale=1.0, bias=None):
    """Returns the merged weight, and the bias if there is one, in float64."""
    weights = {"x.weight": weight}
    if bias is not None:
        weights["x.bias"] = bias
    keys = {f"x.{role}": np.asarray(value) for role, value in lora.items()}
    merged = merge_lora(weights, keys, {"x": "x"}, scale=scale)
    arrays = [np.asarray(merged[key]).astype(np.float64) for key in weights]
    return arrays if bias is not None else arrays[0]


def wide(*arrays):
    return [np.asarray(array, np.float64) for array in arrays]


def rescaled_rows(weight, magnitude):
    """The rows of a matrix with other lengths, one after the other."""
    flat = weight.reshape(len(weight), -1)
    rows = [m * row / np.sqrt((row**2).sum()) for m, row in zip(magnitude, flat)]  # noqa: B905
    return np.stack(rows).reshape(weight.shape)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["lora_magnitude_vector", "dora_scale"])
def test_dora_gives_rows_their_trained_lengths(scale, name):
    weight, up, down = draw(6, 4), draw(6, 2, seed=1), draw(2, 4, seed=2)
    magnitude = np.abs(draw(6, seed=3)) + 1
    stored = magnitude if name == "lora_magnitude_vector" else magnitude[:, None]
    lora = {"lora_A.weight": down, "lora_B.weight": up, "alpha": np.float32(4)}
    found = merge(weight, lora | {name: stored}, scale)
    wide_weight, wide_up, wide_down = wide(weight, up, down)
    full = rescaled_rows(wide_weight + 2 * wide_up @ wide_down, magnitude)
    expected = wide_weight + scale * (full - wide_weight)
    np.testing.assert_allclose(found, expected, **CLOSE)
    if scale == 0.0:
        np.testing.assert_array_equal(found, weight)


def test_dora_of_columns_as_lycoris_and_onetrainer_store_it():
    weight, up, down = draw(4, 4), draw(4, 2, seed=1), draw(2, 4, seed=2)
    magnitude = np.abs(draw(1, 4, seed=3)) + 1
    lora = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": magnitude}
    wide_weight, wide_up, wide_down = wide(weight, up, down)
    full = rescaled_rows((wide_weight + wide_up @ wide_down).T, magnitude[0]).T
    np.testing.assert_allclose(merge(weight, lora), full, **CLOSE)


@pytest.mark.parametrize("stored", [(1, 5, 1, 1, 1), (5, 1, 1, 1, 1), (5,)], ids=str)
def test_dora_of_convolutions_as_peft_stores_it(stored):
    """PEFT turns the axes of kernels' magnitudes: [1, out, 1, 1, 1]."""
    weight = draw(5, 3, 1, 2, 2)
    up, down = draw(5, 2, 1, 1, 1, seed=1), draw(2, 3, 1, 2, 2, seed=2)
    magnitude = np.abs(draw(5, seed=3)) + 1
    lora = {
        "lora_A.default.weight": down,
        "lora_B.default.weight": up,
        "lora_magnitude_vector.default.weight": magnitude.reshape(stored),
    }
    wide_weight, wide_up, wide_down = wide(weight, up, down)
    change = np.einsum("or,ri...->oi...", wide_up[:, :, 0, 0, 0], wide_down)
    expected = rescaled_rows(wide_weight + change, magnitude)
    np.testing.assert_allclose(merge(weight, lora), expected, **CLOSE)


def test_rows_of_zeros_have_no_direction():
    zeros = np.zeros((2, 3), np.float32)
    lora = {
        "lora_A.weight": zeros[:1],
        "lora_B.weight": zeros[:, :1],
        "dora_scale": np.ones((2, 1), np.float32),
    }
    np.testing.assert_array_equal(merge(zeros, lora), 0)


def test_each_dora_starts_from_what_the_adapters_before_it_made():
    weight = draw(3, 3)
    adapters = [
        {
            "x.lora_A.weight": draw(1, 3, seed=seed),
            "x.lora_B.weight": draw(3, 1, seed=seed + 1),
            "x.dora_scale": np.abs(draw(3, 1, seed=seed + 2)) + 1,
        }
        for seed in (1, 4)
    ]
    merged, expected = {"x.weight": weight}, weight.astype(np.float64)
    for lora in adapters:
        merged = merge_lora(merged, lora, {"x": "x"}, scale=0.5)
        down, up, magnitude = wide(*lora.values())
        full = rescaled_rows(expected + up @ down, magnitude[:, 0])
        expected = expected + 0.5 * (full - expected)
    np.testing.assert_allclose(np.asarray(merged["x.weight"]), expected, **CLOSE)


def kron_loops(first, second):
    """The Kronecker product by its definition."""
    rows, columns = len(second), second.shape[1]
    product = np.zeros(
        (len(first) * rows, first.shape[1] * columns, *second.shape[2:]), np.float64
    )
    for i, j in np.ndindex(*first.shape):
        block = first[i, j] * second
        product[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] = block
    return product


@pytest.mark.parametrize("split", ["neither", "first", "second", "both"])
@pytest.mark.parametrize("kernel", [(), (1, 2, 2)], ids=["linear", "convolution"])
def test_lokr_is_a_kronecker_product(split, kernel):
    """Alpha counts if a matrix is in factors; two whole ones have the factor 1."""
    weight = draw(6, 8, *kernel)
    first, second = draw(2, 4, seed=1), draw(3, 2, *kernel, seed=2)
    lora, factor = {"alpha": np.float32(1)}, 1.0
    for name, matrix, own in (("w1", first, "first"), ("w2", second, "second")):
        if split not in (own, "both"):
            lora[f"lokr_{name}"] = matrix
            continue
        flat = int(np.prod(matrix.shape[1:]))
        left, right = draw(len(matrix), 2, seed=3), draw(2, flat, seed=4)
        lora |= {f"lokr_{name}_a": left, f"lokr_{name}_b": right}
        product = np.matmul(*wide(left, right)).reshape(matrix.shape)
        first, second = (product, second) if own == "first" else (first, product)
        factor = 0.5
    change = kron_loops(*wide(first, second))
    expected = weight + 0.75 * factor * change
    np.testing.assert_allclose(merge(weight, lora, 0.75), expected, rtol=0, atol=2e-5)


def test_lokr_with_a_core_and_a_magnitude():
    weight = draw(4, 6, 1, 2, 2)
    first, core = draw(2, 3, seed=1), draw(2, 2, 1, 2, 2, seed=2)
    left, right = draw(2, 2, seed=3), draw(2, 2, seed=4)
    magnitude = np.abs(draw(4, 1, 1, 1, 1, seed=5)) + 1
    lora = {
        "lokr_w1": first,
        "lokr_t2": core,
        "lokr_w2_a": left,
        "lokr_w2_b": right,
        "alpha": np.float32(3),
        "dora_scale": magnitude,
    }
    second = np.zeros((2, 2, 1, 2, 2))
    for i, j, out, into in np.ndindex(2, 2, 2, 2):
        second[out, into] += left[i, out] * right[j, into] * core[i, j]
    changed = weight + 3 / 2 * kron_loops(first.astype(np.float64), second)
    expected = rescaled_rows(changed, magnitude.ravel())
    np.testing.assert_allclose(merge(weight, lora), expected, **CLOSE)


@pytest.mark.parametrize("with_core", [False, True])
def test_loha_is_a_product_entry_by_entry(with_core):
    kernel = (1, 2, 2) if with_core else ()
    weight, lora, product = draw(4, 3, *kernel), {"alpha": np.float32(1)}, 1.0
    for seed, name in ((1, "1"), (5, "2")):
        left, right = draw(4, 2, seed=seed), draw(2, 3, seed=seed + 1)
        if not with_core:
            lora |= {f"hada_w{name}_a": left, f"hada_w{name}_b": right}
            product = product * np.matmul(*wide(left, right))
            continue
        core = draw(2, 2, *kernel, seed=seed + 2)
        lora |= {
            f"hada_w{name}_a": np.ascontiguousarray(left.T),
            f"hada_w{name}_b": right,
            f"hada_t{name}": core,
        }
        matrix = np.zeros(weight.shape)
        for i, j, out, into in np.ndindex(2, 2, 4, 3):
            matrix[out, into] += left[out, i] * right[j, into] * core[i, j]
        product = product * matrix
    expected = weight + 2 * 0.5 * product
    np.testing.assert_allclose(merge(weight, lora, 2.0), expected, rtol=0, atol=2e-5)


def test_locon_with_a_core():
    weight, core = draw(5, 3, 1, 2, 2), draw(2, 2, 1, 2, 2, seed=3)
    up, down = draw(5, 2, 1, 1, 1, seed=1), draw(2, 3, 1, 1, 1, seed=2)
    lora = {
        "lora_up.weight": up,
        "lora_down.weight": down,
        "lora_mid.weight": core,
        "alpha": np.float32(1),
    }
    expected = weight.astype(np.float64)
    for out, into, i, j in np.ndindex(5, 3, 2, 2):
        pair = up[out, i, 0, 0, 0] * down[j, into, 0, 0, 0]
        expected[out, into] += 0.5 * pair * core[i, j]
    np.testing.assert_allclose(merge(weight, lora), expected, **CLOSE)


def test_flat_factors_of_a_convolution():
    """Matrices that a tool extracted have kernels in their columns."""
    weight, up, down = draw(5, 3, 1, 2, 2), draw(5, 2, seed=1), draw(2, 12, seed=2)
    lora = {"lora_up.weight": up, "lora_down.weight": down}
    expected = weight + np.matmul(*wide(up, down)).reshape(weight.shape)
    np.testing.assert_allclose(merge(weight, lora), expected, **CLOSE)


@pytest.mark.parametrize("name", ["lora_B.bias", "lora_up.bias", "lora_B.turbo.bias"])
def test_the_second_matrix_has_a_bias(name):
    """PEFT's `lora_bias`: it acts with the matrix, so alpha counts for it too."""
    stem = name.removesuffix(".bias")
    down = stem.replace("lora_B", "lora_A").replace("lora_up", "lora_down")
    lora = {
        f"{stem}.weight": draw(3, 2, seed=1),
        f"{down}.weight": draw(2, 4, seed=2),
        name: draw(3, seed=3),
        "alpha": np.float32(8),
    }
    bias = draw(3, seed=4)
    _, found = merge(draw(3, 4), lora, 0.5, bias=bias)
    expected = bias + 0.5 * 4 * lora[name].astype(np.float64)
    np.testing.assert_allclose(found, expected, **CLOSE)


def test_narrow_factors_are_multiplied_in_float32():
    """1 + 2^-8 and its square have no bfloat16, nor has their product."""
    weight = np.zeros((1, 1), ml_dtypes.bfloat16)
    factor = np.full((1, 1), 1 + 2.0**-7, ml_dtypes.bfloat16)
    lora = dict.fromkeys(("lokr_w1", "lokr_w2"), factor)
    np.testing.assert_array_equal(merge(weight, lora), (1 + 2.0**-7) ** 2)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"dora_scale": draw(3, 1)}, "half: x.dora_scale stands without its matrices"),
        ({"lokr_w1": draw(1, 1)}, "half: x.lokr_w1 stands without its other matrix"),
        ({"hada_w1_a": draw(3, 1)}, "half: x.hada_w1_a stands without its other"),
        (
            {"lokr_w1": draw(0, 2), "lokr_w2": draw(3, 2)},
            r"shape: x.lokr_w1 is \(0, 2\); expected \(1, 2\)",
        ),
        (
            {"lokr_w1": draw(2, 1), "lokr_w2": draw(2, 4)},
            r"shape: x.lokr_w1 has 2 rows and 1 columns; expected divisors of 3 and 4",
        ),
        (
            {"lokr_w1": draw(3, 2), "lokr_w2": draw(1, 1)},
            r"shape: x.lokr_w2 is \(1, 1\); expected \(1, 2\)",
        ),
        (
            {
                "lora_A.weight": draw(1, 4),
                "lora_B.weight": draw(3, 1),
                "dora_scale": draw(3, 1),
                "diff": draw(3, 4),
            },
            "twice: x.dora_scale and x.diff exclude each other",
        ),
        (
            {
                "lora_A.weight": draw(1, 4),
                "lora_B.weight": draw(3, 1),
                "lora_magnitude_vector": draw(3),
                "dora_scale": draw(3, 1),
            },
            "twice: x.lora_magnitude_vector and x.dora_scale exclude each other",
        ),
        (
            {
                "lora_A.weight": draw(1, 4),
                "lora_B.weight": draw(3, 1),
                "dora_scale": draw(4),
            },
            r"shape: x.dora_scale is \(4,\); expected \(3, 1\)",
        ),
        (
            {
                "lora_A.weight": draw(1, 4),
                "lora_B.weight": draw(3, 1),
                "lora_magnitude_vector": draw(4),
            },
            r"shape: x.lora_magnitude_vector is \(4,\); expected \(3,\)",
        ),
    ],
    ids=[
        "magnitude",
        "lokr",
        "loha",
        "no rows",
        "no divisor",
        "second matrix",
        "two meanings",
        "two magnitudes",
        "length",
        "PEFT's length",
    ],
)
def test_what_does_not_fit_is_named(lora, message):
    with pytest.raises(ConversionError, match=message):
        merge(draw(3, 4), lora)


PAIR = {"y.lora_A.weight": draw(1, 4), "y.lora_B.weight": draw(3, 1)}


@pytest.mark.parametrize(
    "lora",
    [
        {"y.alpha": np.float32(1)},
        PAIR | {"model.y.lora_A.weight": draw(1, 4)},
        PAIR | {"y.dora_scale": draw(3, 1), "y.diff": draw(3, 4)},
        {"y.diff": np.zeros((3, 4), np.int32)},
        {key.replace("A.", "A.one."): value for key, value in PAIR.items()}
        | {"x.lora_A.two.weight": draw(1, 4), "x.lora_B.two.weight": draw(3, 1)},
    ],
    ids=["half", "twice", "exclude", "dtype", "several adapters"],
)
def test_what_has_a_meaning_is_not_skipped(lora):
    """`strict=False` skips what is for other models, not what is damaged."""
    weights = {"x.weight": draw(3, 4), "y.weight": draw(3, 4)}
    good = {"x.diff": draw(3, 4)}
    with pytest.raises(ConversionError, match="; 1 problems in ") as error:
        merge_lora(weights, good | lora, {"x": "x", "y": "y"}, strict=False)
    assert "strict=False" not in str(error.value)


@pytest.mark.parametrize("role", ["dora_scale", "lokr_w1"])
def test_what_is_skipped_is_skipped_whole(role):
    """No half of a module is merged without the part that does not fit."""
    adapter = {
        "x.diff": draw(3, 4),
        "y.lora_A.weight": draw(1, 4, seed=1),
        "y.lora_B.weight": draw(3, 1, seed=2),
        "y.dora_scale": draw(5, seed=3),
    }
    if role == "lokr_w1":
        adapter = {"x.diff": draw(3, 4), "y.lokr_w1": draw(2, 2), "y.lokr_w2": draw(1)}
    weights = {"x.weight": draw(3, 4, seed=4), "y.weight": draw(3, 4, seed=5)}
    names = {"x": "x", "y": "y"}
    with pytest.warns(UserWarning, match=rf"skipped 1 parts in .*\n  shape: y.{role}"):
        merged = merge_lora(weights, adapter, names, strict=False)
    expected = weights["x.weight"] + adapter["x.diff"]
    np.testing.assert_allclose(np.asarray(merged["x.weight"]), expected, **CLOSE)
    assert merged["y.weight"] is weights["y.weight"]


class Unread:
    """An array of which only shape and dtype are known."""

    dtype = np.dtype(np.float32)

    def __init__(self, *shape):
        self.shape = shape

    def __array__(self, *_, **__):
        raise AssertionError("read before it is used")


def test_nothing_is_read_before_it_is_used():
    """Adapters of 14 billion weights are checked by shapes alone."""
    names = {name: name for name in ("a", "b", "c", "d")}
    weights = {f"{name}.weight": Unread(4, 6) for name in names}
    lora = {
        "a.lora_A.weight": Unread(2, 6),
        "a.lora_B.weight": Unread(4, 2),
        "a.dora_scale": Unread(4, 1),
        "b.lokr_w1": Unread(2, 2),
        "b.lokr_w2_a": Unread(2, 1),
        "b.lokr_w2_b": Unread(1, 3),
        "c.hada_w1_a": Unread(4, 2),
        "c.hada_w1_b": Unread(2, 6),
        "c.hada_w2_a": Unread(4, 2),
        "c.hada_w2_b": Unread(2, 6),
        "d.diff": Unread(4, 6),
    }
    merged = merge_lora(merge_lora(weights, lora, names), lora, names, scale=0.5)
    for key in weights:
        assert merged[key].shape == (4, 6)
        with pytest.raises(AssertionError, match="read before it is used"):
            np.asarray(merged[key])
