"""Pooling of tokens into draft tokens, alone or with norm and rotation."""

from pallas_kernels.pooling.api import norm_rope_pool, pool_tiles, reduce_tiles
from pallas_kernels.pooling.interfaces import QKNorm, Reduction, Rope, Scales, Tiling

__all__ = [
    "QKNorm",
    "Reduction",
    "Rope",
    "Scales",
    "Tiling",
    "norm_rope_pool",
    "pool_tiles",
    "reduce_tiles",
]
