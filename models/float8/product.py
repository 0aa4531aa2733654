"""Products of activations with weights in FP8.

Activations are rounded row by row as part of the operation that makes them: norm and
modulation, or GELU. `Rounded` is what several layers read. The product's scales and
bias are part of the operation after. The product itself is left in the output's dtype
without scales, and on a GPU is cuBLASLt's, with its default accumulation. Between two
products of a feed-forward network nothing but the first product is written out; see
`rounded_activation`.

cuBLASLt wants both operands with the inner axis last: weights are [out, in], as
checkpoints store them, and nothing is transposed.

On a CPU the same numbers are multiplied in float32, which is slow. So the operands are
the same bits everywhere, and results differ by how sums are rounded.

A product may be of weights in FP8 alone ("weight-only"): activations keep the dtype of
the output, and weights are widened to it, which changes none of them.

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
from pallas_kernels.common import Device, Product, current_device, warn_once
from pallas_kernels.float8_rows import (
    add_norm_rows,
    gelu_rows,
    gelu_tanh,
    layer_norm,
    norm_rows,
    round_rows,
    why_not_in_kernel,
)

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
class Rounded:
    """Activations in FP8, for one product or for several.

    Attributes:
      rows: Their values and scales. Nothing has a derivative by them.
      arrays: What they were made of: gradients pass to these.
      make: Makes the activations of `arrays`, in float32.
    """

    rows: ScaledRows
    arrays: Any
    make: Callable[[Any], Array]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the activations."""
        return self.rows.values.shape


Part = Float[Array | np.ndarray, "*rows _"] | Rounded


def rounded(x: Float[Array | np.ndarray, "*rows K"]) -> Rounded:
    """Rounds activations row by row."""
    x = jnp.asarray(x)
    rows = _in_kernel(round_rows, x)
    if rows is None:
        rows = quantise_rows(jax.lax.stop_gradient(x))
    return Rounded(rows=rows, arrays=x, make=_float32)


def rounded_norm(
    x: Float[Array, "B T E"],
    factor: Float[Array, "#B _ E"],
    shift: Float[Array, "#B _ E"],
    *,
    eps: float,
) -> Rounded:
    """Computes `layer_norm(x) * factor + shift` in float32, and rounds it row by row.

    Norm, modulation, maxima and rounding are one kernel on Hopper GPUs if all tokens of
    an item have the same modulation. Elsewhere XLA reads x twice.

    Args:
      x: Tokens.
      factor: Of each channel, of all tokens or of each.
      shift: Likewise.
      eps: Added to the variance.
    """
    make = functools.partial(_norm, eps=eps)
    arrays = (x, factor, shift)
    rows, of_items = None, _of_items((x.shape[0], x.shape[-1]), factor, shift)
    if of_items is not None:
        rows = _in_kernel(functools.partial(norm_rows, eps=eps), x, *of_items)
    if rows is None:
        rows = quantise_rows(jax.lax.stop_gradient(make(arrays)))
    return Rounded(rows=rows, arrays=arrays, make=make)


def rounded_sum_norm(
    x: Float[Array, "B T E"],
    product: Product,
    gate: Float[Array, "#B _ E"] | None,
    factor: Float[Array, "#B _ E"],
    shift: Float[Array, "#B _ E"],
    *,
    eps: float,
) -> tuple[Float[Array, "B T E"], Rounded]:
    """Computes `x + gate * product`, and `rounded_norm` of the sum.

    Both are one kernel where `rounded_norm` is. Elsewhere XLA writes the sum, and reads
    it twice.

    Args:
      x: Tokens, the residual stream.
      product: What is added to it, of as many tokens.
      gate: Of each channel of the product, of all tokens or of each; None for none.
      factor: As for `rounded_norm`, like all arguments below.
      shift: Likewise.
      eps: Added to the variance.
    """
    of_items = _of_items((x.shape[0], x.shape[-1]), gate, factor, shift)
    made = None
    if of_items is not None:
        made = _call_kernel(
            functools.partial(add_norm_rows, eps=eps), x, product, *of_items
        )
    if made is None:
        total = add_gated(x, product, gate)
        return total, rounded_norm(total, factor, shift, eps=eps)
    total, *rows = made
    total = _known_sum((x, product, gate), total)
    make = functools.partial(_norm, eps=eps)
    rounded = Rounded(rows=ScaledRows(*rows), arrays=(total, factor, shift), make=make)
    return total, rounded


