"""Sources of HunyuanVideo's text embeddings: its encoders, or the disk."""

import functools
from collections.abc import Sequence
from pathlib import Path

from models.diffusion.embeddings import EmbeddingCache
from models.diffusion.interfaces import TextEncoder
from models.diffusion.text_sources import open_text_encoder
from models.hunyuan.text_encoder import (
    TEXT_LENGTH,
    HunyuanTextEncoder,
    TextDevice,
    hunyuan_cache,
)
from models.hunyuan.text_files import HunyuanTextFiles


def load_text_encoder(
    files: HunyuanTextFiles | None,
    *,
    prompts: Sequence[str] | None = None,
    embeddings: Path | None = None,
    device: TextDevice | None = None,
) -> TextEncoder | None:
    """Returns what makes contexts; the prompts have been through it.

    Args:
      files: The encoders; None if the model has none.
      prompts: Encoded now. None encodes when asked to, in a new process each time.
      embeddings: A file of embeddings, or a folder that keeps them.
      device: Where the encoders run; see `HunyuanTextEncoder`.

    Returns:
      None if there are no encoders, and no file of embeddings.

    Raises:
      CheckpointError: The encoders or stored embeddings are damaged.
      ImportError: The extra `hunyuan` is not installed, and a prompt is not stored.
      UnknownPromptError: A file of embeddings lacks a prompt.
    """
    if files is None:
        load = None
    else:
        load = functools.partial(HunyuanTextEncoder, files=files, device=device)

    def open_cache(folder: Path) -> EmbeddingCache:
        assert files is not None  # there is an encoder whose embeddings are kept
        return hunyuan_cache(folder, files)

    return open_text_encoder(
        load=load,
        open_cache=open_cache,
        text_length=TEXT_LENGTH,
        prompts=prompts,
        embeddings=embeddings,
    )
