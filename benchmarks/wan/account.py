"""Arithmetic of a step of a Wan transformer."""

import numpy as np

from draft_jax import VideoGrid
from models.wan.config import WanConfig
from pallas_kernels.attention.sm90.geometry import geometry_of
from pallas_kernels.attention.sm90.plan import BLOCK


def kernel_work(grid: VideoGrid) -> float:
    """Returns the Hopper kernel's products over those of the tokens, all pairs kept.

    A query block costs as much as a full one, a key block as many keys as its class.
    """
    geometry = geometry_of(grid, "tiled")
    widths = np.array([width.tokens for width in geometry.widths])
    keys = int(widths[geometry.width_of_block].sum())
    return BLOCK * grid.num_blocks * keys / grid.num_tokens**2


def flops_outside_attention(config: WanConfig, num_tokens: int) -> dict[str, float]:
    """Arithmetic of one model call on one item, without self-attention's products.

    Matrix products only, two operations for each multiplication and addition: norms,
    gates and rotations do not count, nor the time embedding, which has one row.

    Args:
      config: Sizes of a text-to-video model.
      num_tokens: Video tokens.

    Returns:
      By part; their sum is the whole.
    """
    dim, text = config.dim, config.text_length
    patch = dim * config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
    layers = config.num_layers
    return {
        "self-attention's projections": layers * 8.0 * num_tokens * dim**2,
        "cross-attention's projections": layers
        * (4.0 * num_tokens * dim**2 + 4.0 * text * dim**2),
        "cross-attention": layers * 4.0 * num_tokens * text * dim,
        "feed-forward": layers * 4.0 * num_tokens * dim * config.ffn_dim,
        "patches, head and text": 2.0
        * (
            num_tokens * patch * (config.in_channels + config.out_channels)
            + text * dim * (config.text_dim + dim)
        ),
    }
