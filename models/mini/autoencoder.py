"""The convolutional codec of small models: Wan's autoencoder, small.

config.json of a checkpoint has its sizes and the statistics of its latents under
"codec", as diffusers names them; codec.safetensors has diffusers' keys in float16.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from models.wan.vae.autoencoder import WanVAE
from models.wan.vae.codec import WanVAECodec
from models.wan.vae.config import WanVAEConfig
from models.wan.vae.convert import export_wan_vae, load_wan_vae

_STORED = {  # our fields by published name
    "base_dim": "base_dim",
    "z_dim": "latent_channels",
    "dim_mult": "dim_mult",
    "num_res_blocks": "num_res_blocks",
    "temperal_downsample": "temporal_downsample",
    "spatial_downsample": "spatial_downsample",
    "decoder_base_dim": "decoder_base_dim",
    "patch_size": "patch_size",
    "latents_mean": "latents_mean",
    "latents_std": "latents_std",
}


def autoencoder_config(**changes: Any) -> WanVAEConfig:
    """Returns the sizes of the small codec, its latents not normalised yet.

    Two frames, four rows and four columns of pixels are 16 numbers, as many as a
    transformer of small models takes. Patches of 4 x 4 pixels enter whole and leave
    whole: a step that doubles rows by repeating them would have to learn anew where
    in a patch it is.
    """
    fields: dict[str, Any] = {
        "base_dim": 40,
        "decoder_base_dim": 48,
        "latent_channels": 16,
        "dim_mult": (1, 1),
        "num_res_blocks": 1,
        "temporal_downsample": (True,),
        "spatial_downsample": (False,),
        "patch_size": 4,
    }
    fields |= changes
    channels = fields["latent_channels"]
    normal = {"latents_mean": (0.0,) * channels, "latents_std": (1.0,) * channels}
    # Convolutions in 3-D take three times as long to decode on a CPU.
    return WanVAEConfig(**(normal | {"convolution": "2d"} | fields))


def describe_autoencoder(config: WanVAEConfig) -> dict[str, Any]:
    """Returns the sizes and statistics for JSON; see `read_autoencoder_config`."""
    named = {key: getattr(config, ours) for key, ours in _STORED.items()}
    named |= dict.fromkeys(("in_channels", "out_channels"), config.patch_channels)
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in named.items()
    }


def read_autoencoder_config(stored: dict[str, Any], **changes: Any) -> WanVAEConfig:
    """Returns the sizes that `describe_autoencoder` described.

    Args:
      stored: The JSON object.
      **changes: Fields to set, such as `dtype`.

    Raises:
      ValueError: Keys are missing or unknown, or a size is not acceptable.
    """
    return WanVAEConfig.from_dict(stored, **({"convolution": "2d"} | changes))


def load_autoencoder(file: Path, config: WanVAEConfig) -> WanVAECodec:
    """Reads codec.safetensors.

    Raises:
      CheckpointError: The file is damaged.
      ConversionError: The weights do not fit the configuration.
    """
    return WanVAECodec(model=load_wan_vae(file, config))


def save_autoencoder(file: Path, model: WanVAE) -> None:
    """Writes codec.safetensors, in float16."""
    safetensors.numpy.save_file(export_wan_vae(model, dtype=np.float16), file)


def with_statistics(
    model: WanVAE, mean: np.ndarray, std: np.ndarray, **changes: Any
) -> WanVAEConfig:
    """Returns the configuration with other statistics of latents.

    Args:
      model: The autoencoder.
      mean: Means of its latents as they are now, by channel.
      std: Their standard deviations.
      **changes: Other fields to set.
    """
    config = model.config
    old_mean, old_std = np.array(config.latents_mean), np.array(config.latents_std)
    return dataclasses.replace(
        config,
        latents_mean=tuple((old_mean + old_std * mean).tolist()),
        latents_std=tuple((old_std * std).tolist()),
        **changes,
    )
