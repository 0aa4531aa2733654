"""What goes round a level of Wan2.2's autoencoder: its input at the output's size.

Positions of a small box are channels of one position, or the other way round: a
channel's positions follow each other, frames first, then rows, then columns. Groups of
these are averaged, or each stands for a group, so that as many channels come out as
the level has.
"""

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from models.diffusion.video_autoencoder.layers import Frames
from models.wan.vae.config import Level


def average_down(x: Frames, level: Level, *, starts: bool) -> Float[Array, "B t h w O"]:
    """Returns means over what a level's step makes one position.

    Args:
      x: The next frames of a video.
      level: Channels in and out, and the step.
      starts: Whether the video starts with them. The first frame then is the later one
        of its pair; the earlier one is zero.

    Returns:
      In the dtype of `x`; means are taken in float32.

    Source: Wan2.2 `AvgDown3D`.
    """
    time, side = level.factors
    if starts:
        x = jnp.pad(x, ((0, 0), (time - 1, 0), (0, 0), (0, 0), (0, 0)))
    boxes = rearrange(
        x, "B (T t) (H h) (W w) C -> B T H W (C t h w)", t=time, h=side, w=side
    )
    groups = rearrange(boxes, "B T H W (O group) -> B T H W O group", O=level.outputs)
    return groups.mean(-1, dtype=jnp.float32).astype(x.dtype)


def repeat_up(x: Frames, level: Level, *, starts: bool) -> Float[Array, "B t h w O"]:
    """Returns each position as those that a level's step makes of it.

    Args:
      x: The next frames of a video.
      level: Channels in and out, and the step.
      starts: Whether the video starts with them. Of the first frame only the later
        one of its pair is returned.

    Source: Wan2.2 `DupUp3D`.
    """
    time, side = level.factors
    repeats = level.outputs * level.positions // level.inputs
    frames = rearrange(
        x.repeat(repeats, axis=-1),
        "B T H W (O t h w) -> B (T t) (H h) (W w) O",
        t=time,
        h=side,
        w=side,
    )
    return frames[:, time - 1 :] if starts else frames
