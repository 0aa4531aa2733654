"""Sizes of a Wan2.1 or Wan2.2 transformer."""

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

# Published name of each of our fields in a diffusers `config.json`.
_DIFFUSERS_FIELDS = {
    "num_attention_heads": "num_heads",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "text_dim": "text_dim",
    "freq_dim": "freq_dim",
    "ffn_dim": "ffn_dim",
    "num_layers": "num_layers",
    "cross_attn_norm": "cross_attn_norm",
    "eps": "eps",
    "image_dim": "image_dim",
}
_ORIGINAL_FIELDS = {
    "dim": "dim",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "in_dim": "in_channels",
    "num_heads": "num_heads",
    "num_layers": "num_layers",
    "out_dim": "out_channels",
    "text_dim": "text_dim",
    "text_len": "text_length",
    "eps": "eps",
}
# Model types of the original that this port has, and the width of their CLIP's image
# tokens, which the original does not write down.
_IMAGE_DIMS = {"t2v": None, "i2v": 1280, "ti2v": None}
_TWO_IMAGES = "models of videos between two images are not supported"
_VACE = "VACE, which edits videos, is not supported"
# Why others are refused.
_OTHER_TYPES = {
    "flf2v": _TWO_IMAGES,
    "vace": _VACE,
}
_QK_NORM_NAME = "rms_norm_across_heads"
# Of Wan2.2's 5B model. Its frame of 22 x 40 tokens is divided by no tile of 128 tokens:
# this one makes 8 blocks of it, 8 x 16 makes 9; docs/wan2_2.md has the times. In frames
# of 40 x 22 tokens it is turned: as it stands it would make 14.
TI2V_TILE = (6, 20)


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class WanConfig:
    """Sizes and dtypes of a Wan transformer. Hashable: a static argument of jit.

    How it attends is a choice of run time: an `AttentionPlan`.

    Attributes:
      dim: Width of the residual stream; `num_heads` divides it.
      ffn_dim: Hidden width of the feed-forward network.
      num_heads: Attention heads, N.
      num_layers: Transformer blocks.
      in_channels: Channels of the latent that comes in.
      out_channels: Channels of the velocity that goes out.
      patch_size: Latent frames, rows and columns merged into one token.
      text_dim: Width of the text encoder's output.
      text_length: Rows of the text context, padding included. Cross-attention has
        no mask, so the padded rows take part and their number changes the result.
      image_dim: Width of the image tokens that image-to-video models attend to
        beside the text; None for models that see none.
      holds_first_frame: Whether an image may be given as the first latent frame, which
        is held at its values and at time 0, instead of further channels.
      freq_dim: Size of the sinusoidal timestep embedding; even.
      eps: Added to variances in every norm.
      rope_theta: Base of the rotary frequencies.
      qk_norm: RMS norm of queries and keys over all of `dim`.
      cross_attn_norm: Affine layer norm before cross-attention.
      tile: Rows and columns of tokens in one attention block.
      turns_tile: Whether frames higher than wide have the tile with its sides
        exchanged.
      dtype: Of the matrix products and attention. Norms, softmax, modulation,
        rotary embedding, time embedding and the residual stream stay float32.
      param_dtype: Parameters are stored in it.
      linears: Precision of the blocks' matrix products: "bfloat16" stands for `dtype`,
        "float8" for FP8 with scales; see `models.float8`. Layers on the transformer's
        list are in `dtype` either way.

    Raises:
      ValueError: A size is not a positive integer, does not divide as it must, or
        a name is not one of those accepted.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_channels: int = 16
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    text_dim: int = 4096
    text_length: int = 512
    image_dim: int | None = None
    holds_first_frame: bool = False
    freq_dim: int = 256
    eps: float = 1e-6
    rope_theta: float = 10000.0
    qk_norm: bool = True
    cross_attn_norm: bool = True
    tile: tuple[int, int] = (8, 16)
    turns_tile: bool = False
    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    linears: str = "bfloat16"

    def __post_init__(self) -> None:
        make_plain(self)
        optional = () if self.image_dim is None else ("image_dim",)
        check_positive_integers(self, _POSITIVE_FIELDS + optional)
        for name, length in (("patch_size", 3), ("tile", 2)):
            check_sizes(self, name, length)
        if self.dim % self.num_heads:
            raise ValueError(f"{self.dim=} must be a multiple of {self.num_heads=}")
        if self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(
                f"{self.head_dim=} must be even and at least 6: rotary embedding "
                "turns pairs of channels, some for each of frame, row and column"
            )
        if self.freq_dim % 2:
            raise ValueError(f"{self.freq_dim=} must be even")
        if not self.eps > 0.0:
            raise ValueError(f"{self.eps=} must be positive")
        if not self.rope_theta > 1.0:
            raise ValueError(f"{self.rope_theta=} must be greater than 1")
        if self.holds_first_frame and self.takes_image:
            raise ValueError(
                f"{self.holds_first_frame=} needs as many channels in as out, not "
                f"{self.in_channels} and {self.out_channels}"
            )
        check_dtypes(self)
        check_linears(self)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head, D."""
        return self.dim // self.num_heads

    @property
    def compute_dtype(self) -> jnp.dtype:
        """`dtype` as a dtype object."""
        return jnp.dtype(self.dtype)

    @property
    def takes_image(self) -> bool:
        """Whether the model must start from an image: it has channels for it then."""
        return self.in_channels != self.out_channels

    @classmethod
    def t2v_1_3b(cls, **changes: Any) -> "WanConfig":
        """Returns the sizes of Wan2.1-T2V-1.3B."""
        sizes: dict[str, Any] = {
            "dim": 1536,
            "ffn_dim": 8960,
            "num_heads": 12,
            "num_layers": 30,
        }
        return cls(**(sizes | changes))

    @classmethod
    def t2v_14b(cls, **changes: Any) -> "WanConfig":
        """Returns the sizes of Wan2.1-T2V-14B."""
        sizes: dict[str, Any] = {
            "dim": 5120,
            "ffn_dim": 13824,
            "num_heads": 40,
            "num_layers": 40,
        }
        return cls(**(sizes | changes))

    @classmethod
    def i2v_14b(cls, **changes: Any) -> "WanConfig":
        """Returns the sizes of Wan2.1-I2V-14B, for 480p and 720p alike.

        Channels come in as 16 of noise, 4 of mask and 16 of the image's latent.
        """
        return cls.t2v_14b(**({"in_channels": 36, "image_dim": 1280} | changes))

    @classmethod
    def i2v_a14b(cls, **changes: Any) -> "WanConfig":
        """Returns the sizes of each expert of Wan2.2-I2V-A14B.

        Those of Wan2.2-T2V-A14B have the sizes of Wan2.1-T2V-14B.
        """
        return cls.t2v_14b(**({"in_channels": 36} | changes))

    @classmethod
    def ti2v_5b(cls, **changes: Any) -> "WanConfig":
        """Returns the sizes of Wan2.2-TI2V-5B."""
        sizes: dict[str, Any] = {
            "dim": 3072,
            "ffn_dim": 14336,
            "num_heads": 24,
            "num_layers": 30,
            "in_channels": 48,
            "out_channels": 48,
            "holds_first_frame": True,
        }
        return cls(**(sizes | _tile_of_held_frame(changes) | changes))

    @classmethod
    def mini(cls, **changes: Any) -> "WanConfig":
        """Returns the sizes of the small model that ships with this project."""
        sizes: dict[str, Any] = {
            "dim": 384,
            "ffn_dim": 1536,
            "num_heads": 3,
            "num_layers": 8,
            "text_dim": 256,
            "text_length": 32,
            "tile": (4, 8),
        }
        return cls(**(sizes | changes))

    @classmethod
    def from_dict(cls, published: Mapping[str, Any], **changes: Any) -> "WanConfig":
        """Reads the sizes in a published `config.json`, original or diffusers.

        Args:
          published: The parsed file. Keys that start with "_", such as
            "_class_name", are ignored.
          **changes: Fields to set or override, such as `dtype`, `tile`, or what
            diffusers keeps outside its model configuration: `text_length`, and
            `holds_first_frame`, which is its pipeline's `expand_timesteps`.

        Returns:
          The configuration.

        Raises:
          ValueError: The file is of a model of another kind, asks for something this
            port does not have, or lacks or adds keys; all are named.
        """
        is_diffusers = "num_attention_heads" in published
        fields = _DIFFUSERS_FIELDS if is_diffusers else _ORIGINAL_FIELDS
        _check_published_keys(published, fields, is_diffusers)
        sizes: dict[str, Any] = {
            ours: published[key] for key, ours in fields.items() if key in published
        }
        if is_diffusers:
            sizes |= _read_diffusers_only(published)
        else:
            kind = published.get("model_type", "t2v")
            sizes["image_dim"] = _IMAGE_DIMS[kind]
            sizes["holds_first_frame"] = kind == "ti2v"
        if (sizes | changes).get("holds_first_frame"):
            sizes |= _tile_of_held_frame(changes)
        return cls(**(sizes | changes))

    def to_dict(self) -> dict[str, Any]:
        """Returns the sizes as diffusers names them in `config.json`.

        `from_dict` reads them. diffusers has no transformer without norms of queries
        and keys; without them `qk_norm` is false. Compute options (tile, dtypes), the
        length of the text and whether a first frame is held are not part of a diffusers
        configuration and are left out.
        """
        named = {key: getattr(self, ours) for key, ours in _DIFFUSERS_FIELDS.items()}
        return named | {
            "_class_name": "WanTransformer3DModel",
            "added_kv_proj_dim": None if self.image_dim is None else self.dim,
            "attention_head_dim": self.head_dim,
            "patch_size": list(self.patch_size),
            "qk_norm": _QK_NORM_NAME if self.qk_norm else False,
        }


