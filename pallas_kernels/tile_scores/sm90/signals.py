"""Barriers by which the warpgroups of a CTA wait for each other."""

import dataclasses
from typing import Any

from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.barriers import NamedBarriers
from pallas_kernels.tile_scores.sm90.plan import (
    NAMED_K_FREE,
    NAMED_Q_FREE,
    NAMED_TURN,
    NUM_CONSUMERS,
)

# A barrier in shared memory: references have no public type.
Ref = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Signals(NamedBarriers):
    """Everything that a warpgroup waits for, and what ends the wait.

    On the GPU q_free, k_free and turn are the hardware's named barriers.
    """

    q_full: Ref
    q_free: Ref
    k_full: Ref
    k_free: Ref
    turn: Ref

    def wait_q_full(self, slot):
        """Waits until a query block has landed."""
        plgpu.barrier_wait(self.q_full.at[slot])

    def wait_k_full(self, slot):
        """Waits until a key block has landed."""
        plgpu.barrier_wait(self.k_full.at[slot])

    def wait_q_free(self, slot):
        """Waits until all consumers have read a query block for the last time."""
        self._wait(self.q_free.at[slot], NAMED_Q_FREE + slot, NUM_CONSUMERS + 1)

    def free_q(self, slot):
        """Lets the producer overwrite a query block."""
        self._arrive(self.q_free.at[slot], NAMED_Q_FREE + slot, NUM_CONSUMERS + 1)

    def wait_k_free(self, slot):
        """Waits until all consumers have read a key block."""
        self._wait(self.k_free.at[slot], NAMED_K_FREE + slot, NUM_CONSUMERS + 1)

    def free_k(self, slot):
        """Lets the producer overwrite a key block."""
        self._arrive(self.k_free.at[slot], NAMED_K_FREE + slot, NUM_CONSUMERS + 1)

    def take_turn(self, consumer):
        """Waits until this consumer may issue a product."""
        self._wait(self.turn.at[consumer], NAMED_TURN + consumer, 2)

    def give_turn_after(self, consumer):
        """Lets the consumer behind this one issue a product."""
        following = lax.rem(consumer + 1, NUM_CONSUMERS)
        self._arrive(self.turn.at[following], NAMED_TURN + following, 2)
