"""Stored text embeddings of UMT5: what their encoder is known by."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from models.diffusion.embeddings import EmbeddingCache, hash_settings, sample_weights
from models.umt5.config import UMT5Config
from models.umt5.tokenizer import UMT5Tokenizer, clean_prompt


def umt5_cache(
    folder: Path | str,
    config: UMT5Config,
    tokenizer: UMT5Tokenizer,
    weight_files: Iterable[Path],
) -> EmbeddingCache:
    """Returns the embeddings in a folder that one encoder has made.

    Its identity covers the configuration, the tokenizer's file and length, and the
    weights. Prompts that `clean_prompt` makes equal share a file.

    Args:
      folder: Folder of the files, made if it does not exist.
      config: The encoder's configuration.
      tokenizer: The encoder's tokenizer.
      weight_files: Its checkpoint.

    Raises:
      CheckpointError: There is no weight file, or one cannot be read.
    """
    settings = {
        "config": dataclasses.asdict(config),
        "tokenizer": tokenizer.digest,
        "max_length": tokenizer.max_length,
        "weights": sample_weights(weight_files),
    }
    return EmbeddingCache(
        folder=folder, identity=hash_settings(settings), clean=clean_prompt
    )
