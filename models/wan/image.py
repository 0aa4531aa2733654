"""First frames: fitted to the video, and as the latent channels a model is told."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from models.diffusion.images import kept_part
from models.diffusion.interfaces import Codec


def condition_latents(
    codec: Codec, images: Float[Array, "B height width 3"], *, frames: int
) -> Float[Array, "B F H W condition"]:
    """Returns channels that tell the first frame, and that no other is known.

    They stand after those of the noisy latent in the transformer's input: a mask with
    one channel for each pixel frame of a latent frame, then the latent of a video
    that is the image and grey frames after it.

    Args:
      codec: Encodes the video.
      images: First frames in [-1, 1], of the video's size.
      frames: Frames of the video.

    Returns:
      float32; for Wan's codec 4 + 16 channels.

    Raises:
      ValueError: The codec has no latent for this size.

    Source: Wan2.1 `WanI2V.generate`; diffusers `WanImageToVideoPipeline.
    prepare_latents` without a last image.
    """
    batch, height, width, _ = images.shape
    shape = codec.latent_shape(frames=frames, height=height, width=width)
    rest = ((0, 0), (0, frames - 1), (0, 0), (0, 0), (0, 0))
    latents = codec.encode(jnp.pad(images.astype(jnp.float32)[:, None], rest))
    mask = jnp.zeros((batch, *shape[:3], codec.stride[0])).at[:, 0].set(1.0)
    return jnp.concatenate([mask, latents.astype(jnp.float32)], axis=-1)


def fit_images(
    images: Float[Array, "B _H _W 3"],
    video_size: tuple[int, int],
    multiples: tuple[int, int],
    *,
    resize: Callable[[Array, int, int], Array],
) -> tuple[Float[Array, "B _h _w 3"], Float[Array, "B height width 3"]]:
    """Fits images of any size to be first frames of a video.

    Args:
      images: In [-1, 1].
      video_size: Height and width of the video.
      multiples: As in `kept_part`.
      resize: Makes images of so many rows and columns.

    Returns:
      The kept part in the image's own pixels, which the image encoder sees, and the
      same resized to the video; equal if the size was right.

    Source: Wan2.1 `WanI2V.generate`, where nothing is cut. Wan2.2's `WanTI2V.i2v` cuts
    the little that this rule squeezes, too.
    """
    rows, columns = kept_part((images.shape[1], images.shape[2]), video_size, multiples)
    kept = images[:, rows, columns]
    if kept.shape[1:3] == tuple(video_size):
        return kept, kept
    return kept, resize(kept, *video_size)
