"""Pooling on Hopper GPUs (sm_90), in Pallas Mosaic GPU.

Modules are imported on first use: `sm90.norm_rope_pool`.
"""

from typing import TYPE_CHECKING

from pallas_kernels.common.lazy_modules import importer

if TYPE_CHECKING:
    from pallas_kernels.pooling.sm90 import norm_rope_pool, pool_tiles, pool_video

__all__ = ["norm_rope_pool", "pool_tiles", "pool_video"]

__getattr__ = importer(__name__, *__all__)
