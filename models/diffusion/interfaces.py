"""What a pipeline needs of its parts, and what it hands from one to another."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

LatentShape = tuple[int, int, int, int]  # frames, rows, columns, channels


class TextContext(NamedTuple):
    """What cross-attention sees of some prompts, as a text encoder makes it."""

    embeddings: Float[Array, "B L text_dim"]  # padding included
    lengths: Int[Array, " B"]  # how many rows are real


class ImageCondition(NamedTuple):
    """What an image-to-video model sees of its images.

    One item serves all prompts, or there is one for each.
    """

    latents: Float[Array, "B F H W condition"]  # see `image.condition_latents`
    tokens: Float[Array, "B I image_dim"] | None  # None for models without


@runtime_checkable
class TextEncoder(Protocol):
    """Turns prompts into the context of cross-attention."""

    def encode(
        self, prompts: Sequence[str]
    ) -> tuple[Float[Array, "B L text_dim"], Int[Array, " B"]]:
        """Context rows, padding included, and how many of them are real."""


@runtime_checkable
class ClosedVocabulary(Protocol):
    """A text encoder that knows some words only."""

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of the prompt that training did not contain."""

    def describe_vocabulary(self) -> str:
        """What prompts can be made of, in a few words for a person."""


@runtime_checkable
class ImageEncoder(Protocol):
    """Turns images into tokens that cross-attention sees beside the text."""

    def encode(
        self, images: Float[Array, "B height width 3"]
    ) -> Float[Array, "B I image_dim"]:
        """Tokens of images in [-1, 1] of any size; Wan takes CLIP's last but one
        layer, 257 tokens of 1280."""


@runtime_checkable
class LatentSizes(Protocol):
    """What a codec, or its configuration, says of its latents."""

    @property
    def stride(self) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels in one latent position."""

    def latent_shape(self, *, frames: int, height: int, width: int) -> LatentShape:
        """Frames, rows, columns and channels of the latent of a video.

        Raises:
          ValueError: Names a side that the codec has no latent for, and what it
            accepts.
        """


@runtime_checkable
class Codec(LatentSizes, Protocol):
    """Turns pixels into latents and back. Only videos from an image need `encode`."""

    def encode(
        self, video: Float[Array, "B frames height width 3"]
    ) -> Float[Array, "B F H W C"]:
        """Latents of pixels in [-1, 1], of the strength the transformer expects."""

    def decode(
        self, latents: Float[Array, "B F H W C"]
    ) -> Float[Array, "B frames height width 3"]:
        """Pixels in [-1, 1]."""
