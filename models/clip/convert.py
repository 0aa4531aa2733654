"""Reads CLIP vision checkpoints, original Wan and transformers layout."""

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from models.checkpoints.conversion import (
    ConversionError,
    Layout,
    Rule,
    best_layout,
    drop_batch_axis,
    load_parameters,
    transpose,
)
from models.checkpoints.safetensors_io import load_safetensors
from models.clip.config import CLIPVisionConfig
from models.clip.encoder import CLIPVisionEncoder

LayoutName = Literal["original", "transformers", "transformers_5"]
STACKED = ("transformer",)

# PyTorch's Conv2d stores [out, in, rows, columns].
_conv_2d = Layout(
    "conv_2d", lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)
)
_class_token = Layout("class_token", lambda x: x[0, 0], lambda x: x[None, None])


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedLayout:
    """The keys of one published layout.

    Attributes:
      rules: Of the weights that are used.
      layer: What the keys of a layer begin with; `{}` is its number.
      unused: Regular expression of whole keys that do not bear on the output,
        beside those of the last layer.
    """

    rules: tuple[Rule, ...]
    layer: str
    unused: str


_ORIGINAL_BLOCK = r"visual\.transformer\.(\d+)\."
ORIGINAL = PublishedLayout(
    rules=(
        Rule(r"visual\.patch_embedding\.weight", r"patch_embedding.kernel", _conv_2d),
        Rule(r"visual\.cls_embedding", r"cls_embedding", _class_token),
        Rule(r"visual\.pos_embedding", r"pos_embedding", drop_batch_axis),
        Rule(r"visual\.pre_norm\.weight", r"pre_norm.scale"),
        Rule(r"visual\.pre_norm\.bias", r"pre_norm.bias"),
        Rule(
            _ORIGINAL_BLOCK + r"(norm1|norm2)\.weight",
            r"transformer.\1.\2.scale",
        ),
        Rule(_ORIGINAL_BLOCK + r"(norm1|norm2)\.bias", r"transformer.\1.\2.bias"),
        # What follows the slash is a third of a stored array; see `_Weights`.
        Rule(
            _ORIGINAL_BLOCK + r"attn\.to_qkv\.weight/(q|k|v)",
            r"transformer.\1.attn.to_\2.kernel",
            transpose,
        ),
        Rule(
            _ORIGINAL_BLOCK + r"attn\.to_qkv\.bias/(q|k|v)",
            r"transformer.\1.attn.to_\2.bias",
        ),
        Rule(
            _ORIGINAL_BLOCK + r"attn\.proj\.weight",
            r"transformer.\1.attn.proj.kernel",
            transpose,
        ),
        Rule(_ORIGINAL_BLOCK + r"attn\.proj\.bias", r"transformer.\1.attn.proj.bias"),
        Rule(
            _ORIGINAL_BLOCK + r"mlp\.0\.weight",
            r"transformer.\1.mlp.fc1.kernel",
            transpose,
        ),
        Rule(_ORIGINAL_BLOCK + r"mlp\.0\.bias", r"transformer.\1.mlp.fc1.bias"),
        Rule(
            _ORIGINAL_BLOCK + r"mlp\.2\.weight",
            r"transformer.\1.mlp.fc2.kernel",
            transpose,
        ),
        Rule(_ORIGINAL_BLOCK + r"mlp\.2\.bias", r"transformer.\1.mlp.fc2.bias"),
    ),
    layer="visual.transformer.{}.",
    unused=r"visual\.post_norm\.(weight|bias)|visual\.head|textual\..+|log_scale",
)


