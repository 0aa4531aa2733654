"""Exact attention of a few queries against float64 matrices of NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax.grid import VideoGrid
from pallas_kernels import unchecked_row_attention
from pallas_kernels.attention import dense_xla, rows
from pallas_kernels.common.device import Device
from tests.pallas_kernels.attention.reference import attention_of_rows, valid_keys
from tests.tolerances import ATTENTION

NUM_ROWS = 9
SCALE = 0.3
AFTER = VideoGrid(2, 3, 5, tile=(2, 2), text_length=11)
BEFORE = VideoGrid(2, 3, 5, tile=(2, 2), text_length=11, text_side="before")
CASES = {  # grid, text lengths of the two batch items, whether cuDNN can do it
    "no text": (VideoGrid(2, 3, 5, tile=(2, 2)), None, True),
    "after": (AFTER, None, True),
    "after, ragged": (AFTER, (0, 7), True),
    "before": (BEFORE, None, True),
    "before, ragged": (BEFORE, (4, 0), False),
}


def random_arrays(grid, dtype="float32", num_rows=NUM_ROWS):
    rng = np.random.default_rng(0)
    sizes = (num_rows, grid.num_tokens, grid.num_tokens)
    return [jnp.asarray(rng.normal(size=(2, size, 3, 8)), dtype) for size in sizes]


def attend(queries, k, v, grid, lengths, scale=SCALE):
    lengths = None if lengths is None else jnp.asarray(lengths, jnp.int32)
    return unchecked_row_attention(
        queries, k, v, grid=grid, scale=scale, text_lengths=lengths
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_matches_numpy_whatever_padding_holds(case, dtype):
    grid, lengths, _ = CASES[case]
    queries, k, v = random_arrays(grid, dtype)
    is_valid = valid_keys(grid, lengths)
    k, v = (jnp.where(is_valid[:, :, None, None], x, jnp.nan) for x in (k, v))
    out = attend(queries, k, v, grid, lengths)
    assert out.dtype == dtype
    want = attention_of_rows(queries, k, v, is_valid, SCALE)
    np.testing.assert_allclose(out.astype("float32"), want, **ATTENTION[dtype])


def test_a_traced_scale():
    queries, k, v = random_arrays(AFTER)
    run = jax.jit(functools.partial(attend, queries, k, v, AFTER, (0, 7)))
    is_valid = valid_keys(AFTER, (0, 7))
    for scale in (0.3, 1.1):
        want = attention_of_rows(queries, k, v, is_valid, scale)
        np.testing.assert_allclose(run(scale), want, **ATTENTION["float32"])
    assert run._cache_size() == 1


def test_rows_that_take_several_chunks(monkeypatch):
    """37 rows, of which 16 are computed at a time."""
    monkeypatch.setattr(dense_xla, "CPU_CHUNK_LOGITS", 1)
    queries, k, v = random_arrays(AFTER, num_rows=37)
    want = attention_of_rows(queries, k, v, valid_keys(AFTER, None), SCALE)
    out = attend(queries, k, v, AFTER, None)
    np.testing.assert_allclose(out, want, **ATTENTION["float32"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("is_traced", [False, True], ids=["known", "traced"])
def test_what_is_asked_of_cudnn(case, is_traced, monkeypatch):
    """A function of XLA stands in for it, which takes a valid prefix of the keys."""
    grid, lengths, by_cudnn = CASES[case]
    asked = []
    of_xla = jax.nn.dot_product_attention

    def cudnn(queries, k, v, *, scale, key_value_seq_lengths, implementation):
        asked.append(implementation)
        return of_xla(
            queries, k, v, scale=scale, key_value_seq_lengths=key_value_seq_lengths
        )

    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    monkeypatch.setattr(rows, "why_no_cudnn", lambda *shape: None)
    # A number of rows of its own: a kept program would call another test's stand-in.
    num_rows = 12 + 2 * [*CASES].index(case) + is_traced
    queries, k, v = random_arrays(grid, num_rows=num_rows)
    run = functools.partial(attend, queries, k, v, grid, lengths)
    out = jax.jit(run)(SCALE) if is_traced else run(SCALE)
    assert asked == ["cudnn"] * by_cudnn
    want = attention_of_rows(queries, k, v, valid_keys(grid, lengths), SCALE)
    np.testing.assert_allclose(out, want, **ATTENTION["float32"])


def test_the_device_says_what_computes_them(monkeypatch):
    """On an H100, by dtype, head dimension, tokens and where padding stands."""
    h100 = Device(platform="gpu", kind="NVIDIA H100", compute_capability=(9, 0))
    chosen = []

    def note(queries, *arrays, path, **options):
        chosen.append(path)
        return queries

    monkeypatch.setattr(rows, "current_device", lambda x: h100)
    monkeypatch.setattr(rows, "_attend", note)
    attend(*random_arrays(AFTER, "bfloat16"), AFTER, (0, 7))
    attend(*random_arrays(AFTER), AFTER, (0, 7))
    attend(*random_arrays(BEFORE, "bfloat16"), BEFORE, (0, 7))
    attend(*random_arrays(BEFORE, "bfloat16"), BEFORE, None)
    long = VideoGrid(8, 32, 32)
    keys = jnp.zeros((1, long.num_tokens, 1, 128), "bfloat16")
    attend(keys[:, :40], keys, keys, long, None)
    attend(keys[:, :40, :, :96], keys[..., :96], keys[..., :96], long, None)
    assert chosen == ["cudnn", "xla", "xla", "cudnn", "hopper", "cudnn"]


def test_no_gradient_flows():
    def loss(scale, queries, k, v):
        return (attend(queries, k, v, AFTER, (0, 7), scale) ** 2).sum()

    moved = jax.grad(loss, (0, 1, 2, 3))(SCALE, *random_arrays(AFTER))
    for gradient in moved:
        np.testing.assert_array_equal(gradient, 0.0)


def test_memory_is_that_of_the_rows():
    """Logits of 32 rows of a head, and keys and values of all heads in float32."""
    shapes = [
        jax.ShapeDtypeStruct((1, size, 4, 16), jnp.float32) for size in (32, 8192, 8192)
    ]
    grid = VideoGrid(8, 32, 32)
    run = jax.jit(functools.partial(attend, grid=grid, lengths=None))
    used = run.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert used < 4 * (2 * 32 * 8192 + 3 * 8192 * 4 * 16)
