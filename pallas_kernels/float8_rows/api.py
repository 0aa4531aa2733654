"""Rows for products in FP8: each is made and rounded in one kernel.

XLA makes such rows twice, once for their maxima and once for their values. The kernels
for Hopper GPUs read what a row is made of once, and write FP8 once.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float8e4m3fn

from pallas_kernels.common.arrays import AnyArray
from pallas_kernels.common.batching import fold_mapped_axes
from pallas_kernels.common.device import Device
from pallas_kernels.common.products import Product, check_product, filled
from pallas_kernels.common.sharding import (
    Axes,
    lists_of_maps,
    over_explicit_axes,
    partitioned,
    vary_alike,
)
from pallas_kernels.common.static import jit_once
from pallas_kernels.float8_rows import sm90

# gelu(x) = x * sigmoid(2u) of u = sqrt(2 / pi) (x + 0.044715 x^3).
_LINEAR = 2 * math.sqrt(2 / math.pi)
_CUBIC = 0.044715 * _LINEAR


def gelu_tanh(x: Float[AnyArray, "*axes"]) -> Float[Array, "*axes"]:
    """Applies GELU by its tanh approximation, in float32.

    As a product with a sigmoid: for four numbers in bfloat16 XLA's program for Hopper
    GPUs has 110 instructions, where that of `jax.nn.gelu`, which rounds each operation,
    has 136.
    """
    dtype = jnp.asarray(x).dtype
    wide = jnp.asarray(x, jnp.promote_types(dtype, jnp.float32))
    doubled = wide * (_LINEAR + _CUBIC * jnp.square(wide))
    return (wide * jax.nn.sigmoid(doubled)).astype(dtype)


def layer_norm(x: Float[AnyArray, "*axes E"], eps: float) -> Float[Array, "*axes E"]:
    """Returns zero mean and unit variance over the last axis, in float32."""
    x = jnp.asarray(x, jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + eps)


def gelu_rows(
    product: Product,
) -> tuple[Float8e4m3fn[Array, "*rows K"], Float[Array, "*rows"]]:
    """Finishes a product in float32, applies `gelu_tanh`, and rounds rows to FP8.

    A row is divided by its scale, so that its largest value becomes 448, the largest of
    e4m3. What is not finite makes its row not finite. It has no derivative. Rows may be
    sharded over devices.

    Args:
      product: A product without its scales and bias.

    Returns:
      Values and float32 scales; what they stand for is the product of both.

    Raises:
      ValueError: The kernel does not take such a product on any device: see
        `why_not_in_kernel`. Or its parts do not fit its values.
    """
    _check("gelu_rows", "product", product)
    check_product("product", product, num_rows=len(product.shape) - 1)
    values, *parts = filled(product, num_rows=len(product.shape) - 1)
    scales = (jnp.asarray(x, jnp.float32) for x in parts)
    return _gelu_rows(jnp.asarray(values), *scales)


def norm_rows(
    x: Float[AnyArray, "B T K"],
    factor: Float[AnyArray, "B K"],
    shift: Float[AnyArray, "B K"],
    *,
    eps: float,
) -> tuple[Float8e4m3fn[Array, "B T K"], Float[Array, "B T"]]:
    """Computes `layer_norm(x) * factor + shift` in float32, and rounds rows to FP8.

    Mean and variance are those of a row. The rest is as in `gelu_rows`.

    Args:
      x: Rows to norm.
      factor: Factor of each channel after the norm, for all rows of a batch item.
      shift: Added after that.
      eps: Added to the variance.

    Returns:
      Values and float32 scales; what they stand for is the product of both.

    Raises:
      ValueError: The kernel does not take such rows on any device: see
        `why_not_in_kernel`.
    """
    _check("norm_rows", "x", x)
    modulation = (jnp.asarray(y, jnp.float32) for y in (factor, shift))
    return _norm_rows(jnp.asarray(x), *modulation, eps=eps)


def add_norm_rows(
    x: Float[AnyArray, "B T K"],
    product: Product,
    gate: Float[AnyArray, "B K"] | None,
    factor: Float[AnyArray, "B K"],
    shift: Float[AnyArray, "B K"],
    *,
    eps: float,
) -> tuple[Float[Array, "B T K"], Float8e4m3fn[Array, "B T K"], Float[Array, "B T"]]:
    """Computes `x + gate * product`, and `norm_rows` of it.

    The product is finished and added in float32.

    Args:
      x: Rows to add to.
      product: As many rows.
      gate: Factor of each channel of the product, for all rows of a batch item; None
        for ones.
      factor: As for `norm_rows`, like all arguments below.
      shift: Added after the norm and its factor.
      eps: Added to the variance.

    Returns:
      The sum in the dtype of x; then values and scales of its normed rows.

    Raises:
      ValueError: The kernel does not take such rows on any device: see
        `why_not_in_kernel`. Or the product does not fit x.
    """
    _check("add_norm_rows", "x", x)
    _check("add_norm_rows", "product", product)
    check_product("product", product, num_rows=2)
    if product.shape != x.shape:
        raise ValueError(f"product has shape {product.shape}; x has {x.shape}")
    values, rows, *of_channels = filled(product, num_rows=2)
    factor, shift = (jnp.asarray(y, jnp.float32) for y in (factor, shift))
    gate = jnp.ones_like(factor) if gate is None else jnp.asarray(gate, jnp.float32)
    columns, bias = (gate * jnp.asarray(y) for y in of_channels)
    arrays = (x, values, rows, columns, bias, factor, shift)
    return _add_norm_rows(*map(jnp.asarray, arrays), eps=eps)


def round_rows(
    x: Float[AnyArray, "*rows K"],
) -> tuple[Float8e4m3fn[Array, "*rows K"], Float[Array, "*rows"]]:
    """Rounds rows to FP8 as they are; the rest is as in `gelu_rows`."""
    _check("round_rows", "x", x)
    return _round_rows(jnp.asarray(x))


def why_not_in_kernel(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike, device: Device
) -> str | None:
    """Returns why the kernels do not take such rows on a device, or None.

    Args:
      shape: That of the rows.
      dtype: Of the rows as they are read.
      device: Device that it would run on.
    """
    return device.why_not_hopper() or sm90.rows.why_unsupported(shape, dtype)


def _check(function: str, name: str, x) -> None:
    if cause := sm90.rows.why_unsupported(x.shape, x.dtype):
        raise ValueError(f"{function} cannot take {name}: {cause}")


@jit_once
def _gelu_rows(product, rows, columns, bias):
    lead = lists_of_maps(product.ndim - 1)
    operands = (f"product: {lead} K", f"rows: {lead}", "columns: K", "bias: K")
    axes = Axes(
        operation="GELU of rows in FP8",
        operands=operands,
        results=(f"{lead} K", lead),
    )

    def run(product, rows, *shared):
        flat = rows.reshape(rows.size)
        return _by_rows(sm90.gelu.gelu_rows, product, flat, *shared)

    return _over_devices(run, axes, (product, rows, columns, bias), num_shared=2)


@functools.partial(jit_once, static_argnames=("eps",))
def _norm_rows(x, factor, shift, *, eps: float):
    axes = Axes(
        operation="norm of rows in FP8",
        operands=("x: B N K", "factor: B K", "shift: B K"),
        results=("B N K", "B N"),
    )
    run = functools.partial(_by_rows, functools.partial(sm90.kernel.norm_rows, eps=eps))
    return _over_devices(run, axes, (x, factor, shift), num_shared=0)


@functools.partial(jit_once, static_argnames=("eps",))
def _add_norm_rows(x, product, rows, *of_items, eps: float):
    axes = Axes(
        operation="sum and norm of rows in FP8",
        operands=(
            *("x: B N K", "product: B N K", "rows: B N", "columns: B K"),
            *("bias: B K", "factor: B K", "shift: B K"),
        ),
        results=("B N K", "B N K", "B N"),
    )

    def run(x, product, rows, *of_items):
        kernel = functools.partial(sm90.kernel.add_norm_rows, eps=eps)
        lead, flat = rows.shape, (rows.size, x.shape[-1])
        total, values, scale = kernel(
            x.reshape(flat), product.reshape(flat), rows.reshape(rows.size), *of_items
        )
        return total.reshape(x.shape), values.reshape(x.shape), scale.reshape(lead)

    return _over_devices(run, axes, (x, product, rows, *of_items), num_shared=0)


@jit_once
def _round_rows(x):
    lead = lists_of_maps(x.ndim - 1)
    axes = Axes(
        operation="rounding of rows to FP8",
        operands=(f"x: {lead} K",),
        results=(f"{lead} K", lead),
    )
    run = functools.partial(_by_rows, sm90.kernel.round_rows)
    return _over_devices(run, axes, (x,), num_shared=0)


def _by_rows(kernel: Callable, x, *others):
    """Calls a kernel with all rows of `x` in one axis."""
    lead = x.shape[:-1]
    values, scale = kernel(x.reshape(int(np.prod(lead)), x.shape[-1]), *others)
    return values.reshape(x.shape), scale.reshape(lead)


def _over_devices(run: Callable, axes: Axes, arrays, *, num_shared: int):
    """Calls a function of rows: each device has its own, mapped axes join theirs."""

    def call(*arrays):
        made = fold_mapped_axes(partitioned(run, axes), num_shared=num_shared)
        return tuple(made(*vary_alike(arrays)))

    return over_explicit_axes(
        call, operation=axes.operation, operands=axes.operands, results=axes.results
    )(*arrays)
