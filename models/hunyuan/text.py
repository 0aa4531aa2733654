"""Sources of HunyuanVideo's text embeddings: its encoders, or the disk."""

import functools
from pathlib import Path

import jax

from models.diffusion.embeddings import EmbeddingCache
from models.diffusion.interfaces import TextEncoder
from models.diffusion.text_options import TextOptions
from models.diffusion.text_sources import open_text_encoder
from models.hunyuan.text_encoder import (
    TEXT_LENGTH,
    HunyuanTextEncoder,
    TextDevice,
    hunyuan_cache,
)
from models.hunyuan.text_files import HunyuanTextFiles


def load_text_encoder(
    files: HunyuanTextFiles | None, options: TextOptions
) -> TextEncoder | None:
    """Returns what makes contexts; `options.prompts` have been through it.

    Without prompts it encodes when asked to, in a new process each time, which finds
    on the GPU what memory JAX has left.

    Args:
      files: The encoders; None if the model has none.
      options: Which source, and where the encoders run.

    Returns:
      None if there are no encoders, and no file of embeddings.

    Raises:
      CheckpointError: The encoders or stored embeddings are damaged.
      ImportError: The extra `hunyuan` is not installed, and a prompt is not stored.
      UnknownPromptError: A file of embeddings lacks a prompt.
    """
    load = None
    if files is not None:
        load = functools.partial(
            HunyuanTextEncoder, files=files, device=_text_device(options.device)
        )

    def open_cache(folder: Path) -> EmbeddingCache:
        assert files is not None  # there is an encoder whose embeddings are kept
        return hunyuan_cache(folder, files)

    return open_text_encoder(
        load=load,
        open_cache=open_cache,
        text_length=TEXT_LENGTH,
        prompts=options.prompts,
        embeddings=options.embeddings,
    )


def _text_device(device: jax.Device | None) -> TextDevice | None:
    """Returns torch's name of a device."""
    if device is None:
        return None
    return "cpu" if device.platform == "cpu" else "cuda"
