"""Reads and writes the weights of HunyuanVideo's autoencoder.

The original and diffusers use the same keys. The original's file wraps them in
`state_dict` and may put `vae.` before them.
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from models.checkpoints.conversion import load_parameters, save_parameters
from models.checkpoints.rules import (
    CONV_3D,
    LAYER_NORM,
    LINEAR,
    Layout,
    Row,
    Rule,
    library_rules,
    weight_and_bias,
    within,
)
from models.checkpoints.weights import open_weights
from models.hunyuan.vae.autoencoder import HunyuanVAE
from models.hunyuan.vae.config import HunyuanVAEConfig

# That the original and other programs put before the keys.
_PREFIXES = (
    *("state_dict.vae.", "state_dict.", "vae.", "first_stage_model.", "model."),
)
# A convolution of window one, which is a linear layer here.
_POINT = weight_and_bias(Layout("outputs inputs 1 1 1", "inputs outputs"))


def _row(name: str, path: str, kind: Any) -> Row:
    """Returns the row of a module that both layouts call the same."""
    return Row(name, name, path, kind)


# First the modules inside a block, then those beside the blocks, then the blocks.
_RESIDUAL = (
    _row("norm1", "norm1", LAYER_NORM),
    _row("conv1.conv", "conv1", CONV_3D),
    _row("norm2", "norm2", LAYER_NORM),
    _row("conv2.conv", "conv2", CONV_3D),
    _row("conv_shortcut.conv", "conv_shortcut", _POINT),
)
_ATTENTION = (
    _row("group_norm", "group_norm", LAYER_NORM),
    _row("to_q", "to_q", LINEAR),
    _row("to_k", "to_k", LINEAR),
    _row("to_v", "to_v", LINEAR),
    _row("to_out.0", "to_out", LINEAR),
)
_HALF = (  # of encoder and decoder
    _row("conv_in.conv", "conv_in", CONV_3D),
    *within(*("mid_block.resnets.{}",) * 3, _RESIDUAL),
    *within(*("mid_block.attentions.{}",) * 3, _ATTENTION),
    _row("conv_norm_out", "conv_norm_out", LAYER_NORM),
    _row("conv_out.conv", "conv_out", CONV_3D),
)
_ENCODER = (
    *_HALF,
    *within(*("down_blocks.{}.resnets.{}",) * 3, _RESIDUAL),
    _row(
        "down_blocks.{}.downsamplers.0.conv.conv",
        "down_blocks.{}.downsampler",
        CONV_3D,
    ),
)
_DECODER = (
    *_HALF,
    *within(*("up_blocks.{}.resnets.{}",) * 3, _RESIDUAL),
    _row("up_blocks.{}.upsamplers.0.conv.conv", "up_blocks.{}.upsampler.conv", CONV_3D),
)
RULES: tuple[Rule, ...] = library_rules(
    (
        _row("quant_conv", "quant_conv", _POINT),
        _row("post_quant_conv", "post_quant_conv", _POINT),
        *within(*("encoder",) * 3, _ENCODER),
        *within(*("decoder",) * 3, _DECODER),
    )
)


def open_vae_weights(path: str | os.PathLike) -> Mapping[str, Any]:
    """Opens an autoencoder's checkpoint; see `open_weights`."""
    return open_weights(path, prefixes=_PREFIXES)


def load_hunyuan_vae(
    source: str | os.PathLike | Mapping[str, Any], config: HunyuanVAEConfig
) -> HunyuanVAE:
    """Builds an autoencoder with a checkpoint's weights.

    Args:
      source: A `.safetensors` or `.pt` file, a directory with the former, or arrays by
        key.
      config: Sizes of the model, and how to run it. Weights are cast to its
        `param_dtype`.

    Returns:
      The model.

    Raises:
      CheckpointError: A file is missing or damaged.
      ConversionError: Weights and `config` do not fit; every offender is listed.

    Source: HunyuanVideo `hyvideo/vae/__init__.py`, for the wrappings.
    """
    if not isinstance(source, Mapping):
        source = open_vae_weights(source)
    return load_parameters(lambda: HunyuanVAE(config, rngs=nnx.Rngs(0)), source, RULES)


def export_hunyuan_vae(
    model: HunyuanVAE, *, dtype: Any = None
) -> dict[str, np.ndarray]:
    """Returns an autoencoder's weights as arrays by checkpoint key.

    Args:
      model: The model.
      dtype: Cast to this; None keeps the parameters' dtype.
    """
    return save_parameters(model, RULES, dtype=dtype)
