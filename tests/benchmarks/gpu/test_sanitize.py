"""Parts of `benchmarks.gpu.sanitize` are what they are named for."""

import collections
import math

import numpy as np
import pytest

from benchmarks.gpu.sanitize import PARTS, Attention
from pallas_kernels.attention.sm90.copies import Boxes, SingleRows
from pallas_kernels.attention.sm90.geometry import geometry_of
from pallas_kernels.attention.sm90.softmax import GROWTH, MOST_SUM

ATTENTION = {name: part for name, part in PARTS.items() if isinstance(part, Attention)}


def test_places_of_blocks():
    places = {n: geometry_of(part.grid, part.order) for n, part in ATTENTION.items()}
    named = collections.defaultdict(set)
    for name, own in places.items():
        named[type(own.copies)].add(name)
    assert named[SingleRows] == {"by-rows", "by-rows-raster", "means-by-rows"}
    assert named[Boxes] == {"boxes", "means-boxes"}
    assert {len(own.widths) for own in places.values()} == {1, 2, 3}


@pytest.mark.parametrize("name", [n for n, part in ATTENTION.items() if part.growth])
def test_logits_that_grow(name):
    """Above the sum that a row may have, or, in float16, above a step's growth."""
    part = ATTENTION[name]
    q, k, _ = (np.asarray(x, np.float64) for x in part.qkv())
    assert np.isfinite(k).all()
    logits = np.einsum("btnd,bsnd->bnts", q, k) * part.head_dim**-0.5
    starts = part.grid.block_starts
    growth = np.diff(np.maximum.reduceat(logits, starts, axis=-1), axis=-1)
    if name.startswith("repair"):
        assert growth.sum(-1).min() > math.log(MOST_SUM)
    else:
        assert growth.min() > GROWTH * math.log(2)
