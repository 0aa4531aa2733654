"""Reads and writes the weights of Wan's autoencoder, original and diffusers layout."""

import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import numpy as np
from flax import nnx

from models.checkpoints.conversion import (
    best_layout,
    load_parameters,
    save_parameters,
)
from models.checkpoints.rules import (
    CONV_2D,
    CONV_3D,
    Layout,
    Parameter,
    Row,
    Rule,
    library_rules,
    original_rules,
    weight_and_bias,
    within,
)
from models.checkpoints.weights import open_weights
from models.diffusion.folders.layouts import LayoutName
from models.wan.vae.autoencoder import WanVAE
from models.wan.vae.config import WanVAEConfig

# That other programs put before the keys of the original.
_PREFIXES = ("vae.", "first_stage_model.", "model.")

# Convolutions of window one, which are linear layers here.
_POINT_2D = weight_and_bias(Layout("outputs inputs 1 1", "inputs outputs"))
_POINT_3D = weight_and_bias(Layout("outputs inputs 1 1 1", "inputs outputs"))
# Scales of norms, with axes of size 1 for the positions.
_NORM_2D = (Parameter("gamma", "gamma", Layout("channels 1 1", "channels")),)
_NORM_3D = (Parameter("gamma", "gamma", Layout("channels 1 1 1", "channels")),)

# First the modules inside a block, then those beside the blocks, then the blocks.
_RESIDUAL = (
    Row("residual.0", "norm1", "norm1", _NORM_3D),
    Row("residual.2", "conv1", "conv1", CONV_3D),
    Row("residual.3", "norm2", "norm2", _NORM_3D),
    Row("residual.6", "conv2", "conv2", CONV_3D),
    Row("shortcut", "conv_shortcut", "conv_shortcut", _POINT_3D),
)
_RESAMPLE = (
    Row("resample.1", "resample.1", "resample", CONV_2D),
    Row("time_conv", "time_conv", "time_conv", CONV_3D),
)
_ATTENTION = (
    Row("norm", "norm", "norm", _NORM_2D),
    Row("to_qkv", "to_qkv", "to_qkv", _POINT_2D),
    Row("proj", "proj", "proj", _POINT_2D),
)
_QUANTIZERS = (
    Row("conv1", "quant_conv", "quant_conv", _POINT_3D),
    Row("conv2", "post_quant_conv", "post_quant_conv", _POINT_3D),
)
_HALF = (  # of encoder and decoder
    Row("conv1", "conv_in", "conv_in", CONV_3D),
    *within("middle.0", "mid_block.resnets.0", "mid_block.resnets.0", _RESIDUAL),
    *within("middle.1", "mid_block.attentions.0", "mid_block.attentions.0", _ATTENTION),
    *within("middle.2", "mid_block.resnets.1", "mid_block.resnets.1", _RESIDUAL),
    Row("head.0", "norm_out", "norm_out", _NORM_3D),
    Row("head.2", "conv_out", "conv_out", CONV_3D),
)


def make_rules(config: WanVAEConfig, layout: LayoutName) -> tuple[Rule, ...]:
    """Returns the rules of one layout.

    Args:
      config: Sizes of the model. The original counts the blocks of Wan2.1's decoder
        through, so that their numbers depend on how many there are.
      layout: The layout whose keys the rules know.
    """
    table = (
        *_QUANTIZERS,
        *within("encoder", "encoder", "encoder", _HALF + _downsampling(config)),
        *within("decoder", "decoder", "decoder", _HALF + _upsampling(config)),
    )
    return original_rules(table) if layout == "original" else library_rules(table)


def detect_layout(keys: Iterable[str], config: WanVAEConfig) -> LayoutName:
    """Returns the layout of a checkpoint: the one whose table knows more of its keys.

    Raises:
      ConversionError: Both know equally many, as when no key is known.
    """
    return best_layout(
        keys, {name: make_rules(config, name) for name in get_args(LayoutName)}
    )


def open_vae_weights(path: str | os.PathLike) -> Mapping[str, Any]:
    """Opens an autoencoder's checkpoint; see `open_weights`."""
    return open_weights(path, prefixes=_PREFIXES)


def load_wan_vae(
    source: str | os.PathLike | Mapping[str, Any], config: WanVAEConfig
) -> WanVAE:
    """Builds an autoencoder with a checkpoint's weights.

    Args:
      source: A `.safetensors` or `.pth` file, a directory with the former, or arrays
        by key. Layout original or diffusers, told by the keys.
      config: Sizes of the model, and how to run it. Weights are cast to its
        `param_dtype`.

    Returns:
      The model.

    Raises:
      CheckpointError: A file is missing or damaged.
      ConversionError: Weights and `config` do not fit; every offender is listed.

    Source: diffusers `scripts/convert_wan_to_diffusers.py`, for the names.
    """
    if not isinstance(source, Mapping):
        source = open_vae_weights(source)
    rules = make_rules(config, detect_layout(source, config))
    return load_parameters(lambda: WanVAE(config, rngs=nnx.Rngs(0)), source, rules)


def export_wan_vae(
    model: WanVAE, *, layout: LayoutName = "diffusers", dtype: Any = None
) -> dict[str, np.ndarray]:
    """Returns an autoencoder's weights as arrays by checkpoint key.

    Args:
      model: The model.
      layout: Keys and layouts to write.
      dtype: Cast to this; None keeps the parameters' dtype.
    """
    return save_parameters(model, make_rules(model.config, layout), dtype=dtype)


def _downsampling(config: WanVAEConfig) -> tuple[Row, ...]:
    """Returns the encoder's blocks, which are in groups where levels are gone round."""
    if not config.averages:
        name = "down_blocks.{}"
        return tuple(within("downsamples.{}", name, name, _RESIDUAL + _RESAMPLE))
    return _levels("down", config, per_level=config.num_res_blocks + 1)


def _upsampling(config: WanVAEConfig) -> tuple[Row, ...]:
    """Returns the decoder's blocks; the original numbers Wan2.1's through."""
    per_level = config.num_res_blocks + 2  # the last is the step to the next level
    if config.averages:
        return _levels("up", config, per_level=per_level)
    rows: list[Row] = []
    for level in range(len(config.dim_mult)):
        ours = f"up_blocks.{level}"
        for block in range(per_level - 1):
            index, name = level * per_level + block, f"{ours}.resnets.{block}"
            rows += within(f"upsamples.{index}", name, name, _RESIDUAL)
        index = (level + 1) * per_level - 1
        rows += within(
            f"upsamples.{index}", f"{ours}.upsamplers.0", f"{ours}.upsampler", _RESAMPLE
        )
    return tuple(rows)


def _levels(
    name: Literal["down", "up"], config: WanVAEConfig, *, per_level: int
) -> tuple[Row, ...]:
    """Returns levels that are groups in the original, too; the last part is a step."""
    rows: list[Row] = []
    for level in range(len(config.dim_mult)):
        original = f"{name}samples.{level}.{name}samples"
        ours = f"{name}_blocks.{level}"
        for block in range(per_level - 1):
            resnet = f"{ours}.resnets.{block}"
            rows += within(f"{original}.{block}", resnet, resnet, _RESIDUAL)
        step = f"{ours}.{name}sampler"
        rows += within(f"{original}.{per_level - 1}", step, step, _RESAMPLE)
    return tuple(rows)
