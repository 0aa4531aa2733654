"""Opens a checkpoint of any kind: what it holds, by key, as numbers to compute with."""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from models.checkpoints.safetensors_io import load_safetensors
from models.checkpoints.scaled import apply_scales
from models.checkpoints.torch_io import load_torch
from models.checkpoints.views import without_keys, without_prefix

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")


def open_weights(
    path: str | os.PathLike,
    *,
    stem: str | None = None,
    prefixes: Sequence[str] = (),
    beside: Collection[str] = (),
    tables: Collection[str] = (),
) -> Mapping[str, Any]:
    """Opens a checkpoint; each array is read when it is used.

    Args:
      path: A `.safetensors` file, a folder with one, whole or in shards, or a file of
        PyTorch.
      stem: Start of the file names, for a folder with several checkpoints.
      prefixes: Texts that all keys may start with, which are taken away.
      beside: Keys of what is no weight, which are left out.
      tables: Keys of token tables, which have no scale in FP8 files.

    Returns:
      Arrays by key. FP8 weights with scales are in float32.

    Raises:
      CheckpointError: A file is missing or damaged, only some keys have a prefix, or
        scales and weights do not fit.
    """
    path = Path(path)
    source: Mapping[str, Any]
    metadata: Mapping[str, str] = {}
    if path.suffix.lower() in TORCH_SUFFIXES:
        source = load_torch(path)
    else:
        reader = load_safetensors(path, stem=stem)
        source, metadata = reader, reader.metadata
    source = without_keys(without_prefix(source, prefixes), beside)
    return apply_scales(source, metadata=metadata, tables=tables)
