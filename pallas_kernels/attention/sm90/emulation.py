"""Stand-ins of interpret mode for instructions of sm_90, in plain JAX."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.sm90.instructions import Instructions
from pallas_kernels.attention.sm90.row_copies import RECIPROCAL_BITS, Rows


class Emulation(Instructions):
    """The methods of `Instructions` for the CPU.

    Each product is done when its method returns, sums are those of whole rows, and a
    warp stands for the warpgroup.
    """

    uses_named_barriers = False
    copies_for_pairs = False

    def as_matrix(self, tokens):
        """Returns the tokens as they are: references cannot be reshaped here."""
        return tokens

    def logits(self, q_rows, k_block):
        """Returns q @ k.T."""
        return _dot(_matrix(q_rows), _matrix(k_block).T)

    def add_values(self, acc, weights, v_block):
        """Returns acc + weights @ v over as many keys as weights have."""
        return acc + _dot(weights, _matrix(v_block)[: weights.shape[1]])

    def overlapped_products(
        self,
        q_rows,
        k_block,
        acc,
        weights,
        v_block,
        *,
        wait_for_values,
        after_issue,
        use_logits,
    ):
        """Computes the products one after another, and waits as the GPU does."""
        logits = self.logits(q_rows, k_block)
        wait_for_values()
        acc = self.add_values(acc, weights, v_block)
        after_issue()
        return acc, *use_logits(logits)

    def finish_reads(self):
        """Orders a product's ordinary reads before the copies that follow."""
        plgpu.commit_smem()

    def row_sums(self, partial_sums):
        """Returns the sums, which are those of whole rows here."""
        return partial_sums

    def partial_sums(self, weights):
        """Sums each row."""
        return weights.sum(axis=1)

    def in_columns(self, values, per_value):
        """Repeats each number."""
        return jnp.repeat(jnp.stack(values), per_value)

    def any_of_warp(self, rows):
        """Says whether any row of the warpgroup is true."""
        return jnp.any(rows).astype(jnp.int32)

    def fetch_rows(self, array, rows, rows_smem, *, num_rows):
        """Copies rows of a block; rows past its end are zeros."""
        token, is_own = _tokens(rows, num_rows)
        values = jnp.where(is_own[:, None], array[...][token], 0.0)
        rows_smem[:num_rows] = values.astype(rows_smem.dtype)

    def store_rows(self, rows_smem, rows, array):
        """Copies all rows within the block."""
        num_rows = rows_smem.shape[0]
        token, is_own = _tokens(rows, num_rows)
        values = rows_smem[...]

        def store_row(i, _):
            @pl.when(is_own[i])
            def _store():
                array[token[i], :] = values[i]

            return ()

        lax.fori_loop(0, num_rows, store_row, ())

    def end_group(self):
        """Does nothing: copies are done when they have been started."""

    def wait_for_groups(self, pending):
        """Does nothing."""


def _matrix(tokens):
    return tokens[...].reshape(-1, tokens.shape[-1])


def _dot(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _tokens(rows: Rows, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """Returns the token of each row, and whether it is the block's, as the PTX does."""
    row = rows.first + jnp.arange(num_rows, dtype=jnp.int32)
    is_own = row < rows.length
    row = jnp.minimum(row, rows.length - 1)
    run = (row * rows.reciprocal) >> RECIPROCAL_BITS
    return rows.start + row + run * rows.jump, is_own
