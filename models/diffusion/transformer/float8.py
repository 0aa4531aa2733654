"""Linear layers of a transformer in FP8.

A transformer is built with ordinary layers; then those that are not on its list of
layers to leave become `Float8Linear`s. Embeddings, modulation, text projections and the
first and last layers stay as they are: they are few, and errors in them reach all else.
"""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.float8.product import (
    Rounded,
    rounded_activation,
    scaled_product,
    unfinished_product,
)
from models.float8.rows import ScaledRows, quantise_rows
from pallas_kernels.common import Product


class Float8Linear(nnx.Module):
    """A dense layer whose product is in FP8.

    Attributes:
      weight: Rows are output channels, [out, in], as the product wants them.
      weight_scale: One for each output channel, float32.
      bias: Added in float32; None without.
      dtype: Of the output.
      weight_only: Whether the weight alone is in FP8: inputs are rounded to `dtype`.
    """

    def __init__(
        self, rows: ScaledRows, bias: Float[Array, "*layers out"] | None, *, dtype: str
    ) -> None:
        self.weight = nnx.Param(rows.values)
        self.weight_scale = nnx.Param(rows.scale)
        self.bias = None if bias is None else nnx.Param(bias)
        self.dtype = dtype
        self.weight_only = False

    @classmethod
    def of(cls, layer: nnx.Linear) -> "Float8Linear":
        """Rounds a layer's weights; those of a stack have leading axes."""
        bias = None if layer.bias is None else layer.bias[...]
        weight = jnp.swapaxes(layer.kernel[...], -1, -2)
        return cls(quantise_rows(weight), bias, dtype=jnp.dtype(layer.dtype).name)

    def __call__(
        self, *parts: Float[Array, "*axes _"] | Rounded
    ) -> Float[Array, "*axes O"]:
        """Applies the layer to the last axis; see `scaled_product` for several."""
        return scaled_product(
            parts,
            self._rows,
            self._bias,
            dtype=self.dtype,
            weight_only=self.weight_only,
        )

    def unfinished(self, x: Float[Array, "*axes I"] | Rounded) -> Product:
        """Applies the layer but for scales and bias, which its reader applies."""
        return unfinished_product(
            x,
            self._rows,
            self._bias,
            dtype=self.dtype,
            weight_only=self.weight_only,
        )

    def before(
        self,
        activation: Callable[[Array], Array],
        x: Float[Array, "*axes I"] | Rounded,
    ) -> Rounded:
        """Applies the layer, and then an activation, for a layer that rounds inputs."""
        return rounded_activation(
            x, self._rows, self._bias, activation, dtype=self.dtype
        )

    @property
    def _rows(self) -> ScaledRows:
        return ScaledRows(self.weight[...], self.weight_scale[...])

    @property
    def _bias(self) -> Float[Array, " O"] | None:
        return None if self.bias is None else self.bias[...]


def use_float8_linears(model: nnx.Module, *, leave: Collection[str]) -> None:
    """Turns the linear layers of a model into `Float8Linear`s, in place.

    Args:
      model: The model; with `nnx.eval_shape` around, nothing is computed.
      leave: Paths of layers that stay as they are, with dots, or of modules whose
        layers all do.

    Raises:
      ValueError: A path of `leave` leads to no linear layer.
    """
    used = set()
    for parent, name, path in list(_linears(model, "")):
        fitting = [left for left in leave if f"{path}.".startswith(f"{left}.")]
        used.update(fitting)
        if not fitting:
            setattr(parent, name, Float8Linear.of(getattr(parent, name)))
    if unused := sorted(set(leave) - used):
        raise ValueError(f"leave={unused} lead to no linear layer of the model")


def rounds_inputs(layer: nnx.Module) -> bool:
    """Returns whether a layer rounds its inputs to FP8."""
    return isinstance(layer, Float8Linear) and not layer.weight_only


def has_float8_linears(model: Any) -> bool:
    """Returns whether a model has layers in FP8."""
    return any(isinstance(layer, Float8Linear) for _, layer in nnx.iter_modules(model))


def weight_only(model: nnx.Module) -> nnx.Module:
    """Returns a model of the same arrays whose weights alone are in FP8.

    Products take as long as in `dtype`, and the error is that of the weights.
    """
    copy = nnx.merge(*nnx.split(model))
    for _, layer in nnx.iter_modules(copy):
        if isinstance(layer, Float8Linear):
            layer.weight_only = True
    return copy


def _linears(module: nnx.Module, prefix: str) -> Iterator[tuple[nnx.Module, str, str]]:
    """Returns the module that holds each linear layer, its name there, and its path."""
    for name, part in vars(module).items():
        if isinstance(part, nnx.Linear):
            yield module, name, f"{prefix}{name}"
        elif isinstance(part, nnx.Module):
            yield from _linears(part, f"{prefix}{name}.")
