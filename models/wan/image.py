"""What an image-to-video model is told about its first frame, as latent channels."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from models.wan.interfaces import Codec


def condition_latents(
    codec: Codec, images: Float[Array, "B height width 3"], *, frames: int
) -> Float[Array, "B F H W condition"]:
    """Channels that say what the first frame is, and that no other one is known.

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
