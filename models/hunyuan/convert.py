"""Reads and writes HunyuanVideo transformers, original and diffusers layout.

The original stores queries, keys and values as one layer; in single blocks the first
layer of the feed-forward network is part of it, too. diffusers stores them apart, and
swaps the halves of one layer: shift and scale before the last. Ours are all apart.
"""

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
    CONV_3D,
    LAYER_NORM,
    LINEAR,
    RMS_NORM,
    Row,
    Rule,
    expand,
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
from models.hunyuan.config import HunyuanConfig
from models.hunyuan.transformer import HunyuanTransformer

STACKED = (
    "context_embedder.refiner_blocks",
    "transformer_blocks",
    "single_transformer_blocks",
)
# Before the keys: in the original's own file, and by other programs.
_PREFIXES = ("module.", "model.diffusion_model.", "diffusion_model.", "model.")
# These are computed in float32, so they are stored in it too: few values, read often.
FLOAT32 = (
    "time_text_embed",
    "norm_q",
    "norm_k",
    "norm_added_q",
    "norm_added_k",
)


def _alike(original: str, name: str) -> Row:
    """Returns the row of a linear layer that is called here as in diffusers."""
    return Row(original, name, name, LINEAR)


# The original numbers the entries of `nn.Sequential`.
_EMBEDDERS = (
    _alike("time_in.mlp.0", "timestep_embedder.linear_1"),
    _alike("time_in.mlp.2", "timestep_embedder.linear_2"),
    _alike("vector_in.in_layer", "text_embedder.linear_1"),
    _alike("vector_in.out_layer", "text_embedder.linear_2"),
    _alike("guidance_in.mlp.0", "guidance_embedder.linear_1"),
    _alike("guidance_in.mlp.2", "guidance_embedder.linear_2"),
)
_REFINER_EMBEDDERS = (
    _alike("t_embedder.mlp.0", "timestep_embedder.linear_1"),
    _alike("t_embedder.mlp.2", "timestep_embedder.linear_2"),
    _alike("c_embedder.linear_1", "text_embedder.linear_1"),
    _alike("c_embedder.linear_2", "text_embedder.linear_2"),
)
_REFINER_BLOCK = (
    Row("norm1", "norm1", "norm1", LAYER_NORM),
    Row("norm2", "norm2", "norm2", LAYER_NORM),
    _alike("self_attn_qkv", "attn.to_q"),
    _alike("self_attn_qkv", "attn.to_k"),
    _alike("self_attn_qkv", "attn.to_v"),
    Row("self_attn_proj", "attn.to_out.0", "attn.to_out", LINEAR),
    Row("mlp.fc1", "ff.net.0.proj", "ff.linear_1", LINEAR),
    Row("mlp.fc2", "ff.net.2", "ff.linear_2", LINEAR),
    _alike("adaLN_modulation.1", "norm_out.linear"),
)
_DOUBLE_BLOCK = (
    _alike("img_mod.linear", "norm1.linear"),
    _alike("txt_mod.linear", "norm1_context.linear"),
    _alike("img_attn_qkv", "attn.to_q"),
    _alike("img_attn_qkv", "attn.to_k"),
    _alike("img_attn_qkv", "attn.to_v"),
    _alike("txt_attn_qkv", "attn.add_q_proj"),
    _alike("txt_attn_qkv", "attn.add_k_proj"),
    _alike("txt_attn_qkv", "attn.add_v_proj"),
    Row("img_attn_q_norm", "attn.norm_q", "attn.norm_q", RMS_NORM),
    Row("img_attn_k_norm", "attn.norm_k", "attn.norm_k", RMS_NORM),
    Row("txt_attn_q_norm", "attn.norm_added_q", "attn.norm_added_q", RMS_NORM),
    Row("txt_attn_k_norm", "attn.norm_added_k", "attn.norm_added_k", RMS_NORM),
    Row("img_attn_proj", "attn.to_out.0", "attn.to_out", LINEAR),
    _alike("txt_attn_proj", "attn.to_add_out"),
    Row("img_mlp.fc1", "ff.net.0.proj", "ff.linear_1", LINEAR),
    Row("img_mlp.fc2", "ff.net.2", "ff.linear_2", LINEAR),
    Row("txt_mlp.fc1", "ff_context.net.0.proj", "ff_context.linear_1", LINEAR),
    Row("txt_mlp.fc2", "ff_context.net.2", "ff_context.linear_2", LINEAR),
)
_SINGLE_BLOCK = (
    _alike("modulation.linear", "norm.linear"),
    _alike("linear1", "attn.to_q"),
    _alike("linear1", "attn.to_k"),
    _alike("linear1", "attn.to_v"),
    _alike("linear1", "proj_mlp"),
    _alike("linear2", "proj_out"),
    Row("q_norm", "attn.norm_q", "attn.norm_q", RMS_NORM),
    Row("k_norm", "attn.norm_k", "attn.norm_k", RMS_NORM),
)
_REFINER = "context_embedder"
_TABLE = (
    Row("img_in.proj", "x_embedder.proj", "x_embedder", CONV_3D),
    *(
        row._replace(
            library=f"time_text_embed.{row.library}",
            path=f"time_text_embed.{row.path}",
        )
        for row in _EMBEDDERS
    ),
    _alike("txt_in.input_embedder", f"{_REFINER}.proj_in"),
    *within(
        "txt_in",
        f"{_REFINER}.time_text_embed",
        f"{_REFINER}.time_text_embed",
        _REFINER_EMBEDDERS,
    ),
    *within(
        "txt_in.individual_token_refiner.blocks.{}",
        f"{_REFINER}.token_refiner.refiner_blocks.{{}}",
        f"{_REFINER}.refiner_blocks.{{}}",
        _REFINER_BLOCK,
    ),
    *within(
        "double_blocks.{}",
        "transformer_blocks.{}",
        "transformer_blocks.{}",
        _DOUBLE_BLOCK,
    ),
    *within(
        "single_blocks.{}",
        "single_transformer_blocks.{}",
        "single_transformer_blocks.{}",
        _SINGLE_BLOCK,
    ),
    _alike("final_layer.linear", "proj_out"),
)
_SHIFT, _SCALE = "norm_out.shift", "norm_out.scale"
_ORIGINAL_OUT, _LIBRARY_OUT = "final_layer.adaLN_modulation.1", "norm_out.linear"

