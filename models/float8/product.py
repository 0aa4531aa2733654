"""Products of activations with weights in FP8.

Activations are rounded row by row where they are used, so XLA makes the rounding part
of the operation before: norm and modulation, or GELU. Of layers that read the same
activations, it rounds once. The product's scales and bias are part of the operation
after. The product itself is left in the output's dtype without scales, and on a GPU is
cuBLASLt's, with its default accumulation.

cuBLASLt wants both operands with the inner axis last: weights are [out, in], as
checkpoints store them, and nothing is transposed.

On a CPU the same numbers are multiplied in float32, which is slow. So the operands are
the same bits everywhere, and results differ by how sums are rounded.

A gradient passes as if nothing were rounded ("straight through"). It is that of the
inputs and of the bias; weights in FP8 have none.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from models.float8.rows import FLOAT8, ScaledRows, quantise_rows, widen_rows
from pallas_kernels.common import Device, current_device

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


def scaled_product(
    parts: Sequence[Float[Array | np.ndarray, "*rows _"]],
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
    if reason := why_no_float8(current_device(*parts)):
        raise ValueError(f"{reason}; choose linears='bfloat16'")
    widths = [part.shape[-1] for part in parts]
    if weight.values.ndim != 2 or sum(widths) != weight.values.shape[1]:
        raise ValueError(
            f"parts have {widths} channels; expected as many together as the weight "
            f"of shape {weight.values.shape} has inputs"
        )
    given = tuple(map(jnp.asarray, parts))
    return _product(dtype, given, weight, None if bias is None else jnp.asarray(bias))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(dtype, parts, weight, bias):
    total = None
    for part, values in _pair(parts, weight.values):
        rows = quantise_rows(part)
        raw = _multiply(rows.values, values, jnp.dtype(dtype))
        scaled = raw.astype(jnp.float32) * rows.scale[..., None]
        total = scaled if total is None else total + scaled
    total = total * weight.scale
    if bias is not None:
        total = total + bias.astype(jnp.float32)
    return total.astype(dtype)


def _pair(parts, matrix):
    """Returns each part with the columns of a matrix that it meets."""
    bounds = [0, *itertools.accumulate(part.shape[-1] for part in parts)]
    cuts = (matrix[:, first:last] for first, last in itertools.pairwise(bounds))
    return zip(parts, cuts, strict=True)


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


def _forward(dtype, parts, weight, bias):
    values = jax.tree.map(lambda primal: primal.value, (parts, weight, bias))
    if any(jax.tree.leaves(jax.tree.map(lambda primal: primal.perturbed, weight))):
        raise TypeError(
            "weights in FP8 have no gradient; train with linears='bfloat16', and "
            "round afterwards"
        )
    parts, weight, bias = values
    return _product(dtype, parts, weight, bias), values


def _backward(dtype, saved, cotangent):
    parts, weight, bias = saved
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        cotangent = jnp.zeros(cotangent.shape, cotangent.dtype)
    cotangent = cotangent.astype(jnp.float32)
    of_parts = tuple(
        (cotangent @ columns).astype(part.dtype)
        for part, columns in _pair(parts, widen_rows(weight))
    )
    of_bias = None
    if bias is not None:
        rows = tuple(range(cotangent.ndim - 1))
        of_bias = cotangent.sum(rows).astype(bias.dtype)
    return of_parts, None, of_bias


_product.defvjp(_forward, _backward, symbolic_zeros=True)
