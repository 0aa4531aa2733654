"""Sizes that a model can make: the shape of a latent, and what suits an image."""

import math

from einops import reduce
from jaxtyping import Array, Float

from models.diffusion.interfaces import LatentShape, LatentSizes
from models.diffusion.sampling import Sampling

PatchSize = tuple[int, int, int]  # latent frames, rows and columns of one token


def side_multiples(patch_size: PatchSize, sizes: LatentSizes) -> tuple[int, int]:
    """Returns rows and columns of pixels behind one token.

    Height and width of videos are multiples of them.
    """
    _, *strides = sizes.stride
    _, *patches = patch_size
    rows, columns = (
        stride * patch for stride, patch in zip(strides, patches, strict=True)
    )
    return rows, columns


def nearest_sizes(value: int, multiple: int, *, offset: int = 0) -> str:
    """Names the sizes next to one that is no multiple and `offset` more."""
    below = value - (value - offset) % multiple
    return f"{below} or {below + multiple}" if below > 0 else f"{below + multiple}"


def latent_shape(
    sampling: Sampling, sizes: LatentSizes, *, patch_size: PatchSize, channels: int
) -> LatentShape:
    """Returns frames, rows, columns and channels of the latent of a video.

    Args:
      sampling: Says frames, height and width.
      sizes: The codec, or its configuration.
      patch_size: Of the transformer.
      channels: Latent channels that the transformer makes.

    Raises:
      ValueError: A side of the video does not suit the codec or the transformer's
        patches, or codec and transformer differ in channels.
    """
    sides = {"height": sampling.height, "width": sampling.width}
    for (name, value), multiple in zip(
        sides.items(), side_multiples(patch_size, sizes), strict=True
    ):
        if value % multiple:
            raise ValueError(
                f"{name}={value} must be a multiple of {multiple} for this model, "
                f"such as {nearest_sizes(value, multiple)}"
            )
    shape = sizes.latent_shape(frames=sampling.frames, **sides)
    if shape[0] % patch_size[0]:
        raise ValueError(
            f"frames={sampling.frames} gives {shape[0]} latent frames, which must "
            f"be a multiple of {patch_size[0]} for this model"
        )
    if shape[-1] != channels:
        raise ValueError(
            f"the codec has {shape[-1]} latent channels; the transformer makes "
            f"{channels}"
        )
    return shape


def size_like_image(
    image_size: tuple[int, int], *, area: int, multiples: tuple[int, int]
) -> tuple[int, int]:
    """Returns height and width with an image's aspect ratio, and at most an area.

    Args:
      image_size: Rows and columns of the image.
      area: Most pixels of a frame, such as 480 * 832.
      multiples: What height and width must be multiples of; see `side_multiples`.

    Returns:
      Each side as large as the area and the ratio allow, rounded down.

    Raises:
      ValueError: The image is so long, or the area so small, that a side would be 0.

    Source: Wan2.1 `WanI2V.generate`. It computes the roots in floating point and so
    makes 464 rows, not 480, for an image of 480 x 832; the roots here are exact.
    """
    rows, columns = image_size
    # floor(sqrt(x) / m) is the integer root of floor(x / m^2).
    height, width = (
        multiple * math.isqrt(area * side // (other * multiple**2))
        for side, other, multiple in zip(
            (rows, columns), (columns, rows), multiples, strict=True
        )
    )
    if not height or not width:
        raise ValueError(
            f"an image of {rows} x {columns} pixels (height x width) is too long for a "
            f"video of its shape and at most {area} pixels, whose sides are multiples "
            f"of {multiples[0]} x {multiples[1]}: give a larger size, or one to crop "
            "the image to"
        )
    return height, width


def shrink_latents(
    latents: Float[Array, "B F H W C"], positions: int
) -> Float[Array, "B F rows columns C"]:
    """Returns means of n x n positions, n the least with at most so many in a frame.

    Rows and columns at the end that fill no such square are left out.
    """
    rows, columns = latents.shape[2:4]
    n = 1
    while (rows // n) * (columns // n) > positions:
        n += 1
    whole = latents[:, :, : rows // n * n, : columns // n * n]
    return reduce(whole, "B F (H y) (W x) C -> B F H W C", "mean", y=n, x=n)
