"""Rotary positions of a video, and of a reference frame before it."""

import dataclasses

import jax.numpy as jnp

from draft_jax import VideoGrid
from models.diffusion.transformer.rope import RopeTable, rope_table
from models.hunyuan.config import HunyuanConfig


def video_rope(grid: VideoGrid, config: HunyuanConfig) -> RopeTable:
    """Returns cosine and sine of each visual token's angles, in tiled order.

    The video counts frames, rows and columns from 0. A reference frame before it has
    the time -1, and columns that go on where those of the video end.

    Args:
      grid: The sequence, reference frame and text included.
      config: Sizes of the model.

    Source: HunyuanVideo `get_rotary_pos_embed`; HunyuanCustom
    `get_nd_rotary_pos_embed_new`, mode "timecat-w".
    """
    frames = grid.frames - config.reference_frames
    video = dataclasses.replace(grid, frames=frames, text_length=0)
    table = rope_table(video, config.rope_channels, theta=config.rope_theta)
    if not config.reference_frames:
        return table
    reference = rope_table(
        dataclasses.replace(video, frames=config.reference_frames),
        config.rope_channels,
        theta=config.rope_theta,
        positions=(
            range(-config.reference_frames, 0),
            range(grid.height),
            range(grid.width, 2 * grid.width),
        ),
    )
    cos, sin = (
        jnp.concatenate([before, after])
        for before, after in zip(reference, table, strict=True)
    )
    return cos, sin
