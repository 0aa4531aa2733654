"""Sizes of a HunyuanVideo transformer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from models.checkpoints.config_checks import (
    check_dtypes,
    check_keys,
    check_linears,
    check_positive_integers,
    check_sizes,
)
from pallas_kernels.common import make_plain, register_configuration

_GUIDANCE_ROUNDINGS = ("bfloat16", "none")

# Published name of each of our fields in a diffusers `config.json`.
_FIELDS = {
    "num_attention_heads": "num_heads",
    "num_layers": "num_double_blocks",
    "num_single_layers": "num_single_blocks",
    "num_refiner_layers": "num_refiner_blocks",
    "mlp_ratio": "mlp_ratio",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "text_embed_dim": "text_dim",
    "pooled_projection_dim": "pooled_dim",
    "guidance_embeds": "guidance_embeds",
    "rope_theta": "rope_theta",
}
_OTHERS = (
    "attention_head_dim",
    "patch_size",
    "patch_size_t",
    "rope_axes_dim",
    "qk_norm",
    "image_condition_type",
)
_REQUIRED = ("num_attention_heads", "attention_head_dim", "num_layers")
_POSITIVE_FIELDS = (
    "dim",
    "num_heads",
    "num_double_blocks",
    "num_single_blocks",
    "num_refiner_blocks",
    "in_channels",
    "out_channels",
    "text_dim",
    "text_length",
    "pooled_dim",
    "freq_dim",
)
_QK_NORM_NAME = "rms_norm"


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class HunyuanConfig:
    """Sizes and dtypes of a HunyuanVideo transformer. Hashable: static for jit.

    How it attends is a choice of run time: an `AttentionPlan`.

    Attributes:
      dim: Width of the residual streams; `num_heads` divides it.
      num_heads: Attention heads, N.
      num_double_blocks: Blocks in which video and text have weights of their own.
      num_single_blocks: Blocks after them, of one stream of video and text.
      num_refiner_blocks: Blocks of the token refiner, which sees the text alone.
      mlp_ratio: Hidden width of the blocks' feed-forward networks over `dim`.
      in_channels: Channels of the latent that comes in.
      out_channels: Channels of the velocity that goes out.
      patch_size: Latent frames, rows and columns merged into one token.
      text_dim: Width of the language model's output.
      text_length: Text tokens in the sequence, padding included.
      pooled_dim: Width of CLIP's pooled output.
      guidance_embeds: Whether the model is told a guidance scale.
      guidance_rounding: Where 1,000 times that scale is rounded. Both published codes
        do it in bfloat16, which makes 6016 of 6.0; "none" makes 6000.
      reference_frames: Frames of a reference image before the video, as in
        HunyuanCustom: 0 or 1.
      freq_dim: Size of the sinusoidal embedding of time and guidance; even.
      eps: Added to variances in every norm.
      rope_theta: Base of the rotary frequencies.
      rope_channels: Channels of a head that turn with the frame, the row and the
        column. Each is even; together they are a head.
      tile: Rows and columns of tokens in one attention block.
      dtype: Of the matrix products, attention, residual streams and gates. Norms,
        modulation, softmax, rotary embedding and the embedding of time, guidance and
        pooled text are float32.
      param_dtype: Parameters are stored in it.
      linears: Precision of the blocks' matrix products: "bfloat16" stands for `dtype`,
        "float8" for FP8 with scales; see `models.float8`. Layers on the transformer's
        list are in `dtype` either way.

    Raises:
      ValueError: A size is not a positive integer, does not divide as it must, or
        a name is not one of those accepted.
    """

    dim: int
    num_heads: int
    num_double_blocks: int
    num_single_blocks: int
    num_refiner_blocks: int = 2
    mlp_ratio: float = 4.0
    in_channels: int = 16
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    text_dim: int = 4096
    text_length: int = 256
    pooled_dim: int = 768
    guidance_embeds: bool = True
    guidance_rounding: str = "bfloat16"
    reference_frames: int = 0
    freq_dim: int = 256
    eps: float = 1e-6
    rope_theta: float = 256.0
    rope_channels: tuple[int, int, int] = (16, 56, 56)
    tile: tuple[int, int] = (8, 16)
    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    linears: str = "bfloat16"

    def __post_init__(self) -> None:
        make_plain(self)
        check_positive_integers(self, _POSITIVE_FIELDS)
        for name, length in (("patch_size", 3), ("tile", 2), ("rope_channels", 3)):
            check_sizes(self, name, length)
        if self.dim % self.num_heads:
            raise ValueError(f"{self.dim=} must be a multiple of {self.num_heads=}")
        if sum(self.rope_channels) != self.head_dim or any(
            channels % 2 for channels in self.rope_channels
        ):
            raise ValueError(
                f"{self.rope_channels=} must be even numbers whose sum is "
                f"{self.head_dim=}"
            )
        if self.freq_dim % 2:
            raise ValueError(f"{self.freq_dim=} must be even")
        for name, least in (("eps", 0.0), ("rope_theta", 1.0), ("mlp_ratio", 0.0)):
            if not getattr(self, name) > least:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be greater than {least:g}"
                )
        if self.guidance_rounding not in _GUIDANCE_ROUNDINGS:
            raise ValueError(
                f"{self.guidance_rounding=} must be one of {_GUIDANCE_ROUNDINGS}"
            )
        if self.reference_frames not in (0, 1):
            raise ValueError(f"{self.reference_frames=} must be 0 or 1")
        check_dtypes(self)
        check_linears(self)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head, D."""
        return self.dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the feed-forward networks."""
        return int(self.dim * self.mlp_ratio)

    @property
    def num_layers(self) -> int:
        """Layers of self-attention: the double blocks, then the single ones."""
        return self.num_double_blocks + self.num_single_blocks

    @property
    def compute_dtype(self) -> jnp.dtype:
        """`dtype` as a dtype object."""
        return jnp.dtype(self.dtype)

    @classmethod
    def video_13b(cls, **changes: Any) -> "HunyuanConfig":
        """Returns the sizes of HunyuanVideo, text to video."""
        sizes: dict[str, Any] = {
            "dim": 3072,
            "num_heads": 24,
            "num_double_blocks": 20,
            "num_single_blocks": 40,
        }
        return cls(**(sizes | changes))

    @classmethod
    def custom_13b(cls, **changes: Any) -> "HunyuanConfig":
        """Returns the sizes of HunyuanCustom, which is shown a reference image.

        LLaVA puts 575 tokens of the image into the text. There is no guidance to embed:
        prompts and negative prompts are a batch of two.
        """
        sizes: dict[str, Any] = {
            "guidance_embeds": False,
            "reference_frames": 1,
            "text_length": 256 + 575,
        }
        return cls.video_13b(**(sizes | changes))

    @classmethod
    def from_dict(cls, published: Mapping[str, Any], **changes: Any) -> "HunyuanConfig":
        """Reads the sizes in a `config.json` of diffusers; the original has none.

        Args:
          published: The parsed file. Keys that start with "_", such as
            "_class_name", are ignored.
          **changes: Fields to set or override, such as `dtype` or `tile`.

        Returns:
          The configuration.

        Raises:
          ValueError: The file is not of a text-to-video model, asks for something this
            port does not have, or lacks or adds keys; all are named.
        """
        _check_published(published)
        sizes: dict[str, Any] = {
            ours: published[key] for key, ours in _FIELDS.items() if key in published
        }
        side = published.get("patch_size", 2)
        sizes |= {
            "dim": published["num_attention_heads"] * published["attention_head_dim"],
            "patch_size": (published.get("patch_size_t", 1), side, side),
            "rope_channels": tuple(published.get("rope_axes_dim", (16, 56, 56))),
        }
        return cls(**(sizes | changes))

    def to_dict(self) -> dict[str, Any]:
        """Returns the sizes as diffusers names them in `config.json`.

        `from_dict` reads them. Compute options (tile, dtypes), the rounding of the
        guidance, the length of the text and reference frames are not part of a
        diffusers configuration and are left out.

        Raises:
          ValueError: Rows and columns of a patch differ, which diffusers cannot say.
        """
        frames, rows, columns = self.patch_size
        if rows != columns:
            raise ValueError(f"{self.patch_size=} must be square for diffusers")
        named = {key: getattr(self, ours) for key, ours in _FIELDS.items()}
        return named | {
            "_class_name": "HunyuanVideoTransformer3DModel",
            "attention_head_dim": self.head_dim,
            "patch_size": rows,
            "patch_size_t": frames,
            "rope_axes_dim": list(self.rope_channels),
            "qk_norm": _QK_NORM_NAME,
            "image_condition_type": None,
        }


def _check_published(published: Mapping[str, Any]) -> None:
    """Rejects other kinds of models, and keys nothing here would read."""
    if (kind := published.get("image_condition_type")) is not None:
        raise ValueError(
            f"image_condition_type={kind!r} must be null: models of videos from an "
            "image are not supported"
        )
    if (norm := published.get("qk_norm", _QK_NORM_NAME)) != _QK_NORM_NAME:
        raise ValueError(f"qk_norm={norm!r} must be {_QK_NORM_NAME!r}")
    check_keys(published, known={*_FIELDS, *_OTHERS}, required=_REQUIRED)