def add_gated(
    x: Float[Array, "B T E"], product: Product, gate: Float[Array, "#B _ E"] | None
) -> Float[Array, "B T E"]:
    """Returns `x + gate * product`, computed in float32, in the dtype of x."""
    y = product.float32()
    return (_float32(x) + (y if gate is None else gate * y)).astype(x.dtype)


def rounded_activation(
    x: Part,
    weight: ScaledRows,
    bias: Float[Array | np.ndarray, " out"] | None,
    activation: Callable[[Array], Array],
    *,
    dtype: str,
) -> Rounded:
    """Multiplies activations with a weight in FP8, and rounds for the next product.

    What is in between (scales, bias, activation, maxima and rounding) is one kernel on
    Hopper GPUs if the activation is `pallas_kernels.float8_rows.gelu_tanh`. Elsewhere
    it is computed twice, once for the maxima. Else its result would be written out and
    read again, which takes longer, and as much memory again.

    Takes and raises what `scaled_product` does.
    """
    product = unfinished_product(x, weight, bias, dtype=dtype)
    make = functools.partial(_activate, activation)
    rows = _in_kernel(gelu_rows, product) if activation is gelu_tanh else None
    if rows is None:
        rows = quantise_made(make, jax.lax.stop_gradient(product))
    return Rounded(rows=rows, arrays=product, make=make)


def unfinished_product(
    part: Part,
    weight: ScaledRows,
    bias: Float[Array | np.ndarray, " out"] | None = None,
    *,
    dtype: str,
    weight_only: bool = False,
) -> Product:
    """Multiplies activations with a weight in FP8, for a reader that finishes it.

    Takes and raises what `scaled_product` does.
    """
    _check([part], weight, weight_only)
    values, scale = _multiply_part(part, weight.values, dtype, weight_only)
    return Product(values, scale, weight.scale, bias)


def scaled_product(
    parts: Sequence[Part],
    weight: ScaledRows,
    bias: Float[Array | np.ndarray, " out"] | None = None,
    *,
    dtype: str,
    weight_only: bool = False,
) -> Float[Array, "*rows out"]:
    """Multiplies activations with a weight in FP8; adds a bias.

    Args:
      parts: The activations; several lie side by side along the inner axis, without
        becoming one array. Each is rounded by itself.
      weight: Rows are output channels, [out, in].
      bias: Is added in float32.
      dtype: Of the result. The product has it, too, before it is scaled.
      weight_only: Whether activations are not rounded to FP8, but to `dtype`.

    Returns:
      The result in `dtype`.

    Raises:
      TypeError: A gradient of the weight is asked for.
      ValueError: The device has no products in FP8, widths do not fit, or a part is in
        FP8 where only the weight may be.
    """
    if len(parts) == 1:
        return unfinished_product(
            parts[0], weight, bias, dtype=dtype, weight_only=weight_only
        ).finished()
    _check(parts, weight, weight_only)
    start, total = 0, None
    for part in parts:
        stop = start + part.shape[-1]
        values = weight.values[:, start:stop]
        product, scale = _multiply_part(part, values, dtype, weight_only)
        scaled = Product(product, rows=scale).float32()
        start, total = stop, scaled if total is None else total + scaled
    assert total is not None, "checked"
    total = total * weight.scale
    return (total if bias is None else total + _float32(bias)).astype(dtype)


def _check(parts: Sequence[Part], weight: ScaledRows, weight_only: bool) -> None:
    if weight_only and any(isinstance(part, Rounded) for part in parts):
        raise ValueError(
            "parts are in FP8 already; expected arrays, for weight_only=True rounds no "
            "activations"
        )
    arrays = [p.rows.values if isinstance(p, Rounded) else p for p in parts]
    if reason := why_no_float8(current_device(*arrays)):
        raise ValueError(f"{reason}; choose linears='bfloat16'")
    widths = [part.shape[-1] for part in parts]
    if weight.values.ndim != 2 or not widths or sum(widths) != weight.values.shape[1]:
        raise ValueError(
            f"parts have {widths} channels; expected as many together as the weight "
            f"of shape {weight.values.shape} has inputs"
        )


