"""Attention between the tiles of a video, from means of the parts of each tile."""

from pallas_kernels.tile_scores.api import Parts, tile_scores, why_not_in_kernel

__all__ = ["Parts", "tile_scores", "why_not_in_kernel"]
