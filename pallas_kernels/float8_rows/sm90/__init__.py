"""Rows in FP8 on Hopper GPUs (sm_90), in Pallas Mosaic GPU.

Modules are imported on first use: `sm90.kernel`.
"""

from typing import TYPE_CHECKING

from pallas_kernels.common.lazy_modules import importer

if TYPE_CHECKING:
    from pallas_kernels.float8_rows.sm90 import gelu, kernel, rows

__all__ = ["gelu", "kernel", "rows"]

__getattr__ = importer(__name__, *__all__)
