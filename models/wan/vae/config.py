"""Sizes of the video autoencoders of Wan2.1 and Wan2.2."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from models.checkpoints.config_checks import (
    FLOAT_NAMES,
    check_dtypes,
    check_keys,
    check_positive_integers,
    is_positive_integer,
)
from models.diffusion.interfaces import LatentShape
from models.diffusion.video_autoencoder import sizes
from models.diffusion.video_autoencoder.layers import ConvolutionName, check_convolution
from models.diffusion.video_autoencoder.sizes import COLOURS
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
# Fields that only Wan2.2's files have. A null in them says what the default does.
_DIFFUSERS_OPTIONAL = {
    "decoder_base_dim": "decoder_base_dim",
    "is_residual": "averages",
    "patch_size": "patch_size",
}
# What diffusers can ask for beyond both models, and the values that ask for nothing.
_NEUTRAL: dict[str, tuple] = {
    "attn_scales": ([],),
    "dropout": (0, 0.0),
}
_DERIVED = ("scale_factor_temporal", "scale_factor_spatial")
_CHANNELS = ("in_channels", "out_channels")  # of pixels, as patches
_OWN = ("spatial_downsample",)  # what our files say beside diffusers' keys

# Of the latents that Wan2.1 was trained on; from its `wan/modules/vae.py`.
_WAN_2_1_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
_WAN_2_1_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
# Of those that Wan2.2's 5B model was trained on; from its `wan/modules/vae2_2.py`.
_WAN_2_2_MEAN = (
    *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557),
    *(-0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825),
    *(-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
    *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230),
    *(-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748),
    *(0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
)
_WAN_2_2_STD = (
    *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013),
    *(0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978),
    *(0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
    *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093),
    *(0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887),
    *(0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)
# The form that its times were measured in: 121 frames of 704 x 1280 in bfloat16 take
# 3.65 s on one H200 (2026-11-30).
_HOW_WAN_2_2: dict[str, Any] = {"convolution": "2d"}


class Level(NamedTuple):
    """One resolution of the encoder or decoder.

    Attributes:
      inputs: Channels in.
      outputs: Channels of the resolution.
      temporal: Whether the step to the next resolution halves, or doubles, the frames
        too; None for no step.
      spatial: Whether it halves, or doubles, rows and columns.
    """

    inputs: int
    outputs: int
    temporal: bool | None
    spatial: bool

    @property
    def factors(self) -> tuple[int, int]:
        """The factors in time and in space of the step to the next resolution."""
        return 1 + bool(self.temporal), 1 + self.spatial

    @property
    def positions(self) -> int:
        """The number of positions that the step makes one, or makes of one."""
        time, side = self.factors
        return time * side**2


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class WanVAEConfig:
    """The sizes and numerics of the autoencoder. Hashable: a static jit argument.

    Attributes:
      base_dim: Channels of the encoder at the finest resolution.
      decoder_base_dim: Those of the decoder; None for as many as the encoder has.
      latent_channels: Channels of the latent, C.
      dim_mult: Channels of each resolution, finest first, in units of `base_dim`.
        Each but the first halves rows and columns, or what the next two say.
      num_res_blocks: Residual blocks of each resolution of the encoder; the decoder
        has one more.
      temporal_downsample: Whether the step from a resolution to the next also
        halves the frames; one entry less than `dim_mult`.
      spatial_downsample: Whether it halves rows and columns; None for every step, as
        in the published models. A step that does not has a convolution all the same.
      averages: Whether a level's input goes round it to its output, averaged or
        repeated to the new size, as in Wan2.2's 5B model.
      patch_size: Rows and columns of pixels that enter as one position, their colours
        side by side in the channels.
      latents_mean: Mean of the encoder's output, by channel. The transformer works
        on latents less this mean, over `latents_std`.
      latents_std: Standard deviation of the encoder's output, by channel.
      dtype: Dtype of convolutions, matrix products, the feature cache and what passes
        between layers. Norms, activations, softmax, the latents and the pixels are
        float32 always. float32 as in the original; on GPUs that have it, float32
        products use TF32 unless `jax.default_matmul_precision` says otherwise
        (PyTorch does so for convolutions, too).
      param_dtype: Parameters are stored in it.
      attention_dtype: Dtype of queries, keys and values within a frame; None for
        `dtype`. In bfloat16 or float16 cuDNN attends on GPUs if a position has at most
        128 channels, which the published models exceed.
      convolution: Form of convolutions over three frames; the result differs by
        rounding. "3d": as such. "2d": with the three frames side by side in the
        channels of one 2-D convolution, for which GPU libraries have more kernels.
        Wan2.2's preset has "2d".

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
    spatial_downsample: tuple[bool, ...] | None = None
    decoder_base_dim: int | None = None
    averages: bool = False
    patch_size: int = 1
    dtype: str = "float32"
    param_dtype: str = "float32"
    attention_dtype: str | None = None
    convolution: ConvolutionName = "3d"

    def __post_init__(self) -> None:
        make_plain(self)
        names = ("base_dim", "latent_channels", "num_res_blocks", "patch_size")
        optional = () if self.decoder_base_dim is None else ("decoder_base_dim",)
        check_positive_integers(self, names + optional)
        mult = self.dim_mult
        if (
            not isinstance(mult, tuple)
            or not mult
            or not all(map(is_positive_integer, mult))
        ):
            raise ValueError(f"dim_mult={mult!r} must be a tuple of positive integers")
        self._check_tuples()
        if self.averages:
            self._check_averages()
        elif any(level.outputs % 2 for level in self.decoder_levels[:-1]):
            raise ValueError(
                f"{self.base_dim=} times {self.dim_mult=} must be even where the "
                "decoder halves the channels: everywhere but in the first entry"
            )
        check_dtypes(self)
        if self.attention_dtype not in (None, *FLOAT_NAMES):
            raise ValueError(
                f"{self.attention_dtype=} must be None or one of {FLOAT_NAMES}"
            )
        check_convolution(self)

    def _check_tuples(self) -> None:
        lengths = {
            "temporal_downsample": len(self.dim_mult) - 1,
            "latents_mean": self.latent_channels,
            "latents_std": self.latent_channels,
        }
        if self.spatial_downsample is not None:
            lengths["spatial_downsample"] = len(self.dim_mult) - 1
        for name, length in lengths.items():
            value = getattr(self, name)
            if not isinstance(value, tuple) or len(value) != length:
                raise ValueError(f"{name}={value!r} must be a tuple of {length}")
        steps = self.temporal_downsample, self.spatial_steps
        if not all(isinstance(value, bool) for step in steps for value in step):
            raise ValueError(
                f"{self.temporal_downsample=} and {self.spatial_downsample=} must hold "
                "booleans"
            )
        if not all(value > 0.0 for value in self.latents_std):
            raise ValueError(f"{self.latents_std=} must hold positive numbers")

    def _check_averages(self) -> None:
        """Checks that channels are groups of others where a level is gone round."""
        for level in self.encoder_levels:
            if level.inputs * level.positions % level.outputs:
                raise ValueError(
                    f"a level of the encoder has {level.outputs} channels, which must "
                    f"divide {level.inputs} of the level before x {level.positions}"
                )
        for level in self.decoder_levels:
            if level.temporal is not None and (
                level.outputs * level.positions % level.inputs
            ):
                raise ValueError(
                    f"a level of the decoder has {level.outputs} channels, which x "
                    f"{level.positions} must be a multiple of {level.inputs} of the "
                    "level before"
                )

    @property
    def channels(self) -> tuple[int, ...]:
        """The encoder's channels of each resolution, finest first."""
        return tuple(self.base_dim * factor for factor in self.dim_mult)

    @property
    def spatial_steps(self) -> tuple[bool, ...]:
        """Whether each step from a resolution to the next halves rows and columns."""
        if self.spatial_downsample is None:
            return (True,) * (len(self.dim_mult) - 1)
        return self.spatial_downsample

    @property
    def encoder_levels(self) -> "tuple[Level, ...]":
        """The encoder's resolutions, finest first."""
        inputs = (self.base_dim, *self.channels)
        steps = (*self.temporal_downsample, None), (*self.spatial_steps, False)
        return tuple(map(Level, inputs, self.channels, *steps))

    @property
    def decoder_levels(self) -> "tuple[Level, ...]":
        """The decoder's resolutions, coarsest first."""
        base = self.decoder_base_dim or self.base_dim
        outputs = tuple(base * factor for factor in reversed(self.dim_mult))
        temporal = (*reversed(self.temporal_downsample), None)
        spatial = (*reversed(self.spatial_steps), False)
        # Without averages around it, the step to a finer resolution halves channels.
        before = outputs if self.averages else tuple(size // 2 for size in outputs)
        inputs = (outputs[0], *before)
        return tuple(map(Level, inputs, outputs, temporal, spatial))

    @property
    def patch_channels(self) -> int:
        """The channels of pixels, as patches."""
        return COLOURS * self.patch_size**2

    @property
    def stride(self) -> tuple[int, int, int]:
        """The frames, rows and columns of pixels behind one latent position.

        The first latent frame stands for one frame of the video only.
        """
        side = 2 ** sum(self.spatial_steps) * self.patch_size
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
        """Returns the autoencoder of Wan2.1, which Wan2.2's 14B models have, too."""
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
    def wan2_2(cls, **changes: Any) -> "WanVAEConfig":
        """Returns the autoencoder of Wan2.2's 5B model."""
        fields: dict[str, Any] = {
            "base_dim": 160,
            "decoder_base_dim": 256,
            "latent_channels": 48,
            "averages": True,
            "patch_size": 2,
            "latents_mean": _WAN_2_2_MEAN,
            "latents_std": _WAN_2_2_STD,
        } | _HOW_WAN_2_2
        return cls.wan2_1(**(fields | changes))

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
          ValueError: The file asks for what neither model has, or lacks or adds keys;
            all are named.
        """
        known = {*_DIFFUSERS_FIELDS, *_DIFFUSERS_OPTIONAL, *_NEUTRAL, *_DERIVED}
        known |= {*_CHANNELS, *_OWN}
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
                "only the autoencoders of Wan2.1 and Wan2.2 are supported; this one "
                f"sets {foreign}"
            )
        fields: dict[str, Any] = {
            ours: tuple(published[key])
            if isinstance(published[key], list)
            else published[key]
            for key, ours in _DIFFUSERS_FIELDS.items()
        }
        if published.get("spatial_downsample") is not None:
            fields["spatial_downsample"] = tuple(published["spatial_downsample"])
        fields |= {
            ours: published[key]
            for key, ours in _DIFFUSERS_OPTIONAL.items()
            if published.get(key) is not None
        }
        if fields.get("averages"):
            fields |= _HOW_WAN_2_2
        config = cls(**(fields | changes))
        for key in _CHANNELS:
            channels = published.get(key, COLOURS)
            if channels != config.patch_channels:
                raise ValueError(
                    f"{key}={channels!r} must be {config.patch_channels}, the colours "
                    f"of {config.patch_size} x {config.patch_size} pixels"
                )
        return config
