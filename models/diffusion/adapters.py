"""Adapters of transformers of every family, merged as weights are opened."""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from models.checkpoints.lora import merge_lora
from models.checkpoints.lora.rows import Target


def _spelled(names: Iterable[str], feature: str) -> dict[str, str]:
    """Returns the feature by each part of names, with dots and with underscores."""
    return {
        spelled: feature for name in names for spelled in (name, name.replace(".", "_"))
    }


# What parts of modules' names tell of the model that an adapter was made for. Those
# that a model's own modules have mean nothing there: so one table serves all families.
# Text encoders first, whose layers have names like Wan's.
FAMILY_FEATURES: Mapping[str, str] = {
    **_spelled(("lora_te", "text_encoder"), "a text encoder"),
    **_spelled(
        (
            *("double_blocks", "single_blocks", "single_transformer_blocks"),
            *("attn.to_", "attn.add_", "ff_context", "txt_in", "context_embedder"),
        ),
        "models with joint attention, such as HunyuanVideo",
    ),
    **_spelled(
        (
            *("cross_attn", "attn1", "attn2", "ffn"),
            *(f"self_attn.{name}" for name in "qkvo"),
        ),
        "models with cross-attention, such as Wan's",
    ),
}


def merge_adapters(
    weights: Mapping[str, Any],
    loras: Iterable[tuple[str | os.PathLike, float]],
    names_of: Callable[[Iterable[str]], Mapping[str, Target]],
    *,
    strict: bool,
    features: Mapping[str, str],
) -> Mapping[str, Any]:
    """Adds adapters to a transformer's weights, each to what those before it made.

    Args:
      weights: Arrays by key, as published.
      loras: Files and strengths.
      names_of: Makes of the weights' keys the names that `merge_lora` takes.
      strict: Whether parts that mean nothing to this model are refused.
      features: What parts of modules' names tell that the family's models may lack,
        `FAMILY_FEATURES` among them.

    Raises:
      CheckpointError: An adapter is missing or damaged.
      ConversionError: One does not fit.
    """
    for lora, scale in loras:
        weights = merge_lora(
            weights,
            lora,
            names_of(weights),
            scale=scale,
            strict=strict,
            features=features,
        )
    return weights
