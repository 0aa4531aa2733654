"""Dense attention with the Hopper kernel: interpret mode, lowering, and when it runs.

Its GPU tests are in tests/gpu.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from draft_jax.grid import VideoGrid
from pallas_kernels.attention.sm90 import dense_backend as hopper_dense
from pallas_kernels.common.device import Device
from tests.cases import mostly_nightly
from tests.pallas_kernels.attention.reference import (
    attention_of_rows,
    numpy_attention,
    random_qkv,
)
from tests.tolerances import ATTENTION

HOPPER = Device(platform="gpu", kind="NVIDIA H100", compute_capability=(9, 0))


@pytest.mark.usefixtures("no_races")
@pytest.mark.parametrize(
    "lengths", [pytest.param(None, marks=pytest.mark.nightly), (176, 130)], ids=str
)
def test_interpreted_matches_numpy(lengths):
    """176 tokens: a full block and one of 48; with lengths, rows are cut."""
    grid = VideoGrid(1, 8, 6, tile=(8, 16), text_length=128)
    sizes = {"batch": 2, "num_heads": 1, "head_dim": 64, "dtype": "bfloat16"}
    q, k, v = random_qkv(grid, **sizes)
    out = hopper_dense.hopper_dense_attention(
        q,
        k,
        v,
        scale=0.125,
        lengths=None if lengths is None else jnp.asarray(lengths, jnp.int32),
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    text_lengths = None if lengths is None else [n - 48 for n in lengths]
    dense = np.ones((2, 1, grid.num_blocks, grid.num_blocks), bool)
    want, _ = numpy_attention(q, k, v, dense, grid, text_lengths=text_lengths)
    np.testing.assert_allclose(out.astype("float32"), want, **ATTENTION["bfloat16"])


ROWS = {  # queries, keys, parts of the keys, valid keys of the two items
    "one-part": (130, 264, 1, None),
    "parts-of-128": (128, 256, 2, None),
    "a-part-is-padding": (40, 384, 3, (384, 120)),
}


@pytest.mark.usefixtures("no_races")
@pytest.mark.parametrize("case", mostly_nightly(ROWS, ["a-part-is-padding"]))
def test_interpreted_rows_match_numpy(case, monkeypatch):
    num_rows, num_keys, parts, lengths = ROWS[case]
    monkeypatch.setattr(hopper_dense, "num_parts", lambda *sizes: parts)
    rng = np.random.default_rng(0)
    sizes = (num_rows, num_keys, num_keys)
    arrays = (rng.normal(size=(2, size, 1, 64)) for size in sizes)
    rows, k, v = (jnp.asarray(x, "bfloat16") for x in arrays)
    ends = np.asarray(lengths or (num_keys, num_keys))[:, None]
    is_valid = np.arange(num_keys) < ends
    out = hopper_dense.hopper_row_attention(
        rows,
        jnp.where(is_valid[..., None, None], k, jnp.nan),
        v,
        scale=0.125,
        lengths=None if lengths is None else jnp.asarray(lengths, jnp.int32),
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    want = attention_of_rows(rows, k, v, is_valid, 0.125)
    np.testing.assert_allclose(out.astype("float32"), want, **ATTENTION["bfloat16"])


def test_large_logits_in_one_part_of_the_keys():
    """Keys of the last part are 40 times as long: the others hardly count."""
    rng = np.random.default_rng(1)
    rows, k, v = (
        rng.normal(size=(1, size, 1, 64)) for size in (16, 4096 * 2, 4096 * 2)
    )
    k[:, 4096:] *= 40.0
    rows, k, v = (jnp.asarray(x, "bfloat16") for x in (rows, k, v))
    out = hopper_dense.hopper_row_attention(
        rows, k, v, scale=0.125, interpret=plgpu.InterpretGPUParams()
    )
    want = attention_of_rows(rows, k, v, np.ones((1, 4096 * 2), bool), 0.125)
    np.testing.assert_allclose(out.astype("float32"), want, **ATTENTION["bfloat16"])


@pytest.mark.parametrize(
    ("query_blocks", "num_tokens", "parts"),
    [
        (48, 126_976, 8),  # HunyuanVideo with text: 384 CTAs, 2.9 waves
        (80, 80_640, 3),  # Wan 14B: 240 CTAs, 1.8 waves
        (6, 19_968, 4),  # parts have 4,096 keys at least
        (48, 8 * 15_013, 1),  # a prime number of eights
        (132, 80_640, 1),
        (3, 4096, 1),
    ],
)
def test_parts_of_the_keys_fill_waves(query_blocks, num_tokens, parts):
    assert hopper_dense.num_parts(query_blocks, num_tokens, 132) == parts


@pytest.mark.parametrize("num_tokens", [80_640, 126_976], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128], ids=str)
def test_rows_lower_for_cuda(num_tokens, head_dim):
    rows, k = (
        jax.ShapeDtypeStruct((1, size, 24, head_dim), jnp.bfloat16)
        for size in (256, num_tokens)
    )
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)

    def run(rows, k, v, lengths):
        return hopper_dense.hopper_row_attention(rows, k, v, scale=0.1, lengths=lengths)

    traced = jax.jit(run).trace(rows, k, k, lengths)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("num_tokens", [32_760, 126_720], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128], ids=str)
def test_lowers_for_cuda(num_tokens, head_dim):
    q = jax.ShapeDtypeStruct((1, num_tokens, 3, head_dim), jnp.bfloat16)

    def run(q, k, v):
        return hopper_dense.hopper_dense_attention(q, k, v, scale=0.1)

    lowered = jax.jit(run).trace(q, q, q).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize(
    ("num_tokens", "masks", "expected"),
    [
        (256, False, [(128, 128, 2, False)]),
        (256, True, [(128, 128, 2, True)]),
        (176, False, [(128, 128, 1, False), (48, 48, 1, False)]),
        (168, False, [(128, 128, 1, False), (48, 40, 1, True)]),
        (176, True, [(128, 128, 1, True), (48, 48, 1, True)]),
        (376, False, [(128, 128, 2, False), (128, 120, 1, True)]),
    ],
    ids=str,
)
def test_widths_of_blocks(num_tokens, masks, expected):
    """Keys are masked where a block is shorter than its width, or some are padding."""
    lengths = np.minimum(128, num_tokens - np.arange(0, num_tokens, 128))
    widths = hopper_dense._widths(lengths, masks)
    assert [dataclasses.astuple(width) for width in widths] == expected


REFUSED = {
    "short": ((1, 4088, 2, 128), "bfloat16", HOPPER, "at least 4096, not 4088"),
    "odd": ((1, 5001, 2, 128), "bfloat16", HOPPER, "a multiple of 8 tokens"),
    "dtype": ((1, 8192, 2, 128), "float32", HOPPER, "not float32"),
    "head-dim": ((1, 8192, 2, 96), "bfloat16", HOPPER, "64 and 128, not 96"),
    "cpu": ((1, 8192, 2, 128), "bfloat16", Device(platform="cpu"), "sm_90"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_says_why_it_is_not_used(case):
    *arguments, cause = REFUSED[case]
    assert cause in hopper_dense.why_unsupported(*arguments)


def test_is_used_for_long_sequences():
    assert (
        hopper_dense.why_unsupported((1, 32_760, 12, 128), "bfloat16", HOPPER) is None
    )