RULES: dict[LayoutName, tuple[Rule, ...]] = {
    "original": (
        *original_rules(_TABLE),
        *expand((_ORIGINAL_OUT, half, LINEAR) for half in (_SHIFT, _SCALE)),
    ),
    "diffusers": (
        *library_rules(_TABLE),
        *expand((_LIBRARY_OUT, half, LINEAR) for half in (_SCALE, _SHIFT)),
    ),
}


# ComfyUI's names of what the original calls otherwise.
_COMFY_NAMES = {
    "attn_qkv": "attn.qkv",
    "attn_proj": "attn.proj",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
    "mod.linear": "mod.lin",
    "modulation.linear": "modulation.lin",
}
_COMFY = re.compile("|".join(map(re.escape, _COMFY_NAMES)))

# Parts of modules' names that only some models have, for messages about adapters.
LORA_FEATURES = {
    **FAMILY_FEATURES,
    "audio": "models with sound",
    "bg_proj": "models that edit videos",
}


def detect_layout(keys: Iterable[str]) -> LayoutName:
    """Returns the layout of a checkpoint: the one whose table knows more of its keys.

    Raises:
      ConversionError: Both know equally many, as when no key is known.
    """
    return best_layout(keys, RULES)


def lora_names(keys: Iterable[str], config: HunyuanConfig) -> dict[str, Target]:
    """Returns how adapters may spell the modules of a checkpoint, for `merge_lora`.

    Args:
      keys: Keys of a transformer's weights, in either layout.
      config: Sizes of the model, which tell the rows of joined layers.

    Returns:
      The spellings of both layouts and of ComfyUI, with dots and with underscores. An
      adapter may join other layers than the checkpoint does.

    Raises:
      ConversionError: The layout of the keys is unknown.
    """
    keys = list(keys)
    joined = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
    rows = dict.fromkeys((*joined, "shift", "scale"), config.dim)
    targets = targets_by_spelling(
        keys,
        RULES[detect_layout(keys)],
        RULES.values(),
        rows | {"proj_mlp": config.mlp_dim},
    )
    names: dict[str, Target] = {}
    for module, target in targets.items():
        for spelled in (module, _COMFY.sub(lambda m: _COMFY_NAMES[m[0]], module)):
            names[spelled] = names[spelled.replace(".", "_")] = target
    return names


def open_transformer_weights(
    path: str | os.PathLike, *, stem: str | None = None
) -> Mapping[str, Any]:
    """Opens a transformer's checkpoint; see `open_weights`."""
    return open_weights(path, stem=stem, prefixes=_PREFIXES)


def load_hunyuan_transformer(
    source: str | os.PathLike | Mapping[str, Any],
    config: HunyuanConfig,
    *,
    stem: str | None = None,
    mesh: DeviceMesh | None = None,
) -> HunyuanTransformer:
    """Builds a transformer with a checkpoint's weights.

    Args:
      source: A `.safetensors` file, a directory with one, whole or in shards, the
        original's `.pt` file, or arrays by key, such as `merge_lora` returns. Layout
        original or diffusers, told by the keys.
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
        lambda: HunyuanTransformer(config, rngs=nnx.Rngs(0)),
        source,
        RULES[detect_layout(source)],
        stacked=STACKED,
        float32=FLOAT32,
        shardings=shardings_of(mesh, HunyuanTransformer),
    )


def save_hunyuan_transformer(
    model: HunyuanTransformer,
    directory: str | os.PathLike,
    *,
    stem: str = "diffusion_pytorch_model",
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
    weights = export_hunyuan_transformer(model, layout=layout, dtype=dtype)
    return save_safetensors(
        weights, directory, stem=stem, max_shard_bytes=max_shard_bytes
    )


def export_hunyuan_transformer(
    model: HunyuanTransformer, *, layout: LayoutName = "diffusers", dtype: Any = None
) -> dict[str, np.ndarray]:
    """Returns a transformer's weights as arrays by checkpoint key."""
    return save_parameters(model, RULES[layout], stacked=STACKED, dtype=dtype)
