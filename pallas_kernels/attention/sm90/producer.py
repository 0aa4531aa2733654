"""The producer of the Hopper kernel: it keeps the ring of K and V blocks full."""

import abc
import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.attention.sm90.cta import Cta, QueryBlock
from pallas_kernels.attention.sm90.plan import LoadsOfQueryBlock, Ref, Width


def produce(cta: Cta) -> None:
    """Copies Q, then K and V of every kept block, as far ahead as the ring allows."""

    def load(query_block, index, fill):
        @pl.when(index > 0)
        def _():
            cta.signals.wait_q_free()

        loads = cta.plan.copies.loads(cta, query_block, fill)
        loads.load_queries()
        for width_index, width in enumerate(cta.plan.widths):
            begin, end = cta.steps_of_width(query_block, width_index)
            _KeyLoads(cta, query_block, width, loads).load(begin, end, fill)
            fill += 2 * (end - begin)
        if cta.plan.means is not None:
            count = query_block.num_means
            _MeanLoads(cta, query_block, loads).load(jnp.int32(0), count, fill)
            fill += 2 * count
        loads.finish(fill)
        return fill

    fill = cta.for_each_query_block(load, jnp.int32(0))

    @pl.when(cta.num_query_blocks() > 0)
    def _():
        cta.signals.wait_q_free()

    is_shared = cta.shares_keys()

    @pl.loop(jnp.maximum(fill - cta.plan.config.num_slots, 0), fill)
    def _drain(last_fill):
        # A CTA of a pair stays until the other has what is copied to it.
        cta.signals.wait_kv_free(cta.slot_of(last_fill), is_shared)


class _Loads(abc.ABC):
    """Copies of K and V of some steps of one query block."""

    cta: Cta
    query_block: QueryBlock

    @property
    @abc.abstractmethod
    def sources(self) -> tuple[Ref, Ref]:
        """Arrays of K and V."""

    @abc.abstractmethod
    def block_of(self, step):
        """Returns the block of a step, or any for steps past the last."""

    @abc.abstractmethod
    def copy(self, source: Ref, block, slot, fill) -> None:
        """Starts to copy a block into a free slot."""

    def load(self, begin, end, fill) -> None:
        """Copies K of each step, then V of the one before; `fill` counts copies."""
        k_gmem, v_gmem = self.sources

        def load_step(step, blocks):
            # The next block's id is read before the copies wait for a free slot.
            block_v, block_k = blocks
            next_block = self.block_of(step + 1)
            v_fill = fill + 2 * (step - begin)
            self._load_block(k_gmem, block_k, v_fill - jnp.minimum(step - begin, 1))

            @pl.when(step > begin)
            def _():
                self._load_block(v_gmem, block_v, v_fill)

            return block_k, next_block

        @pl.when(end > begin)
        def _():
            first = self.block_of(begin)
            last, _ = lax.fori_loop(begin, end, load_step, (first, first))
            self._load_block(v_gmem, last, fill + 2 * (end - begin) - 1)

    def _load_block(self, source: Ref, block, fill) -> None:
        """Copies a block into its slot of the ring as soon as it is free."""
        slot = self.cta.slot_of(fill)

        @pl.when(fill >= self.cta.plan.config.num_slots)
        def _():
            self.cta.signals.wait_kv_free(slot, self.query_block.is_shared)

        self.copy(source, block, slot, fill)


@dataclasses.dataclass(frozen=True)
class _KeyLoads(_Loads):
    """Copies of the key blocks of one width of one list."""

    cta: Cta
    query_block: QueryBlock
    width: Width
    loads: LoadsOfQueryBlock

    @property
    def sources(self) -> tuple[Ref, Ref]:
        """Keys and values of tokens."""
        return self.cta.gmem.k, self.cta.gmem.v

    def block_of(self, step):
        """Returns the key block of a step."""
        return self.cta.key_block(self.query_block, step)

    def copy(self, source: Ref, block, slot, fill) -> None:
        """Starts to copy as many tokens as the width has."""
        self.loads.load_block(source, block, slot, fill, self.width)


@dataclasses.dataclass(frozen=True)
class _MeanLoads(_Loads):
    """Copies of the blocks of means that follow a list."""

    cta: Cta
    query_block: QueryBlock
    loads: LoadsOfQueryBlock

    @property
    def sources(self) -> tuple[Ref, Ref]:
        """Mean keys and mean values."""
        return self.cta.means.k, self.cta.means.v

    def block_of(self, step):
        """Returns the step: every block of means is walked."""
        return step

    def copy(self, source: Ref, block, slot, fill) -> None:
        """Starts to copy a whole block."""
        self.loads.load_means(source, block, slot, fill)
