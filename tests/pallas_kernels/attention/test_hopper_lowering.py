"""The Hopper kernel lowers for CUDA without a GPU: every shape and configuration.

Interpret mode replaces the matrix products and the named barriers; here they are
lowered through Mosaic GPU, layout inference included.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from draft_jax.block_mask import BlockMask
from draft_jax.grid import VideoGrid
from pallas_kernels.attention.sm90 import backend as hopper
from pallas_kernels.attention.sm90.plan import MAX_SMEM_BYTES, KernelConfig, smem_bytes
from tests.cases import mostly_nightly

HUNYUAN = VideoGrid(33, 48, 80)
EDGES = VideoGrid(33, 45, 80, text_length=256)
CASES = {  # grid, has text_lengths, head_dim, dtype, order
    "divisible": (HUNYUAN, False, 128, "bfloat16"),
    "boxes": (VideoGrid(33, 45, 80), False, 128, "bfloat16", "raster"),
    "raster": (EDGES, False, 128, "bfloat16", "raster"),
    "raster-by-rows": (VideoGrid(2, 30, 52), False, 128, "bfloat16", "raster"),
    "head-dim-64": (HUNYUAN, False, 64, "float16"),
    "edges": (EDGES, False, 128, "bfloat16"),
    "edges-and-lengths": (EDGES, True, 64, "bfloat16"),
    "not-aligned": (VideoGrid(2, 15, 26, text_length=13), True, 128, "float16"),
}
CONFIGS = {
    "default": {},
    "exact-softmax": {"exact_softmax": True},
    "four-slots": {"num_slots": 4},
    "sums-last": {"sums_last": True},
}


def lower(grid, has_lengths, head_dim, dtype, order="tiled", *, config=None):
    """The program for batch 2 and 3 heads, from shapes alone."""
    q = jax.ShapeDtypeStruct((2, grid.num_tokens, 3, head_dim), dtype)
    mask = jax.eval_shape(lambda: BlockMask.full(grid=grid, batch=2, num_heads=3))
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32)

    @jax.jit
    def run(q, k, v, mask, lengths):
        return hopper.hopper_attention(
            q,
            k,
            v,
            mask,
            grid=grid,
            scale=head_dim**-0.5,
            text_lengths=lengths if has_lengths else None,
            order=order,
            config=config,
        )

    return run.trace(q, q, q, mask, lengths).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(
    "case",
    mostly_nightly(CASES, ("raster", "raster-by-rows", "edges")),
)
def test_every_shape_lowers(case):
    assert "mosaic_gpu" in lower(*CASES[case]).as_text()


@pytest.mark.parametrize("name", mostly_nightly(CONFIGS, ("default",)))
def test_every_configuration_lowers(name):
    config = dataclasses.replace(KernelConfig.for_head_dim(128), **CONFIGS[name])
    assert "mosaic_gpu" in lower(*CASES["divisible"], config=config).as_text()


@pytest.mark.parametrize("head_dim", [64, 128])
def test_default_configuration_fits_shared_memory(head_dim):
    config = KernelConfig.for_head_dim(head_dim)
    assert smem_bytes(config, head_dim, itemsize=2) <= MAX_SMEM_BYTES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_slots": 2}, "num_slots=2 must be at least 3"),
        ({"num_slots": 10}, "must be at most 9 with named"),
    ],
    ids=["too-few-slots", "too-many-named-barriers"],
)
def test_bad_configuration_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        KernelConfig(**options)


def test_unsupported_inputs_are_named():
    with pytest.raises(ValueError, match="bfloat16 and float16, not float32"):
        lower(HUNYUAN, False, 128, "float32")
    too_many = KernelConfig(num_slots=7)
    with pytest.raises(
        ValueError, match=r"num_slots=7 needs .* bytes of shared memory"
    ):
        lower(HUNYUAN, False, 128, "bfloat16", config=too_many)
