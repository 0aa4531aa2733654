"""Convolutions of video autoencoders."""

from collections.abc import Sequence
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import einops
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

ConvolutionName = Literal["3d", "2d"]

Frames = Float[Array, "B T H W C"]


@runtime_checkable
class Numerics(Protocol):
    """What a layer reads of its model's configuration."""

    @property
    def dtype(self) -> str:
        """Dtype of operands and results."""

    @property
    def param_dtype(self) -> str:
        """Dtype of parameters."""


def check_convolution(config: Any) -> None:
    """Raises ValueError if a configuration's form of convolutions is unknown."""
    if config.convolution not in get_args(ConvolutionName):
        raise ValueError(
            f"{config.convolution=} must be one of {get_args(ConvolutionName)}"
        )


def pointwise(
    in_features: int, out_features: int, config: Numerics, rngs: nnx.Rngs
) -> nnx.Linear:
    """Makes a convolution of window one: a linear layer on each position."""
    return nnx.Linear(
        in_features,
        out_features,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        rngs=rngs,
    )


def convolve(
    x: Frames,
    kernel: Float[Array, "Z Y X C O"],
    *,
    strides: Sequence[int] = (1, 1, 1),
    padding: Sequence[int] = (0, 0),
    form: ConvolutionName,
) -> Float[Array, "B t h w O"]:
    """Convolves frames with windows that lie inside of the video in time.

    Args:
      x: Frames, in the dtype to compute in.
      kernel: Weights, in the same dtype.
      strides: Frames, rows and columns from one window to the next.
      padding: Rows and columns of zeros on each side of a frame.
      form: How it is computed; results differ by rounding. "3d": as such. "2d": with
        the frames of a window side by side in the channels of one 2-D convolution,
        for which GPU libraries have more kernels.
    """
    sides = tuple((width, width) for width in padding)
    if form == "3d":
        return lax.conv_general_dilated(
            x,
            kernel,
            window_strides=strides,
            padding=((0, 0), *sides),
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        )
    window, step = kernel.shape[0], strides[0]
    count = (x.shape[1] - window) // step + 1
    last = (count - 1) * step + 1
    taps = [x[:, tap : tap + last : step] for tap in range(window)]
    images = lax.conv_general_dilated(
        einops.rearrange(jnp.concatenate(taps, axis=-1), "B T H W C -> (B T) H W C"),
        einops.rearrange(kernel, "T H W C O -> H W (T C) O"),
        window_strides=strides[1:],
        padding=sides,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return einops.rearrange(images, "(B T) H W O -> B T H W O", T=count)
