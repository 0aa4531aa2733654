"""Stand-ins of interpret mode for `instructions`, in plain JAX.

A thread stands for all threads of a row, and a warp for the warpgroup: the maximum and
the sum of a thread are those of the row. Sums of tiles are [64, 128 / J].
"""

import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.lanes import ROWS
from pallas_kernels.tile_scores.sm90.instructions import Instructions


class Emulation(Instructions):
    """The methods of `Instructions` for the CPU."""

    uses_named_barriers = False

    def logits(self, q_rows, k_block, *, after_issue):
        """Returns q @ k.T."""
        after_issue()
        return jnp.dot(q_rows[...], k_block[...].T, preferred_element_type=jnp.float32)

    def finish_reads(self):
        """Orders a product's ordinary reads before the copies that follow."""
        plgpu.commit_smem()

    def thread_maxima(self, logits):
        """Finds the largest of each row."""
        return logits.max(axis=1)

    def maximum_of_row(self, maxima):
        """Returns the maxima, which are those of whole rows here."""
        return maxima

    def sum_of_row(self, sums):
        """Returns the sums, which are those of whole rows here."""
        return sums

    def any_of_warp(self, rows):
        """Says whether any row of the warpgroup is true."""
        return jnp.any(rows).astype(jnp.int32)

    def tile_sums(self, weights, per_tile):
        """Sums each row over the columns of each key tile, and rounds to bfloat16."""
        by_key = rearrange(weights, "r (b a c) -> r (a b c)", a=4, c=2)
        sums = by_key.reshape(ROWS, -1, per_tile).sum(-1)
        return lax.reduce_precision(sums, exponent_bits=8, mantissa_bits=7)

    def row_sums(self, sums):
        """Sums each row."""
        return sums.sum(axis=1)

    def times_rows(self, sums, factors):
        """Multiplies each row."""
        return sums * factors[:, None]

    def keep(self, memory, block, sums):
        """Writes sums of a block in bfloat16."""
        memory[block, :] = sums.astype(jnp.bfloat16).reshape(-1)

    def kept(self, memory, block, per_tile):
        """Reads sums of a block back."""
        del per_tile
        return memory[block, :]

    def unpacked(self, kept):
        """Returns sums that were read."""
        return kept.astype(jnp.float32).reshape(ROWS, -1)

    def store_scores(
        self, sums, scores, first_row, first_column, *, per_tile, num_tiles
    ):
        """Sums over the rows of each query tile and stores what is within the map."""
        by_part = rearrange(sums, "(w e h) t -> (w h e) t", e=2, h=8)
        sums = by_part.reshape(-1, per_tile, by_part.shape[1]).sum(1)
        rows, columns = sums.shape

        def store_row(i, _):
            row = first_row + i

            def store(count: int) -> None:
                places = pl.ds(row * num_tiles + first_column, count)
                scores[places] = sums[i, :count]

            is_inside = row < num_tiles
            is_whole = first_column + columns <= num_tiles
            pl.when(is_inside & is_whole)(lambda: store(columns))
            if rest := num_tiles % columns:
                is_last = first_column == num_tiles - rest
                pl.when(is_inside & is_last)(lambda: store(rest))
            return ()

        lax.fori_loop(0, rows, store_row, ())
