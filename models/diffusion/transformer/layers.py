"""Layers that transformers share, of plain sizes and dtypes.

Norms are float32 inside and out; linear layers compute in the dtype they are given.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from models.diffusion.transformer.float8 import Float8Linear, rounds_inputs
from models.float8.product import (
    Rounded,
    add_gated,
    rounded,
    rounded_norm,
    rounded_sum_norm,
)
from pallas_kernels.common import Product
from pallas_kernels.float8_rows import layer_norm

# What enters a linear layer, `[B, T, E]`: in its dtype, or in FP8.
Activations = Float[Array, "B _ _"] | Rounded

# The initialisation of most linear layers in the original codes of all families.
XAVIER_UNIFORM = nnx.initializers.xavier_uniform()


def linear(
    in_features: int,
    out_features: int,
    *,
    dtype: str,
    param_dtype: str,
    rngs: nnx.Rngs,
    use_bias: bool = True,
    kernel_init: Callable = XAVIER_UNIFORM,
) -> Any:
    """Returns a dense layer that computes in `dtype`.

    It is an `nnx.Linear` until it becomes a `Float8Linear`, which takes what is in FP8,
    too.
    """
    return nnx.Linear(
        in_features,
        out_features,
        use_bias=use_bias,
        dtype=jnp.dtype(dtype),
        param_dtype=jnp.dtype(param_dtype),
        kernel_init=kernel_init,
        rngs=rngs,
    )


@runtime_checkable
class HasWidth(Protocol):
    """A configuration of a model with one width."""

    @property
    def dim(self) -> int:
        """Width of the residual stream."""

    @property
    def dtype(self) -> str:
        """Of matrix products."""

    @property
    def param_dtype(self) -> str:
        """Of stored parameters."""


def projection(config: HasWidth, rngs: nnx.Rngs) -> Callable[[], Any]:
    """Returns a function that makes linear layers from a model's width to the same."""
    return functools.partial(
        linear,
        config.dim,
        config.dim,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        rngs=rngs,
    )


def unfinished(layer: nnx.Linear | Float8Linear, x: Activations) -> Product:
    """Applies a layer but for its bias, and scales in FP8, which its reader applies."""
    if isinstance(layer, Float8Linear):
        return layer.unfinished(x)
    assert not isinstance(x, Rounded), "see `modulated_norm`"
    values = x.astype(layer.dtype) @ layer.kernel[...].astype(layer.dtype)
    bias = None if layer.bias is None else layer.bias[...].astype(layer.dtype)
    return Product(values, bias=bias)


def activate(
    activation: Callable[[Array], Array],
    layer: nnx.Linear | Float8Linear,
    x: Float[Array, "*axes I"] | Rounded,
    *,
    before: nnx.Linear | Float8Linear,
) -> Float[Array, "*axes H"] | Rounded:
    """Applies a layer and then an activation, for the layer that it stands before."""
    if isinstance(layer, Float8Linear):
        if rounds_inputs(layer) and rounds_inputs(before):
            return layer.before(activation, x)
        return activation(layer(x))
    assert not isinstance(x, Rounded), "see `modulated_norm`"
    # A backward pass reads the layer's result instead of several arrays in float32.
    return jax.checkpoint(activation)(layer(x))


def apply_side_by_side(
    layer: nnx.Linear | Float8Linear,
    first: Float[Array, "B T E"],
    second: Float[Array, "B T M"] | Rounded,
) -> Float[Array, "B T O"]:
    """Applies a layer to two inputs side by side, which never are one array."""
    if isinstance(layer, Float8Linear):
        return layer(first, second)
    assert not isinstance(second, Rounded), "see `activate`"
    kernel, width = layer.kernel[...].astype(layer.dtype), first.shape[-1]
    assert layer.bias is not None, "made with one"
    bias = layer.bias[...].astype(layer.dtype)
    return first @ kernel[:width] + second @ kernel[width:] + bias


def modulated_norm(
    x: Float[Array, "B T E"],
    factor: Float[Array, "#B _ E"],
    shift: Float[Array, "#B _ E"],
    *,
    eps: float,
    before: nnx.Linear | Float8Linear,
) -> Activations:
    """Computes `layer_norm(x) * factor + shift` in float32 for one or several layers.

    Args:
      x: Tokens.
      factor: Of each channel, of all tokens or of each.
      shift: Likewise.
      eps: Added to the variance.
      before: A layer that reads the result. Those that do are alike in precision.
    """
    if rounds_inputs(before):
        return rounded_norm(x, factor, shift, eps=eps)

    # A backward pass reads the stream instead of what is normalised.
    @jax.checkpoint
    def run(x, factor, shift):
        return (layer_norm(x, eps) * factor + shift).astype(before.dtype)

    return run(x, factor, shift)


