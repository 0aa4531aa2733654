"""Sources of a Wan model's text embeddings: its encoder, or the disk."""

import functools
from pathlib import Path

import jax

from models.checkpoints.scaled import FLOAT8
from models.diffusion.dtypes import default_dtype
from models.diffusion.embeddings import EmbeddingCache
from models.diffusion.folders.layouts import Part
from models.diffusion.interfaces import TextEncoder
from models.diffusion.text_options import TextOptions
from models.diffusion.text_sources import open_text_encoder
from models.umt5.config import UMT5Config
from models.umt5.embeddings import umt5_cache
from models.umt5.text_encoder import UMT5TextEncoder
from models.umt5.tokenizer import UMT5Tokenizer
from models.wan.checkpoint import WanParts

_NARROW = ("bfloat16", *FLOAT8)  # what bfloat16 holds to the last bit
TEXT_PARTS: tuple[Part, ...] = ("text_encoder", "tokenizer")


def load_text_encoder(wan: WanParts, options: TextOptions) -> TextEncoder | None:
    """Returns what makes contexts; `options.prompts` have been through it.

    Args:
      wan: The opened model.
      options: Which encoder, and what happens to it.

    Returns:
      None if `wan` has no text encoder and the options do not stand for it.

    Raises:
      CheckpointError: The encoder, the tokenizer or stored embeddings are damaged.
      ConversionError: The encoder does not fit its configuration.
      UnknownPromptError: A file of embeddings lacks a prompt.
    """
    load = None
    if not options.given and wan.text_encoder is not None and wan.tokenizer is not None:
        load = functools.partial(
            UMT5TextEncoder.load,
            wan.text_encoder,
            wan.tokenizer,
            config=_text_config(wan, options.device),
            max_length=wan.config.text_length,
            device=options.device,
        )
    return open_text_encoder(
        load=load,
        open_cache=functools.partial(_open_cache, wan, options.device),
        text_length=wan.config.text_length,
        prompts=options.prompts,
        embeddings=options.embeddings,
    )


def _open_cache(
    wan: WanParts, device: jax.Device | None, folder: Path
) -> EmbeddingCache:
    assert wan.tokenizer is not None
    return umt5_cache(
        folder,
        _text_config(wan, device),
        UMT5Tokenizer(wan.tokenizer, max_length=wan.config.text_length),
        wan.sources["text_encoder"].files,
    )


def _text_config(wan: WanParts, device: jax.Device | None) -> UMT5Config:
    """Computes in what is fast on the device; stores what the file has, or less."""
    weights = wan.text_encoder
    assert weights is not None
    dtype = default_dtype(device)
    narrow = all(weights[key].dtype.name in _NARROW for key in weights)
    dtypes = {"dtype": dtype, "param_dtype": "bfloat16" if narrow else dtype}
    return wan.read_config(
        "text_encoder", UMT5Config.from_dict, UMT5Config.xxl, **dtypes
    )
