"""Reads and writes Wan transformer checkpoints, original and diffusers layout."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.checkpoints.conversion import (
    best_layout,
    load_parameters,
    save_parameters,
)
from models.checkpoints.lora.rows import Target, targets_by_spelling
from models.checkpoints.rules import (
    BATCHED_TABLE,
    CONV_3D,
    LAYER_NORM,
    LINEAR,
    RMS_NORM,
    Row,
    Rule,
    library_rules,
    original_rules,
    within,
)
from models.checkpoints.safetensors_io import save_safetensors
from models.checkpoints.weights import open_weights
from models.diffusion.adapters import FAMILY_FEATURES
from models.diffusion.folders.layouts import LayoutName
from models.diffusion.mesh import DeviceMesh
from models.diffusion.transformer.sharded import shardings_of
from models.wan.config import WanConfig
from models.wan.transformer import WanTransformer

STACKED = ("blocks",)
# That other programs put before the keys of the original or of diffusers.
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
# These are computed in float32, so they are stored in it too: few values, read often.
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
_TABLE_ENDING = re.compile(r"\.?modulation$")
# Parts of modules' names that only some models have, for messages about adapters.
LORA_FEATURES = {
    **FAMILY_FEATURES,
    **dict.fromkeys(
        ("k_img", "v_img", "img_emb", "add_k_proj", "add_v_proj", "norm_added_k"),
        "image-to-video models",
    ),
    "image_embedder": "image-to-video models",
    "vace": "VACE models",
    "control_adapter": "models with a camera control",
    "ref_conv": "models with reference images",
    "audio": "models with sound",
}

# The original numbers the entries of `nn.Sequential`; its `norm3` stands before
# cross-attention, where diffusers says `norm2`.
_EMBEDDERS = (
    Row("time_embedding.0", "time_embedder.linear_1", "time_embedder.linear_1", LINEAR),
    Row("time_embedding.2", "time_embedder.linear_2", "time_embedder.linear_2", LINEAR),
    Row("time_projection.1", "time_proj", "time_proj", LINEAR),
    Row("text_embedding.0", "text_embedder.linear_1", "text_embedder.linear_1", LINEAR),
    Row("text_embedding.2", "text_embedder.linear_2", "text_embedder.linear_2", LINEAR),
)
# Only image-to-video models have these, and those of cross-attention with "img".
_IMAGE_EMBEDDER = (
    Row("proj.0", "norm1", "norm1", LAYER_NORM),
    Row("proj.1", "ff.net.0.proj", "ff.linear_1", LINEAR),
    Row("proj.3", "ff.net.2", "ff.linear_2", LINEAR),
    Row("proj.4", "norm2", "norm2", LAYER_NORM),
)
_ATTENTION = (
    Row("q", "to_q", "to_q", LINEAR),
    Row("k", "to_k", "to_k", LINEAR),
    Row("v", "to_v", "to_v", LINEAR),
    Row("o", "to_out.0", "to_out", LINEAR),
    Row("norm_q", "norm_q", "norm_q", RMS_NORM),
    Row("norm_k", "norm_k", "norm_k", RMS_NORM),
)
_IMAGE_ATTENTION = (
    Row("k_img", "add_k_proj", "add_k_proj", LINEAR),
    Row("v_img", "add_v_proj", "add_v_proj", LINEAR),
    Row("norm_k_img", "norm_added_k", "norm_added_k", RMS_NORM),
)
_BLOCK = (
    *within("self_attn", "attn1", "attn1", _ATTENTION),
    *within("cross_attn", "attn2", "attn2", _ATTENTION + _IMAGE_ATTENTION),
    Row("norm3", "norm2", "norm2", LAYER_NORM),
    Row("ffn.0", "ffn.net.0.proj", "ffn.linear_1", LINEAR),
    Row("ffn.2", "ffn.net.2", "ffn.linear_2", LINEAR),
    Row("modulation", "scale_shift_table", "scale_shift_table", BATCHED_TABLE),
)
_CONDITIONS = "condition_embedder"
_IMAGE = f"{_CONDITIONS}.image_embedder"
_TABLE = (
    Row("patch_embedding", "patch_embedding", "patch_embedding", CONV_3D),
    *(
        Row(original, f"{_CONDITIONS}.{library}", f"{_CONDITIONS}.{path}", kind)
        for original, library, path, kind in _EMBEDDERS
    ),
    *within("img_emb", _IMAGE, _IMAGE, _IMAGE_EMBEDDER),
    *within("blocks.{}", "blocks.{}", "blocks.{}", _BLOCK),
    Row("head.head", "proj_out", "proj_out", LINEAR),
    Row("head.modulation", "scale_shift_table", "scale_shift_table", BATCHED_TABLE),
)

RULES: dict[LayoutName, tuple[Rule, ...]] = {
    "original": original_rules(_TABLE),
    "diffusers": library_rules(_TABLE),
}


def detect_layout(keys: Iterable[str]) -> LayoutName:
    """Returns the layout of a checkpoint: the one whose table knows more of its keys.

    Raises:
      ConversionError: Both know equally many, as when no key is known.
    """
    return best_layout(keys, RULES)


def lora_names(keys: Iterable[str]) -> dict[str, Target]:
    """Returns how adapters may spell the modules of a checkpoint, for `merge_lora`.

    Args:
      keys: Keys of a Wan transformer's weights, in either layout.

    Returns:
      The spellings of both layouts, with dots and with underscores, and the name
      that the checkpoint itself uses. Keys of LightX2V's differences of tables, such
      as "blocks.0.diff_m", are among the spellings.

    Raises:
      ConversionError: The layout of the keys is unknown.
    """
    keys = list(keys)
    # No layout of Wan joins layers, so no rows are counted.
    targets = targets_by_spelling(
        keys, RULES[detect_layout(keys)], RULES.values(), num_rows={}
    )
    names: dict[str, Target] = {}
    for module, target in targets.items():
        names[module] = names[module.replace(".", "_")] = target
        # LightX2V's differences of a block's table have the block's name.
        block, is_table = _TABLE_ENDING.subn(".diff_m", module)
        if is_table:
            names[block] = names[block.replace(".", "_")] = target
    return names


def open_transformer_weights(
    path: str | os.PathLike, *, stem: str | None = None
) -> Mapping[str, Any]:
    """Opens a transformer's checkpoint; see `open_weights`."""
    return open_weights(path, stem=stem, prefixes=_PREFIXES)


