"""Reads UMT5 encoder checkpoints, original Wan and transformers layout."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from models.checkpoints.conversion import (
    ConversionError,
    Rule,
    best_layout,
    file_of,
    load_parameters,
    save_parameters,
    transpose,
)
from models.checkpoints.safetensors_io import load_safetensors
from models.umt5.config import UMT5Config
from models.umt5.encoder import UMT5Encoder

LayoutName = Literal["original", "transformers"]
STACKED = ("blocks",)

ORIGINAL_RULES = (
    Rule(r"token_embedding\.weight", r"token_embedding.embedding"),
    Rule(r"blocks\.(\d+)\.(norm1|norm2)\.weight", r"blocks.\1.\2.scale"),
    Rule(
        r"blocks\.(\d+)\.attn\.(q|k|v|o)\.weight",
        r"blocks.\1.attn.\2.kernel",
        transpose,
    ),
    Rule(
        r"blocks\.(\d+)\.ffn\.gate\.0\.weight",
        r"blocks.\1.ffn.gate.kernel",
        transpose,
    ),
    Rule(
        r"blocks\.(\d+)\.ffn\.(fc1|fc2)\.weight",
        r"blocks.\1.ffn.\2.kernel",
        transpose,
    ),
    Rule(
        r"blocks\.(\d+)\.pos_embedding\.embedding\.weight",
        r"blocks.\1.pos_embedding.embedding",
    ),
    Rule(r"norm\.weight", r"norm.scale"),
)

# transformers ties these two: a file holds either, or the same array twice.
_SHARED = Rule(r"shared\.weight", r"token_embedding.embedding")
_TIED = Rule(r"encoder\.embed_tokens\.weight", r"token_embedding.embedding")
_TABLE_KEYS = ("shared.weight", "encoder.embed_tokens.weight")
# `layer.0` is self-attention and `layer.1` the feed-forward network.
_ATTENTION = r"encoder\.block\.(\d+)\.layer\.0\."
_FEED_FORWARD = r"encoder\.block\.(\d+)\.layer\.1\."
TRANSFORMERS_RULES = (
    _SHARED,
    _TIED,
    Rule(_ATTENTION + r"layer_norm\.weight", r"blocks.\1.norm1.scale"),
    Rule(
        _ATTENTION + r"SelfAttention\.(q|k|v|o)\.weight",
        r"blocks.\1.attn.\2.kernel",
        transpose,
    ),
    Rule(
        _ATTENTION + r"SelfAttention\.relative_attention_bias\.weight",
        r"blocks.\1.pos_embedding.embedding",
    ),
    Rule(_FEED_FORWARD + r"layer_norm\.weight", r"blocks.\1.norm2.scale"),
    Rule(
        _FEED_FORWARD + r"DenseReluDense\.wi_0\.weight",
        r"blocks.\1.ffn.gate.kernel",
        transpose,
    ),
    Rule(
        _FEED_FORWARD + r"DenseReluDense\.wi_1\.weight",
        r"blocks.\1.ffn.fc1.kernel",
        transpose,
    ),
    Rule(
        _FEED_FORWARD + r"DenseReluDense\.wo\.weight",
        r"blocks.\1.ffn.fc2.kernel",
        transpose,
    ),
    Rule(r"encoder\.final_layer_norm\.weight", r"norm.scale"),
)

RULES: dict[LayoutName, tuple[Rule, ...]] = {
    "original": ORIGINAL_RULES,
    "transformers": TRANSFORMERS_RULES,
}


def detect_layout(keys: Iterable[str]) -> LayoutName:
    """Which layout a checkpoint has: the one whose table knows more of its keys.

    Raises:
      ConversionError: Both know equally many, as when no key is known.
    """
    return best_layout(keys, RULES)


def load_umt5_encoder(
    source: str | os.PathLike | Mapping[str, Any],
    config: UMT5Config,
    *,
    stem: str | None = None,
    device: jax.Device | None = None,
) -> UMT5Encoder:
    """Builds an encoder with a checkpoint's weights.

    Args:
      source: A `.safetensors` file, a directory with one, whole or in shards, or
        arrays by key. Layout original or transformers, told by the keys.
      config: Sizes of the encoder, and how to run it. Weights are cast to its
        `param_dtype`.
      stem: Start of the file names, for a directory with several checkpoints.
      device: Where the weights are put; the default device if None.

    Returns:
      The encoder.

    Raises:
      CheckpointError: A file is missing or damaged.
      ConversionError: Weights and `config` do not fit; every offender is listed.
    """
    if not isinstance(source, Mapping):
        source = load_safetensors(source, stem=stem)
    layout = detect_layout(source)
    if layout == "transformers":
        source = _without_tied_copy(source)
    with jax.default_device(device):
        return load_parameters(
            lambda: UMT5Encoder(config, rngs=nnx.Rngs(0)),
            source,
            RULES[layout],
            stacked=STACKED,
        )


def export_umt5_encoder(
    model: UMT5Encoder, *, layout: LayoutName = "transformers", dtype: Any = None
) -> dict[str, np.ndarray]:
    """An encoder's weights as arrays by checkpoint key."""
    rules = [rule for rule in RULES[layout] if rule is not _TIED]
    return save_parameters(model, rules, stacked=STACKED, dtype=dtype)


def _without_tied_copy(source: Mapping[str, Any]) -> Mapping[str, Any]:
    """The weights with one token table; ones that differ are refused."""
    shared, tied = _TABLE_KEYS
    if shared not in source or tied not in source:
        return source
    if not np.array_equal(source[shared], source[tied]):
        raise ConversionError(
            f"{shared} and {tied} differ; one token table serves as both"
        )
    return _Without(source, tied)


@dataclasses.dataclass(frozen=True)
class _Without(Mapping[str, Any]):
    """A mapping less one of its keys; nothing is read before it is asked for."""

    source: Mapping[str, Any]
    hidden: str

    def __getitem__(self, key: str) -> Any:
        if key == self.hidden:
            raise KeyError(key)
        return self.source[key]

    def file_of(self, key: str) -> Path | None:
        """The file of a key, where `source` knows it."""
        return file_of(self.source, key)

    def __iter__(self) -> Iterator[str]:
        return (key for key in self.source if key != self.hidden)

    def __len__(self) -> int:
        return len(self.source) - 1
