"""Wan's rules for requests: which sizes, texts and images suit a transformer."""

import dataclasses

import jax.numpy as jnp
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
from models.media.resize import resize_bicubic, resize_lanczos
from models.wan.config import WanConfig
from models.wan.image import condition_latents, fit_images

NO_EMBEDDED_GUIDANCE = (
    "embedded_guidance is given, but Wan models are not told of guidance: set it to "
    "None, and the strength of classifier-free guidance by guidance"
)


@dataclasses.dataclass(frozen=True)
class WanConditioning:
    """The `Conditioning` of a Wan transformer.

    Args:
      config: Sizes of the transformer.
    """

    config: WanConfig

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
        mesh.check_tokens(num_tokens(latent_shape, self.config.patch_size))

    def check_image(self, *, given: bool) -> None:
        """Checks that an image is given exactly where the model starts from one.

        A model that holds its first frame starts from one or none.

        Raises:
          ValueError: It is missing, or given to a text-to-video model.
        """
        if given == self.config.takes_image or self.config.holds_first_frame:
            return
        kind = "a text-to-video" if given else "an image-to-video"
        raise ValueError(
            f"image is {'given' if given else 'missing'}, but this is {kind} model"
        )

    def check_guidance(self, sampling: Sampling) -> None:
        """Checks that Wan is not told of guidance.

        Raises:
          ValueError: `sampling.embedded_guidance` is given.
        """
        if sampling.embedded_guidance is not None:
            raise ValueError(NO_EMBEDDED_GUIDANCE)

    def check_context(self, name: str, context: TextContext) -> None:
        """Checks that a context has the transformer's sizes.

        Raises:
          ValueError: It does not; the message calls it `name`.
        """
        shape, lengths = context.embeddings.shape, context.lengths.shape
        expected = (self.config.text_length, self.config.text_dim)
        if shape[1:] != expected or lengths != shape[:1] or not shape[0]:
            raise ValueError(
                f"{name} has embeddings of shape {shape} and lengths of shape "
                f"{lengths}; expected [batch, text_length, text_dim] = [batch, "
                f"{expected[0]}, {expected[1]}] and [batch]"
            )

    def image_condition(
        self,
        images: Images,
        sampling: Sampling,
        *,
        codec: Codec,
        image_encoder: ImageEncoder | None,
    ) -> ImageCondition:
        """Returns what the model is told of first frames.

        Images of another size than the video are resized as Wan2.1 does it, after the
        middle was cut out of those of clearly another aspect ratio: see
        `models.wan.image.fit_images`. The image encoder sees what is kept in the
        image's own pixels. Where the model holds its first frame, the condition is the
        latent of that frame.

        Raises:
          ValueError: The images are not such, or there is no encoder for the tokens
            that the model takes.
        """
        kept, images = fit_images(
            as_images(images),
            (sampling.height, sampling.width),
            self.side_multiples(codec),
            resize=resize_lanczos if self.config.holds_first_frame else resize_bicubic,
        )
        if self.config.holds_first_frame:
            return ImageCondition(codec.encode(images[:, None]), None)
        tokens = None
        if self.config.image_dim is not None:
            if image_encoder is None:
                raise ValueError(
                    "this pipeline has no image encoder: pass an ImageCondition"
                )
            tokens = image_encoder.encode(kept)
        latents = condition_latents(codec, images, frames=sampling.frames)
        return ImageCondition(latents, tokens)

    def repeat_condition(
        self, image: ImageCondition, batch: int, latent_shape: LatentShape
    ) -> ImageCondition:
        """Returns the condition of every item of a batch.

        Args:
          image: One item, or one for each of the batch.
          batch: Number of items.
          latent_shape: Shape of one item's latent.

        Raises:
          ValueError: There are other numbers of items, or the latents do not fit.
        """
        if self.config.holds_first_frame:
            return repeat_condition(image, batch, (1, *latent_shape[1:]))
        channels = self.config.in_channels - self.config.out_channels
        return repeat_condition(image, batch, (*latent_shape[:-1], channels))

    def hold_frames(
        self, latents: Float[Array, "B F H W C"], image: ImageCondition | None
    ) -> Float[Array, "B F H W C"]:
        """Returns latents with the first frame that is held; see `Conditioning`.

        Source: Wan2.2 `WanTI2V.i2v`.
        """
        if image is None or not self.config.holds_first_frame:
            return latents
        first = image.latents.astype(latents.dtype)
        return jnp.concatenate([first, latents[:, first.shape[1] :]], axis=1)