def load_wan_transformer(
    source: str | os.PathLike | Mapping[str, Any],
    config: WanConfig,
    *,
    stem: str | None = None,
    mesh: DeviceMesh | None = None,
) -> WanTransformer:
    """Builds a transformer with a checkpoint's weights.

    Args:
      source: A `.safetensors` file, a directory with one, whole or in shards, or
        arrays by key, such as `merge_lora` returns. Layout original or diffusers,
        told by the keys.
      config: Sizes of the model, and how to run it. Weights are cast to its
        `param_dtype`, but for the few of `FLOAT32`.
      stem: Start of the file names, for a directory with several checkpoints.
      mesh: Devices of a `ShardedTransformer` of the model, on which its weights lie
        from the start; None for one device.

    Returns:
      The model.

    Raises:
      CheckpointError: A file is missing or damaged.
      ConversionError: Weights and `config` do not fit; every offender is listed.
    """
    if not isinstance(source, Mapping):
        source = open_transformer_weights(source, stem=stem)
    return load_parameters(
        lambda: WanTransformer(config, rngs=nnx.Rngs(0)),
        source,
        RULES[detect_layout(source)],
        stacked=STACKED,
        float32=FLOAT32,
        shardings=shardings_of(mesh, WanTransformer),
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
      directory: Folder to write to.
      stem: Start of the file names.
      layout: Keys and layouts to write.
      dtype: The weights' dtype in the file; None keeps that of the parameters.
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
    """Returns a transformer's weights as arrays by checkpoint key."""
    return save_parameters(model, RULES[layout], stacked=STACKED, dtype=dtype)
