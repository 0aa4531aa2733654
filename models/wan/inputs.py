"""Inputs of a Wan transformer, and their checks."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from draft_jax.pytree import register_named_tuple
from models.wan.config import WanConfig


@register_named_tuple
class WanInputs(NamedTuple):
    """Arrays that one call of a Wan transformer takes; a pytree.

    Attributes:
      latents: Noisy latents, channels last; an image-to-video model takes the
        condition's channels after them. Frames, rows and columns are multiples of
        `config.patch_size`.
      timesteps: Noise level of each item, 0 (clean) to 1000 (noise).
      context: Text embeddings, L = `config.text_length` rows, padded.
      context_lengths: Rows of context that are text; later ones are set to zero
        before they are embedded. None if they are zero already.
      image_tokens: CLIP's tokens of the image (257 of the layer before its last),
        for an image-to-video model and only there.
      first_timesteps: Noise level of each item's first latent frame, where it is
        another than that of the frames after it; None where it is the same.
    """

    latents: Float[Array, "B F H W C"]
    timesteps: Float[Array, " B"]
    context: Float[Array, "B L text"]
    context_lengths: Int[Array, " B"] | None = None
    image_tokens: Float[Array, "B I image"] | None = None
    first_timesteps: Float[Array, " B"] | None = None

    @property
    def times(self) -> Float[Array, "B times"]:
        """Noise levels of each item: one, or that of the first frame and the others."""
        if self.first_timesteps is None:
            return self.timesteps[:, None]
        return jnp.stack([self.first_timesteps, self.timesteps], axis=1)


def check_inputs(inputs: WanInputs, config: WanConfig) -> None:
    """Checks that inputs fit the configuration and each other.

    Raises:
      ValueError: One does not; says what was expected.
    """
    batch = inputs.latents.shape[0]
    if inputs.latents.shape[-1] != config.in_channels:
        raise ValueError(
            f"latents have {inputs.latents.shape[-1]} channels, the last axis of "
            f"{inputs.latents.shape}; the model takes {config.in_channels}"
        )
    expected = (batch, config.text_length, config.text_dim)
    if inputs.context.shape != expected:
        raise ValueError(
            f"context has shape {inputs.context.shape}; expected [batch, text_length, "
            f"text_dim] = {expected}"
        )
    for name in ("timesteps", "first_timesteps", "context_lengths"):
        array = getattr(inputs, name)
        if array is not None and array.shape != (batch,):
            raise ValueError(f"{name} has shape {array.shape}; expected ({batch},)")
    _check_image_tokens(inputs.image_tokens, batch, config.image_dim)


def _check_image_tokens(
    image_tokens: Float[Array, "B I image"] | None, batch: int, size: int | None
) -> None:
    if (image_tokens is None) != (size is None):
        given = "missing" if image_tokens is None else "given"
        kind = "a text-to-video" if size is None else "an image-to-video"
        raise ValueError(
            f"image_tokens are {given}, but this is {kind} model (image_dim={size})"
        )
    if image_tokens is None:
        return
    shape = image_tokens.shape
    if (shape[0], shape[2]) != (batch, size) or not shape[1]:
        raise ValueError(
            f"image_tokens has shape {shape}; expected [batch, tokens, image_dim] "
            f"= [{batch}, 1 or more, {size}]"
        )
