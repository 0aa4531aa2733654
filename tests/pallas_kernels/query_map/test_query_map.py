"""An affine map of queries, added to an output: XLA and the kernel against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common.device import Device
from pallas_kernels.query_map import (
    api,
    unchecked_add_query_map,
    why_not_in_kernel,
)
from pallas_kernels.query_map.sm90 import kernel
from tests.cases import mostly_nightly
from tests.pallas_kernels.float8_rows.loops import INTERPRET

HOPPER = Device(platform="gpu", kind="H100", compute_capability=(9, 0))
# Batch, tokens, heads and channels; dtype; tokens that the map is added to.
CASES = {
    "a-short-last-part": ((2, 1096, 2, 64), "float16", (76, 1096)),
    "whole-blocks": ((1, 1024, 1, 128), "bfloat16", (0, 1024)),
    "text-behind": ((2, 704, 3, 128), "bfloat16", (0, 641)),
    "one-block": ((1, 64, 2, 128), "bfloat16", (3, 60)),
}


def random_arrays(shape, dtype, seed=0):
    """Output, queries, and a matrix and an offset for each item and head."""
    batch, _, heads, dim = shape
    rng = np.random.default_rng(seed)
    out, q = (rng.normal(size=shape).astype(jnp.dtype(dtype)) for _ in range(2))
    matrix = rng.normal(size=(batch, heads, dim, dim)) / dim**0.5
    matrix = matrix.astype(jnp.dtype(dtype)).astype(np.float32)  # exactly in dtype
    return out, q, matrix, rng.normal(size=(batch, heads, dim)).astype(np.float32)


def loop(out, q, matrix, offset, tokens):
    """Adds the map one batch item and head at a time, in float64."""
    want = np.asarray(out, np.float64)
    for item, head in np.ndindex(*matrix.shape[:2]):
        own = slice(*tokens)
        rows = np.asarray(q[item, own, head], np.float64)
        want[item, own, head] += rows @ matrix[item, head] + offset[item, head]
    return want


def check(got, want, dtype):
    assert got.dtype == jnp.dtype(dtype)
    # Half a unit of the last place, and float32's sums.
    rounding = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        np.asarray(got, np.float64), want, rtol=rounding, atol=1e-5
    )


@pytest.mark.parametrize("case", mostly_nightly(CASES, ["text-behind"]))
def test_kernel_is_the_loop(case):
    shape, dtype, tokens = CASES[case]
    arrays = random_arrays(shape, dtype)
    got = kernel.add_query_map(
        *map(jnp.asarray, arrays), tokens=tokens, interpret=INTERPRET
    )
    check(got, loop(*arrays, tokens), dtype)


@pytest.mark.parametrize("case", CASES)
def test_xla_is_the_loop(case):
    shape, _, tokens = CASES[case]
    arrays = random_arrays(shape, "float32")
    got = unchecked_add_query_map(*map(jnp.asarray, arrays), tokens=tokens)
    np.testing.assert_allclose(got, loop(*arrays, tokens), rtol=1e-4, atol=1e-4)


def test_other_tokens_keep_their_bits():
    """Also where they are not finite, and what would be added is not."""
    out, q, matrix, offset = random_arrays((1, 96, 2, 64), "bfloat16")
    out[:, 90], q[:, 91] = np.inf, np.nan
    arrays = tuple(map(jnp.asarray, (out, q, matrix, offset)))
    for add in (
        functools.partial(kernel.add_query_map, interpret=INTERPRET),
        unchecked_add_query_map,
    ):
        got = np.asarray(add(*arrays, tokens=(8, 90)))
        for kept in (slice(0, 8), slice(90, 96)):
            np.testing.assert_array_equal(
                got[:, kept].view(np.uint16), out[:, kept].view(np.uint16)
            )
        assert np.isfinite(got[:, 8:90].astype(np.float32)).all()


def test_mapped_axes_join_the_batch():
    shape, dtype, tokens = CASES["one-block"]
    made = [random_arrays(shape, dtype, seed) for seed in range(2)]
    stacked = [jnp.stack(parts) for parts in zip(*made, strict=True)]
    add = functools.partial(kernel.add_query_map, tokens=tokens, interpret=INTERPRET)
    got = jax.vmap(add, (0, 0, 0, None))(*stacked[:3], stacked[3][0])
    for place, (out, q, matrix, _) in enumerate(made):
        want = loop(out, q, matrix, made[0][3], tokens)
        check(got[place], want, dtype)


def test_derivatives_are_those_of_the_sum(monkeypatch):
    """Of the kernel's function as of XLA's, along every argument."""
    in_interpret = functools.partial(kernel.add_query_map, interpret=INTERPRET)
    monkeypatch.setattr(kernel, "add_query_map", in_interpret)
    shape, dtype, tokens = CASES["one-block"]
    out, q, matrix, offset = random_arrays(shape, dtype)

    def loss(out, q, matrix, offset):
        total = api._add(out, q, matrix, offset, tokens=tokens, in_kernel=True)
        return (total.astype(jnp.float32) ** 2).sum() / 2

    got = jax.grad(loss, (0, 1, 2, 3))(out, q, matrix, offset)
    total = loop(out, q, matrix, offset, tokens)
    of_change = np.zeros_like(total)
    of_change[:, slice(*tokens)] = total[:, slice(*tokens)]
    rows = np.asarray(q, np.float64)
    want = (
        total,
        np.einsum("btne,bnde->btnd", of_change, matrix),
        np.einsum("btnd,btne->bnde", rows, of_change),
        of_change.sum(1),
    )
    for x, y in zip(got, want, strict=True):
        error = np.linalg.norm(np.asarray(x, np.float64) - y)
        assert error < 0.01 * np.linalg.norm(y)


@pytest.mark.parametrize(
    ("shape", "dtype", "cause"),
    [
        ((1, 640, 2, 128), "float32", "bfloat16 and float16, not float32"),
        ((1, 640, 2, 96), "bfloat16", "a head dimension of 64 and 128, not 96"),
        ((1, 63, 2, 64), "bfloat16", "64 tokens or more, not 63"),
        ((1, 1100, 2, 64), "bfloat16", "a multiple of 8 tokens, not 1100"),
    ],
)
def test_what_the_kernel_does_not_take(shape, dtype, cause):
    assert cause in why_not_in_kernel(shape, dtype, HOPPER)
    arrays = map(jnp.asarray, random_arrays(shape, dtype))
    with pytest.raises(ValueError, match=cause):
        kernel.add_query_map(*arrays, tokens=(0, 8))


@pytest.mark.parametrize("head_dim", kernel.HEAD_DIMS)
def test_it_lowers_for_a_gpu(head_dim):
    batch, heads = 2, 3
    arrays = [
        jax.ShapeDtypeStruct((batch, 1000, heads, head_dim), "bfloat16"),
        jax.ShapeDtypeStruct((batch, 1000, heads, head_dim), "bfloat16"),
        jax.ShapeDtypeStruct((batch, heads, head_dim, head_dim), "float32"),
        jax.ShapeDtypeStruct((batch, heads, head_dim), "float32"),
    ]
    add = functools.partial(kernel.add_query_map, tokens=(0, 990))
    lowered = jax.jit(add).trace(*arrays).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
