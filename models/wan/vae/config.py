"""Sizes of Wan2.1's video autoencoder."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from models.checkpoints.config_checks import (
    check_dtypes,
    check_keys,
    check_positive_integers,
    is_positive_integer,
)
from models.diffusion.interfaces import LatentShape
from models.diffusion.video_autoencoder import sizes
from models.diffusion.video_autoencoder.layers import ConvolutionName, check_convolution
from pallas_kernels.common import make_plain, register_configuration

# Published name of each of our fields in a diffusers `config.json`.
_DIFFUSERS_FIELDS = {
    "base_dim": "base_dim",
    "z_dim": "latent_channels",
    "dim_mult": "dim_mult",
    "num_res_blocks": "num_res_blocks",
    "temperal_downsample": "temporal_downsample",
    "latents_mean": "latents_mean",
    "latents_std": "latents_std",
}
# What diffusers can ask for beyond Wan2.1, and the values that ask for nothing.
_NEUTRAL: dict[str, tuple] = {
    "decoder_base_dim": (None,),
    "attn_scales": ([],),
    "dropout": (0, 0.0),
    "is_residual": (False,),
    "in_channels": (3,),
    "out_channels": (3,),
    "patch_size": (None, 1),
}
_DERIVED = ("scale_factor_temporal", "scale_factor_spatial")

# Of the latents that Wan2.1 was trained on; from its `wan/modules/vae.py`.
_WAN_2_1_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
_WAN_2_1_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class WanVAEConfig:
    """The sizes and numerics of the autoencoder. Hashable: a static jit argument.

    Attributes:
      base_dim: Channels at full resolution.
      latent_channels: Channels of the latent, C.
      dim_mult: Channels of each resolution, finest first, in units of `base_dim`.
        Each but the first halves rows and columns.
      num_res_blocks: Residual blocks of each resolution of the encoder; the decoder
        has one more.
      temporal_downsample: Whether the step from a resolution to the next also
        halves the frames; one entry less than `dim_mult`.
      latents_mean: Mean of the encoder's output, by channel. The transformer works
        on latents less this mean, over `latents_std`.
      latents_std: Standard deviation of the encoder's output, by channel.
      dtype: Dtype of convolutions, matrix products, the feature cache and what passes
        between layers. Norms, activations, softmax, the latents and the pixels are
        float32 always. float32 as in the original; on GPUs that have it, float32
        products use TF32 unless `jax.default_matmul_precision` says otherwise
        (PyTorch does so for convolutions, too).
      param_dtype: Parameters are stored in it.
      convolution: Form of convolutions over three frames; the result differs by
        rounding. "3d": as such. "2d": with the three frames side by side in the
        channels of one 2-D convolution, for which GPU libraries have more kernels.

    Raises:
      ValueError: A size is not positive, a tuple has the wrong length, or a name is
        not one of those accepted.
    """

    base_dim: int
    latent_channels: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    temporal_downsample: tuple[bool, ...]
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    dtype: str = "float32"
    param_dtype: str = "float32"
    convolution: ConvolutionName = "3d"

    def __post_init__(self) -> None:
        make_plain(self)
        check_positive_integers(self, ("base_dim", "latent_channels", "num_res_blocks"))
        mult = self.dim_mult
        if (
            not isinstance(mult, tuple)
            or not mult
            or not all(map(is_positive_integer, mult))
        ):
            raise ValueError(f"dim_mult={mult!r} must be a tuple of positive integers")
        if any(dim % 2 for dim in self.channels[1:]):
            raise ValueError(
                f"{self.base_dim=} times {self.dim_mult=} must be even where the "
                "decoder halves the channels: everywhere but in the first entry"
            )
        self._check_tuples()
        check_dtypes(self)
        check_convolution(self)

    def _check_tuples(self) -> None:
        lengths = {
            "temporal_downsample": len(self.dim_mult) - 1,
            "latents_mean": self.latent_channels,
            "latents_std": self.latent_channels,
        }
        for name, length in lengths.items():
            value = getattr(self, name)
            if not isinstance(value, tuple) or len(value) != length:
                raise ValueError(f"{name}={value!r} must be a tuple of {length}")
        if not all(isinstance(value, bool) for value in self.temporal_downsample):
            raise ValueError(f"{self.temporal_downsample=} must hold booleans")
        if not all(value > 0.0 for value in self.latents_std):
            raise ValueError(f"{self.latents_std=} must hold positive numbers")

    @property
    def channels(self) -> tuple[int, ...]:
        """The channels of each resolution, finest first."""
        return tuple(self.base_dim * factor for factor in self.dim_mult)

    @property
    def stride(self) -> tuple[int, int, int]:
        """The frames, rows and columns of pixels behind one latent position.

        The first latent frame stands for one frame of the video only.
        """
        side = 2 ** (len(self.dim_mult) - 1)
        return 2 ** sum(self.temporal_downsample), side, side

    def latent_shape(self, *, frames: int, height: int, width: int) -> LatentShape:
        """Returns the shape of one video's latent; see `sizes.latent_shape`."""
        return sizes.latent_shape(
            self.stride,
            self.latent_channels,
            frames=frames,
            height=height,
            width=width,
        )

    @classmethod
    def wan2_1(cls, **changes: Any) -> "WanVAEConfig":
        """Returns the autoencoder of Wan2.1, of all sizes of the transformer."""
        fields: dict[str, Any] = {
            "base_dim": 96,
            "latent_channels": 16,
            "dim_mult": (1, 2, 4, 4),
            "num_res_blocks": 2,
            "temporal_downsample": (False, True, True),
            "latents_mean": _WAN_2_1_MEAN,
            "latents_std": _WAN_2_1_STD,
        }
        return cls(**(fields | changes))

    @classmethod
    def from_dict(cls, published: Mapping[str, Any], **changes: Any) -> "WanVAEConfig":
        """Reads the sizes in a diffusers `vae/config.json`.

        Args:
          published: The parsed file. Keys that start with "_", such as
            "_class_name", are ignored.
          **changes: Fields to set or override, such as `dtype`.

        Returns:
          The configuration.

        Raises:
          ValueError: The file asks for what Wan2.1 does not have (as Wan2.2's 5B
            model does), or lacks or adds keys; all are named.
        """
        known = {*_DIFFUSERS_FIELDS, *_NEUTRAL, *_DERIVED}
        check_keys(
            published,
            known=known,
            required=_DIFFUSERS_FIELDS,
            what="VAE configuration",
        )
        foreign = {
            key: published[key]
            for key, neutral in _NEUTRAL.items()
            if key in published and published[key] not in neutral
        }
        if foreign:
            raise ValueError(
                f"only the autoencoder of Wan2.1 is supported; this one sets {foreign}"
            )
        fields: dict[str, Any] = {
            ours: tuple(published[key])
            if isinstance(published[key], list)
            else published[key]
            for key, ours in _DIFFUSERS_FIELDS.items()
        }
        return cls(**(fields | changes))
