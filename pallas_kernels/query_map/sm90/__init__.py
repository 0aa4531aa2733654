"""The map of queries on Hopper GPUs (sm_90), in Pallas Mosaic GPU.

Modules are imported on first use: `sm90.kernel`.
"""

from typing import TYPE_CHECKING

from pallas_kernels.common.lazy_modules import importer

if TYPE_CHECKING:
    from pallas_kernels.query_map.sm90 import kernel

__all__ = ["kernel"]

__getattr__ = importer(__name__, *__all__)
