"""Images that a caller gives to a pipeline: checked, and which part is kept."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from models.diffusion.interfaces import ImageCondition

# Overshoot of an earlier resize is no reason to refuse an image.
_MOST = 1.5


def as_images(
    images: Float[Array | np.ndarray, "..."],
) -> Float[Array, "B height width 3"]:
    """Returns a batch in float32 of one or more images.

    Raises:
      ValueError: They are not colour images, or not in [-1, 1].
    """
    given = jnp.asarray(images)
    if not jnp.issubdtype(given.dtype, jnp.floating):
        raise ValueError(
            f"image has dtype {given.dtype}; expected floating-point numbers in [-1, 1]"
        )
    batch = given.astype(jnp.float32)
    batch = batch[None] if batch.ndim == 3 else batch
    if batch.ndim != 4 or batch.shape[-1] != 3 or 0 in batch.shape:
        raise ValueError(
            f"image has shape {given.shape}; expected [height, width, 3] or [batch, "
            "height, width, 3], none of them 0"
        )
    most = float(jnp.abs(batch).max())
    if not most <= _MOST:
        raise ValueError(f"image has values up to {most:g}; expected [-1, 1]")
    return batch


def repeat_condition(
    image: ImageCondition, batch: int, latent_shape: tuple[int, ...]
) -> ImageCondition:
    """Returns the condition of every item of a batch.

    Args:
      image: One item, or one for each of the batch.
      batch: Number of items.
      latent_shape: Shape that the model takes of one item's `image.latents`.

    Raises:
      ValueError: There are other numbers of items, or the latents do not fit.
    """
    items = len(image.latents)
    if items not in (1, batch) or image.latents.shape[1:] != latent_shape:
        raise ValueError(
            f"image has {items} items with latents of shape "
            f"{image.latents.shape[1:]}; expected 1 or {batch} of shape {latent_shape}"
        )
    return jax.tree.map(
        lambda leaf: jnp.repeat(leaf, batch // len(leaf), axis=0), image
    )


def kept_part(
    image_size: tuple[int, int],
    video_size: tuple[int, int],
    multiples: tuple[int, int],
) -> tuple[slice, slice]:
    """Returns the rows and columns of an image that fill a video of another shape.

    Scaled until it covers the video, the image stands out on two sides. By less than
    one of `multiples` nothing is cut: the whole image is squeezed, which is what Wan
    does, whose videos have the aspect ratio of their image up to such a rest. By more,
    the middle of the image is kept.

    Args:
      image_size: Height and width in pixels.
      video_size: Likewise.
      multiples: Rows and columns that sides of a video are multiples of.
    """
    parts = [slice(0, side) for side in image_size]
    for axis, other in ((0, 1), (1, 0)):
        image, video = image_size[axis], video_size[axis]
        across, video_across = image_size[other], video_size[other]
        # In pixels of the video, times `across` to stay with whole numbers.
        overhang = image * video_across - video * across
        if overhang >= multiples[axis] * across:
            kept = max(1, round(video * across / video_across))
            start = (image - kept) // 2
            parts[axis] = slice(start, start + kept)
    rows, columns = parts
    return rows, columns