def _transformers(prefix: str) -> PublishedLayout:
    """The keys of `CLIPVisionModel` behind a prefix, dots escaped."""
    block = prefix + r"encoder\.layers\.(\d+)\."
    rules = (
        Rule(prefix + r"embeddings\.class_embedding", r"cls_embedding"),
        Rule(
            prefix + r"embeddings\.patch_embedding\.weight",
            r"patch_embedding.kernel",
            _conv_2d,
        ),
        Rule(prefix + r"embeddings\.position_embedding\.weight", r"pos_embedding"),
        # Spelt so by the published code.
        Rule(prefix + r"pre_layrnorm\.weight", r"pre_norm.scale"),
        Rule(prefix + r"pre_layrnorm\.bias", r"pre_norm.bias"),
        Rule(block + r"layer_norm(1|2)\.weight", r"transformer.\1.norm\2.scale"),
        Rule(block + r"layer_norm(1|2)\.bias", r"transformer.\1.norm\2.bias"),
        Rule(
            block + r"self_attn\.(q|k|v)_proj\.weight",
            r"transformer.\1.attn.to_\2.kernel",
            transpose,
        ),
        Rule(
            block + r"self_attn\.(q|k|v)_proj\.bias",
            r"transformer.\1.attn.to_\2.bias",
        ),
        Rule(
            block + r"self_attn\.out_proj\.weight",
            r"transformer.\1.attn.proj.kernel",
            transpose,
        ),
        Rule(block + r"self_attn\.out_proj\.bias", r"transformer.\1.attn.proj.bias"),
        Rule(
            block + r"mlp\.(fc1|fc2)\.weight",
            r"transformer.\1.mlp.\2.kernel",
            transpose,
        ),
        Rule(block + r"mlp\.(fc1|fc2)\.bias", r"transformer.\1.mlp.\2.bias"),
    )
    unused = (
        rf"{prefix}post_layernorm\.(weight|bias)|visual_projection\.weight|"
        rf"{prefix}embeddings\.position_ids"
    )
    layer = prefix.replace("\\", "") + "encoder.layers.{}."
    return PublishedLayout(rules=rules, layer=layer, unused=unused)


LAYOUTS: dict[LayoutName, PublishedLayout] = {
    "original": ORIGINAL,
    "transformers": _transformers(r"vision_model\."),
    "transformers_5": _transformers(""),  # versions 5 and later save no prefix
}


def detect_layout(keys: Iterable[str]) -> LayoutName:
    """Which layout a checkpoint has: the one whose table knows most of its keys.

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

    The last layer, the norm and the head behind it, and the text tower of the
    original checkpoint are left out; every other key must be known.

    Args:
      source: A `.safetensors` file, a directory with one, whole or in shards, or
        arrays by key. Layout original or transformers, told by the keys.
      config: Sizes of the tower, and how to run it. Weights are cast to its
        `param_dtype`.
      stem: Start of the file names, for a directory with several checkpoints.
      device: Where the weights are put; the default device if None.

    Returns:
      The tower.

    Raises:
      CheckpointError: A file is missing or damaged.
      ConversionError: Weights and `config` do not fit; every offender is listed.
    """
    if not isinstance(source, Mapping):
        source = load_safetensors(source, stem=stem)
    layout = LAYOUTS[detect_layout(source)]
    last = layout.layer.format(config.num_layers - 1)
    # Only the unused layer tells a tower of this depth from a shallower one.
    if not any(key.startswith(last) for key in source):
        raise ConversionError(
            f"the checkpoint has no key {last}...; num_layers={config.num_layers} "
            "must be the number of its layers"
        )
    unused = re.compile(f"{layout.unused}|{re.escape(last)}.+")
    weights = _used_weights(source, unused)
    with jax.default_device(device):
        return load_parameters(
            lambda: CLIPVisionEncoder(config, rngs=nnx.Rngs(0)),
            weights,
            layout.rules,
            stacked=STACKED,
        )


_FUSED = re.compile(r"visual\.transformer\.\d+\.attn\.to_qkv\.(weight|bias)")


def _used_weights(source: Mapping[str, Any], unused: re.Pattern[str]) -> "_Weights":
    """The weights less those not used, queries, keys and values apart."""
    places: dict[str, tuple[str, int | None]] = {}
    for key in source:
        if unused.fullmatch(key):
            continue
        if _FUSED.fullmatch(key):
            places |= {f"{key}/{part}": (key, i) for i, part in enumerate("qkv")}
        else:
            places[key] = key, None
    return _Weights(source, places)


@dataclasses.dataclass(frozen=True)
class _Weights(Mapping[str, Any]):
    """Some arrays of a checkpoint, or a third of their rows, read when asked for."""

    source: Mapping[str, Any]
    places: Mapping[str, tuple[str, int | None]]  # key of the source, which third

    def __getitem__(self, key: str) -> Any:
        name, third = self.places[key]
        if third is None:
            return self.source[name]
        # Rows that are no multiple of 3 give unequal parts, which do not fit.
        return np.array_split(np.atleast_1d(self.source[name]), 3)[third]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)