def _in_kernel(
    kernel: Callable[..., Any], x: Array | Product, *others: Any
) -> ScaledRows | None:
    """Makes and rounds rows in a kernel; None where it does not run."""
    made = _call_kernel(kernel, x, *others)
    return None if made is None else ScaledRows(*made)


def _call_kernel(kernel: Callable[..., Any], x: Array | Product, *others: Any) -> Any:
    """Calls a kernel that makes rows like x; None where it does not run."""
    device = current_device(*jax.tree.leaves(x))
    if not device.is_hopper:
        return None
    if cause := why_not_in_kernel(x.shape, x.dtype, device):
        warn_once(f"rounding to FP8 runs on XLA, slower: {cause}")
        return None
    return kernel(*jax.lax.stop_gradient((x, *others)))


def _of_items(size: tuple[int, int], *arrays: Array | None) -> Any:
    """Returns what all tokens of an item have, [B, E]; None if tokens differ."""
    if any(x is not None and x.shape[1] != 1 for x in arrays):
        return None
    return [None if x is None else jnp.broadcast_to(x[:, 0], size) for x in arrays]


def _multiply_part(
    part: Part, values: Array, dtype: str, weight_only: bool
) -> tuple[Array, Array | None]:
    """Returns the product without scales, and scales of rows; rounds what is not."""
    if weight_only:
        assert not isinstance(part, Rounded), "checked"
        x = jnp.asarray(part)
        rows = jax.lax.stop_gradient(x.astype(dtype))
        return _product(_float32, dtype, rows, None, x, values), None
    if not isinstance(part, Rounded):
        part = rounded(part)
    rows, scale = part.rows
    return _product(part.make, dtype, rows, scale, part.arrays, values), scale


def _float32(x):
    return jnp.asarray(x).astype(jnp.float32)


def _activate(activation, product):
    """Finishes a product and applies an activation, in float32."""
    return activation(product.float32())


def _norm(arrays, *, eps):
    x, factor, shift = map(_float32, arrays)
    return layer_norm(x, eps) * factor + shift


@jax.custom_vjp
def _known_sum(arrays, total):
    """Returns the sum of `add_gated`, which a kernel has made of its arguments."""
    del arrays
    return total


_known_sum.defvjp(
    lambda arrays, total: (total, arrays),
    lambda arrays, moved: (*jax.vjp(lambda a: add_gated(*a), arrays)[1](moved), None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(make, dtype, rows, scale, arrays, values):
    """Returns rows times values, without scales.

    Rows are what `make` makes of arrays, over a scale of each row or None, rounded:
    nothing here reads the arrays.
    """
    del make, scale, arrays
    return _multiply(rows, values, jnp.dtype(dtype))


def _multiply(rows, columns, dtype):
    """Returns rows times columns, both with the inner axis last, in `dtype`."""
    precision, sums = None, dtype
    columns = columns.astype(rows.dtype)  # wider, if weights alone are in FP8
    if current_device(rows).platform == "cpu":
        rows, columns = (x.astype(jnp.float32) for x in (rows, columns))
        precision, sums = jax.lax.Precision.HIGHEST, jnp.float32
    axes = (((rows.ndim - 1,), (1,)), ((), ()))
    product = jax.lax.dot_general(
        rows, columns, axes, precision=precision, preferred_element_type=sums
    )
    return product.astype(dtype)


def _forward(make, dtype, rows, scale, arrays, values):
    if values.perturbed:
        raise TypeError(
            "weights in FP8 have no gradient; train with linears='bfloat16', and "
            "round afterwards"
        )
    rows, scale, arrays = jax.tree.map(lambda p: p.value, (rows, scale, arrays))
    product = _product(make, dtype, rows, scale, arrays, values.value)
    return product, (scale, arrays, values.value)


def _backward(make, dtype, saved, cotangent):
    """Pulls back as if nothing were rounded; scales are constants."""
    del dtype
    scale, arrays, values = saved
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return None, None, jax.tree.map(jnp.zeros_like, arrays), None
    of_product = _float32(cotangent)
    if scale is not None:
        of_product /= scale[..., None]
    (of_arrays,) = jax.vjp(make, arrays)[1](of_product @ _float32(values))
    return None, None, of_arrays, None


_product.defvjp(_forward, _backward, symbolic_zeros=True)
