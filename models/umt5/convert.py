"""Reads UMT5 encoder checkpoints, original Wan and transformers layout."""

import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from models.checkpoints.conversion import (
    ConversionError,
    best_layout,
    load_parameters,
    save_parameters,
)
from models.checkpoints.rules import (
    EMBEDDING,
    MATRIX,
    RMS_NORM,
    Row,
    Rule,
    library_rules,
    original_rules,
    within,
)
from models.checkpoints.views import without_keys
from models.checkpoints.weights import open_weights
from models.umt5.config import UMT5Config
from models.umt5.encoder import UMT5Encoder

LayoutName = Literal["original", "transformers"]
STACKED = ("blocks",)

# transformers' `layer.0` is self-attention and `layer.1` the feed-forward network.
_BLOCK = (
    Row("norm1", "layer.0.layer_norm", "norm1", RMS_NORM),
    Row("attn.q", "layer.0.SelfAttention.q", "attn.q", MATRIX),
    Row("attn.k", "layer.0.SelfAttention.k", "attn.k", MATRIX),
    Row("attn.v", "layer.0.SelfAttention.v", "attn.v", MATRIX),
    Row("attn.o", "layer.0.SelfAttention.o", "attn.o", MATRIX),
    Row(
        "pos_embedding.embedding",
        "layer.0.SelfAttention.relative_attention_bias",
        "pos_embedding",
        EMBEDDING,
    ),
    Row("norm2", "layer.1.layer_norm", "norm2", RMS_NORM),
    Row("ffn.gate.0", "layer.1.DenseReluDense.wi_0", "ffn.gate", MATRIX),
    Row("ffn.fc1", "layer.1.DenseReluDense.wi_1", "ffn.fc1", MATRIX),
    Row("ffn.fc2", "layer.1.DenseReluDense.wo", "ffn.fc2", MATRIX),
)
_TABLE = (
    Row("token_embedding", "shared", "token_embedding", EMBEDDING),
    *within("blocks.{}", "encoder.block.{}", "blocks.{}", _BLOCK),
    Row("norm", "encoder.final_layer_norm", "norm", RMS_NORM),
)
# transformers ties these two: a file holds either, or the same array twice.
_TABLE_KEYS = ("shared.weight", "encoder.embed_tokens.weight")
_TIED = Rule(_TABLE_KEYS[1], "token_embedding.embedding")
_TOKEN_TABLES = ("token_embedding.weight", *_TABLE_KEYS)
_BESIDE = ("spiece_model",)  # the tokenizer, which ComfyUI keeps in the file

RULES: dict[LayoutName, tuple[Rule, ...]] = {
    "original": original_rules(_TABLE),
    "transformers": (*library_rules(_TABLE), _TIED),
}


def detect_layout(keys: Iterable[str]) -> LayoutName:
    """Returns the layout of a checkpoint: the one whose table knows more of its keys.

    Raises:
      ConversionError: Both know equally many, as when no key is known.
    """
    return best_layout(keys, RULES)


def open_umt5_weights(
    path: str | os.PathLike, *, stem: str | None = None
) -> Mapping[str, Any]:
    """Opens an encoder's checkpoint; see `open_weights`."""
    return open_weights(path, stem=stem, beside=_BESIDE, tables=_TOKEN_TABLES)


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
      device: Device that holds the weights; the default device if None.

    Returns:
      The encoder.

    Raises:
      CheckpointError: A file is missing or damaged.
      ConversionError: Weights and `config` do not fit; every offender is listed.
    """
    if not isinstance(source, Mapping):
        source = open_umt5_weights(source, stem=stem)
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
    """Returns an encoder's weights as arrays by checkpoint key."""
    rules = [rule for rule in RULES[layout] if rule is not _TIED]
    return save_parameters(model, rules, stacked=STACKED, dtype=dtype)


def _without_tied_copy(source: Mapping[str, Any]) -> Mapping[str, Any]:
    """Leaves out the second token table; raises if the two differ."""
    shared, tied = _TABLE_KEYS
    if shared not in source or tied not in source:
        return source
    if not np.array_equal(source[shared], source[tied]):
        raise ConversionError(
            f"{shared} and {tied} differ; one token table serves as both"
        )
    return without_keys(source, [tied])
