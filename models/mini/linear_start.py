"""A codec that begins as a linear one: principal components of patches in frame pairs.

An autoencoder of random weights takes minutes of a GPU to restore videos as well as
principal components do. This one does so before its first step. All residual
blocks and the attention begin as zero. Norms and SiLU cannot be left out: a constant
in every channel keeps both nearly linear, and least squares finds what undoes them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from models.wan.vae.autoencoder import Decoder, Encoder, WanVAE
from models.wan.vae.layers import FrameAttention, ResidualBlock, run_layers

CONSTANT = 2.0  # in each channel before the last norm
DEVIATION = 0.5  # of the largest component in a channel
LOG_VARIANCE = -10.0  # of latents
RIDGE = 1e-6  # of least squares, in units of a channel's variance

Values = Float[np.ndarray, "..."]


class Components(NamedTuple):
    """Principal components of patches.

    Attributes:
      basis: Patches from components, largest first; its deviation is `DEVIATION`.
      mean: The mean patch.
      still: The number of components of pairs that are means of two frames.
    """

    basis: Float[np.ndarray, "K P"]
    mean: Float[np.ndarray, " P"]
    still: int


def start_linear(model: WanVAE, videos: Float[np.ndarray, "B T Y X 3"]) -> WanVAE:
    """Sets the weights of an autoencoder of two levels, and returns it.

    Args:
      model: Random weights; its one step between levels halves frames only.
      videos: Videos in [-1, 1] to take components of; T odd and at least 3.

    Raises:
      ValueError: The model has fewer channels than latents, or another step.
    """
    config = model.config
    size = config.latent_channels
    widths = (*config.channels, *(level.inputs for level in config.decoder_levels))
    if config.spatial_downsample != (False,) or min(widths) < size:
        raise ValueError(
            f"the smallest of {widths=} must be at least the {size} latent channels, "
            f"and spatial_downsample={config.spatial_downsample} must be (False,)"
        )
    patches = np.asarray(model.patches(jnp.asarray(videos)))
    parts = principal_components(patches, widths[0], size)
    for _, layer in nnx.iter_graph(model):
        if isinstance(layer, ResidualBlock):
            layer.conv2.kernel[...] = jnp.zeros_like(layer.conv2.kernel[...])
        elif isinstance(layer, FrameAttention):
            layer.proj.kernel[...] = jnp.zeros_like(layer.proj.kernel[...])
    last: Any
    for last in (model.encoder.mid_block, model.decoder.up_blocks[-1]):
        bias = last.resnets[-1].conv2.bias
        bias[...] = jnp.full_like(bias[...], CONSTANT)
    model.quant_conv.kernel[...] = jnp.eye(2 * size)
    model.post_quant_conv.kernel[...] = jnp.eye(size)
    _start_encoder(model.encoder, parts, patches, size)
    latents = _means(model, jnp.asarray(videos))
    _start_decoder(model.decoder, parts, latents, patches, size)
    return model


def principal_components(
    patches: Float[np.ndarray, "B T H W P"], count: int, latents: int
) -> Components:
    """Returns components of patches, and how many of a pair's are its mean's.

    In a film that could run backwards the components of a pair of frames are sums and
    differences of those of a frame.

    Args:
      patches: Of videos.
      count: Number of components of a frame.
      latents: Number of components of a pair.
    """
    flat = patches.reshape(-1, patches.shape[-1]).astype(np.float64)
    mean = flat.mean(0)
    variances, vectors = np.linalg.eigh(np.cov(flat.T))
    order = np.argsort(variances)[::-1][:count]
    variances, vectors = np.maximum(variances[order], 1e-8), vectors[:, order]
    # Halfway to deviations that are all alike: those of edges would be far out then.
    scale = (variances[0] * variances) ** 0.25 / DEVIATION
    parts = (patches - mean) @ vectors
    first, second = parts[:, 1:-1:2], parts[:, 2::2]
    axes = tuple(range(first.ndim - 1))
    resting = np.square((first + second) / 2).mean(axes)
    moving = np.square((first - second) / 2).mean(axes)
    best = np.argsort(np.concatenate([resting, moving]))[::-1][:latents]
    still = int((best < len(order)).sum())
    return Components(vectors.T * scale[:, None], mean, still)


def _start_encoder(
    encoder: Encoder, parts: Components, patches: Values, size: int
) -> None:
    """Makes the mean of the posterior the components of a pair, of deviation 1."""
    width = len(parts.basis)
    analysis = np.linalg.pinv(parts.basis)
    _set_middle(encoder.conv_in, analysis)
    encoder.conv_in.bias[...] = jnp.asarray(-parts.mean @ analysis, jnp.float32)
    step: Any = encoder.down_blocks[-2]
    _set_middle(step.resample, np.eye(width))
    kernel = np.zeros(step.time_conv.kernel.shape, np.float32)
    for index in range(size):
        if index < parts.still:
            kernel[1:, 0, 0, index, index] = 0.5
        else:
            kernel[1:, 0, 0, index - parts.still, index] = -0.5, 0.5
    step.time_conv.kernel[...] = jnp.asarray(kernel)
    stream, features = _before_encoders_head(encoder, jnp.asarray(patches))
    wanted = (np.asarray(stream)[..., :size] - CONSTANT) / DEVIATION
    _fit_head(encoder.conv_out, features, wanted)
    bias = encoder.conv_out.bias
    bias[...] = bias[...].at[size:].set(LOG_VARIANCE)


def _start_decoder(
    decoder: Decoder, parts: Components, latents: Array, patches: Values, size: int
) -> None:
    """Makes pixels the sums of components."""
    _set_middle(decoder.conv_in, DEVIATION * np.eye(size, decoder.conv_in.bias.size))
    step: Any = decoder.up_blocks[0].upsampler
    kernel = np.zeros(step.time_conv.kernel.shape, np.float32)
    width = kernel.shape[-2]
    for index in range(parts.still):
        kernel[-1, 0, 0, index, [index, width + index]] = 1.0
    for index in range(size - parts.still):
        kernel[-1, 0, 0, parts.still + index, [index, width + index]] = -1.0, 1.0
    step.time_conv.kernel[...] = jnp.asarray(kernel)
    narrow = step.resample.bias.size
    _set_middle(step.resample, np.eye(width, narrow))
    first: Any = decoder.up_blocks[1].resnets[0]
    shortcut = first.conv_shortcut
    if shortcut is not None:
        shortcut.kernel[...] = jnp.eye(*shortcut.kernel.shape)
    _fit_head(decoder.conv_out, _before_decoders_head(decoder, latents), patches)


def _set_middle(convolution: Any, matrix: Values) -> None:
    """Lets a convolution see the position itself only, in its own frame."""
    kernel = np.zeros(convolution.kernel.shape, np.float32)
    rows, columns = kernel.shape[-4:-2]
    last = (-1,) if kernel.ndim == 5 else ()
    kernel[(*last, rows // 2, columns // 2)] = matrix
    convolution.kernel[...] = jnp.asarray(kernel)


def _fit_head(convolution: Any, features: Array, wanted: Values) -> None:
    """Sets a last convolution to the least squares from features to what is wanted."""
    x = np.asarray(features, np.float64).reshape(-1, features.shape[-1])
    y = np.asarray(wanted, np.float64).reshape(-1, wanted.shape[-1])
    centre_x, centre_y = x.mean(0), y.mean(0)
    x, y = x - centre_x, y - centre_y
    squares = x.T @ x
    squares += np.eye(len(squares)) * RIDGE * np.trace(squares) / len(squares)
    solution = np.linalg.solve(squares, x.T @ y)
    kernel = np.zeros(convolution.kernel.shape, np.float32)
    kernel[-1, 1, 1, :, : y.shape[-1]] = solution
    convolution.kernel[...] = jnp.asarray(kernel)
    bias = np.zeros(convolution.bias.shape, np.float32)
    bias[: y.shape[-1]] = centre_y - centre_x @ solution
    convolution.bias[...] = jnp.asarray(bias)


@nnx.jit
def _before_encoders_head(encoder: Encoder, patches: Array) -> tuple[Array, Array]:
    layers = (encoder.conv_in, *encoder.down_blocks, encoder.mid_block)
    stream, _ = run_layers(layers, patches, None)
    return stream, jax.nn.silu(encoder.norm_out(stream))


@nnx.jit
def _before_decoders_head(decoder: Decoder, latents: Array) -> Array:
    layers = (decoder.conv_in, decoder.mid_block, *decoder.up_blocks)
    stream, _ = run_layers(layers, latents, None)
    return jax.nn.silu(decoder.norm_out(stream))


@nnx.jit
def _means(model: WanVAE, videos: Array) -> Array:
    return model.moments(videos)[0]
