"""Instructions of sm_90 that the roles use, which interpret mode does not have.

`emulation.Emulation` does the same in plain JAX.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.sm90 import row_copies, wgmma
from pallas_kernels.attention.sm90.plan import Ref
from pallas_kernels.common import lanes


class Instructions:
    """Matrix products, sums over lanes and copies of rows, as the GPU makes them."""

    uses_named_barriers = True
    copies_for_pairs = True  # one TMA copy can fill the memory of two CTAs

    def as_matrix(self, tokens: Ref) -> Ref:
        """Returns tokens in shared memory as a matrix; boxes are kept as rows."""
        if len(tokens.shape) == 2:
            return tokens
        rows, columns, head_dim = tokens.shape
        return tokens.reshape(rows * columns, head_dim)

    def logits(self, q_rows: Ref, k_block: Ref):
        """Returns q @ k.T, waited for."""

        def product(logits_ref):
            plgpu.wgmma(logits_ref, q_rows, k_block.T)
            return logits_ref[...]

        shape = (q_rows.shape[0], k_block.shape[0])
        return pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))

    def add_values(self, acc, weights, v_block: Ref):
        """Returns acc + weights @ v, waited for, over as many keys as weights have."""
        acc = wgmma.issue(acc, weights, v_block)
        plgpu.wgmma_wait(0)
        return wgmma.settle(acc)

    def overlapped_products(
        self,
        q_rows: Ref,
        k_block: Ref,
        acc,
        weights,
        v_block: Ref,
        *,
        wait_for_values: Callable[[], None],
        after_issue: Callable[[], None],
        use_logits: Callable[..., tuple],
    ):
        """Computes logits, and uses them while the product with V runs.

        Args:
          q_rows: Queries of the consumer.
          k_block: Keys of this step.
          acc: Weighted values so far.
          weights: Weights of the step before.
          v_block: Values of the step before, a whole block.
          wait_for_values: Called between the two products, before V is read.
          after_issue: Called when both have been issued.
          use_logits: Called with the logits; waits there keep arithmetic in place.

        Returns:
          acc + weights @ v, and the results of `use_logits`.
        """

        def products(logits_ref):
            plgpu.wgmma(logits_ref, q_rows, k_block.T)
            wait_for_values()
            new_acc = wgmma.issue(acc, weights, v_block)
            after_issue()
            logits = plgpu.wgmma_accumulator_load(logits_ref, wait_n=1)
            # Keeps the compiler from using the logits before the wait.
            results = use_logits(lax.optimization_barrier(logits))
            plgpu.wgmma_wait(0)
            return wgmma.settle(new_acc), *results

        # The accumulator is made right before its first product: only then does ptxas
        # drop the 64 zeros that the product would be added to.
        shape = (q_rows.shape[0], k_block.shape[0])
        return pl.run_scoped(products, plgpu.ACC(shape, jnp.float32))

    def finish_reads(self) -> None:
        """Orders reads of shared memory before the copies that overwrite it.

        wgmma reads as the copies write and needs nothing.
        """

    def row_sums(self, partial_sums):
        """Adds up what the four threads of each row hold."""
        return lanes.sum_of_four_lanes(partial_sums)

    def partial_sums(self, weights):
        """Sums each row over the columns that a thread holds."""
        return lanes.thread_sums(weights)

    def in_columns(self, values, per_value: int):
        """Repeats each number for so many columns of logits."""
        return lanes.in_columns(values, per_value)

    def any_of_warp(self, rows):
        """Returns an integer that is not zero where the warp holds a true row.

        It differs between the warps of a warpgroup: what depends on it must not
        contain an operation of the whole warpgroup.
        """
        return lanes.lanes_of_warp(rows)

    def fetch_rows(
        self,
        array: Ref,
        rows: row_copies.Rows,
        rows_smem: Ref,
        *,
        num_rows: int,
    ) -> None:
        """Starts to copy rows of a block: see `row_copies.fetch`."""
        row_copies.fetch(array, rows, rows_smem, num_rows=num_rows)

    def store_rows(self, rows_smem: Ref, rows: row_copies.Rows, array: Ref) -> None:
        """Copies all rows within the block: see `row_copies.store`."""
        row_copies.store(rows_smem, rows, array)

    def end_group(self) -> None:
        """Makes a group of what this thread has started since the last call."""
        row_copies.end_group()

    def wait_for_groups(self, pending: int) -> None:
        """Waits until at most this thread's last `pending` groups are under way."""
        row_copies.wait_for_groups(pending)
