"""Stand-ins of interpret mode for `instructions`, in plain JAX.

A thread stands for all threads of a row, so its maximum and sum are those of the row.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.tile_scores.sm90.instructions import Instructions


class Emulation(Instructions):
    """The methods of `Instructions` for the CPU."""

    def logits(self, q_rows, k_block):
        """Returns q @ k.T."""
        return jnp.dot(q_rows[...], k_block[...].T, preferred_element_type=jnp.float32)

    def finish_reads(self):
        """Orders a product's ordinary reads before the copies that follow."""
        plgpu.commit_smem()

    def thread_maxima(self, logits):
        """Finds the largest of each row."""
        return logits.max(axis=1)

    def thread_sums(self, weights):
        """Sums each row."""
        return weights.sum(axis=1)

    def maximum_of_row(self, maxima):
        """Returns the maxima, which are those of whole rows here."""
        return maxima

    def sum_of_row(self, sums):
        """Returns the sums, which are those of whole rows here."""
        return sums

    def store_pair_sums(
        self, weights, scores, first_row, first_column, *, per_tile, num_tiles
    ):
        """Sums weights over pairs of tiles and stores what is within the map."""
        rows, columns = (size // per_tile for size in weights.shape)
        sums = weights.reshape(rows, per_tile, columns, per_tile).sum((1, 3))

        def store_row(i, _):
            row = first_row + i

            def store(count: int) -> None:
                places = pl.ds(row * num_tiles + first_column, count)
                scores[places] = sums[i, :count]

            is_last = first_column + columns > num_tiles
            is_inside = row < num_tiles
            pl.when(is_inside & ~is_last)(lambda: store(columns))
            if rest := num_tiles % columns:
                pl.when(is_inside & is_last)(lambda: store(rest))
            return ()

        lax.fori_loop(0, rows, store_row, ())
