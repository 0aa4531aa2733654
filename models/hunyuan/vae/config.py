"""Sizes of HunyuanVideo's video autoencoder."""

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

# Published fields that are ours under the same name, in both layouts; what an older
# file leaves out has the value of HunyuanVideo.
_REQUIRED = ("block_out_channels", "latent_channels", "layers_per_block")
_OPTIONAL = (
    *("norm_num_groups", "scaling_factor"),
    *("spatial_compression_ratio", "temporal_compression_ratio"),
)
# The original's own name of a field.
_RENAMED = {"time_compression_ratio": "temporal_compression_ratio"}
# What a file can ask for beyond HunyuanVideo, and the values that ask for nothing.
_NEUTRAL: dict[str, tuple] = {
    "in_channels": (3,),
    "out_channels": (3,),
    "act_fn": ("silu",),
    "mid_block_add_attention": (True,),
}
_BLOCKS = {
    "down_block_types": {"HunyuanVideoDownBlock3D", "DownEncoderBlockCausal3D"},
    "up_block_types": {"HunyuanVideoUpBlock3D", "UpDecoderBlockCausal3D"},
}
# Of training, and sizes of tiles, which `HunyuanTiling` has.
_IGNORED = ("force_upcast", "sample_size", "sample_tsize")


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class HunyuanVAEConfig:
    """The sizes and numerics of the autoencoder. Hashable: a static jit argument.

    Attributes:
      block_out_channels: Channels of each resolution, finest first. Each step from one
        to the next halves rows and columns; the last ones halve the frames, too.
      latent_channels: Channels of the latent, C.
      layers_per_block: Residual blocks of each resolution of the encoder; the decoder
        has one more.
      norm_num_groups: Groups of channels that are normalised together.
      spatial_compression_ratio: Rows and columns of pixels behind a latent position.
      temporal_compression_ratio: Frames behind a latent frame, but the first.
      scaling_factor: The transformer works on latents times this.
      dtype: Dtype of convolutions, matrix products and what passes between layers.
        Norms, activations, softmax, the latents and the pixels are float32 always.
        The original decodes in float16.
      param_dtype: Parameters are stored in it.
      convolution: Form of convolutions; see `video_autoencoder.layers.convolve`.
        One tile takes 189 ms by "2d" and 204 ms by "3d" (bfloat16, H200).

    Raises:
      ValueError: A size is not positive, sizes do not fit each other, or a name is
        not one of those accepted.
    """

    block_out_channels: tuple[int, ...]
    latent_channels: int
    layers_per_block: int
    norm_num_groups: int = 32
    spatial_compression_ratio: int = 8
    temporal_compression_ratio: int = 4
    scaling_factor: float = 0.476986
    dtype: str = "float32"
    param_dtype: str = "float32"
    convolution: ConvolutionName = "2d"

    def __post_init__(self) -> None:
        make_plain(self)
        check_positive_integers(
            self,
            (
                *("latent_channels", "layers_per_block", "norm_num_groups"),
                *("spatial_compression_ratio", "temporal_compression_ratio"),
            ),
        )
        channels, groups = self.block_out_channels, self.norm_num_groups
        if (
            not isinstance(channels, tuple)
            or not channels
            or not all(is_positive_integer(c) and not c % groups for c in channels)
        ):
            raise ValueError(
                f"block_out_channels={channels!r} must be a tuple of positive "
                f"multiples of norm_num_groups={groups}"
            )
        self._check_ratios()
        if not self.scaling_factor > 0.0:
            raise ValueError(f"{self.scaling_factor=} must be positive")
        check_dtypes(self)
        check_convolution(self)

    def _check_ratios(self) -> None:
        finest = 2 ** (len(self.block_out_channels) - 1)
        if self.spatial_compression_ratio != finest:
            raise ValueError(
                f"{self.spatial_compression_ratio=} must be {finest}: "
                f"{self.block_out_channels=} halve rows and columns at each step"
            )
        time = self.temporal_compression_ratio
        if time & (time - 1) or time > finest:
            raise ValueError(
                f"temporal_compression_ratio={time} must be a power of two up to "
                f"{finest}: frames are halved where rows are"
            )

    @property
    def stride(self) -> sizes.Stride:
        """The frames, rows and columns of pixels behind one latent position."""
        side = self.spatial_compression_ratio
        return self.temporal_compression_ratio, side, side

    @property
    def temporal_steps(self) -> tuple[bool, ...]:
        """Whether each step changes the frames, in the order in which a half runs.

        The encoder takes the steps from fine to coarse and the decoder from coarse to
        fine; in both the last ones change the frames.
        """
        steps = len(self.block_out_channels) - 1
        temporal = self.temporal_compression_ratio.bit_length() - 1
        return (False,) * (steps - temporal) + (True,) * temporal

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
    def video(cls, **changes: Any) -> "HunyuanVAEConfig":
        """Returns the autoencoder of HunyuanVideo and HunyuanCustom, 884-16c-hy."""
        fields: dict[str, Any] = {
            "block_out_channels": (128, 256, 512, 512),
            "latent_channels": 16,
            "layers_per_block": 2,
        }
        return cls(**(fields | changes))

    @classmethod
    def from_dict(
        cls, published: Mapping[str, Any], **changes: Any
    ) -> "HunyuanVAEConfig":
        """Reads the sizes in a `vae/config.json` of the original or of diffusers.

        Args:
          published: The parsed file. Keys that start with "_", such as "_class_name",
            are ignored.
          **changes: Fields to set or override, such as `dtype`.

        Returns:
          The configuration.

        Raises:
          ValueError: The file asks for what HunyuanVideo does not have, or lacks or
            adds keys; all are named.
        """
        given = {
            _RENAMED.get(key, key): value
            for key, value in published.items()
            if not key.startswith("_")
        }
        known = {*_REQUIRED, *_OPTIONAL, *_NEUTRAL, *_BLOCKS, *_IGNORED}
        check_keys(given, known=known, required=_REQUIRED, what="VAE configuration")
        foreign = {
            key: given[key]
            for key, neutral in _NEUTRAL.items()
            if key in given and given[key] not in neutral
        } | {
            key: given[key]
            for key, names in _BLOCKS.items()
            if not names.issuperset(given.get(key, ()))
        }
        if foreign:
            raise ValueError(
                "only the autoencoder of HunyuanVideo is supported; this one sets "
                f"{foreign}"
            )
        fields = {key: given[key] for key in (*_REQUIRED, *_OPTIONAL) if key in given}
        if isinstance(fields["block_out_channels"], list):
            fields["block_out_channels"] = tuple(fields["block_out_channels"])
        return cls(**(fields | changes))
