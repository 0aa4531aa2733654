"""What a launch asks of a GPU, against what an H100 has; interpret mode asks nothing.

Limits are those of CUDA's programming guide for compute capability 9.0.
"""

import dataclasses

import jax.numpy as jnp
import pytest

from pallas_kernels.attention.sm90.plan import (
    MAX_SMEM_BYTES,
    KernelConfig,
    smem_bytes,
)

REGISTERS_OF_AN_SM = 65_536
CONSUMERS, PRODUCERS, THREADS = 2, 1, 128


@pytest.mark.parametrize("head_dim", [64, 128])
def test_registers_fit_and_can_be_set(head_dim):
    """setmaxnreg takes multiples of 8 from 24 to 256."""
    config = KernelConfig.for_head_dim(head_dim)
    counts = [config.consumer_registers, config.producer_registers]
    assert all(count % 8 == 0 and 24 <= count <= 256 for count in counts)
    of_a_cta = THREADS * (CONSUMERS * counts[0] + PRODUCERS * counts[1])
    assert REGISTERS_OF_AN_SM - 8 * 3 * THREADS < of_a_cta <= REGISTERS_OF_AN_SM


@pytest.mark.parametrize(("head_dim", "slots"), [(64, 9), (128, 6)])
def test_shared_memory_is_counted_and_full(head_dim, slots):
    """Blocks of Q and of the ring, the log-sum-exps, and a barrier for each use."""
    config = KernelConfig.for_head_dim(head_dim)
    assert config.num_slots == slots
    blocks = (slots + 1) * 128 * head_dim * jnp.bfloat16.dtype.itemsize
    barriers = {"q_full": 1, "q_free": 1, "kv_full": slots, "kv_free": slots}
    barriers |= {"turn": CONSUMERS, "pair_free": slots}
    needed = blocks + 2 * 64 * 4 + 8 * sum(barriers.values())
    assert smem_bytes(config, head_dim, itemsize=2) == needed <= MAX_SMEM_BYTES


def test_another_slot_has_no_memory_or_no_barrier():
    more = dataclasses.replace(KernelConfig.for_head_dim(128), num_slots=7)
    assert smem_bytes(more, 128, itemsize=2) > 227 * 1024
    with pytest.raises(ValueError, match="must be at most 9"):
        dataclasses.replace(KernelConfig.for_head_dim(64), num_slots=10)
