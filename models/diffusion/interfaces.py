"""Interfaces of a pipeline's parts, and what it hands from one to another.

Pipeline, sampler and inspection know a model family by these alone. A family is a
`VideoModel` with its `Conditioning`, a `Codec` and encoders.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from draft_jax import AttentionPlan, BlockMask, DraftStep, VideoGrid
from draft_jax.pytree import register_named_tuple
from models.diffusion.mesh import DeviceMesh
from models.diffusion.sampling import Sampling

LatentShape = tuple[int, int, int, int]  # frames, rows, columns, channels

# One image, or one for each prompt.
Images = (
    Float[Array | np.ndarray, "height width 3"]
    | Float[Array | np.ndarray, "B height width 3"]
)


@register_named_tuple
class TextContext(NamedTuple):
    """Rows that attention sees of some prompts, as a text encoder makes them."""

    embeddings: Float[Array, "B L text_dim"]  # padding included
    lengths: Int[Array, " B"]  # how many rows are real
    pooled: Float[Array, "B pooled_dim"] | None = None  # a vector of each prompt
    # Rows that a token refiner sees, as many as are real; None for the first ones.
    # HunyuanCustom's are the text's and then, after padding, the image's.
    mask: Bool[Array, "B L"] | None = None


@register_named_tuple
class ImageCondition(NamedTuple):
    """Channels and tokens that an image-to-video model sees of its images.

    One item serves all prompts, or there is one for each.
    """

    # Channels beside the noisy latent's (see `wan.image.condition_latents`), or else a
    # frame, which is a reference or the latent's first one: the model's family knows.
    latents: Float[Array, "B F H W condition"]
    tokens: Float[Array, "B I image_dim"] | None  # None for models without


@runtime_checkable
class TextEncoder(Protocol):
    """Turns prompts into what a transformer sees of them."""

    def encode(self, prompts: Sequence[str]) -> TextContext:
        """Returns the context of the prompts."""


@runtime_checkable
class ClosedVocabulary(Protocol):
    """Knows some words only; a text encoder may."""

    def unknown_words(self, prompt: str) -> list[str]:
        """Returns words of the prompt that training did not contain."""

    def describe_vocabulary(self) -> str:
        """Says in a few words for a person what prompts can be made of."""


@runtime_checkable
class ImageEncoder(Protocol):
    """Turns images into tokens that cross-attention sees beside the text."""

    def encode(
        self, images: Float[Array, "B height width 3"]
    ) -> Float[Array, "B I image_dim"]:
        """Returns tokens of images in [-1, 1] of any size.

        Wan takes CLIP's last but one layer, 257 tokens of 1280.
        """


@runtime_checkable
class LatentSizes(Protocol):
    """Sizes of latents, as a codec or its configuration tells them."""

    @property
    def stride(self) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels in one latent position."""

    def latent_shape(self, *, frames: int, height: int, width: int) -> LatentShape:
        """Returns frames, rows, columns and channels of the latent of a video.

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
        """Returns latents of pixels in [-1, 1], as strong as the model expects."""

    def decode(
        self, latents: Float[Array, "B F H W C"]
    ) -> Float[Array, "B frames height width 3"]:
        """Returns pixels in [-1, 1]."""

    def tiled(self, pixels: int) -> "Codec":
        """Returns the codec on tiles of so many rows and columns of pixels.

        Raises:
          ValueError: It has no tiles of that size, or none at all.
        """


@runtime_checkable
class Conditioning(Protocol):
    """Rules of a family for requests: which sizes, texts and images suit its model."""

    def latent_shape(self, sampling: Sampling, codec: LatentSizes) -> LatentShape:
        """Returns the shape of a video's latent.

        Raises:
          ValueError: A side of the video does not suit the codec or the model, or
            the two do not fit each other.
        """

    def side_multiples(self, codec: LatentSizes) -> tuple[int, int]:
        """Returns the multiples that height and width of a video must be."""

    def check_mesh(self, mesh: DeviceMesh, latent_shape: LatentShape) -> None:
        """Checks that a mesh can share the model's work on a latent.

        Raises:
          ValueError: It does not divide the heads, or there are too few tokens.
        """

    def check_image(self, *, given: bool) -> None:
        """Checks that an image is given exactly where the model takes one.

        Raises:
          ValueError: It is missing, or given to a model that takes none.
        """

    def check_guidance(self, sampling: Sampling) -> None:
        """Checks that the model is told of guidance exactly if it takes that.

        Raises:
          ValueError: `sampling.embedded_guidance` is missing, or given to a model
            that takes none.
        """

    def check_context(self, name: str, context: TextContext) -> None:
        """Checks that a context has the model's sizes.

        Raises:
          ValueError: It does not; the message calls it `name`.
        """

    def image_condition(
        self,
        images: Images,
        sampling: Sampling,
        *,
        codec: Codec,
        image_encoder: ImageEncoder | None,
    ) -> ImageCondition:
        """Returns what the model is told of first frames.

        Raises:
          ValueError: They are no images, or a part for them is missing.
        """

    def repeat_condition(
        self, image: ImageCondition, batch: int, latent_shape: LatentShape
    ) -> ImageCondition:
        """Returns the condition of every item of a batch.

        Raises:
          ValueError: It fits neither the batch nor the model.
        """

    def hold_frames(
        self, latents: Float[Array, "B F H W C"], image: ImageCondition | None
    ) -> Float[Array, "B F H W C"]:
        """Returns noisy latents with those frames that an image fixes put back.

        The sampler calls it before the first step, and after each. Of most models an
        image fixes none.
        """


@runtime_checkable
class VideoModel(Protocol):
    """A diffusion transformer as sampler and inspection know it; an `nnx.Module`."""

    @property
    def config(self) -> Hashable:
        """Sizes and dtypes. Models of equal configurations share programs."""

    @property
    def num_layers(self) -> int:
        """Layers of self-attention, in the order that masks and schedules have."""

    @property
    def num_heads(self) -> int:
        """Heads of each layer."""

    @property
    def conditioning(self) -> Conditioning:
        """Rules for requests."""

    def grid(self, latent_shape: tuple[int, ...]) -> VideoGrid:
        """Returns the tokens of one latent: [F, H, W, C], or with a batch axis.

        Raises:
          ValueError: The model does not take the shape.
        """

    def step_inputs(
        self,
        latents: Float[Array, "B F H W C"],
        timestep: Float[Array, ""] | float,
        context: TextContext,
        image: ImageCondition | None,
        embedded_guidance: Float[Array, ""] | None = None,
    ) -> Any:
        """Returns the model's own inputs for one step, a pytree.

        Args:
          latents: Noisy latents.
          timestep: Noise level of all items.
          context: Rows of the prompts, or of prompts and then their negative prompts:
            a multiple of B.
          image: Condition of the B items, for an image-to-video model.
          embedded_guidance: Strength of the guidance that the model is told of; see
            `Sampling`.

        Returns:
          First argument of `__call__` and `capture_qk`, whose arrays have one row
          for each of the context.
        """

    def __call__(
        self,
        inputs: Any,
        *,
        attention: AttentionPlan,
        step: DraftStep | None,
        masks: BlockMask | None,
    ) -> tuple[Float[Array, "rows F H W C"], BlockMask | None]:
        """Predicts the velocity of noisy latents.

        Args:
          inputs: The model's own; see `step_inputs`.
          attention: Dense or draft attention.
          step: The schedule's entry for this step, with draft attention.
          masks: Masks that the step before returned, stacked over layers.

        Returns:
          The velocity in float32, and the masks for the next step; None with dense
          attention.
        """

    def capture_qk(
        self,
        inputs: Any,
        *,
        attention: AttentionPlan,
        step: DraftStep | None,
        masks: BlockMask | None,
    ) -> tuple[Float[Array, "layers B T N D"], Float[Array, "layers B T N D"]]:
        """Returns queries and keys of every layer, as self-attention sees them.

        Takes what `__call__` takes. Tokens are in tiled order.
        """

    def map_qk(
        self,
        function: Callable[[Array, Array], Any],
        inputs: Any,
        *,
        attention: AttentionPlan,
        step: DraftStep | None,
        masks: BlockMask | None,
    ) -> tuple[Float[Array, "rows F H W C"], Any]:
        """Calls a function of queries and keys of every layer, one layer at a time.

        No two layers' queries and keys exist at once, so it is for models and videos
        of any size.

        Args:
          function: Returns a pytree of arrays for q and k, [B, T, N, D] in tiled order.
          inputs: As `__call__` takes them.
          attention: As `__call__` takes it.
          step: As `__call__` takes it.
          masks: As `__call__` takes them.

        Returns:
          The velocity, and what the function has returned, stacked over layers.
        """

    def map_qkv(
        self,
        function: Callable[[Array, Array, Array], Any],
        inputs: Any,
        *,
        attention: AttentionPlan,
        step: DraftStep | None,
        masks: BlockMask | None,
    ) -> tuple[Float[Array, "rows F H W C"], Any]:
        """Calls a function of queries, keys and values, as `map_qk` of two."""


@runtime_checkable
class KeepsResidual(VideoModel, Protocol):
    """A model whose blocks can be left out: `MagCache` needs one.

    Its residual is the output of the last block without the input of the first, of
    the tokens that the head sees.
    """

    def residual_shape(self, latent_shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        """Returns shape and dtype of one item's residual."""

    def call_with_residual(
        self,
        inputs: Any,
        *,
        attention: AttentionPlan,
        step: DraftStep | None,
        masks: BlockMask | None,
    ) -> tuple[
        Float[Array, "rows F H W C"], BlockMask | None, Float[Array, "rows T E"]
    ]:
        """Returns what `__call__` does, and the residual."""

    def reuse_residual(
        self, inputs: Any, residual: Float[Array, "rows T E"]
    ) -> Float[Array, "rows F H W C"]:
        """Returns the velocity without running a block: embedding, sum and head.

        Args:
          inputs: As of `__call__`.
          residual: Of an earlier call.
        """
