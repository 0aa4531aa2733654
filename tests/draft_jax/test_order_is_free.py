"""On a Hopper GPU a layer moves nothing as large as Q: seen without one, by lowering.

On a CPU attention itself gathers blocks of keys, so programs for it say nothing of
order. What XLA makes of these programs is in the results of `benchmarks/layer/run.py`.
"""

import functools
import math
import re

import jax
import numpy as np
import pytest

from draft_jax import (
    DraftConfig,
    DraftStep,
    VideoGrid,
    draft_attention,
    initial_mask,
    scheduled_attention,
)
from pallas_kernels.common import device as device_module
from pallas_kernels.common.device import Device

H100 = Device(platform="gpu", kind="NVIDIA H100", compute_capability=(9, 0))
DIVISIBLE = VideoGrid(5, 48, 80)
EDGES = VideoGrid(5, 45, 80, text_length=72)
NARROW = VideoGrid(5, 30, 52, text_length=72)  # rows are no whole number of tiles
ODD = VideoGrid(5, 30, 53, text_length=77)
CONFIG = DraftConfig.paper(sparsity=0.75, pooling="mean+max")
STAYS_IN_PLACE = {"custom_call", "reshape"}  # the former are kernels
OF_A_NEW_MASK = (
    "pool_tiles_sm90",
    "count_digits_sm90",
    "pack_rows_sm90",
    "dot_general",
)


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch):
    monkeypatch.setattr(device_module, "describe_device", lambda device: H100)


def lower(layer, grid, *more):
    """StableHLO of a layer, and how many numbers Q has."""
    q = jax.ShapeDtypeStruct((1, grid.num_tokens, 2, 128), "bfloat16")
    lowered = jax.jit(layer).trace(q, q, q, *more).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert "block_sparse_attention_sm90" in text
    return text, math.prod(q.shape)


def large_moves(text, num_elements):
    """Operations whose results are as large as Q and may lie elsewhere."""
    found = set()
    for line in text.splitlines():
        operation = re.search(r"stablehlo\.(\w+)", line)
        shapes = re.findall(r"tensor<([\dx]+)x\w+>", line)
        if operation is None or not shapes:
            continue
        if math.prod(int(n) for n in shapes[-1].split("x")) >= num_elements:
            found.add(operation[1])
    return found - STAYS_IN_PLACE


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("grid", "order"),
    [
        (EDGES, "raster"),
        *(
            pytest.param(*rest, marks=pytest.mark.nightly)
            for rest in (
                (DIVISIBLE, "tiled"),
                (EDGES, "tiled"),
                (ODD, "tiled"),
                (NARROW, "tiled"),
                (DIVISIBLE, "raster"),
                (NARROW, "raster"),
                (ODD, "raster"),
            )
        ),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*row by row")
def test_nothing_large_is_moved(grid, order):
    layer = functools.partial(draft_attention, grid=grid, config=CONFIG, order=order)
    text, size = lower(layer, grid)
    assert large_moves(text, size) == set()
    assert all(name in text for name in OF_A_NEW_MASK)


@pytest.mark.nightly
@pytest.mark.parametrize("order", ["raster", "tiled"])
def test_nothing_large_is_moved_for_means(order):
    """A correction multiplies all queries and is no part of this."""
    config = DraftConfig.compensated(correction=None)
    layer = functools.partial(
        draft_attention, grid=DIVISIBLE, config=config, order=order
    )
    text, size = lower(layer, DIVISIBLE)
    assert large_moves(text, size) == set()
    assert all(f"{name}_sm90" in text for name in ("pool_video", "tile_scores"))
    assert "pool_tiles_sm90" not in text, "q, k or v is read twice"


@pytest.mark.nightly
def test_a_move_is_seen():
    """So that the test above can fail."""

    def layer(q, k, v):
        q = q[:, EDGES.tile_order]
        return draft_attention(q, k, v, grid=EDGES, config=CONFIG, order="tiled")

    text, size = lower(layer, EDGES)
    assert large_moves(text, size) == {"gather"}


def test_a_known_step_that_reuses_its_mask_has_one_kernel():
    """And what prepares its lists: nothing of the draft or the selection."""
    step = DraftStep(
        dense=np.asarray(False), budget=np.asarray(1), refresh=np.asarray(False)
    )
    mask = jax.eval_shape(lambda: initial_mask(EDGES, CONFIG, batch=1, num_heads=2))

    def layer(q, k, v, mask):
        return scheduled_attention(
            q, k, v, grid=EDGES, config=CONFIG, step=step, mask=mask, order="tiled"
        )[0]

    text, size = lower(layer, EDGES, mask)
    assert large_moves(text, size) == set()
    assert not [name for name in OF_A_NEW_MASK if name in text]
    assert "stablehlo.case" not in text
    assert "stablehlo.if" not in text
