"""What the published code computes for HunyuanVideo and HunyuanCustom, in loops.

Rules of shawnricecake/draft-attention (commit f3c81d5), of `attenion.py` and
`draft_attention_classifier_free_guidance.py`, for sizes that the tile divides. Samples
stand one after another in one sequence; each has two segments, of the video with its
valid text and of the padding. NumPy in float64; it shares nothing with the package.
"""

import dataclasses
import itertools
import math

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of each sample: the video, a reference frame included, and then text."""

    frames: int
    rows: int
    columns: int
    tile: tuple[int, int]
    text: int

    @property
    def visual(self):
        return self.frames * self.rows * self.columns

    @property
    def sample(self):
        return self.visual + self.text

    @property
    def block(self):
        return self.tile[0] * self.tile[1]

    @property
    def num_blocks(self):
        return math.ceil(self.sample / self.block)


def reorder(sizes, batch=1):
    """Old position of each token of the sequence that the kernel is given.

    Bands of as many rows as a tile has, then tiles from left to right, then the rows
    of the tile. Text stays behind the video of its sample.
    """
    tile_rows, tile_columns = sizes.tile
    old = []
    for sample in range(batch):
        start = sample * sizes.sample
        for band in range(sizes.frames * sizes.rows // tile_rows):
            for left in range(0, sizes.columns, tile_columns):
                for row in range(band * tile_rows, (band + 1) * tile_rows):
                    for column in range(left, left + tile_columns):
                        old.append(start + row * sizes.columns + column)
        old += range(start + sizes.visual, start + sizes.sample)
    return old


def segments(sizes, valid):
    """Starts of the segments, and the end: two segments for each sample."""
    starts = [0]
    for sample, count in enumerate(valid):
        starts.append(sample * sizes.sample + sizes.visual + int(count))
        starts.append((sample + 1) * sizes.sample)
    return starts


def draft_map(q, k, sizes):
    """q, k [visual, N, D] of one sample in raster order -> [N, S, S]."""
    pooled_q, pooled_k = (average_pool(x, sizes) for x in (q, k))
    num_tiles, heads, dim = pooled_q.shape
    out = np.zeros((heads, num_tiles, num_tiles))
    for n, i in np.ndindex(heads, num_tiles):
        logits = np.array([pooled_q[i, n] @ key for key in pooled_k[:, n]])
        weights = np.exp((logits - logits.max()) / math.sqrt(dim))
        out[n, i] = weights / weights.sum()
    return out


def average_pool(x, sizes):
    """x [visual, N, D] -> [S, N, D]; tiles of a frame row by row."""
    (tile_rows, tile_columns), pooled = sizes.tile, []
    for frame in range(sizes.frames):
        for top in range(0, sizes.rows, tile_rows):
            for left in range(0, sizes.columns, tile_columns):
                total = np.zeros(x.shape[1:])
                for row in range(top, top + tile_rows):
                    for column in range(left, left + tile_columns):
                        total += x[(frame * sizes.rows + row) * sizes.columns + column]
                pooled.append(total / sizes.block)
    return np.stack(pooled)


def num_dropped(num_pairs, sparsity):
    """The smallest scores that set the threshold; the share goes through floats."""
    kept_share = 1 - sparsity
    return int((1.0 - kept_share) * num_pairs)


def num_kept(num_pairs, sparsity):
    """Pairs at or above the threshold, which is the largest of the dropped scores."""
    return num_pairs - num_dropped(num_pairs, sparsity) + 1


def exact_sparsity(num_pairs, sparsity):
    """The share to skip that keeps `num_kept` pairs where a share is rounded down."""
    return 1 - (num_kept(num_pairs, sparsity) - 0.5) / num_pairs


def keep_above_threshold(scores, sparsity):
    """[N, S, S] -> bool: every score as large as the largest one to drop."""
    kept = np.zeros_like(scores, bool)
    for head, own in enumerate(scores):
        ascending = sorted(own.ravel())
        threshold = ascending[num_dropped(own.size, sparsity) - 1]
        kept[head] = own >= threshold
    return kept


def block_masks(q, k, sizes, sparsity):
    """q, k [B, T, N, D] -> [segments, N, blocks, blocks], and the maps [B, N, S, S].

    All true, but for the pairs of two visual blocks. The second segment of a sample
    has its video's map as well, though it has no video.
    """
    batch, _, heads, _ = q.shape
    masks = np.ones((2 * batch, heads, sizes.num_blocks, sizes.num_blocks), bool)
    maps = []
    for sample in range(batch):
        visual = q[sample, : sizes.visual], k[sample, : sizes.visual]
        maps.append(draft_map(*visual, sizes))
        kept = keep_above_threshold(maps[-1], sparsity)
        for segment in (2 * sample, 2 * sample + 1):
            for n, i, j in np.ndindex(kept.shape):
                masks[segment, n, i, j] = kept[n, i, j]
    return masks, np.stack(maps)


def best_of_empty_rows(masks, maps):
    """The best pair of each row of visual tiles that has none; see differences.md."""
    num_tiles = maps.shape[-1]
    best = np.zeros_like(masks)
    for b, n, row in np.ndindex(maps.shape[:3]):
        if not masks[b, n, row, :num_tiles].any():
            best[b, n, row, np.argmax(maps[b, n, row])] = True
    return best


def attention(q, k, v, masks, sizes, valid):
    """q, k, v [B, T, N, D] in raster order -> [B, T, N, D]; masks None is dense."""
    batch, length, heads, dim = q.shape
    old = reorder(sizes, batch)
    q, k, v = (x.reshape(-1, heads, dim)[old].astype(np.float64) for x in (q, k, v))
    out = np.full(q.shape, np.nan)
    starts = segments(sizes, valid)
    for segment, (start, stop) in enumerate(itertools.pairwise(starts)):
        for n in range(heads):
            for query in range(stop - start):
                keys = [
                    start + key
                    for key in range(stop - start)
                    if masks is None
                    or masks[segment, n, query // sizes.block, key // sizes.block]
                ]
                logits = k[keys, n] @ q[start + query, n] / math.sqrt(dim)
                weights = np.exp(logits - logits.max())
                out[start + query, n] = weights @ v[keys, n] / weights.sum()
    restored = np.zeros_like(out)
    for new, position in enumerate(old):
        restored[position] = out[new]
    return restored.reshape(batch, length, heads, dim)
