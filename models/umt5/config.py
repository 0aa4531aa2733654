"""Sizes of a UMT5 encoder, and the dtypes it runs in."""

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

# float16 is left out on purpose: activations of T5 encoders overflow it, which the
# original code hides by clamping infinities.
_FLOAT_NAMES = ("float32", "bfloat16")

TEXT_LENGTH = 512  # tokens of a prompt that Wan2.1 reads, the end token included

# Published name of each of our fields in a transformers `config.json`.
_PUBLISHED_FIELDS = {
    "vocab_size": "vocab_size",
    "d_model": "dim",
    "num_heads": "num_heads",
    "d_kv": "head_dim",
    "d_ff": "ffn_dim",
    "num_layers": "num_layers",
    "relative_attention_num_buckets": "num_buckets",
    "relative_attention_max_distance": "max_distance",
    "layer_norm_epsilon": "eps",
}
_REQUIRED = ("vocab_size", "d_model", "num_heads", "d_kv", "d_ff", "num_layers")
# Keys that change the result, and the only value that this port computes.
_FIXED = {
    "model_type": "umt5",
    "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu_new",
    "is_gated_act": True,
}


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class UMT5Config:
    """The sizes and numerics of a UMT5 encoder. Hashable, hence a static jit argument.

    Attributes:
      vocab_size: Rows of the token table; at least as many as the tokenizer has.
      dim: Width of the residual stream and of the output.
      num_heads: Attention heads, N.
      head_dim: Channels of one head, D; `num_heads * head_dim` may differ from
        `dim`.
      ffn_dim: Hidden width of the gated feed-forward network.
      num_layers: Transformer blocks.
      num_buckets: Rows of the relative position table, half of them for keys after
        the query; a multiple of 4.
      max_distance: Tokens; keys this far away or farther share the last bucket.
      eps: Added to the mean square in every norm.
      dtype: Dtype of the matrix products. Norms, logits, softmax, position bias and the
        residual stream are float32.
      param_dtype: Parameters are stored in it.

    Raises:
      ValueError: A size is not a positive integer or does not fit the others, or a
        dtype is not one of those accepted.
    """

    vocab_size: int
    dim: int
    num_heads: int
    head_dim: int
    ffn_dim: int
    num_layers: int
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    dtype: str = "bfloat16"
    param_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        make_plain(self)
        sizes = [field.name for field in dataclasses.fields(self) if field.type is int]
        check_positive_integers(self, sizes)
        if self.num_buckets % 4:
            raise ValueError(f"{self.num_buckets=} must be a multiple of 4")
        if self.max_distance <= self.num_buckets // 4:
            raise ValueError(
                f"{self.max_distance=} must be greater than {self.num_buckets // 4}, "
                "the number of distances with a bucket of their own"
            )
        if not 0.0 < self.eps < math.inf:
            raise ValueError(f"{self.eps=} must be positive and finite")
        check_dtypes(self, _FLOAT_NAMES, "activations of T5 encoders overflow float16")

    @classmethod
    def xxl(cls, **changes: Any) -> "UMT5Config":
        """Returns UMT5-XXL, the text encoder of every Wan2.1 model."""
        sizes: dict[str, Any] = {
            "vocab_size": 256384,
            "dim": 4096,
            "num_heads": 64,
            "head_dim": 64,
            "ffn_dim": 10240,
            "num_layers": 24,
        }
        return cls(**(sizes | changes))

    @classmethod
    def from_dict(cls, published: Mapping[str, Any], **changes: Any) -> "UMT5Config":
        """Reads the sizes in the `config.json` of a transformers `UMT5EncoderModel`.

        The original Wan layout has no such file; its encoder is `xxl()`.

        Args:
          published: The parsed file. Keys that do not bear on the encoder, such as
            dropout rates, are not read.
          **changes: Fields to set or override, such as `dtype`.

        Returns:
          The configuration.

        Raises:
          ValueError: The file is of another model, such as T5, whose layers share
            one position bias, or lacks sizes; all keys at fault are named.
        """
        check_published(published, fixed=_FIXED, required=_REQUIRED)
        sizes: dict[str, Any] = {
            ours: published[key]
            for key, ours in _PUBLISHED_FIELDS.items()
            if key in published
        }
        return cls(**(sizes | changes))
