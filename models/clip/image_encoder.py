"""The image encoder of Wan: images to the image tokens of cross-attention."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from models.clip.config import CLIPVisionConfig
from models.clip.convert import load_clip_vision_encoder
from models.clip.encoder import CLIPVisionEncoder
from models.media.resize import resize_bicubic

# Of red, green and blue in [0, 1] over CLIP's training images.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPImageEncoder:
    """Preprocessing and tower; an `ImageEncoder` of `models.diffusion.interfaces`.

    It runs where its weights are; results go to the default device.

    Args:
      model: The tower.
    """

    model: CLIPVisionEncoder

    @classmethod
    def load(
        cls,
        weights: str | os.PathLike | Mapping[str, Any],
        *,
        config: CLIPVisionConfig | None = None,
        device: jax.Device | None = None,
    ) -> "CLIPImageEncoder":
        """Reads the tower.

        Args:
          weights: See `load_clip_vision_encoder`.
          config: Sizes of the tower, and how to run it; `vit_h_14()` if None.
          device: Device that it is put on and runs on; the default one if None.

        Raises:
          CheckpointError: A file is missing or damaged.
          ConversionError: Weights and `config` do not fit.
        """
        config = config or CLIPVisionConfig.vit_h_14()
        return cls(model=load_clip_vision_encoder(weights, config, device=device))

    def encode(
        self, images: Float[Array, "B height width 3"]
    ) -> Float[Array, "B I image_dim"]:
        """Returns the tokens of some images.

        The published pipelines give it the image as it came, before it is resized
        to the size of the video.

        Args:
          images: At least one, in [-1, 1], of any size; see `clip_pixels`.

        Returns:
          float32; I = `config.num_tokens`, 257 of 1280 channels for ViT-H/14.

        Raises:
          FloatingPointError: The result is not finite.
          RuntimeError: `free` was called.
          ValueError: `images` is not a batch of colour images in floating point.
        """
        given = np.asarray(images)
        if (
            given.ndim != 4
            or given.shape[-1] != 3
            or 0 in given.shape
            or not jnp.issubdtype(given.dtype, jnp.floating)
        ):
            raise ValueError(
                f"images of shape {given.shape} and dtype {given.dtype} must be "
                "[batch, height, width, 3], none of them 0, floating-point"
            )
        leaves = jax.tree.leaves(nnx.state(self.model))
        if any(leaf.is_deleted() for leaf in leaves):
            raise RuntimeError("the image encoder was freed; load it again")
        # Weights that are not bound to a device would else be moved to the default.
        with jax.default_device(min(leaves[0].devices(), key=lambda d: d.id)):
            pixels = clip_pixels(jnp.asarray(given), self.model.config.image_size)
            tokens = np.asarray(_run(self.model, pixels))
        if not np.isfinite(tokens).all():
            raise FloatingPointError(
                "the image tokens are not finite: check the image encoder's weights, "
                "which may be damaged"
            )
        return jnp.asarray(tokens)

    def free(self) -> None:
        """Deletes the weights from the device, whoever else holds them."""
        for leaf in jax.tree.leaves(nnx.state(self.model)):
            leaf.delete()


@functools.partial(jax.jit, static_argnames="size")
def clip_pixels(
    images: Float[Array, "B height width 3"], size: int
) -> Float[Array, "B size size 3"]:
    """Resizes images to a square and normalises them, as Wan2.1's own code does.

    The whole image is squeezed into the square, by bicubic interpolation without a
    low-pass filter, and overshoot is kept. diffusers uses transformers'
    `CLIPImageProcessor`. It resizes the shorter side with Pillow's filter on 8-bit
    pixels and cuts the square out of the middle. So its tokens of the same image
    differ, and those of a wide image miss both ends.

    Args:
      images: In [-1, 1].
      size: Rows and columns of the result.

    Returns:
      float32.

    Source: Wan2.1 `CLIPModel.visual`, which calls `torch.nn.functional.interpolate`
    with mode="bicubic" and align_corners=False.
    """
    pixels = resize_bicubic(images, size, size)
    mean, std = jnp.array(MEAN, jnp.float32), jnp.array(STD, jnp.float32)
    return (0.5 * pixels + 0.5 - mean) / std


@nnx.jit
def _run(
    model: CLIPVisionEncoder, pixels: Float[Array, "B height width 3"]
) -> Float[Array, "B T E"]:
    return model(pixels)
