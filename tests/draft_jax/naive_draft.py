"""The method in NumPy loops: slow, obvious, and sharing nothing with the package."""

import itertools
import math
from fractions import Fraction

import numpy as np


def tile_members(frames, height, width, tile):
    """Raster positions of each tile's visual tokens, by walking over the tiles."""
    members = []
    for frame in range(frames):
        for top in range(0, height, tile[0]):
            for left in range(0, width, tile[1]):
                members.append(
                    [
                        (frame * height + row) * width + column
                        for row in range(top, min(top + tile[0], height))
                        for column in range(left, min(left + tile[1], width))
                    ]
                )
    return members


def block_members(grid):
    """Raster positions of each block's tokens, text blocks included."""
    visual = tile_members(grid.frames, grid.height, grid.width, grid.tile)
    before = grid.text_side == "before"
    shift = grid.text_length if before else 0
    visual = [[token + shift for token in tile] for tile in visual]
    first_text = 0 if before else grid.frames * grid.height * grid.width
    size = grid.tile[0] * grid.tile[1]
    text = list(range(first_text, first_text + grid.text_length))
    text = [list(chunk) for chunk in itertools.batched(text, size)]
    return text + visual if before else visual + text


def pool(x, grid, reduction=np.mean):
    """x [B, T, N, D] of visual tokens in raster order -> [B, S, N, D]."""
    members = tile_members(grid.frames, grid.height, grid.width, grid.tile)
    return np.stack([reduction(x[:, tile], axis=1) for tile in members], axis=1)


def draft_map(q, k, grid, reduction=np.mean, weights_by_tokens=True, scale=None):
    """q, k [B, T, N, D] of visual tokens in raster order -> [B, N, S, S].

    A key tile stands for as many keys as it has tokens, or for one if not by tokens.
    """
    q, k = q.astype(np.float64), k.astype(np.float64)
    lengths = [
        len(tile) if weights_by_tokens else 1
        for tile in tile_members(grid.frames, grid.height, grid.width, grid.tile)
    ]
    draft_q, draft_k = pool(q, grid, reduction), pool(k, grid, reduction)
    batch, num_tiles, heads, dim = draft_q.shape
    scale = 1 / math.sqrt(dim) if scale is None else scale
    out = np.zeros((batch, heads, num_tiles, num_tiles))
    for b, n, i in np.ndindex(batch, heads, num_tiles):
        logits = [draft_q[b, i, n] @ draft_k[b, j, n] * scale for j in range(num_tiles)]
        weights = np.exp(np.array(logits) - max(logits)) * lengths
        out[b, n, i] = weights / weights.sum()
    return out


def select_percentile(scores, budget, forced=None):
    """The best `budget` pairs of one head's [S, S], then one for each empty row."""
    size = len(scores)
    kept = np.zeros_like(scores, bool) if forced is None else forced.copy()
    ranking = sorted(
        (-float(scores[i, j]), i, j) for i in range(size) for j in range(size)
    )
    for _, i, j in ranking:
        if kept.sum() < budget:
            kept[i, j] = True
    for i in range(size):
        if not kept[i].any():
            kept[i, int(np.argmax(scores[i]))] = True
    return kept


def select_row_topk(scores, budget, forced=None):
    kept = np.zeros_like(scores, bool) if forced is None else forced.copy()
    for i, row in enumerate(scores):
        for _, j in sorted((-float(value), j) for j, value in enumerate(row)):
            if kept[i].sum() < budget:
                kept[i, j] = True
    return kept


def select_top_p(scores, budget, mass, forced=None):
    kept = np.zeros_like(scores, bool) if forced is None else forced.copy()
    for i, row in enumerate(scores):
        for _, j in sorted((-float(value), j) for j, value in enumerate(row)):
            if kept[i].sum() < budget and row[kept[i]].sum() < mass:
                kept[i, j] = True
    return kept


def token_mask(kept, grid):
    """[R, R] kept block pairs -> [T, T] kept token pairs in raster order."""
    members = block_members(grid)
    out = np.zeros((grid.num_tokens, grid.num_tokens), bool)
    for i, j in zip(*np.nonzero(kept), strict=True):
        out[np.ix_(members[i], members[j])] = True
    return out


