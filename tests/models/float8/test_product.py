"""Products in FP8 against products of the same e4m3 numbers in float64."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from models.float8 import product
from models.float8.product import (
    compiler_options,
    rounded,
    rounded_activation,
    rounded_norm,
    rounded_sum_norm,
    scaled_product,
    why_no_float8,
)
from models.float8.rows import ScaledRows, quantise_rows, widen_rows
from pallas_kernels.common import Device, Product
from tests.float8_rounding import numpy_round
from tests.tolerances import FLOAT8_PRODUCT

CPU = Device(platform="cpu")
H100 = Device(platform="gpu", kind="H100", compute_capability=(9, 0))
L40 = Device(platform="gpu", kind="L40", compute_capability=(8, 9))
A100 = Device(platform="gpu", kind="A100", compute_capability=(8, 0))
TPU = Device(platform="tpu", kind="v5")


def make_problem(dtype=np.float32, rows=(2, 5), inner=48, outer=20):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(*rows, inner)) * np.exp(rng.normal(size=(*rows, 1)))
    weight = rng.normal(size=(outer, inner)).astype(np.float32)
    bias = rng.normal(size=outer).astype(np.float32)
    return x.astype(dtype), weight, bias


def numpy_product(parts, weight, bias):
    rounded = np.concatenate([numpy_round(part) for part in parts], axis=-1)
    return rounded @ numpy_round(weight).T + bias


def relative(got, expected):
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("weight_only", [False, True])
@pytest.mark.parametrize("widths", [(48,), (20, 28)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_match_float64(dtype, widths, weight_only):
    """With weights alone in FP8 activations are rounded to the dtype."""
    x, weight, bias = make_problem(np.dtype(dtype))
    parts = np.split(x, np.cumsum(widths)[:-1], axis=-1)
    got = scaled_product(
        [jnp.asarray(part) for part in parts],
        quantise_rows(jnp.asarray(weight)),
        jnp.asarray(bias),
        dtype=dtype,
        weight_only=weight_only,
    )
    assert got.dtype == dtype
    expected = numpy_product(parts, weight, bias)
    if weight_only:
        expected = x.astype(np.float64) @ numpy_round(weight).T + bias
    error = relative(np.asarray(got, np.float64), expected)
    assert error < FLOAT8_PRODUCT[dtype]


def test_weight_only_products_take_nothing_rounded():
    x, weight, _ = make_problem()
    rows = quantise_rows(jnp.asarray(weight))
    with pytest.raises(ValueError, match="parts are in FP8 already; expected arrays"):
        scaled_product((rounded(x),), rows, dtype="float32", weight_only=True)


def test_parts_are_rounded_by_themselves():
    """A part of small values keeps its precision beside one of large values."""
    x, weight, _ = make_problem()
    small, large = x[..., :24] / 1e5, x[..., 24:]
    rows = quantise_rows(jnp.asarray(weight))
    both = scaled_product((small, large), rows, dtype="float32")
    alone = scaled_product((np.zeros_like(small), large), rows, dtype="float32")
    expected = numpy_round(small) @ numpy_round(weight)[:, :24].T
    rounding = 4 * np.abs(np.asarray(alone)).max() * 2.0**-24
    np.testing.assert_allclose(both - alone, expected, rtol=0, atol=rounding)
    assert np.abs(expected).max() > 20 * rounding


def make_network():
    """Activations, two weights and two biases of a feed-forward network."""
    x, first, first_bias = make_problem()
    rng = np.random.default_rng(2)
    second = rng.normal(size=(9, 20)).astype(np.float32)
    second_bias = rng.normal(size=9).astype(np.float32)
    return x, (first, first_bias), (second, second_bias)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_networks_match_float64(dtype):
    """What lies between the products is rounded once, from float32."""
    x, (first, first_bias), (second, second_bias) = make_network()
    first_rows, second_rows = (quantise_rows(jnp.asarray(w)) for w in (first, second))

    @jax.jit
    def apply(x):
        hidden = rounded_activation(x, first_rows, first_bias, jnp.tanh, dtype=dtype)
        return scaled_product((hidden,), second_rows, second_bias, dtype=dtype)

    product = numpy_round(x) @ numpy_round(first).T
    if dtype == "bfloat16":  # of the unscaled product; a scale is no power of two
        scale = np.abs(x).max(axis=-1, keepdims=True) / 448
        scale = scale * np.abs(first).max(axis=1) / 448
        product = (product / scale).astype(ml_dtypes.bfloat16).astype(float) * scale
    hidden = np.tanh(product + first_bias)
    expected = numpy_product([hidden], second, second_bias)
    error = relative(np.asarray(apply(x), np.float64), expected)
    assert error < FLOAT8_PRODUCT[dtype]


def test_gradients_of_networks_are_those_of_their_parts():
    x, (first, first_bias), (second, second_bias) = make_network()
    first_rows, second_rows = (quantise_rows(jnp.asarray(w)) for w in (first, second))

    def apart(x, bias):
        hidden = jnp.tanh(scaled_product((x,), first_rows, bias, dtype="float32"))
        out = scaled_product((hidden,), second_rows, second_bias, dtype="float32")
        return jnp.sin(out).sum()

    def together(x, bias):
        hidden = rounded_activation(x, first_rows, bias, jnp.tanh, dtype="float32")
        out = scaled_product((hidden,), second_rows, second_bias, dtype="float32")
        return jnp.sin(out).sum()

    expected, got = (
        jax.jit(jax.grad(f, argnums=(0, 1)))(x, first_bias) for f in (apart, together)
    )
    for name, one, other in zip(("x", "bias"), got, expected, strict=True):
        assert np.abs(other).max() > 0.1, name
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("weight_only", [False, True])
@pytest.mark.parametrize("has_bias", [True, False])
def test_gradients_pass_as_if_nothing_were_rounded(has_bias, weight_only):
    x, weight, bias = make_problem()
    rows = quantise_rows(jnp.asarray(weight))
    pulled = np.random.default_rng(1).normal(size=(2, 5, 20)).astype(np.float32)

    def loss(x, bias):
        out = scaled_product(
            (x,),
            rows,
            bias if has_bias else None,
            dtype="float32",
            weight_only=weight_only,
        )
        return (out * pulled).sum()

    of_x, of_bias = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, bias)
    np.testing.assert_allclose(of_x, pulled @ numpy_round(weight), rtol=2e-5, atol=1e-5)
    expected = pulled.sum((0, 1)) if has_bias else np.zeros(20)
    np.testing.assert_allclose(of_bias, expected, rtol=1e-5, atol=1e-6)


def test_gradients_pass_through_scans_and_checkpoints():
    x, _, _ = make_problem(inner=20)
    stack = jax.random.normal(jax.random.key(0), (3, 20, 20))
    rows = quantise_rows(stack)

    def layer(x, rows):
        return scaled_product((x,), ScaledRows(*rows), dtype="float32"), None

    def run(x, layer):
        return jax.lax.scan(layer, x, tuple(rows))[0].sum()

    expected = np.ones(20)
    for weight in reversed(np.asarray(stack)):
        expected = expected @ numpy_round(weight)
    for body in (layer, jax.checkpoint(layer)):
        got = jax.grad(run)(jnp.asarray(x), body)
        np.testing.assert_allclose(
            got, np.broadcast_to(expected, x.shape), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("weight_only", [False, True])
def test_weights_in_fp8_have_no_gradient(weight_only):
    x, weight, _ = make_problem()
    rows = quantise_rows(jnp.asarray(weight))

    def loss(values):
        return scaled_product(
            (x,),
            ScaledRows(values, rows.scale),
            dtype="float32",
            weight_only=weight_only,
        ).sum()

    with pytest.raises(TypeError, match="no gradient; train with linears='bfloat16'"):
        jax.grad(loss)(rows.values)


def test_vmap_is_a_loop():
    x, weight, bias = make_problem()
    rows = quantise_rows(jnp.asarray(weight))

    def apply(x):
        return scaled_product((x,), rows, bias, dtype="float32")

    looped = np.stack([apply(item) for item in x])
    np.testing.assert_allclose(jax.vmap(apply)(x), looped, rtol=1e-6, atol=1e-6)


def test_calls_alike_compile_once():
    _, weight, bias = make_problem()
    rows = quantise_rows(jnp.asarray(weight))
    traces = []

    @jax.jit
    def apply(x, rows):
        traces.append(x)
        return scaled_product((x,), rows, bias, dtype="float32")

    for seed in range(3):
        apply(np.random.default_rng(seed).normal(size=(3, 48)).astype(np.float32), rows)
    assert len(traces) == 1


def test_what_is_rounded_for_several_products_is_rounded_once():
    """In the program as it is written, whatever a compiler makes of it."""
    x, weight, _ = make_problem(rows=(7, 11))
    stack = [quantise_rows(jnp.asarray(weight + i)) for i in range(3)]

    def project(x, stack):
        shared = rounded(x)
        return [scaled_product((shared,), rows, dtype="float32") for rows in stack]

    text = jax.jit(project).lower(jnp.asarray(x), stack).as_text()
    made = re.findall(r"stablehlo.convert .*-> tensor<7x11x48xf8E4M3FN>", text)
    assert len(made) == 1


def numpy_norm(x, factor, shift, eps):
    x = np.asarray(x, np.float64)
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + eps) * factor + shift


def make_modulation(shape):
    rng = np.random.default_rng(3)
    return [rng.normal(size=shape).astype(np.float32) for _ in range(2)]


@pytest.mark.parametrize("tokens", [1, 5], ids=["of-all", "of-each"])
def test_normed_inputs_match_float64(tokens):
    x, weight, bias = make_problem()
    factor, shift = make_modulation((2, tokens, 48))
    normed = rounded_norm(*map(jnp.asarray, (x, factor, shift)), eps=1e-3)
    assert normed.shape == x.shape
    rows = quantise_rows(jnp.asarray(weight))
    got = scaled_product((normed,), rows, bias, dtype="float32")
    expected = numpy_product([numpy_norm(x, factor, shift, 1e-3)], weight, bias)
    assert relative(np.asarray(got, np.float64), expected) < FLOAT8_PRODUCT["float32"]


def test_gradients_of_normed_inputs_are_those_of_the_norm():
    """Those of x, factor and shift, by differences of what is not rounded."""
    x, weight, _ = make_problem(rows=(1, 3))
    arrays = [x, *make_modulation((1, 1, 48))]
    rows = quantise_rows(jnp.asarray(weight))
    pulled = np.random.default_rng(1).normal(size=(1, 3, 20)).astype(np.float32)

    def loss(*arrays):
        normed = rounded_norm(*arrays, eps=1e-3)
        return (scaled_product((normed,), rows, dtype="float32") * pulled).sum()

    got = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*map(jnp.asarray, arrays))
    weights = pulled @ numpy_round(weight)

    def moved(index, channel, distance):
        there = [np.array(array, np.float64) for array in arrays]
        there[index][0, 0, channel] += distance
        return (numpy_norm(*there, 1e-3) * weights).sum()

    for index, gradient in enumerate(got):
        for channel in (0, 17):
            ends = [moved(index, channel, distance) for distance in (1e-4, -1e-4)]
            slope = (ends[0] - ends[1]) / 2e-4
            np.testing.assert_allclose(
                gradient[0, 0, channel], slope, rtol=1e-3, atol=1e-3
            )


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("in_kernel", [False, True])
def test_sums_are_added_and_normed(gated, in_kernel, monkeypatch):
    """Sums, normed rows and gradients, made by XLA or by what stands for a kernel."""
    rng = np.random.default_rng(0)
    x, values = (rng.normal(size=(2, 3, 16)).astype(np.float32) for _ in range(2))
    rows, columns, bias, gate, factor, shift = (
        jnp.asarray(rng.normal(size=size), jnp.float32)
        for size in ((2, 3), 16, 16, (2, 1, 16), (2, 1, 16), (1, 1, 16))
    )
    parts = Product(values, rows, columns, bias)
    gate = gate if gated else None

    def plain(x, values):
        y = values * rows[..., None] * columns + bias
        return x + (y if gate is None else gate * y)

    def kernel(x, added, *of_items, eps):
        total = plain(x, added.values)
        factors = (y[:, None] for y in of_items[1:])
        return total, *quantise_rows(product_norm((total, *factors), eps=eps))

    product_norm = product._norm
    if in_kernel:
        monkeypatch.setattr(product, "current_device", lambda *_: H100)
        monkeypatch.setattr(product, "why_not_in_kernel", lambda *_: None)
        monkeypatch.setattr(product, "add_norm_rows", kernel)
    total, rounded = rounded_sum_norm(
        jnp.asarray(x), parts, gate, factor, shift, eps=1e-3
    )
    expected = np.asarray(plain(x, values), np.float64)
    np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-5)
    centred = expected - expected.mean(-1, keepdims=True)
    normed = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-3)
    normed = normed * factor + shift
    error = np.abs(np.asarray(widen_rows(rounded.rows), np.float64) - normed)
    assert (error <= np.abs(normed).max(-1, keepdims=True) / 16).all()

    def loss(x, values):
        total, rounded = rounded_sum_norm(
            x, parts._replace(values=values), gate, factor, shift, eps=1e-3
        )
        return (total * weights).sum() + (rounded.make(rounded.arrays) * weights).sum()

    weights = rng.normal(size=x.shape).astype(np.float32)

    def same(x, values):
        total = plain(x, values)
        centred = total - total.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        normed = centred / jnp.sqrt(variance + 1e-3) * factor + shift
        return ((total + normed) * weights).sum()

    got, plainly = (
        jax.grad(f, (0, 1))(jnp.asarray(x), jnp.asarray(values)) for f in (loss, same)
    )
    for a, b in zip(got, plainly, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_widths_must_fit():
    x, weight, _ = make_problem()
    rows = quantise_rows(jnp.asarray(weight))
    with pytest.raises(ValueError, match=r"parts have \[47\] channels; expected"):
        scaled_product((x[..., 1:],), rows, dtype="float32")


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        (CPU, None),
        (H100, None),
        (L40, None),
        (A100, r"need an NVIDIA GPU .* 8\.9 .* not gpu A100 \(sm_80\)"),
        (TPU, r"need an NVIDIA GPU .*, not tpu v5$"),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_devices_without_fp8_are_named(device, reason, monkeypatch):
    found = why_no_float8(device)
    assert (found is None) == (reason is None)
    if reason is None:
        return
    assert re.search(reason, str(found))
    monkeypatch.setattr(product, "current_device", lambda *_: device)
    x, weight, _ = make_problem()
    with pytest.raises(ValueError, match="choose linears='bfloat16'"):
        scaled_product((x,), quantise_rows(jnp.asarray(weight)), dtype="bfloat16")


@pytest.mark.parametrize("device", [CPU, H100], ids=lambda device: device.platform)
def test_only_programs_with_fp8_on_a_gpu_have_options(device, monkeypatch):
    monkeypatch.setattr(product, "current_device", lambda *_: device)
    rows = quantise_rows(jnp.ones((2, 3)))
    assert compiler_options({"a": rows.scale}) == {}
    expected = {} if device is CPU else {"xla_gpu_enable_triton_gemm": False}
    assert compiler_options({"a": [rows.scale, rows.values]}) == expected


def test_the_compiler_knows_the_options(monkeypatch):
    """A name that XLA does not know would be an error on GPUs alone."""
    monkeypatch.setattr(product, "current_device", lambda *_: H100)
    options = compiler_options(quantise_rows(jnp.ones((2, 3))))
    compiled = jax.jit(jnp.sin).lower(1.0).compile(compiler_options=options)
    assert float(compiled(0.0)) == 0.0
