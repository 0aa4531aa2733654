"""Static description of one launch of the kernel for scores of tiles."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.lanes import ROWS

BLOCK = 128  # parts of a block of queries, and of one of keys
ALIGNMENT = 8  # parts; swizzled copies are cut out of whole groups
NUM_CONSUMERS = 2
PRODUCER = 2  # values of the "wg" axis: consumers 0 and 1, then the producer
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 232, 40
MAX_SMEM_BYTES = 227 * 1024
PARTS_PER_TILE = (2, 4, 8, 16)  # a warp has whole tiles: 16 rows
HEAD_DIMS = (64, 128)
NUM_SLOTS = 4  # key blocks in flight


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything static about one launch."""

    num_parts: int  # M
    per_tile: int  # J
    num_heads: int
    head_dim: int
    has_key_weights: bool  # keys do not all count alike
    interpreted: bool

    @property
    def num_tiles(self) -> int:
        """Tiles, S."""
        return self.num_parts // self.per_tile

    @property
    def num_blocks(self) -> int:
        """Blocks of parts; the last one may be short."""
        return -(-self.num_parts // BLOCK)

    @property
    def is_last_short(self) -> bool:
        """Whether the last block has fewer parts."""
        return bool(self.num_parts % BLOCK)


def smem_transforms() -> tuple[Any, ...]:
    """Returns how parts lie in shared memory: as wgmma reads them."""
    return (
        plgpu.TilingTransform((ALIGNMENT, 64)),  # type: ignore[abstract]
        plgpu.SwizzleTransform(128),  # type: ignore[abstract]
    )


def scratch_types(plan: Plan) -> dict[str, Any]:
    """Returns the shared memory and barriers of one CTA."""

    def smem(*shape: int):
        size = (*shape, plan.head_dim)
        return plgpu.SMEM(size, jnp.bfloat16, transforms=smem_transforms())

    return {
        "q_smem": smem(NUM_CONSUMERS, ROWS),
        "k_smem": smem(NUM_SLOTS, BLOCK),
        "q_full": plgpu.Barrier(num_arrivals=NUM_CONSUMERS),
        "k_full": plgpu.Barrier(num_barriers=NUM_SLOTS),
        "k_free": plgpu.Barrier(num_arrivals=NUM_CONSUMERS, num_barriers=NUM_SLOTS),
    }


def smem_bytes(head_dim: int) -> int:
    """Returns the bytes of shared memory of one CTA, barriers included."""
    return (NUM_SLOTS + 1) * BLOCK * head_dim * 2 + 8 * (2 * NUM_SLOTS + 1)
