"""Products of activations with weights in FP8.

Activations are rounded row by row where they are used, so XLA makes the rounding part
of the operation before: norm and modulation, or GELU. Of layers that read the same
activations, it rounds once. The product's scales and bias are part of the operation
after. The product itself is left in the output's dtype without scales, and on a GPU is
cuBLASLt's, with its default accumulation. Between two products of a feed-forward
network nothing but the first product is written out; see `unscaled_product`.

cuBLASLt wants both operands with the inner axis last: weights are [out, in], as
checkpoints store them, and nothing is transposed.

On a CPU the same numbers are multiplied in float32, which is slow. So the operands are
the same bits everywhere, and results differ by how sums are rounded.

A gradient passes as if nothing were rounded ("straight through"). It is that of the
inputs and of the bias; weights in FP8 have none.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from models.float8.rows import FLOAT8, ScaledRows, quantise_made, quantise_rows
from pallas_kernels.common import Device, current_device, warn_once
from pallas_kernels.float8_rows import gelu_rows, gelu_tanh, why_not_in_kernel

_FIRST_CAPABILITY = (8, 9)  # Ada; Hopper is (9, 0)

# Triton's products of FP8 are slower than cuBLASLt's, and XLA tries them out for
# minutes before it finds that.
_GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


def why_no_float8(device: Device) -> str | None:
    """Returns why there are no products in FP8 on a device, or None if there are.

    A CPU has them: slow ones, with the rounding of a GPU's.
    """
    if device.platform == "cpu" or has_fast_float8(device):
        return None
    return (
        "products in FP8 need an NVIDIA GPU of compute capability 8.9 or more (Ada, "
        f"Hopper), not {device.platform} {device.kind}{_named(device)}"
    )


def has_fast_float8(device: Device) -> bool:
    """Returns whether a device multiplies FP8 faster than other numbers."""
    capability = device.compute_capability
    return capability is not None and capability >= _FIRST_CAPABILITY


def _named(device: Device) -> str:
    capability = device.compute_capability
    return "" if capability is None else f" (sm_{capability[0]}{capability[1]})"


def compiler_options(arrays: Any) -> dict[str, bool]:
    """Returns the options to compile a program with that takes these arrays.

    Give them to `jax.jit` or to `compile` of what it has lowered. There are none
    without weights in FP8, and none for a CPU.

    Args:
      arrays: A tree of arrays, such as the state of a model.
    """
    leaves = jax.tree.leaves(arrays)
    if not any(getattr(leaf, "dtype", None) == FLOAT8 for leaf in leaves):
        return {}
    on_gpu = current_device(*leaves).platform == "gpu"
    return dict(_GPU_OPTIONS) if on_gpu else {}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Unscaled:
    """A product that what reads it scales, and applies an activation to.

    Attributes:
      product: In the dtype that products have.
      rows: Scales of its rows.
      columns: Scales of its columns.
      bias: Added after scaling.
      activation: Applied at last, in float32.
    """

    product: Float[Array, "*rows K"]
    rows: Float[Array, "*rows"]
    columns: Float[Array, " K"]
    bias: Float[Array, " K"] | None
    activation: Callable[[Array], Array]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the product."""
        return self.product.shape


Part = Float[Array | np.ndarray, "*rows _"] | Unscaled


def scaled_product(
    parts: Sequence[Part],
    weight: ScaledRows,
    bias: Float[Array | np.ndarray, " out"] | None = None,
    *,
    dtype: str,
) -> Float[Array, "*rows out"]:
    """Multiplies activations with a weight in FP8; adds a bias.

    Args:
      parts: The activations; several lie side by side along the inner axis, without
        becoming one array. Each is rounded by itself.
      weight: Rows are output channels, [out, in].
      bias: Is added in float32.
      dtype: Of the result. The product has it, too, before it is scaled.

    Returns:
      The result in `dtype`.

    Raises:
      TypeError: A gradient of the weight is asked for.
      ValueError: The device has no products in FP8, or widths do not fit.
    """
    _check(parts, weight)
    start, total = 0, None
    for part in parts:
        stop = start + part.shape[-1]
        product, rows = _multiply_part(part, weight.values[:, start:stop], dtype)
        scaled = product.astype(jnp.float32) * rows[..., None]
        start, total = stop, scaled if total is None else total + scaled
    assert total is not None, "checked"
    total = total * weight.scale
    return (total if bias is None else total + _float32(bias)).astype(dtype)