def sum_and_norm(
    x: Float[Array, "B T E"],
    product: Product,
    gate: Float[Array, "#B _ E"] | None,
    factor: Float[Array, "#B _ E"],
    shift: Float[Array, "#B _ E"],
    *,
    eps: float,
    before: nnx.Linear | Float8Linear,
) -> tuple[Float[Array, "B T E"], Activations]:
    """Computes `x + gate * product`, and `modulated_norm` of the sum.

    Args:
      x: Tokens, the residual stream.
      product: What is added to it.
      gate: Of each channel of the product, of all tokens or of each; None for none.
      factor: As for `modulated_norm`, like all arguments below.
      shift: Likewise.
      eps: Added to the variance.
      before: A layer that reads what is normed.

    Returns:
      The sum in the dtype of x, and what is normed.
    """
    if rounds_inputs(before):
        return rounded_sum_norm(x, product, gate, factor, shift, eps=eps)
    total = add_gated(x, product, gate)
    return total, modulated_norm(total, factor, shift, eps=eps, before=before)


def shared_input(
    x: Float[Array, "B T E"], *, before: nnx.Linear | Float8Linear
) -> Activations:
    """Returns the input of several layers: in FP8 it is rounded once for all."""
    return rounded(x) if rounds_inputs(before) else x.astype(before.dtype)


class LayerNorm(nnx.Module):
    """Layer norm with learned scale and bias; float32 in and out."""

    def __init__(self, size: int, *, eps: float, param_dtype: str) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(size, jnp.dtype(param_dtype)))
        self.bias = nnx.Param(jnp.zeros(size, jnp.dtype(param_dtype)))

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """Normalises each token, in float32."""
        factor, shift = self.parameters()
        return layer_norm(x, self.eps) * factor + shift

    def parameters(self) -> list[Float[Array, "1 1 E"]]:
        """Returns scale and bias, in float32."""
        return [p[...].astype(jnp.float32)[None, None] for p in (self.scale, self.bias)]


class RMSNorm(nnx.Module):
    """Root mean square norm over the last axis with a learned scale; float32 out."""

    def __init__(self, size: int, *, eps: float, param_dtype: str) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(size, jnp.dtype(param_dtype)))

    def __call__(self, x: Float[Array, "*axes E"]) -> Float[Array, "*axes E"]:
        """Normalises over the last axis, in float32."""
        x = x.astype(jnp.float32)
        mean_square = jnp.square(x).mean(-1, keepdims=True)
        scale = self.scale[...].astype(jnp.float32)
        return x * jax.lax.rsqrt(mean_square + self.eps) * scale


class MLP(nnx.Module):
    """Two linear layers with an activation between; in and out in `dtype`."""

    def __init__(
        self,
        sizes: tuple[int, int, int],
        activation: Callable[[Array], Array],
        *,
        dtype: str,
        param_dtype: str,
        rngs: nnx.Rngs,
    ) -> None:
        features_in, hidden, features_out = sizes
        self.linear_1 = linear(
            features_in, hidden, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.linear_2 = linear(
            hidden, features_out, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.activation = activation

    def __call__(self, x: Float[Array, "*axes I"] | Rounded) -> Float[Array, "*axes O"]:
        """Applies both layers to the last axis."""
        hidden = activate(self.activation, self.linear_1, x, before=self.linear_2)
        return self.linear_2(hidden)


def gelu_exact(x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """Applies GELU by the error function."""
    return jax.nn.gelu(x, approximate=False)


def split_heads(x: Any, num_heads: int) -> Any:
    """Splits channels into heads, E = N * D: of [B, T, E] or of a `Product`."""

    def split(x):
        return rearrange(x, "... (N D) -> ... N D", N=num_heads)

    return x.with_channels(split) if isinstance(x, Product) else split(x)


def merge_heads(x: Float[Array, "B T N D"]) -> Float[Array, "B T E"]:
    """Puts heads side by side, E = N * D."""
    return rearrange(x, "B T N D -> B T (N D)")
