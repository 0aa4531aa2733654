"""Reads and writes the weights of Wan's autoencoder, original and diffusers layout."""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import numpy as np
from flax import nnx

from models.checkpoints.conversion import (
    Layout,
    Rule,
    best_layout,
    conv_3d,
    load_parameters,
    save_parameters,
)
from models.checkpoints.safetensors_io import load_safetensors
from models.wan.vae.autoencoder import WanVAE
from models.wan.vae.config import WanVAEConfig

LayoutName = Literal["original", "diffusers"]

# PyTorch's Conv2d stores [out, in, rows, columns].
conv_2d = Layout(
    "conv_2d", lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)
)
# Convolutions of window one, which are linear layers here.
point_2d = Layout(
    "point_2d", lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None]
)
point_3d = Layout(
    "point_3d", lambda x: x[:, :, 0, 0, 0].T, lambda x: x.T[:, :, None, None, None]
)
# Scales of norms, with axes of size 1 for the positions.
norm_2d = Layout("norm_2d", lambda x: x[:, 0, 0], lambda x: x[:, None, None])
norm_3d = Layout("norm_3d", lambda x: x[:, 0, 0, 0], lambda x: x[:, None, None, None])
_NORMS = (norm_2d, norm_3d)

# The table: name of a module in the original, in diffusers, and here; its layout.
# First those inside a block, then those beside the blocks, then the blocks.
_Module = tuple[str, str, str, Layout]
_RESIDUAL: tuple[_Module, ...] = (
    ("residual.0", "norm1", "norm1", norm_3d),
    ("residual.2", "conv1", "conv1", conv_3d),
    ("residual.3", "norm2", "norm2", norm_3d),
    ("residual.6", "conv2", "conv2", conv_3d),
    ("shortcut", "conv_shortcut", "conv_shortcut", point_3d),
)
_RESAMPLE: tuple[_Module, ...] = (
    ("resample.1", "resample.1", "resample", conv_2d),
    ("time_conv", "time_conv", "time_conv", conv_3d),
)
_ATTENTION: tuple[_Module, ...] = (
    ("norm", "norm", "norm", norm_2d),
    ("to_qkv", "to_qkv", "to_qkv", point_2d),
    ("proj", "proj", "proj", point_2d),
)
_HALF = "(encoder|decoder)"
_ENDS: tuple[_Module, ...] = (
    ("conv1", "quant_conv", "quant_conv", point_3d),
    ("conv2", "post_quant_conv", "post_quant_conv", point_3d),
    (f"{_HALF}.conv1", f"{_HALF}.conv_in", r"\1.conv_in", conv_3d),
    (f"{_HALF}.head.0", f"{_HALF}.norm_out", r"\1.norm_out", norm_3d),
    (f"{_HALF}.head.2", f"{_HALF}.conv_out", r"\1.conv_out", conv_3d),
)
_MIDDLE = f"{_HALF}.mid_block"
_BLOCKS = (
    (f"{_HALF}.middle.0", f"{_MIDDLE}.resnets.0", r"\1.mid_block.resnets.0", _RESIDUAL),
    (
        f"{_HALF}.middle.1",
        f"{_MIDDLE}.attentions.0",
        r"\1.mid_block.attentions.0",
        _ATTENTION,
    ),
    (f"{_HALF}.middle.2", f"{_MIDDLE}.resnets.1", r"\1.mid_block.resnets.1", _RESIDUAL),
    (
        r"encoder.downsamples.(\d+)",
        r"encoder.down_blocks.(\d+)",
        r"encoder.down_blocks.\1",
        _RESIDUAL + _RESAMPLE,
    ),
)


def make_rules(config: WanVAEConfig, layout: LayoutName) -> tuple[Rule, ...]:
    """The table of one layout.

    Args:
      config: Sizes of the model. The original counts the blocks of the decoder
        through, so that their numbers depend on how many there are.
      layout: Which keys.

    Returns:
      Rules for `models.checkpoints.conversion`.
    """
    rules = []
    for *keys, path, array_layout in _modules(config):
        pattern = keys[get_args(LayoutName).index(layout)].replace(".", r"\.")
        if array_layout in _NORMS:
            rules.append(Rule(rf"{pattern}\.gamma", f"{path}.gamma", array_layout))
            continue
        rules.append(Rule(rf"{pattern}\.weight", f"{path}.kernel", array_layout))
        rules.append(Rule(rf"{pattern}\.bias", f"{path}.bias"))
    return tuple(rules)


def detect_layout(keys: Iterable[str], config: WanVAEConfig) -> LayoutName:
    """Which layout a checkpoint has: the one whose table knows more of its keys.

    Raises:
      ConversionError: Both know equally many, as when no key is known.
    """
    return best_layout(
        keys, {name: make_rules(config, name) for name in get_args(LayoutName)}
    )


def load_wan_vae(
    source: str | os.PathLike | Mapping[str, Any], config: WanVAEConfig
) -> WanVAE:
    """Builds an autoencoder with a checkpoint's weights.

    Args:
      source: A `.safetensors` file, a directory with one, or arrays by key, as read
        from `Wan2.1_VAE.pth`. Layout original or diffusers, told by the keys.
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
        source = load_safetensors(source)
    rules = make_rules(config, detect_layout(source, config))
    return load_parameters(lambda: WanVAE(config, rngs=nnx.Rngs(0)), source, rules)


def export_wan_vae(
    model: WanVAE, *, layout: LayoutName = "diffusers", dtype: Any = None
) -> dict[str, np.ndarray]:
    """An autoencoder's weights as arrays by checkpoint key.

    Args:
      model: The model.
      layout: Keys and layouts to write.
      dtype: Cast to this; None keeps the parameters' dtype.
    """
    return save_parameters(model, make_rules(model.config, layout), dtype=dtype)


def _modules(config: WanVAEConfig) -> Iterator[_Module]:
    """Every line of the table, names of blocks put before those of their parts."""
    yield from _ENDS
    for *prefixes, parts in (*_BLOCKS, *_decoder_blocks(config)):
        for *names, layout in parts:
            original, diffusers, ours = (
                f"{prefix}.{name}" for prefix, name in zip(prefixes, names, strict=True)
            )
            yield original, diffusers, ours, layout


def _decoder_blocks(config: WanVAEConfig) -> Iterator[tuple]:
    """The decoder's blocks, numbered through in the original, by level elsewhere."""
    per_level = config.num_res_blocks + 2  # the last is the step to the next level
    for level in range(len(config.dim_mult)):
        ours = f"decoder.up_blocks.{level}"
        for block in range(per_level - 1):
            number, name = level * per_level + block, f"{ours}.resnets.{block}"
            yield f"decoder.upsamples.{number}", name, name, _RESIDUAL
        number = (level + 1) * per_level - 1
        yield (
            f"decoder.upsamples.{number}",
            f"{ours}.upsamplers.0",
            f"{ours}.upsampler",
            _RESAMPLE,
        )
