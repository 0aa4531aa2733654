"""Sources of a model's text embeddings: its encoder, or the disk."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from models.diffusion.embeddings import (
    CachedTextEncoder,
    EmbeddingCache,
    EmbeddingMaker,
    GivenTextEncoder,
)
from models.diffusion.interfaces import TextEncoder


class LoadedTextEncoder(TextEncoder, EmbeddingMaker, Protocol):
    """A text encoder with its weights; it makes contexts, or embeddings to keep."""


def open_text_encoder(
    *,
    load: Callable[[], LoadedTextEncoder] | None,
    open_cache: Callable[[Path], EmbeddingCache],
    text_length: int,
    prompts: Sequence[str] | None,
    embeddings: Path | None,
) -> TextEncoder | None:
    """Returns what makes contexts; the prompts have been through it.

    Args:
      load: Loads the model's encoder; None if there is none.
      open_cache: Returns the embeddings of that encoder in a folder.
      text_length: Context rows, L.
      prompts: Encoded now, after which the encoder is freed. None keeps it.
      embeddings: A file that `GivenTextEncoder.save` wrote, which stands for the
        encoder; or a folder that keeps embeddings, for which the encoder is loaded
        only if one is missing. None for neither.

    Returns:
      None if there is no encoder, and no file stands for it.

    Raises:
      CheckpointError: Stored embeddings or the encoder are damaged.
      UnknownPromptError: A file of embeddings lacks a prompt.
    """
    if embeddings is not None and embeddings.is_file():
        encoder: TextEncoder = GivenTextEncoder.load(
            embeddings, text_length=text_length
        )
    elif load is None:
        return None
    elif embeddings is None:
        loaded = load()
        if prompts is None:
            return loaded
        try:
            made = loaded.embed(prompts)
        finally:
            loaded.free()
        return GivenTextEncoder(embeddings=made, text_length=text_length)
    else:
        encoder = CachedTextEncoder(
            cache=open_cache(embeddings), text_length=text_length, load_encoder=load
        )
    if prompts is not None:
        encoder.encode(prompts)
    return encoder