def unscaled_product(
    x: Part,
    weight: ScaledRows,
    bias: Float[Array | np.ndarray, " out"] | None,
    activation: Callable[[Array], Array],
    *,
    dtype: str,
) -> Unscaled:
    """Multiplies activations with a weight in FP8 for another such product to read.

    What the two do in between (scales, bias, activation, maxima and rounding) is one
    kernel on Hopper GPUs if the activation is `pallas_kernels.float8_rows.gelu_tanh`.
    Elsewhere it is computed twice, once for the maxima. Else its result would be
    written out and read again, which takes longer, and as much memory again.

    Takes and raises what `scaled_product` does.
    """
    _check([x], weight)
    product, rows = _multiply_part(x, weight.values, dtype)
    return Unscaled(
        product=product,
        rows=rows,
        columns=weight.scale,
        bias=None if bias is None else jnp.asarray(bias),
        activation=activation,
    )


def _check(parts: Sequence[Part], weight: ScaledRows) -> None:
    if reason := why_no_float8(current_device(*parts)):
        raise ValueError(f"{reason}; choose linears='bfloat16'")
    widths = [part.shape[-1] for part in parts]
    if weight.values.ndim != 2 or not widths or sum(widths) != weight.values.shape[1]:
        raise ValueError(
            f"parts have {widths} channels; expected as many together as the weight "
            f"of shape {weight.values.shape} has inputs"
        )


def _multiply_part(part: Part, values: Array, dtype: str) -> tuple[Array, Array]:
    """Rounds activations; returns the product without scales, and theirs."""
    if isinstance(part, Unscaled):
        arrays = part.product, part.rows, part.columns, part.bias
        return _product(part.activation, dtype, arrays, values)
    return _product(None, dtype, jnp.asarray(part), values)


def _float32(x):
    return jnp.asarray(x).astype(jnp.float32)


def _widen(activation, arrays):
    """Applies scales, bias and activation of an `Unscaled`, in float32."""
    product, rows, columns, bias = arrays
    x = _float32(product) * rows[..., None] * columns
    return activation(x if bias is None else x + _float32(bias))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(activation, dtype, arrays, values):
    """Returns a product without scales, and those of its rows.

    Arrays are those of an `Unscaled` with this activation; with None, the rows.
    """
    rows = quantise_rows(arrays) if activation is None else _finish(activation, arrays)
    return _multiply(rows.values, values, jnp.dtype(dtype)), rows.scale


def _finish(activation, arrays) -> ScaledRows:
    """Rounds what an `Unscaled` stands for: in a kernel where there is one."""
    product, *_ = arrays
    device = current_device(product)
    if activation is gelu_tanh and device.is_hopper:
        cause = why_not_in_kernel(product.shape, product.dtype, device)
        if cause is None:
            return ScaledRows(*gelu_rows(*arrays))
        warn_once(f"GELU and its rounding to FP8 run on XLA, slower: {cause}")
    return quantise_made(functools.partial(_widen, activation), arrays)


def _multiply(rows, columns, dtype):
    """Returns rows times columns, both with the inner axis last, in `dtype`."""
    precision, sums = None, dtype
    if current_device(rows).platform == "cpu":
        rows, columns = (x.astype(jnp.float32) for x in (rows, columns))
        precision, sums = jax.lax.Precision.HIGHEST, jnp.float32
    axes = (((rows.ndim - 1,), (1,)), ((), ()))
    product = jax.lax.dot_general(
        rows, columns, axes, precision=precision, preferred_element_type=sums
    )
    return product.astype(dtype)


def _forward(activation, dtype, arrays, values):
    if values.perturbed:
        raise TypeError(
            "weights in FP8 have no gradient; train with linears='bfloat16', and "
            "round afterwards"
        )
    arrays = jax.tree.map(lambda primal: primal.value, arrays)
    product, scale = _product(activation, dtype, arrays, values.value)
    return (product, scale), (arrays, values.value, scale)


def _backward(activation, dtype, saved, cotangents):
    """Pulls back as if nothing were rounded; scales are constants."""
    del dtype
    arrays, values, scale = saved
    of_product, _ = cotangents
    if isinstance(of_product, jax.custom_derivatives.SymbolicZero):
        return jax.tree.map(jnp.zeros_like, arrays), None
    of_rows = _float32(of_product) / scale[..., None] @ _float32(values)
    if activation is None:
        return of_rows.astype(arrays.dtype), None
    widen = functools.partial(_widen, activation)
    return *jax.vjp(widen, arrays)[1](of_rows), None


_product.defvjp(_forward, _backward, symbolic_zeros=True)
