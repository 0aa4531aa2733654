"""Attention problems that benchmarks time, by name."""

import dataclasses

from draft_jax import VideoGrid


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One attention problem with batch 1."""

    grid: VideoGrid
    num_heads: int
    head_dim: int
    dtype: str = "bfloat16"

    @property
    def qkv_shape(self) -> tuple[int, int, int, int]:
        """Shape [B, T, N, D] of Q, of K and of V."""
        return 1, self.grid.num_tokens, self.num_heads, self.head_dim

    @property
    def dense_flops(self) -> float:
        """Arithmetic of attention over all pairs of tokens: two products."""
        return 4.0 * self.grid.num_tokens**2 * self.num_heads * self.head_dim


SHAPES = {
    "hunyuan": Shape(grid=VideoGrid(33, 48, 80), num_heads=24, head_dim=128),
    "hunyuan-edges": Shape(
        grid=VideoGrid(33, 45, 80, text_length=256), num_heads=24, head_dim=128
    ),
    "wan": Shape(grid=VideoGrid(21, 48, 80), num_heads=40, head_dim=128),
    "head-dim-64": Shape(grid=VideoGrid(33, 48, 80), num_heads=24, head_dim=64),
    "head-dim-64-edges": Shape(
        grid=VideoGrid(33, 45, 80, text_length=256), num_heads=24, head_dim=64
    ),
}
DENSITIES = (1.0, 0.5, 0.25, 0.1)
