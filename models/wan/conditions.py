"""What a batch is conditioned on, checked and brought to the size of the batch."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from models.diffusion.interfaces import ImageCondition, LatentShape, TextContext
from models.wan.config import WanConfig


def as_prompts(prompts: str | Sequence[str]) -> list[str]:
    """One or more prompts as a list; raises ValueError if there is none or an empty."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError(f"{prompts=} must be at least one prompt, none empty")
    return prompts


def takes_image(config: WanConfig) -> bool:
    """Whether a transformer starts from an image: it then has channels for it."""
    return config.in_channels != config.out_channels


def check_image_is_wanted(config: WanConfig, *, given: bool) -> None:
    """Raises ValueError if an image is missing, or given where none is taken."""
    if given == takes_image(config):
        return
    kind = "a text-to-video" if given else "an image-to-video"
    raise ValueError(
        f"image is {'given' if given else 'missing'}, but this is {kind} model"
    )


def check_context(name: str, context: TextContext, config: WanConfig) -> None:
    """Raises ValueError if a context does not have the transformer's sizes."""
    shape, lengths = context.embeddings.shape, context.lengths.shape
    expected = (config.text_length, config.text_dim)
    if shape[1:] != expected or lengths != shape[:1] or not shape[0]:
        raise ValueError(
            f"{name} has embeddings of shape {shape} and lengths of shape "
            f"{lengths}; expected [batch, text_length, text_dim] = [batch, "
            f"{expected[0]}, {expected[1]}] and [batch]"
        )


def join_contexts(positive: TextContext, negative: TextContext) -> TextContext:
    """The rows of the prompts, then those of their negative prompts.

    Raises:
      ValueError: There is neither one negative item nor one for each prompt.
    """
    batch, rows = len(positive.lengths), len(negative.lengths)
    if rows not in (1, batch):
        raise ValueError(
            f"negative_context has {rows} items; expected 1 or {batch}, one for "
            "each prompt"
        )
    return TextContext(
        *(
            jnp.concatenate([one, jnp.repeat(other, batch // rows, axis=0)])
            for one, other in zip(positive, negative, strict=True)
        )
    )


def repeat_condition(
    image: ImageCondition, batch: int, latent_shape: LatentShape, config: WanConfig
) -> ImageCondition:
    """The condition of every item of a batch.

    Args:
      image: One item, or one for each of the batch.
      batch: Items.
      latent_shape: Of one item.
      config: Of the transformer.

    Raises:
      ValueError: There are other numbers of items, or the latents do not fit.
    """
    items = len(image.latents)
    sides = (*latent_shape[:-1], config.in_channels - config.out_channels)
    if items not in (1, batch) or image.latents.shape[1:] != sides:
        raise ValueError(
            f"image has {items} items with latents of shape "
            f"{image.latents.shape[1:]}; expected 1 or {batch} of shape {sides}"
        )
    return jax.tree.map(
        lambda leaf: jnp.repeat(leaf, batch // len(leaf), axis=0), image
    )
