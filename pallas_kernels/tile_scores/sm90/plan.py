"""Static description of one launch of the kernel for scores of tiles."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.lanes import ROWS, smem_transforms

NUM_CONSUMERS = 3
PRODUCER = 3  # values of the "wg" axis: consumers 0 to 2, then the producer
QUERIES = NUM_CONSUMERS * ROWS  # parts of a block of queries
KEYS = 128  # parts of a block of keys
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 160, 32
NUM_SLOTS = 4  # key blocks in flight
Q_SLOTS = 2  # query blocks: one is copied while the other one's walk ends
# Named barriers; Mosaic uses the lowest five.
NAMED_TURN, NAMED_Q_FREE, NAMED_K_FREE = 5, 8, 10
MAX_SMEM_BYTES = 227 * 1024
PARTS_PER_TILE = (2, 4, 8, 16)  # a warp has whole tiles: 16 rows
HEAD_DIMS = (64, 128)
# Where a product has which part, so that a thread holds whole tiles of keys, and of a
# tile of queries both rows: parts come in groups, (4, 16, 2) of keys and (8, 2, 1) of
# queries, of which the first two axes change places.
KEY_GROUP, QUERY_GROUP = (4, 16, 2), (8, 2, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything static about one launch."""

    num_parts: int  # M
    per_tile: int  # J
    num_maps: int  # of batch items and heads
    num_heads: int
    head_dim: int
    most_ctas: int  # that the GPU runs at a time
    has_key_weights: bool  # keys do not all count alike
    interpreted: bool

    @property
    def num_tiles(self) -> int:
        """Tiles, S."""
        return self.num_parts // self.per_tile

    @property
    def num_query_blocks(self) -> int:
        """Blocks of query parts; the last one may be short."""
        return -(-self.num_parts // QUERIES)

    @property
    def num_key_blocks(self) -> int:
        """Blocks of key parts, likewise."""
        return -(-self.num_parts // KEYS)

    @property
    def num_tasks(self) -> int:
        """Blocks of query parts of all maps: each is a walk over the key blocks."""
        return self.num_maps * self.num_query_blocks

    @property
    def num_ctas(self) -> int:
        """CTAs, of which each takes every `num_ctas`-th task."""
        return min(self.most_ctas, self.num_tasks)

    @property
    def is_last_short(self) -> bool:
        """Whether the last block of keys has fewer parts."""
        return bool(self.num_parts % KEYS)

    @property
    def blocks_at_once(self) -> int:
        """Key blocks whose sums are read back together: 128 bytes for each thread."""
        return self.per_tile

    @property
    def sums_shape(self) -> tuple[int, ...]:
        """Sums of a launch: of each CTA, consumer, and block of keys."""
        groups = -(-self.num_key_blocks // self.blocks_at_once)
        of_block = ROWS * KEYS // self.per_tile
        return self.num_ctas, NUM_CONSUMERS, groups * self.blocks_at_once, of_block


def scratch_types(plan: Plan) -> dict[str, Any]:
    """Returns the shared memory and barriers of one CTA."""

    def smem(*shape: int):
        size = (*shape, plan.head_dim)
        return plgpu.SMEM(size, jnp.bfloat16, transforms=smem_transforms())

    return {
        "q_smem": smem(Q_SLOTS, NUM_CONSUMERS, ROWS),
        "k_smem": smem(NUM_SLOTS, KEYS),
        "q_full": plgpu.Barrier(num_arrivals=NUM_CONSUMERS, num_barriers=Q_SLOTS),
        "q_free": plgpu.Barrier(num_arrivals=NUM_CONSUMERS, num_barriers=Q_SLOTS),
        "k_full": plgpu.Barrier(num_barriers=NUM_SLOTS),
        "k_free": plgpu.Barrier(num_arrivals=NUM_CONSUMERS, num_barriers=NUM_SLOTS),
        "turn": plgpu.Barrier(num_barriers=NUM_CONSUMERS),
    }


def smem_bytes(head_dim: int) -> int:
    """Returns the bytes of shared memory of one CTA, barriers included."""
    blocks = (Q_SLOTS * QUERIES + NUM_SLOTS * KEYS) * head_dim * 2
    return blocks + 8 * (2 * (NUM_SLOTS + Q_SLOTS) + NUM_CONSUMERS)
