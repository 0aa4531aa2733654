"""Reads CLIP vision checkpoints, original Wan and transformers layout."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from models.checkpoints.conversion import (
    ConversionError,
    best_layout,
    load_parameters,
)
from models.checkpoints.rules import (
    CONV_2D,
    LAYER_NORM,
    LINEAR,
    Layout,
    Lookup,
    Row,
    Rule,
    drop_batch_axis,
    expand,
    within,
)
from models.checkpoints.weights import open_weights
from models.clip.config import CLIPVisionConfig
from models.clip.encoder import CLIPVisionEncoder

LayoutName = Literal["original", "transformers", "transformers_5"]
STACKED = ("transformer",)

_BLOCK = (
    Row("norm1", "layer_norm1", "norm1", LAYER_NORM),
    Row("norm2", "layer_norm2", "norm2", LAYER_NORM),
    Row("attn.proj", "self_attn.out_proj", "attn.proj", LINEAR),
    Row("mlp.0", "mlp.fc1", "mlp.fc1", LINEAR),
    Row("mlp.2", "mlp.fc2", "mlp.fc2", LINEAR),
)
_TABLE = (
    Row(
        "patch_embedding",
        "embeddings.patch_embedding",
        "patch_embedding",
        CONV_2D[:1],  # without bias
    ),
    Row("pre_norm", "pre_layrnorm", "pre_norm", LAYER_NORM),  # spelt so by transformers
    *within("transformer.{}", "encoder.layers.{}", "transformer.{}", _BLOCK),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedLayout:
    """The keys of one published layout.

    Attributes:
      rules: Rules of the weights that are used.
      layer: Start of the keys of a layer, `{}` for its index.
      unused: Keys that do not bear on the output, beside those of the last layer; a
        dot at the end stands for every key that starts so.
    """

    rules: tuple[Rule, ...]
    layer: str
    unused: tuple[str, ...]

    def uses(self, key: str, num_layers: int) -> bool:
        """Returns whether a key bears on the output of a tower of some depth."""
        last = self.layer.format(num_layers - 1)
        return not any(
            key.startswith(unused) if unused.endswith(".") else key == unused
            for unused in (*self.unused, last)
        )


def _original() -> PublishedLayout:
    """Returns the keys of the original checkpoint, which holds a text tower too.

    It stores queries, keys and values as one array. What follows the slash is a third
    of it; see `_Weights`.
    """
    thirds = (
        Rule(
            f"visual.transformer.{{}}.attn.to_qkv.{stored}/{part}",
            f"transformer.{{}}.attn.to_{part}.{ours}",
            layout,
        )
        for part in "qkv"
        for stored, ours, layout in LINEAR
    )
    return PublishedLayout(
        rules=(
            Rule("visual.cls_embedding", "cls_embedding", Layout("1 1 dim", "dim")),
            Rule("visual.pos_embedding", "pos_embedding", drop_batch_axis),
            *expand((f"visual.{row.original}", row.path, row.kind) for row in _TABLE),
            *thirds,
        ),
        layer="visual.transformer.{}.",
        unused=(
            "visual.post_norm.weight",
            "visual.post_norm.bias",
            "visual.head",
            "textual.",
            "log_scale",
        ),
    )


def _transformers(prefix: str) -> PublishedLayout:
    """Returns the keys of `CLIPVisionModel` behind a prefix."""
    projections = (
        Row(
            "",
            f"encoder.layers.{{}}.self_attn.{x}_proj",
            f"transformer.{{}}.attn.to_{x}",
            LINEAR,
        )
        for x in "qkv"
    )
    embeddings = f"{prefix}embeddings"
    return PublishedLayout(
        rules=(
            Rule(f"{embeddings}.class_embedding", "cls_embedding"),
            Rule(f"{embeddings}.position_embedding.weight", "pos_embedding"),
            *expand(
                (prefix + row.library, row.path, row.kind)
                for row in (*_TABLE, *projections)
            ),
        ),
        layer=prefix + "encoder.layers.{}.",
        unused=(
            f"{prefix}post_layernorm.weight",
            f"{prefix}post_layernorm.bias",
            f"{embeddings}.position_ids",
            "visual_projection.weight",
        ),
    )


LAYOUTS: dict[LayoutName, PublishedLayout] = {
    "original": _original(),
    "transformers": _transformers("vision_model."),
    "transformers_5": _transformers(""),  # versions 5 and later save no prefix
}


def detect_layout(keys: Iterable[str]) -> LayoutName:
    """Returns the layout of a checkpoint: the one whose table knows most of its keys.

    Raises:
      ConversionError: No key is known, or two tables know equally many.
    """
    return best_layout(keys, {name: layout.rules for name, layout in LAYOUTS.items()})


def load_clip_vision_encoder(
    source: str | os.PathLike | Mapping[str, Any],
    config: CLIPVisionConfig,
    *,
    stem: str | None = None,
    device: jax.Device | None = None,
) -> CLIPVisionEncoder:
    """Builds a vision tower with a checkpoint's weights.

    The last layer, the norm and the head behind it are left out. So is the text tower
    of the original checkpoint. Every other key must be known.

    Args:
      source: A `.safetensors` file, a directory with one, whole or in shards, or
        arrays by key. Layout original or transformers, told by the keys.
      config: Sizes of the tower, and how to run it. Weights are cast to its
        `param_dtype`.
      stem: Start of the file names, for a directory with several checkpoints.
      device: Device that holds the weights; the default device if None.

    Returns:
      The tower.

    Raises:
      CheckpointError: A file is missing or damaged.
      ConversionError: Weights and `config` do not fit; every offender is listed.
    """
    if not isinstance(source, Mapping):
        source = open_weights(source, stem=stem)
    layout = LAYOUTS[detect_layout(source)]
    last = layout.layer.format(config.num_layers - 1)
    # Only the unused layer tells a tower of this depth from a shallower one.
    if not any(key.startswith(last) for key in source):
        raise ConversionError(
            f"the checkpoint has no key {last}...; num_layers={config.num_layers} "
            "must be the number of its layers"
        )
    weights = _used_weights(source, layout, config.num_layers)
    with jax.default_device(device):
        return load_parameters(
            lambda: CLIPVisionEncoder(config, rngs=nnx.Rngs(0)),
            weights,
            layout.rules,
            stacked=STACKED,
        )


def _used_weights(
    source: Mapping[str, Any], layout: PublishedLayout, num_layers: int
) -> "_Weights":
    """Leaves unused weights out, and takes queries, keys and values apart."""
    lookup = Lookup(layout.rules)
    stored: dict[str, tuple[str, int | None]] = {}
    for key in source:
        if not layout.uses(key, num_layers):
            continue
        if lookup.of_key(f"{key}/q"):
            stored |= {f"{key}/{part}": (key, i) for i, part in enumerate("qkv")}
        else:
            stored[key] = key, None
    return _Weights(source, stored)


@dataclasses.dataclass(frozen=True)
class _Weights(Mapping[str, Any]):
    """Some arrays of a checkpoint, or thirds of their rows, read when asked for."""

    source: Mapping[str, Any]
    stored: Mapping[str, tuple[str, int | None]]  # key of the source, which third

    def __getitem__(self, key: str) -> Any:
        key, third = self.stored[key]
        if third is None:
            return self.source[key]
        # Rows that are no multiple of 3 give unequal parts, which do not fit.
        return np.array_split(np.atleast_1d(self.source[key]), 3)[third]

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)