def attention(q, k, v, kept, grid, text_lengths=None, scale=None):
    """q, k, v [B, T, N, D] raster, kept [B, N, R, R] -> [B, T, N, D] in float64."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    out = np.zeros_like(q)
    for b, n in np.ndindex(q.shape[0], q.shape[2]):
        allowed = token_mask(kept[b, n], grid)
        if text_lengths is not None:
            padding = slice(
                grid.text_tokens.start + int(text_lengths[b]), grid.text_tokens.stop
            )
            allowed[:, padding] = False
            allowed[padding] = False
        logits = np.where(allowed, q[b, :, n] @ k[b, :, n].T * scale, -np.inf)
        for row in range(len(logits)):
            if allowed[row].any():
                weights = np.exp(logits[row] - logits[row].max())
                out[b, row, n] = weights @ v[b, :, n] / weights.sum()
    return out


def add_text(kept, grid):
    """[..., S, S] -> [..., R, R], text pairs kept."""
    out = np.ones((*kept.shape[:-2], grid.num_blocks, grid.num_blocks), bool)
    out[..., grid.visual_blocks, grid.visual_blocks] = kept
    return out


def percentile_mask(q, k, grid, sparsity, scale=None):
    """The paper's mask of the whole sequence: q, k [B, T, N, D] -> [B, N, R, R]."""
    visual = grid.visual_tokens
    scores = draft_map(q[:, visual], k[:, visual], grid, scale=scale)
    pairs = Fraction(1) - Fraction(str(sparsity))
    budget = math.ceil(pairs * scores.shape[-1] ** 2)
    kept = [[select_percentile(s, budget) for s in item] for item in scores]
    return add_text(np.array(kept), grid)


def cell_members(grid, sub_tile, frames=1):
    """Raster positions of each sub-tile's visual tokens over each group of frames."""
    cells = []
    for group in itertools.batched(range(grid.frames), frames):
        for top in range(0, grid.height, grid.tile[0]):
            for left in range(0, grid.width, grid.tile[1]):
                bottom = min(top + grid.tile[0], grid.height)
                right = min(left + grid.tile[1], grid.width)
                for y in range(top, top + grid.tile[0], sub_tile[0]):
                    for x in range(left, left + grid.tile[1], sub_tile[1]):
                        cells.append(
                            [
                                (frame * grid.height + row) * grid.width + column
                                for frame in group
                                for row in range(y, min(y + sub_tile[0], bottom))
                                for column in range(x, min(x + sub_tile[1], right))
                            ]
                        )
    return cells


def mean_of(x, tokens):
    """x [T, D] -> [D]; 0 of no tokens."""
    return x[tokens].mean(0) if tokens else np.zeros(x.shape[1:])


def sub_tile_map(q, k, grid, sub_tile, *, weights_by_tokens=True):
    """q, k [V, D] of one head in raster order -> [S, S]."""
    q, k = q.astype(np.float64), k.astype(np.float64)
    cells, num_tiles = cell_members(grid, sub_tile), grid.num_visual_blocks
    parts = len(cells) // num_tiles
    counts = np.array([len(cell) for cell in cells])
    weights = counts if weights_by_tokens else np.sign(counts)
    out = np.zeros((num_tiles, num_tiles))
    for i, cell in enumerate(cells):
        logits = np.array([mean_of(q, cell) @ mean_of(k, other) for other in cells])
        masses = weights * np.exp(logits / math.sqrt(q.shape[-1]))
        tile = i // parts
        share = counts[i] / counts[tile * parts : (tile + 1) * parts].sum()
        by_tile = [masses[j * parts : (j + 1) * parts].sum() for j in range(num_tiles)]
        out[tile] += share * np.array(by_tile) / masses.sum()
    return out


def spread(q, k, grid, sub_tile, frames, *, exact):
    """Root mean square of q . (k - mean of k): q, k [V, D] of one head -> [S, S]."""
    q, k = q.astype(np.float64), k.astype(np.float64)
    tiles = tile_members(grid.frames, grid.height, grid.width, grid.tile)
    rest = k.copy()
    for cell in cell_members(grid, sub_tile, frames):
        rest[cell] -= mean_of(k, cell)
    out = np.zeros((len(tiles), len(tiles)))
    for i, j in np.ndindex(out.shape):
        query, own = mean_of(q, tiles[i]), rest[tiles[j]]
        squares = (own @ query) ** 2 if exact else (own**2) @ (query**2)
        out[i, j] = math.sqrt(squares.mean())
    return out


def compensated_attention(q, k, v, kept, grid, sub_tile, frames, text_lengths=None):
    """`attention` with means for what is not kept: q, k, v [B, T, N, D] raster."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    shift = grid.visual_tokens.start
    cells = [
        [shift + token for token in cell]
        for cell in cell_members(grid, sub_tile, frames)
    ]
    out = np.zeros_like(q)
    for b, n in np.ndindex(q.shape[0], q.shape[2]):
        allowed = token_mask(kept[b, n], grid)
        skipped = ~allowed
        if text_lengths is not None:
            start = grid.text_tokens.start + int(text_lengths[b])
            allowed[:, start : grid.text_tokens.stop] = False
            allowed[start : grid.text_tokens.stop] = False
        for t in np.flatnonzero(allowed.any(-1)):
            keys, values = [*k[b, allowed[t], n]], [*v[b, allowed[t], n]]
            counts = [1.0] * len(keys)
            for cell in cells:
                if count := skipped[t, cell].sum():
                    keys.append(mean_of(k[b, :, n], cell))
                    values.append(mean_of(v[b, :, n], cell))
                    counts.append(count)
            logits = np.stack(keys) @ q[b, t, n] / math.sqrt(q.shape[-1])
            weights = np.exp(logits - logits.max()) * counts
            out[b, t, n] = weights @ np.stack(values) / weights.sum()
    return out
