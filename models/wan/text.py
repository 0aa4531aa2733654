"""Sources of a Wan model's text embeddings: its encoder, or the disk."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax

from models.checkpoints.memory_map import CheckpointError
from models.checkpoints.scaled import FLOAT8
from models.diffusion.dtypes import default_dtype
from models.diffusion.embeddings import (
    CachedTextEncoder,
    EmbeddingCache,
    GivenTextEncoder,
)
from models.diffusion.interfaces import TextEncoder
from models.umt5.config import UMT5Config
from models.umt5.embeddings import umt5_cache
from models.umt5.text_encoder import UMT5TextEncoder
from models.umt5.tokenizer import UMT5Tokenizer
from models.wan.checkpoint import WanParts
from models.wan.layouts import Part

_NARROW = ("bfloat16", *FLOAT8)  # what bfloat16 holds to the last bit
TEXT_PARTS: tuple[Part, ...] = ("text_encoder", "tokenizer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Options of how a Wan model's prompts become embeddings.

    Attributes:
      prompts: Encoded before the transformer is loaded, after which the text encoder
        (11 GB) is freed; `generate` then takes these alone, and what `embeddings`
        has. Negative prompts count. None keeps the encoder in memory for any prompt.
      embeddings: A folder that keeps embeddings: the encoder is loaded for prompts
        that are not in it yet, stores them, and is freed. Or a file that
        `GivenTextEncoder.save` wrote: no encoder is needed.
      device: Where the encoder runs; JAX's default device if None.
    """

    prompts: tuple[str, ...] | None = None
    embeddings: Path | None = None
    device: jax.Device | None = None

    @property
    def given(self) -> bool:
        """Whether embeddings come from a file, which needs no text encoder.

        Raises:
          CheckpointError: The path looks like a file, but there is none.
        """
        path = self.embeddings
        if path is not None and path.suffix == ".safetensors" and not path.exists():
            raise CheckpointError(f"embeddings={str(path)!r} does not exist")
        return path is not None and path.is_file()


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
    prompts = options.prompts
    length = wan.config.text_length
    if options.embeddings is not None and options.given:
        encoder: Any = GivenTextEncoder.load(options.embeddings, text_length=length)
    elif wan.text_encoder is None or wan.tokenizer is None:
        return None
    else:
        load = functools.partial(
            UMT5TextEncoder.load,
            wan.text_encoder,
            wan.tokenizer,
            config=_text_config(wan, options.device),
            max_length=length,
            device=options.device,
        )
        if options.embeddings is None:
            encoder = load()
            if prompts is not None:
                vectors = encoder.embed(prompts)
                encoder.free()
                encoder = GivenTextEncoder(embeddings=vectors, text_length=length)
            return encoder
        encoder = CachedTextEncoder(
            cache=_cache(wan, options.embeddings, load.keywords["config"]),
            text_length=length,
            load_encoder=load,
        )
    if prompts is not None:
        encoder.encode(prompts)
    return encoder


def _cache(wan: WanParts, folder: Path, config: UMT5Config) -> EmbeddingCache:
    assert wan.tokenizer is not None
    return umt5_cache(
        folder,
        config,
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
