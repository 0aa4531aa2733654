"""Sizes of videos and of their latents, where the first frame stands alone."""

from models.diffusion.interfaces import LatentShape
from models.diffusion.sizes import nearest_sizes

COLOURS = 3
Stride = tuple[int, int, int]  # frames, rows and columns of pixels in a latent position


def latent_shape(
    stride: Stride, channels: int, *, frames: int, height: int, width: int
) -> LatentShape:
    """Returns frames, rows, columns and channels of one video's latent.

    Args:
      stride: Frames, rows and columns of pixels behind one latent position. The first
        latent frame stands for one frame of the video only.
      channels: Channels of the latent.
      frames: Frames of the video: one more than a multiple of the stride.
      height: Rows of pixels, a multiple of the stride.
      width: Columns of pixels, likewise.

    Raises:
      ValueError: A size is not such.
    """
    time, *sides = stride
    if frames < 1 or (frames - 1) % time:
        raise ValueError(
            f"{frames=} must be 1 more than a multiple of {time}, such as "
            f"{nearest_sizes(frames, time, offset=1)}"
        )
    for name, value, side in zip(
        ("height", "width"), (height, width), sides, strict=True
    ):
        if value < 1 or value % side:
            raise ValueError(f"{name}={value} must be a multiple of {side}, not 0")
    rows, columns = height // sides[0], width // sides[1]
    return (frames - 1) // time + 1, rows, columns, channels


def video_shape(
    stride: Stride, *, frames: int, rows: int, columns: int
) -> tuple[int, int, int, int]:
    """Returns frames, height, width and colours of the video of a latent.

    Args:
      stride: As in `latent_shape`.
      frames: Frames of the latent.
      rows: Rows of the latent.
      columns: Columns of the latent.
    """
    time, height, width = stride
    return time * (frames - 1) + 1, rows * height, columns * width, COLOURS
