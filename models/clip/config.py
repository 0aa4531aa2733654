"""Sizes of a CLIP vision tower, and the dtypes it runs in."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from models.checkpoints.config_checks import (
    check_dtypes,
    check_positive_integers,
    check_published,
)
from pallas_kernels.common import make_plain, register_configuration

ACTIVATIONS = ("gelu", "quick_gelu")

# Published name of each of our fields in a transformers `config.json`.
_PUBLISHED_FIELDS = {
    "hidden_size": "dim",
    "intermediate_size": "ffn_dim",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_act": "activation",
    "layer_norm_eps": "eps",
}
# Keys that change the result, and the only value that this port computes.
_FIXED = {"model_type": "clip_vision_model", "num_channels": 3}


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig:
    """The sizes and numerics of a CLIP vision tower. Hashable: a static jit argument.

    Attributes:
      dim: Width of the residual stream and of the output.
      ffn_dim: Hidden width of the feed-forward network.
      num_heads: Attention heads, N; they share `dim` equally.
      num_layers: Transformer blocks of the published tower. The last one is neither
        kept nor run, since the output is what enters it.
      image_size: Rows and columns of pixels that it sees.
      patch_size: Rows and columns of pixels in one token; divides `image_size`.
      activation: "gelu" (exact) or "quick_gelu", x * sigmoid(1.702 x).
      eps: Added to the variance in every norm.
      dtype: Dtype of the matrix products. Norms, logits, softmax and the residual
        stream are float32. The original code computes products in float16.
      param_dtype: Parameters are stored in it.

    Raises:
      ValueError: A size is not a positive integer or does not fit the others, or
        the activation or a dtype is not one of those accepted.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    image_size: int
    patch_size: int
    activation: str
    eps: float = 1e-5
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        make_plain(self)
        sizes = [field.name for field in dataclasses.fields(self) if field.type is int]
        check_positive_integers(self, sizes)
        if self.num_layers < 2:
            raise ValueError(
                f"{self.num_layers=} must be at least 2; the last is unused"
            )
        for whole, part in (("dim", "num_heads"), ("image_size", "patch_size")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"{whole}={getattr(self, whole)} must be a multiple of "
                    f"{part}={getattr(self, part)}"
                )
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"{self.activation=} must be one of {ACTIVATIONS}")
        if not 0.0 < self.eps < math.inf:
            raise ValueError(f"{self.eps=} must be positive and finite")
        check_dtypes(self)

    @property
    def num_tokens(self) -> int:
        """The number of tokens of an image: one for the class, one for each patch."""
        return 1 + (self.image_size // self.patch_size) ** 2

    @classmethod
    def vit_h_14(cls, **changes: Any) -> "CLIPVisionConfig":
        """Returns ViT-H/14, the image encoder of Wan2.1's image-to-video models."""
        sizes: dict[str, Any] = {
            "dim": 1280,
            "ffn_dim": 5120,
            "num_heads": 16,
            "num_layers": 32,
            "image_size": 224,
            "patch_size": 14,
            "activation": "gelu",
        }
        return cls(**(sizes | changes))

    @classmethod
    def from_dict(
        cls, published: Mapping[str, Any], **changes: Any
    ) -> "CLIPVisionConfig":
        """Reads the sizes in the `config.json` of a transformers `CLIPVisionModel`.

        The original Wan layout has no such file; its tower is `vit_h_14()`.

        Args:
          published: The parsed file. Keys that do not bear on the output, such as
            `projection_dim`, are not read.
          **changes: Fields to set or override, such as `dtype`.

        Returns:
          The configuration.

        Raises:
          ValueError: The file is of another model or lacks sizes; all keys at fault
            are named.
        """
        check_published(published, fixed=_FIXED, required=_PUBLISHED_FIELDS)
        sizes: dict[str, Any] = {
            ours: published[key] for key, ours in _PUBLISHED_FIELDS.items()
        }
        return cls(**(sizes | changes))
