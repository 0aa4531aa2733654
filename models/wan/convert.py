"""Reads and writes Wan transformer checkpoints, original and diffusers layout."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.checkpoints.conversion import (
    Rule,
    best_layout,
    conv_3d,
    drop_batch_axis,
    load_parameters,
    save_parameters,
    transpose,
)
from models.checkpoints.safetensors_io import load_safetensors, save_safetensors
from models.wan.config import WanConfig
from models.wan.transformer import WanTransformer

LayoutName = Literal["original", "diffusers"]
STACKED = ("blocks",)
# What the model computes in float32 is stored in it too: few numbers, read often.
FLOAT32 = (
    "time_embedder",
    "time_proj",
    "scale_shift_table",
    "norm1",
    "norm2",
    "norm_q",
    "norm_k",
    "norm_added_k",
)
_ENDING = re.compile(r"\.(weight|bias)$")

_BOTH = (
    Rule(r"patch_embedding\.weight", r"patch_embedding.kernel", conv_3d),
    Rule(r"patch_embedding\.bias", r"patch_embedding.bias"),
)

# Only image-to-video models have the parameters that these tables name.
_DIFFUSERS_IMAGE_RULES = (
    Rule(
        r"condition_embedder\.image_embedder\.(norm1|norm2)\.weight",
        r"condition_embedder.image_embedder.\1.scale",
    ),
    Rule(
        r"condition_embedder\.image_embedder\.(norm1|norm2)\.bias",
        r"condition_embedder.image_embedder.\1.bias",
    ),
    Rule(
        r"condition_embedder\.image_embedder\.ff\.net\.0\.proj\.weight",
        r"condition_embedder.image_embedder.ff.linear_1.kernel",
        transpose,
    ),
    Rule(
        r"condition_embedder\.image_embedder\.ff\.net\.0\.proj\.bias",
        r"condition_embedder.image_embedder.ff.linear_1.bias",
    ),
    Rule(
        r"condition_embedder\.image_embedder\.ff\.net\.2\.weight",
        r"condition_embedder.image_embedder.ff.linear_2.kernel",
        transpose,
    ),
    Rule(
        r"condition_embedder\.image_embedder\.ff\.net\.2\.bias",
        r"condition_embedder.image_embedder.ff.linear_2.bias",
    ),
    Rule(
        r"blocks\.(\d+)\.attn2\.(add_k_proj|add_v_proj)\.weight",
        r"blocks.\1.attn2.\2.kernel",
        transpose,
    ),
    Rule(
        r"blocks\.(\d+)\.attn2\.(add_k_proj|add_v_proj)\.bias",
        r"blocks.\1.attn2.\2.bias",
    ),
    Rule(
        r"blocks\.(\d+)\.attn2\.norm_added_k\.weight",
        r"blocks.\1.attn2.norm_added_k.scale",
    ),
)
_ORIGINAL_IMAGE_RULES = (
    Rule(r"img_emb\.proj\.0\.weight", r"condition_embedder.image_embedder.norm1.scale"),
    Rule(r"img_emb\.proj\.0\.bias", r"condition_embedder.image_embedder.norm1.bias"),
    Rule(r"img_emb\.proj\.4\.weight", r"condition_embedder.image_embedder.norm2.scale"),
    Rule(r"img_emb\.proj\.4\.bias", r"condition_embedder.image_embedder.norm2.bias"),
    Rule(
        r"blocks\.(\d+)\.cross_attn\.norm_k_img\.weight",
        r"blocks.\1.attn2.norm_added_k.scale",
    ),
)

DIFFUSERS_RULES = (
    *_BOTH,
    *_DIFFUSERS_IMAGE_RULES,
    Rule(
        r"condition_embedder\.(time_embedder|text_embedder)\.(linear_1|linear_2)\.weight",
        r"condition_embedder.\1.\2.kernel",
        transpose,
    ),
    Rule(
        r"condition_embedder\.(time_embedder|text_embedder)\.(linear_1|linear_2)\.bias",
        r"condition_embedder.\1.\2.bias",
    ),
    Rule(
        r"condition_embedder\.time_proj\.weight",
        r"condition_embedder.time_proj.kernel",
        transpose,
    ),
    Rule(r"condition_embedder\.time_proj\.bias", r"condition_embedder.time_proj.bias"),
    Rule(
        r"blocks\.(\d+)\.(attn1|attn2)\.(to_q|to_k|to_v)\.weight",
        r"blocks.\1.\2.\3.kernel",
        transpose,
    ),
    Rule(
        r"blocks\.(\d+)\.(attn1|attn2)\.(to_q|to_k|to_v)\.bias",
        r"blocks.\1.\2.\3.bias",
    ),
    Rule(
        r"blocks\.(\d+)\.(attn1|attn2)\.to_out\.0\.weight",
        r"blocks.\1.\2.to_out.kernel",
        transpose,
    ),
    Rule(r"blocks\.(\d+)\.(attn1|attn2)\.to_out\.0\.bias", r"blocks.\1.\2.to_out.bias"),
    Rule(
        r"blocks\.(\d+)\.(attn1|attn2)\.(norm_q|norm_k)\.weight",
        r"blocks.\1.\2.\3.scale",
    ),
    Rule(r"blocks\.(\d+)\.norm2\.weight", r"blocks.\1.norm2.scale"),
    Rule(r"blocks\.(\d+)\.norm2\.bias", r"blocks.\1.norm2.bias"),
    Rule(
        r"blocks\.(\d+)\.ffn\.net\.0\.proj\.weight",
        r"blocks.\1.ffn.linear_1.kernel",
        transpose,
    ),
    Rule(r"blocks\.(\d+)\.ffn\.net\.0\.proj\.bias", r"blocks.\1.ffn.linear_1.bias"),
    Rule(
        r"blocks\.(\d+)\.ffn\.net\.2\.weight",
        r"blocks.\1.ffn.linear_2.kernel",
        transpose,
    ),
    Rule(r"blocks\.(\d+)\.ffn\.net\.2\.bias", r"blocks.\1.ffn.linear_2.bias"),
    Rule(
        r"blocks\.(\d+)\.scale_shift_table",
        r"blocks.\1.scale_shift_table",
        drop_batch_axis,
    ),
    Rule(r"proj_out\.weight", r"proj_out.kernel", transpose),
    Rule(r"proj_out\.bias", r"proj_out.bias"),
    Rule(r"scale_shift_table", r"scale_shift_table", drop_batch_axis),
)

# The original numbers the entries of `nn.Sequential`; its `norm3` stands before
# cross-attention, where diffusers says `norm2`.
_ORIGINAL_SEQUENTIALS = (
    (r"time_embedding\.0", r"condition_embedder.time_embedder.linear_1"),
    (r"time_embedding\.2", r"condition_embedder.time_embedder.linear_2"),
    (r"text_embedding\.0", r"condition_embedder.text_embedder.linear_1"),
    (r"text_embedding\.2", r"condition_embedder.text_embedder.linear_2"),
    (r"time_projection\.1", r"condition_embedder.time_proj"),
    (r"img_emb\.proj\.1", r"condition_embedder.image_embedder.ff.linear_1"),
    (r"img_emb\.proj\.3", r"condition_embedder.image_embedder.ff.linear_2"),
    (r"blocks\.(\d+)\.self_attn\.(q|k|v)", r"blocks.\1.attn1.to_\2"),
    (r"blocks\.(\d+)\.cross_attn\.(q|k|v)", r"blocks.\1.attn2.to_\2"),
    (r"blocks\.(\d+)\.cross_attn\.k_img", r"blocks.\1.attn2.add_k_proj"),
    (r"blocks\.(\d+)\.cross_attn\.v_img", r"blocks.\1.attn2.add_v_proj"),
    (r"blocks\.(\d+)\.self_attn\.o", r"blocks.\1.attn1.to_out"),
    (r"blocks\.(\d+)\.cross_attn\.o", r"blocks.\1.attn2.to_out"),
    (r"blocks\.(\d+)\.ffn\.0", r"blocks.\1.ffn.linear_1"),
    (r"blocks\.(\d+)\.ffn\.2", r"blocks.\1.ffn.linear_2"),
    (r"head\.head", r"proj_out"),
)

ORIGINAL_RULES = (
    *_BOTH,
    *_ORIGINAL_IMAGE_RULES,
    *(
        Rule(rf"{key}\.weight", rf"{path}.kernel", transpose)
        for key, path in _ORIGINAL_SEQUENTIALS
    ),
    *(Rule(rf"{key}\.bias", rf"{path}.bias") for key, path in _ORIGINAL_SEQUENTIALS),
    Rule(
        r"blocks\.(\d+)\.self_attn\.(norm_q|norm_k)\.weight",
        r"blocks.\1.attn1.\2.scale",
    ),
    Rule(
        r"blocks\.(\d+)\.cross_attn\.(norm_q|norm_k)\.weight",
        r"blocks.\1.attn2.\2.scale",
    ),
    Rule(r"blocks\.(\d+)\.norm3\.weight", r"blocks.\1.norm2.scale"),
    Rule(r"blocks\.(\d+)\.norm3\.bias", r"blocks.\1.norm2.bias"),
    Rule(r"blocks\.(\d+)\.modulation", r"blocks.\1.scale_shift_table", drop_batch_axis),
    Rule(r"head\.modulation", r"scale_shift_table", drop_batch_axis),
)

RULES: dict[LayoutName, tuple[Rule, ...]] = {
    "original": ORIGINAL_RULES,
    "diffusers": DIFFUSERS_RULES,
}


def detect_layout(keys: Iterable[str]) -> LayoutName:
    """Which layout a checkpoint has: the one whose table knows more of its keys.

    Raises:
      ConversionError: Both know equally many, as when no key is known.
    """
    return best_layout(keys, RULES)


def lora_names(keys: Iterable[str]) -> dict[str, str]:
    """How adapters may spell the modules of a checkpoint, for `merge_lora`.

    Args:
      keys: Of a Wan transformer's weights, in either layout.

    Returns:
      The spellings of both layouts, with dots and with underscores, and the name
      that the checkpoint itself uses.

    Raises:
      ConversionError: The layout of the keys is unknown.
    """
    keys = list(keys)
    rules, names = RULES[detect_layout(keys)], {}
    for key in keys:
        base = _ENDING.sub("", key)
        for rule in rules:
            if (path := rule.path_of(key)) is None:
                continue
            for other in (*ORIGINAL_RULES, *DIFFUSERS_RULES):
                if (spelled := other.key_of(path)) is not None:
                    module = _ENDING.sub("", spelled)
                    names[module] = names[module.replace(".", "_")] = base
    return names


def load_wan_transformer(
    source: str | os.PathLike | Mapping[str, Any],
    config: WanConfig,
    *,
    stem: str | None = None,
) -> WanTransformer:
    """Builds a transformer with a checkpoint's weights.

    Args:
      source: A `.safetensors` file, a directory with one, whole or in shards, or
        arrays by key, such as `merge_lora` returns. Layout original or diffusers,
        told by the keys.
      config: Sizes of the model, and how to run it. Weights are cast to its
        `param_dtype`, but for the few of `FLOAT32`.
      stem: Start of the file names, for a directory with several checkpoints.

    Returns:
      The model.

    Raises:
      CheckpointError: A file is missing or damaged.
      ConversionError: Weights and `config` do not fit; every offender is listed.
    """
    if not isinstance(source, Mapping):
        source = load_safetensors(source, stem=stem)
    return load_parameters(
        lambda: WanTransformer(config, rngs=nnx.Rngs(0)),
        source,
        RULES[detect_layout(source)],
        stacked=STACKED,
        float32=FLOAT32,
    )


def save_wan_transformer(
    model: WanTransformer,
    directory: str | os.PathLike,
    *,
    stem: str = "transformer",
    layout: LayoutName = "diffusers",
    dtype: Any = jnp.bfloat16,
    max_shard_bytes: int | None = None,
) -> list[Path]:
    """Writes a transformer's weights as safetensors.

    Args:
      model: The model.
      directory: Where to write.
      stem: Start of the file names.
      layout: Keys and layouts to write.
      dtype: Of the weights in the file; None keeps the parameters' own.
      max_shard_bytes: Most bytes in one file; None for a single file.

    Returns:
      The files written, the index of shards not among them.
    """
    weights = export_wan_transformer(model, layout=layout, dtype=dtype)
    return save_safetensors(
        weights, directory, stem=stem, max_shard_bytes=max_shard_bytes
    )


def export_wan_transformer(
    model: WanTransformer, *, layout: LayoutName = "diffusers", dtype: Any = None
) -> dict[str, np.ndarray]:
    """A transformer's weights as arrays by checkpoint key."""
    return save_parameters(model, RULES[layout], stacked=STACKED, dtype=dtype)
