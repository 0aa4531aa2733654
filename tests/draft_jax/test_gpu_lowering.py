"""Attention as a Hopper GPU would run it: every grid has a program, without a GPU."""

import sys
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from draft_jax import DraftConfig, VideoGrid, draft_attention
from pallas_kernels.common.device import Device
from tests.cases import mostly_nightly

HOPPER = Device(platform="gpu", kind="H100", compute_capability=(9, 0))
# Copies for products come in eight tokens: sizes that are whole eights, and others, in
# the video, in the text or in both.
GRIDS = {
    "whole tiles": VideoGrid(9, 16, 32),
    "text of ten": VideoGrid(9, 16, 32, text_length=10),
    "edge tiles": VideoGrid(7, 17, 31),
    "edge tiles and text": VideoGrid(8, 20, 33, text_length=13),
}


@pytest.fixture
def hopper(monkeypatch):
    """Every module of the library is told of a Hopper GPU, with no cuDNN to ask."""
    answers = {"current_device": HOPPER, "why_no_cudnn": "a machine without a GPU"}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] not in ("draft_jax", "pallas_kernels"):
            continue
        for function, answer in answers.items():
            if hasattr(module, function):
                known = mock.Mock(return_value=answer)
                monkeypatch.setattr(module, function, known)


@pytest.mark.filterwarnings("ignore::pallas_kernels.SlowBackendWarning")
@pytest.mark.parametrize("order", ["tiled", "raster"])
@pytest.mark.parametrize("name", mostly_nightly(GRIDS, ["edge tiles and text"]))
def test_default_attention_lowers(name, order, hopper):
    grid = GRIDS[name]
    x = jax.ShapeDtypeStruct((1, grid.num_tokens, 2, 128), jnp.bfloat16)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)

    def attend(q, k, v, lengths):
        return draft_attention(
            q,
            k,
            v,
            grid=grid,
            config=DraftConfig(sparsity=0.9),
            text_lengths=lengths if grid.text_length else None,
            order=order,
        )

    traced = jax.jit(attend).trace(x, x, x, lengths)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "block_sparse_attention_sm90" in text
