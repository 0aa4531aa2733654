"""Barriers by which the warpgroups of a CTA, and the two CTAs of a pair, wait."""

import dataclasses

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.sm90.plan import (
    NAMED_KV_FREE,
    NAMED_Q_FREE,
    NAMED_TURN,
    NUM_CONSUMERS,
    Ref,
)
from pallas_kernels.common.barriers import NamedBarriers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Signals(NamedBarriers):
    """Everything that a warpgroup waits for, and what ends the wait.

    On the GPU q_free, kv_free and turn are the hardware's named barriers.
    """

    q_full: Ref
    kv_full: Ref
    q_free: Ref
    kv_free: Ref
    turn: Ref
    pair_free: Ref | None = None  # where CTAs are in pairs

    def wait_q_full(self):
        """Waits until the query block has landed."""
        plgpu.barrier_wait(self.q_full)

    def wait_kv_full(self, slot):
        """Waits until a key block has landed."""
        plgpu.barrier_wait(self.kv_full.at[slot])

    def wait_q_free(self):
        """Waits until both consumers have stored the query block."""
        self._wait(self.q_free, NAMED_Q_FREE, NUM_CONSUMERS + 1)

    def free_q(self):
        """Lets the producer overwrite the query block."""
        self._arrive(self.q_free, NAMED_Q_FREE, NUM_CONSUMERS + 1)

    def wait_kv_free(self, slot, is_shared: jax.Array | bool = False):
        """Waits for the consumers; where blocks are shared, for the other CTA's too."""
        self._wait(self.kv_free.at[slot], NAMED_KV_FREE + slot, NUM_CONSUMERS + 1)
        if self.pair_free is None:
            return
        pair_free = self.pair_free.at[slot]

        @pl.when(is_shared)
        def _():
            plgpu.barrier_arrive(pair_free)
            plgpu.barrier_wait(pair_free)

    def free_kv(self, slot):
        """Lets the producer overwrite a key block."""
        self._arrive(self.kv_free.at[slot], NAMED_KV_FREE + slot, NUM_CONSUMERS + 1)

    def take_turn(self, consumer):
        """Waits until this consumer may issue matrix products."""
        self._wait(self.turn.at[consumer], NAMED_TURN + consumer, NUM_CONSUMERS)

    def give_turn(self, consumer):
        """Lets this consumer issue matrix products."""
        self._arrive(self.turn.at[consumer], NAMED_TURN + consumer, NUM_CONSUMERS)
