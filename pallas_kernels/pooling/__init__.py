"""Pooling of tokens into draft tokens, alone or with norm and rotation."""

from pallas_kernels.pooling.api import (
    joint_norm_rope_pool,
    norm_rope_pool,
)
from pallas_kernels.pooling.interfaces import (
    QKV,
    MeanSquares,
    Projected,
    QKNorm,
    Reduction,
    Rope,
    Scales,
    Tiling,
)
from pallas_kernels.pooling.sharded import (
    deviations_of_tiles,
    means_of_tiles,
    reduce_sub_tiles,
)
from pallas_kernels.pooling.tiles import pool_sub_tiles, pool_tiles, reduce_tiles
from pallas_kernels.pooling.video import PooledVideo, VideoPooling, pool_video

__all__ = [
    "QKV",
    "MeanSquares",
    "PooledVideo",
    "Projected",
    "QKNorm",
    "Reduction",
    "Rope",
    "Scales",
    "Tiling",
    "VideoPooling",
    "deviations_of_tiles",
    "joint_norm_rope_pool",
    "means_of_tiles",
    "norm_rope_pool",
    "pool_sub_tiles",
    "pool_tiles",
    "pool_video",
    "reduce_sub_tiles",
    "reduce_tiles",
]
