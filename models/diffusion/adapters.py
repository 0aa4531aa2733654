"""Adapters of transformers of every family, merged as weights are opened."""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from models.checkpoints.lora import merge_lora
from models.checkpoints.lora.rows import Target
from models.diffusion.experts import ExpertName

Lora = tuple[str | os.PathLike, float]

_PREFIX = re.compile(r"(high|low):(?=.)")


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


def split_expert(name: str | os.PathLike) -> tuple[ExpertName | None, Path]:
    """Returns for which expert an adapter is given, and its file.

    Args:
      name: A file, or "high:FILE" or "low:FILE"; a file of that very name comes first.
    """
    path = Path(name)
    match = None if path.exists() else _PREFIX.match(os.fspath(name))
    if match is None:
        return None, path
    return match[1], Path(os.fspath(name)[match.end() :])  # type: ignore[return-value]


def loras_of(expert: ExpertName, loras: Iterable[Lora]) -> list[tuple[Path, float]]:
    """Returns the adapters of an expert: its own, and those of both."""
    found = [(*split_expert(name), strength) for name, strength in loras]
    return [(file, strength) for of, file, strength in found if of in (None, expert)]


def check_no_expert(loras: Iterable[Lora], path: Path) -> None:
    """Raises ValueError if an adapter is for one of two transformers, and there is one.

    Args:
      loras: Adapters with their strengths.
      path: Where the model lies, for messages.
    """
    for name, _ in loras:
        if split_expert(name)[0] is not None:
            raise ValueError(
                f"adapter {os.fspath(name)!r} is given for one of two transformers, "
                f"but {path} has one: leave out the word before the colon"
            )
