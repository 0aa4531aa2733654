"""Means of keys and values that stand for the key blocks a query block skips.

A mean counts as the tokens it stands for: its logit gets the logarithm of their number,
in the same softmax as the kept keys. All query blocks see all means, so this is dense
attention to few keys; it runs on a few query blocks at a time.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, UInt8

from pallas_kernels.attention.pair_sums import dot
from pallas_kernels.common.sub_tiles import SubTiles

# Bytes of the float32 logits of the query blocks that are computed together.
MAX_CHUNK_BYTES = 2**26


class Means(NamedTuple):
    """Keys and values that stand for skipped blocks, and how many of them.

    Mean `m` of column `c = m // J` counts in query block `r` as
    `sub_tiles.tokens_per_frame[m] * dropped[b, n, r, c]` tokens; as none where that is
    0. The rows of text blocks are 0: text keeps everything.

    Attributes:
      k: Mean keys of the cells of `sub_tiles`, in the dtype of the keys.
      v: Mean values, like k.
      dropped: Frames of column `c`'s group whose tile query block `r` skips, uint8.
      sub_tiles: What each mean is taken over. Static: a pytree without leaves.
    """

    k: Float[Array, "B M N D"]
    v: Float[Array, "B M N D"]
    dropped: UInt8[Array, "B N R C"]
    sub_tiles: SubTiles


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MeansByHead:
    """Means as walks over query blocks read them, H = B * N heads."""

    k: Float[Array, "H M D"]
    v: Float[Array, "H M D"]
    dropped: UInt8[Array, "H R C"]
    tokens_per_frame: np.ndarray

    @classmethod
    def of(cls, means: Means, *, upcast: bool) -> "MeansByHead":
        """Sorts means by head, in float32 if `upcast`."""
        return cls(
            k=by_head(means.k, upcast=upcast),
            v=by_head(means.v, upcast=upcast),
            dropped=rearrange(means.dropped, "B N R C -> (B N) R C"),
            tokens_per_frame=means.sub_tiles.tokens_per_frame,
        )

    def log_counts(self, dropped: UInt8[Array, "H G C"]) -> Float[Array, "H G 1 M"]:
        """Returns the logarithm of the tokens of each mean; minus infinity for none."""
        columns = dropped.shape[-1]
        tokens = self.tokens_per_frame.reshape(columns, -1).astype(np.float32)
        counts = dropped.astype(jnp.float32)[..., None] * tokens
        counts = counts.reshape(*dropped.shape[:2], 1, -1)
        return jnp.where(counts > 0, jnp.log(jnp.maximum(counts, 1)), -jnp.inf)

    def map_rows(
        self,
        function: Callable[..., tuple[Array, ...]],
        *rows: Float[Array, "L P ..."],
        num_maps: int = 1,
    ) -> tuple[Array, ...]:
        """Applies a function to a few query blocks of all heads at a time.

        Args:
          function: Takes arrays [H, G, P, ...] of G query blocks, and their rows of
            `dropped`; returns arrays that begin with the same three axes.
          *rows: Arrays of all query blocks, L = H * R.
          num_maps: How many arrays as large as the logits it holds at once.

        Returns:
          The results of all query blocks [L, P, ...].
        """
        heads, num_rows, _ = self.dropped.shape
        logits = num_maps * heads * rows[0].shape[1] * self.k.shape[1] * 4
        chunk = min(num_rows, max(1, MAX_CHUNK_BYTES // logits))
        padding = -num_rows % chunk  # rows that drop nothing

        def split(x):
            x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
            x = x.reshape(heads, -1, chunk, *x.shape[2:])
            return x.swapaxes(0, 1)

        def join(x):
            x = x.swapaxes(0, 1).reshape(heads, num_rows + padding, *x.shape[3:])
            return x[:, :num_rows].reshape(heads * num_rows, *x.shape[2:])

        arrays = [x.reshape(heads, num_rows, *x.shape[1:]) for x in rows]
        chunks = tuple(map(split, (*arrays, self.dropped)))
        # Gradients compute a chunk's logits again rather than keep those of all.
        results = jax.lax.map(jax.checkpoint(lambda own: function(*own)), chunks)
        return tuple(map(join, results))


def by_head(x: Float[Array, "B M N D"], *, upcast: bool) -> Float[Array, "H M D"]:
    """Moves heads beside the batch, in float32 if `upcast`."""
    return rearrange(x.astype(jnp.float32) if upcast else x, "B M N D -> (B N) M D")


def start_softmax(
    q: Float[Array, "L P D"], means: MeansByHead, *, scale: float
) -> tuple[Float[Array, "L P"], Float[Array, "L P"], Float[Array, "L P D"]]:
    """Returns a running softmax that has met the means: maximum, sum, weighted values.

    Args:
      q: Queries, cut into blocks; padding is finite.
      means: What stands for the blocks that each query block skips.
      scale: Factor on the logits.
    """

    def start(q, dropped):
        logits = scale * dot("hgpd,hmd->hgpm", q, means.k) + means.log_counts(dropped)
        maximum = logits.max(-1)
        weights = jnp.exp(logits - _finite(maximum)[..., None])
        weighted = dot("hgpm,hmd->hgpd", weights.astype(means.v.dtype), means.v)
        return maximum, weights.sum(-1), weighted

    return means.map_rows(start, q)  # type: ignore[return-value]


def _finite(maximum: Array) -> Array:
    """Replaces the maximum of a row without means, which must not give -inf - -inf."""
    return jnp.where(maximum == -jnp.inf, 0.0, maximum)


def added_tangents(
    q: Float[Array, "L P D"],
    out: Float[Array, "L P D"],
    lse: Float[Array, "L P"],
    means: MeansByHead,
    *,
    d_q: Float[Array, "L P D"] | None,
    d_k: Float[Array, "H M D"] | None,
    d_v: Float[Array, "H M D"] | None,
    scale: float,
) -> tuple[Float[Array, "L P D"], Float[Array, "L P"]]:
    """Returns what means add to the tangents of the output and the log-sum-exp.

    Tangents are sums over all keys, so those of kept keys are added to these. With ds
    the tangents of the logits and p the probabilities, d_lse = sum(p * ds), and
    d_out = sum(p * (ds * v + dv)) - out * d_lse.

    Args:
      q: Queries, cut into blocks; padding is finite.
      out: The output of the whole attention.
      lse: Its log-sum-exp, finite.
      means: What stands for the blocks that each query block skips.
      d_q: Tangent of q, or None for zero.
      d_k: Tangent of the mean keys, by head.
      d_v: Tangent of the mean values, by head.
      scale: Factor on the logits.
    """
    keys, values = (x.astype(jnp.float32) for x in (means.k, means.v))

    def move(q, out, lse, *rest):
        *moved, dropped = rest
        q, out = (x.astype(jnp.float32) for x in (q, out))
        logits = scale * dot("hgpd,hmd->hgpm", q, keys) + means.log_counts(dropped)
        weights = jnp.exp(logits - lse[..., None])
        d_logits, d_out = jnp.zeros_like(weights), jnp.zeros_like(out)
        if moved:
            d_logits += dot("hgpd,hmd->hgpm", moved[0].astype(jnp.float32), keys)
        if d_k is not None:
            d_logits += dot("hgpd,hmd->hgpm", q, d_k.astype(jnp.float32))
        if d_v is not None:
            d_out += dot("hgpm,hmd->hgpd", weights, d_v.astype(jnp.float32))
        weighted = weights * (scale * d_logits)
        d_lse = weighted.sum(-1)
        d_out += dot("hgpm,hmd->hgpd", weighted, values) - out * d_lse[..., None]
        # Rows of text see no mean; their cotangents may be NaN and must be dropped.
        has_means = (dropped > 0).any(-1)[..., None]
        d_out = jnp.where(has_means[..., None], d_out, 0.0)
        return d_out, jnp.where(has_means, d_lse, 0.0)

    moved = () if d_q is None else (d_q,)
    results = means.map_rows(move, q, out, lse, *moved, num_maps=2)
    return results  # type: ignore[return-value]
