"""The text encoder of Wan: prompts to the context of cross-attention."""

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from models.diffusion.dtypes import default_dtype
from models.diffusion.embeddings import PromptEmbedding, pad_embeddings
from models.diffusion.interfaces import TextContext
from models.diffusion.prompt_text import check_prompts
from models.umt5.config import TEXT_LENGTH, UMT5Config
from models.umt5.convert import load_umt5_encoder
from models.umt5.encoder import UMT5Encoder
from models.umt5.tokenizer import UMT5Tokenizer

_LOG = logging.getLogger(__name__)

# Prompts run padded to a power of two of tokens, at least this many, so that few
# programs are compiled and a short prompt does not pay for 512 rows.
_SHORTEST = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class UMT5TextEncoder:
    """Tokenizer and encoder; a `TextEncoder` of `models.diffusion.interfaces`.

    It runs where its weights are; results go to the default device.

    Args:
      model: The encoder.
      tokenizer: The tokenizer; its `max_length` is the count of context rows, L.

    Raises:
      ValueError: The tokenizer has more tokens than the encoder.
    """

    model: UMT5Encoder
    tokenizer: UMT5Tokenizer

    def __post_init__(self) -> None:
        table = self.model.config.vocab_size
        if self.tokenizer.vocab_size > table:
            raise ValueError(
                f"{self.tokenizer.file} has {self.tokenizer.vocab_size} tokens; the "
                f"encoder has vectors for {table}"
            )

    @classmethod
    def load(
        cls,
        weights: str | os.PathLike | Mapping[str, Any],
        tokenizer: Path | str,
        *,
        config: UMT5Config | None = None,
        max_length: int = TEXT_LENGTH,
        device: jax.Device | None = None,
    ) -> "UMT5TextEncoder":
        """Reads both parts.

        Args:
          weights: See `load_umt5_encoder`.
          tokenizer: See `UMT5Tokenizer`.
          config: Sizes of the encoder, and how to run it; `UMT5Config.xxl()` with
            `default_dtype` of the device if None.
          max_length: Context rows, L.
          device: Device that the encoder is put on and runs on, such as
            `jax.devices("cpu")[0]`; the default device if None.

        Raises:
          CheckpointError: A file is missing or damaged.
          ConversionError: Weights and `config` do not fit.
          ImportError: An optional package is not installed.
        """
        # The small file first: what is wrong with it shows at once.
        parts = UMT5Tokenizer(tokenizer, max_length=max_length)
        config = config or UMT5Config.xxl(dtype=default_dtype(device))
        _LOG.info("loading the text encoder")
        model = load_umt5_encoder(weights, config, device=device)
        return cls(model=model, tokenizer=parts)

    def encode(self, prompts: Sequence[str]) -> TextContext:
        """Returns the context of the prompts.

        Args:
          prompts: At least one; equal ones are computed once. Each runs by itself,
            so its context does not depend on the others.

        Returns:
          Context in float32, zero past the end of a prompt; lengths in int32.

        Raises:
          FloatingPointError: The encoder's result is not finite.
          RuntimeError: `free` was called.
          TypeError: `prompts` is a string, not a sequence of them.
          ValueError: There is no prompt.
        """
        made = self.embed(prompts)
        return pad_embeddings([made[p] for p in prompts], self.tokenizer.max_length)

    def embed(self, prompts: Sequence[str]) -> dict[str, PromptEmbedding]:
        """Returns the vectors of each prompt's tokens, by prompt, in host memory.

        Takes and raises what `encode` does.
        """
        check_prompts(prompts)
        prompts = list(dict.fromkeys(prompts))
        ids, lengths = self.tokenizer.encode(prompts)
        leaves = jax.tree.leaves(nnx.state(self.model))
        if any(leaf.is_deleted() for leaf in leaves):
            raise RuntimeError("the text encoder was freed; load it again")
        _LOG.info("encoding the text")
        made = {}
        # Weights that are not bound to a device would else be moved to the default.
        with jax.default_device(min(leaves[0].devices(), key=lambda d: d.id)):
            for prompt, tokens, length in zip(prompts, ids, lengths, strict=True):
                size = _padded_length(int(length), self.tokenizer.max_length)
                output = _run(self.model, tokens[None, :size], length[None])
                made[prompt] = PromptEmbedding(np.asarray(output)[0, :length])
        for prompt, embedding in made.items():
            if not np.isfinite(embedding.tokens).all():
                raise FloatingPointError(
                    f"the context of {prompt!r} is not finite: check the text "
                    "encoder's weights, which may be damaged"
                )
        return made

    def unknown_words(self, prompt: str) -> list[str]:
        """Returns no words: a subword tokenizer writes any word in pieces it knows."""
        return []

    def describe_vocabulary(self) -> str:
        """Returns in words what prompts can be made of."""
        return f"any text; it is split into {self.tokenizer.vocab_size} known pieces"

    def free(self) -> None:
        """Deletes the weights from the device, whoever else holds them."""
        for leaf in jax.tree.leaves(nnx.state(self.model)):
            leaf.delete()


@nnx.jit
def _run(
    model: UMT5Encoder, ids: Int[Array, "B T"], lengths: Int[Array, " B"]
) -> Float[Array, "B T E"]:
    return model(ids, lengths)


def _padded_length(length: int, max_length: int) -> int:
    return min(max(_SHORTEST, 1 << (length - 1).bit_length()), max_length)
