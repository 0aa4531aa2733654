"""Parts of a model that are given by themselves, beside a transformer or a folder."""

import os
from collections.abc import Mapping
from typing import Any

from models.checkpoints.weights import open_weights
from models.umt5.convert import open_umt5_weights
from models.wan.convert import open_transformer_weights
from models.wan.layouts import Part
from models.wan.vae.convert import open_vae_weights


def open_part_weights(
    part: Part, path: str | os.PathLike, *, stem: str | None = None
) -> Mapping[str, Any]:
    """Opens the weights of a part, as other programs store them, too.

    Args:
      part: A part that has weights.
      path: A file, or a folder with one checkpoint.
      stem: Start of the file names of a transformer in a folder with others.

    Raises:
      CheckpointError: A file is missing or damaged, or its FP8 weights and their
        scales do not fit.
    """
    match part:
        case "transformer":
            return open_transformer_weights(path, stem=stem)
        case "text_encoder":
            return open_umt5_weights(path)
        case "vae":
            return open_vae_weights(path)
    return open_weights(path)
