"""Ranking on Hopper GPUs (sm_90), in Pallas Mosaic GPU and PTX.

Modules are imported on first use: `sm90.backend`.
"""

from typing import TYPE_CHECKING

from pallas_kernels.common.lazy_modules import importer

if TYPE_CHECKING:
    from pallas_kernels.ranking.sm90 import backend, maps, rows

__all__ = ["backend", "maps", "rows"]

__getattr__ = importer(__name__, *__all__)
