"""Inputs of a HunyuanVideo transformer, and their checks."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float

from draft_jax.pytree import register_named_tuple
from models.hunyuan.config import HunyuanConfig


@register_named_tuple
class HunyuanInputs(NamedTuple):
    """Arrays that one call of a HunyuanVideo transformer takes; a pytree.

    Attributes:
      latents: Noisy latents, channels last. Frames, rows and columns are multiples of
        `config.patch_size`.
      timesteps: Noise level of each item, 0 (clean) to 1000 (noise).
      context: Hidden states of the language model, L = `config.text_length` rows.
      context_mask: Rows that the token refiner attends to. Their number is how many
        rows, from the first, the video attends to. None for all.
      pooled: CLIP's pooled output.
      guidance: 1,000 times the guidance scale, rounded or not, for a model that
        embeds it and only there; see `models.hunyuan.embeddings.guidance_level`.
      reference: Latent of the reference image, for a model that takes one and only
        there. As large as a frame of the video.
    """

    latents: Float[Array, "B F H W C"]
    timesteps: Float[Array, " B"]
    context: Float[Array, "B L text"]
    context_mask: Bool[Array, "B L"] | None
    pooled: Float[Array, "B pooled"]
    guidance: Float[Array, " B"] | None = None
    reference: Float[Array, "B 1 H W C"] | None = None


def check_inputs(inputs: HunyuanInputs, config: HunyuanConfig) -> None:
    """Checks that inputs fit the configuration and each other.

    Raises:
      ValueError: One does not; says what was expected.
    """
    batch, *_, channels = inputs.latents.shape
    if channels != config.in_channels:
        raise ValueError(
            f"latents have {channels} channels, the last axis of "
            f"{inputs.latents.shape}; the model takes {config.in_channels}"
        )
    context = (batch, config.text_length, config.text_dim)
    _check_shape("timesteps", inputs.timesteps.shape, (batch,))
    _check_shape("context", inputs.context.shape, context)
    _check_shape("pooled", inputs.pooled.shape, (batch, config.pooled_dim))
    if inputs.context_mask is not None:
        _check_shape("context_mask", inputs.context_mask.shape, context[:2])
    _check_given(
        "guidance", given=inputs.guidance is not None, taken=config.guidance_embeds
    )
    if inputs.guidance is not None:
        _check_shape("guidance", inputs.guidance.shape, (batch,))
    _check_given(
        "reference",
        given=inputs.reference is not None,
        taken=config.reference_frames > 0,
    )
    if inputs.reference is not None:
        frame = (batch, config.reference_frames, *inputs.latents.shape[2:])
        _check_shape("reference", inputs.reference.shape, frame)


def _check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise ValueError(f"{name} has shape {shape}; expected {expected}")


def _check_given(name: str, *, given: bool, taken: bool) -> None:
    if given != taken:
        raise ValueError(
            f"{name} is {'given' if given else 'missing'}, but this model takes "
            f"{'one' if taken else 'none'}"
        )
