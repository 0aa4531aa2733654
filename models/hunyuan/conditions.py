"""HunyuanVideo's rules for requests: which sizes and texts suit a transformer."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from models.diffusion import sizes
from models.diffusion.images import as_images, repeat_condition
from models.diffusion.interfaces import (
    Codec,
    ImageCondition,
    ImageEncoder,
    Images,
    LatentShape,
    LatentSizes,
    TextContext,
)
from models.diffusion.mesh import DeviceMesh
from models.diffusion.sampling import Sampling
from models.diffusion.transformer.tokens import num_tokens
from models.hunyuan.config import HunyuanConfig


@dataclasses.dataclass(frozen=True)
class HunyuanConditioning:
    """The `Conditioning` of a HunyuanVideo transformer.

    Args:
      config: Sizes of the transformer.
    """

    config: HunyuanConfig

    def latent_shape(self, sampling: Sampling, codec: LatentSizes) -> LatentShape:
        """Returns the shape of a video's latent; see `sizes.latent_shape`."""
        return sizes.latent_shape(
            sampling,
            codec,
            patch_size=self.config.patch_size,
            channels=self.config.out_channels,
        )

    def side_multiples(self, codec: LatentSizes) -> tuple[int, int]:
        """Returns the multiples that height and width of a video must be."""
        return sizes.side_multiples(self.config.patch_size, codec)

    def check_mesh(self, mesh: DeviceMesh, latent_shape: LatentShape) -> None:
        """Checks that a mesh can share the model's work on a latent.

        Raises:
          ValueError: It does not divide the heads, or there are too few tokens.
        """
        mesh.check_heads(self.config.num_heads)
        frames = latent_shape[0] + self.config.reference_frames
        shape = (frames, *latent_shape[1:])
        mesh.check_tokens(num_tokens(shape, self.config.patch_size))

    def check_image(self, *, given: bool) -> None:
        """Checks that an image is given exactly where the model is shown one.

        Raises:
          ValueError: It is missing, or given to a text-to-video model.
        """
        if given == (self.config.reference_frames > 0):
            return
        kind = "makes videos from text alone" if given else "is shown a reference image"
        raise ValueError(
            f"image is {'given' if given else 'missing'}, but this model {kind}"
        )

    def check_guidance(self, sampling: Sampling) -> None:
        """Checks that the model is told of guidance exactly if it embeds that.

        Raises:
          ValueError: `sampling.embedded_guidance` is missing, or given to a model
            that takes none.
        """
        given = sampling.embedded_guidance is not None
        if given == self.config.guidance_embeds:
            return
        remedy = (
            "this model embeds none: use guidance, which runs a negative prompt"
            if given
            else "this model embeds it: give a number, such as 6.0"
        )
        raise ValueError(
            f"embedded_guidance={sampling.embedded_guidance!r}, but {remedy}"
        )

    def check_context(self, name: str, context: TextContext) -> None:
        """Checks that a context has the transformer's sizes.

        Raises:
          ValueError: It does not; the message calls it `name`.
        """
        config = self.config
        batch = len(context.lengths)
        expected = {
            "embeddings": (batch, config.text_length, config.text_dim),
            "lengths": (batch,),
            "pooled": (batch, config.pooled_dim),
            "mask": (batch, config.text_length),
        }
        if not batch:
            raise ValueError(f"{name} has no items; expected 1 or more")
        for field, shape in expected.items():
            array = getattr(context, field)
            if array is None:
                if field == "mask":
                    continue
                raise ValueError(
                    f"{name} has no {field}; expected shape {shape}: it is of a text "
                    "encoder of another model"
                )
            if array.shape != shape:
                raise ValueError(
                    f"{name} has {field} of shape {array.shape}; expected {shape}"
                )
        _check_counts(name, context, config.text_length)

    def image_condition(
        self,
        images: Images,
        sampling: Sampling,
        *,
        codec: Codec,
        image_encoder: ImageEncoder | None,
    ) -> ImageCondition:
        """Returns the latent of reference images: the mean, not a sample, of each.

        Every image has the video's size. HunyuanCustom scales an image until it fits
        and fills the rest with white. Its language model sees the image, too, so the
        context that belongs to it has the image's tokens.

        Raises:
          ValueError: The model is shown none, or the images are not such.
        """
        self.check_image(given=True)
        images = as_images(images)
        if images.shape[1:3] != (sampling.height, sampling.width):
            height, width = images.shape[1:3]
            raise ValueError(
                f"image has {height} rows and {width} columns; expected those of the "
                f"video, {sampling.height} and {sampling.width}: scale it until it "
                "fits, and fill the rest with white"
            )
        latents = codec.encode(images[:, None])
        return ImageCondition(latents.astype(jnp.float32), None)

    def hold_frames(
        self, latents: Float[Array, "B F H W C"], image: ImageCondition | None
    ) -> Float[Array, "B F H W C"]:
        """Returns the latents as they are: a reference image fixes no frame."""
        del image
        return latents

    def repeat_condition(
        self, image: ImageCondition, batch: int, latent_shape: LatentShape
    ) -> ImageCondition:
        """Returns the reference frame of every item of a batch.

        Raises:
          ValueError: There are other numbers of items, or the latents do not fit.
        """
        return repeat_condition(image, batch, (1, *latent_shape[1:]))


def _check_counts(name: str, context: TextContext, text_length: int) -> None:
    """Raises ValueError unless each item has text, and masks as many rows as that."""
    lengths = np.asarray(context.lengths)
    if not ((lengths >= 1) & (lengths <= text_length)).all():
        raise ValueError(
            f"{name} has lengths {lengths.tolist()}; expected 1 to {text_length}"
        )
    if context.mask is None:
        return
    counts = np.asarray(context.mask.sum(-1))
    if (counts != lengths).any():
        raise ValueError(
            f"{name} has masks of {counts.tolist()} rows and lengths "
            f"{lengths.tolist()}; expected the same"
        )
