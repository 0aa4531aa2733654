"""Prompts and contexts of a batch: checked, and joined for guidance."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from models.diffusion.interfaces import TextContext
from models.diffusion.prompt_text import check_text


def as_prompts(prompts: str | Sequence[str]) -> list[str]:
    """Returns one or more prompts as a list; they may be empty.

    Raises:
      ValueError: There is no prompt, or one is not text.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ValueError(f"{prompts=} must hold at least one prompt")
    for prompt in prompts:
        check_text("prompt", prompt)
    return prompts


def join_contexts(positive: TextContext, negative: TextContext) -> TextContext:
    """Returns the rows of the prompts, then those of their negative prompts.

    Raises:
      ValueError: There is neither one negative item nor one for each prompt, or one
        side alone has pooled vectors.
    """
    batch, rows = len(positive.lengths), len(negative.lengths)
    if rows not in (1, batch):
        raise ValueError(
            f"negative_context has {rows} items; expected 1 or {batch}, one for "
            "each prompt"
        )
    if (positive.pooled is None) != (negative.pooled is None):
        side, other = "prompts", "negative_context"
        if positive.pooled is None:
            side, other = other, side
        raise ValueError(f"{side} has pooled vectors and {other} has none")
    if (positive.mask is None) != (negative.mask is None):
        positive, negative = (
            side._replace(mask=context_mask(side)) for side in (positive, negative)
        )
    return jax.tree.map(
        lambda one, other: jnp.concatenate(
            [one, jnp.repeat(other, batch // rows, axis=0)]
        ),
        positive,
        negative,
    )


def context_mask(context: TextContext) -> Bool[Array, "B L"]:
    """Returns the rows that a token refiner sees: `mask`, or the first `lengths`."""
    if context.mask is not None:
        return context.mask
    return jnp.arange(context.embeddings.shape[1]) < context.lengths[:, None]
