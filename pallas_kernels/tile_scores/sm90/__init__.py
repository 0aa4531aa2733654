"""Scores of tiles on Hopper GPUs (sm_90), in Pallas Mosaic GPU.

Modules are imported on first use: `sm90.backend`.
"""

from typing import TYPE_CHECKING

from pallas_kernels.common.lazy_modules import importer

if TYPE_CHECKING:
    from pallas_kernels.tile_scores.sm90 import backend

__all__ = ["backend"]

__getattr__ = importer(__name__, *__all__)
