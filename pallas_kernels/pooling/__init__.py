"""Pooling of tokens into draft tokens, alone or with norm and rotation."""

from pallas_kernels.pooling.api import (
    joint_norm_rope_pool,
    norm_rope_pool,
    pool_sub_tiles,
    pool_tiles,
    reduce_tiles,
)
from pallas_kernels.pooling.interfaces import (
    QKV,
    QKNorm,
    Reduction,
    Rope,
    Scales,
    Tiling,
)
from pallas_kernels.pooling.sub_tiles import (
    channel_variances,
    deviations_of_tiles,
    reduce_sub_tiles,
)

__all__ = [
    "QKV",
    "QKNorm",
    "Reduction",
    "Rope",
    "Scales",
    "Tiling",
    "channel_variances",
    "deviations_of_tiles",
    "joint_norm_rope_pool",
    "norm_rope_pool",
    "pool_sub_tiles",
    "pool_tiles",
    "reduce_sub_tiles",
    "reduce_tiles",
]