_POSITIVE_FIELDS = (
    "dim",
    "ffn_dim",
    "num_heads",
    "num_layers",
    "in_channels",
    "out_channels",
    "text_dim",
    "text_length",
    "freq_dim",
)
_DIFFUSERS_ONLY = (
    "added_kv_proj_dim",
    "attention_head_dim",
    "patch_size",
    "pos_embed_seq_len",
    "qk_norm",
    "rope_max_seq_len",
)
_ORIGINAL_ONLY = ("model_type",)


def _read_diffusers_only(published: Mapping[str, Any]) -> dict[str, Any]:
    heads, head_dim = published["num_attention_heads"], published["attention_head_dim"]
    qk_norm = published.get("qk_norm", _QK_NORM_NAME)
    if qk_norm not in (_QK_NORM_NAME, None, False):
        raise ValueError(f"{qk_norm=} must be {_QK_NORM_NAME!r}, null or false")
    dim = heads * head_dim
    added = published.get("added_kv_proj_dim")
    expected = None if published.get("image_dim") is None else dim
    if added != expected:
        raise ValueError(
            f"added_kv_proj_dim={added!r} must be {expected!r}, for image_dim="
            f"{published.get('image_dim')!r} and a width of {dim}"
        )
    return {
        "dim": dim,
        "patch_size": tuple(published.get("patch_size", (1, 2, 2))),
        "qk_norm": qk_norm is not False,  # of null diffusers makes norms, too
    }


def _tile_of_held_frame(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the 5B model's tile; one that was asked for stands as it is."""
    return {} if "tile" in changes else {"tile": TI2V_TILE, "turns_tile": True}


def _check_published_keys(
    published: Mapping[str, Any], fields: Mapping[str, str], is_diffusers: bool
) -> None:
    """Rejects other kinds of models, and keys nothing here would read."""
    kind = published.get("model_type", "t2v")
    if kind not in _IMAGE_DIMS:
        why = f": {_OTHER_TYPES[kind]}" if kind in _OTHER_TYPES else ""
        raise ValueError(
            f"model_type={kind!r} must be one of {tuple(_IMAGE_DIMS)}{why}"
        )
    if (positions := published.get("pos_embed_seq_len")) is not None:
        raise ValueError(f"pos_embed_seq_len={positions!r} must be null: {_TWO_IMAGES}")
    if (layers := published.get("vace_layers")) is not None:
        raise ValueError(f"vace_layers={layers!r} must be left out: {_VACE}")
    known = {*fields, *(_DIFFUSERS_ONLY if is_diffusers else _ORIGINAL_ONLY)}
    required = ("ffn_dim", "num_layers") + (
        ("attention_head_dim",) if is_diffusers else ("dim", "num_heads")
    )
    check_keys(published, known=known, required=required)
