"""Means that stand for skipped blocks: further keys of the same softmax."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax.grid import VideoGrid
from pallas_kernels import (
    Means,
    SubTiles,
    block_sparse_attention,
    block_sparse_attention_with_lse,
    chosen_backend,
)
from pallas_kernels.attention import means as means_module
from pallas_kernels.attention.api import choose
from pallas_kernels.common.interfaces import Problem
from tests.cases import mostly_nightly
from tests.pallas_kernels.attention.reference import (
    compress,
    random_mask,
    random_qkv,
)
from tests.pallas_kernels.attention.test_dispatch import HOPPER, HOPPER_TAKES
from tests.tolerances import ATTENTION, GRADIENT, LSE, SECOND_DERIVATIVE

TEXT = VideoGrid(3, 5, 7, tile=(2, 4), text_length=11, text_side="before")
# Grid, text lengths, sub-tile and frames of a mean.
CASES = {
    "divisible": (VideoGrid(4, 4, 8, tile=(2, 4)), None, (1, 2), 2),
    "uneven sub-tiles, edges, ragged text": (TEXT, (9, 0), (2, 3), 2),
    "whole tiles, all frames": (TEXT, None, (9, 9), 3),
    "each place": (VideoGrid(2, 3, 3, tile=(2, 2)), None, (1, 1), 1),
}


def tokens_per_frame(grid, sub_tile):
    """Tokens of each sub-tile of a frame's tiles, token by token."""
    counts = {}
    for top, left in itertools.product(
        range(0, grid.height, grid.tile[0]), range(0, grid.width, grid.tile[1])
    ):
        for a, b in itertools.product(
            range(0, grid.tile[0], sub_tile[0]), range(0, grid.tile[1], sub_tile[1])
        ):
            rows = [top + a + i for i in range(sub_tile[0]) if a + i < grid.tile[0]]
            columns = [left + b + i for i in range(sub_tile[1]) if b + i < grid.tile[1]]
            own = [(y, x) for y in rows for x in columns]
            own = [(y, x) for y, x in own if y < grid.height and x < grid.width]
            counts[top, left, a, b] = len(own)
    return list(counts.values())


def random_means(grid, sub_tile, frames, *, dtype="float32", heads=2, dim=16):
    """Means of no keys in particular, and some dropped frames."""
    rng = np.random.default_rng(3)
    cells = SubTiles(
        frames=grid.frames,
        height=grid.height,
        width=grid.width,
        tile=grid.tile,
        sub_tile=sub_tile,
        group_frames=frames,
    )
    of_groups = [len(g) for g in itertools.batched(range(grid.frames), frames)]
    most = np.repeat(of_groups, grid.num_visual_blocks // grid.frames)
    shape = (2, heads, grid.num_blocks, len(most))
    dropped = rng.integers(0, most + 1, shape)
    dropped[:, :, grid.text_blocks] = 0
    dropped[0, 0, grid.visual_blocks.start] = 0  # a row of the mask without keys, too
    k, v = (rng.normal(size=(2, cells.num_cells, heads, dim)) for _ in range(2))
    return Means(
        *(jnp.asarray(x, dtype) for x in (k, v)),
        jnp.asarray(dropped, jnp.uint8),
        cells,
    )


def counts_of_keys(grid, dense, means, sub_tile, lengths):
    """How often each query counts each key and each mean: [B, N, T, T + M]."""
    block = np.repeat(np.arange(grid.num_blocks), grid.block_lengths)
    count = np.asarray(dense)[:, :, block][..., block].astype(float)
    if lengths is not None:
        for item, length in enumerate(lengths):
            text = grid.text_tokens
            padding = slice(text.start + length, text.stop)
            count[item, :, padding] = 0
            count[item, :, :, padding] = 0
    of_frame = tokens_per_frame(grid, sub_tile)
    dropped = np.asarray(means.dropped, float)[:, :, block]
    per_tile = len(of_frame) // (grid.num_visual_blocks // grid.frames)
    groups = dropped.shape[-1] * per_tile // len(of_frame)
    of_means = np.repeat(dropped, per_tile, axis=-1) * np.tile(of_frame, groups)
    return np.concatenate([count, of_means], axis=-1)


def matrices(q, k, v, mean_k, mean_v, *, count, scale=None, xp=np):
    """Softmax with every key as often as it counts."""
    if xp is np:
        q, k, v, mean_k, mean_v = (
            np.asarray(x, np.float64) for x in (q, k, v, mean_k, mean_v)
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys, values = xp.concatenate([k, mean_k], 1), xp.concatenate([v, mean_v], 1)
    logits = scale * xp.einsum("btnd,bsnd->bnts", q, keys)
    has_key = (count > 0).any(-1)
    logits = xp.where(count > 0, logits, xp.where(has_key[..., None], -xp.inf, 0.0))
    top = logits.max(-1, keepdims=True)
    weights = xp.exp(logits - top) * xp.where(has_key[..., None], count, 1.0)
    total = weights.sum(-1, keepdims=True)
    out = xp.einsum("bnts,bsnd->btnd", weights / total * has_key[..., None], values)
    return out, xp.where(has_key, (top + xp.log(total))[..., 0], -xp.inf)


class Case:
    """Inputs of a case and what counts in it."""

    def __init__(self, name, dtype="float32"):
        self.grid, self.lengths, sub_tile, frames = CASES[name]
        self.qkv = random_qkv(self.grid, dtype=dtype)
        dense = random_mask(self.grid)
        self.mask = compress(dense, self.grid)
        self.means = random_means(self.grid, sub_tile, frames, dtype=dtype)
        self.count = counts_of_keys(
            self.grid, dense, self.means, sub_tile, self.lengths
        )

    def attend(self, q, k, v, mean_k, mean_v, *, backend="xla", order="tiled", **rest):
        if order == "raster":
            q, k, v = (x[:, self.grid.raster_order] for x in (q, k, v))
        lengths = None if self.lengths is None else jnp.asarray(self.lengths)
        out, lse = block_sparse_attention_with_lse(
            *(q, k, v, self.mask),
            grid=self.grid,
            order=order,
            text_lengths=lengths,
            means=self.means._replace(k=mean_k, v=mean_v),
            backend=backend,
            **rest,
        )
        if order == "raster":
            out, lse = out[:, self.grid.tile_order], lse[..., self.grid.tile_order]
        return out, lse

    @property
    def arrays(self):
        return (*self.qkv, self.means.k, self.means.v)


@pytest.mark.parametrize(
    "setting",
    mostly_nightly(
        [*itertools.product(CASES, ("tiled", "raster"), ("xla", "oracle"))],
        quick=[
            ("uneven sub-tiles, edges, ragged text", "raster", "xla"),
            ("divisible", "tiled", "oracle"),
        ],
    ),
    ids=str,
)
def test_a_mean_is_a_key_as_often_as_its_tokens_were_dropped(setting):
    case, order, backend = setting
    x = Case(case)
    out, lse = jax.jit(functools.partial(x.attend, backend=backend, order=order))(
        *x.arrays
    )
    want, want_lse = matrices(*x.arrays, count=x.count)
    np.testing.assert_allclose(out, want, **ATTENTION["float32"])
    np.testing.assert_allclose(lse, want_lse, **LSE["float32"])


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("backend", ["xla", "oracle"])
def test_narrow_types(dtype, backend):
    x = Case("divisible", dtype)
    out, lse = x.attend(*x.arrays, backend=backend)
    want, want_lse = matrices(*x.arrays, count=x.count)
    assert out.dtype == dtype
    np.testing.assert_allclose(out.astype("float32"), want, **ATTENTION[dtype])
    np.testing.assert_allclose(lse, want_lse, **LSE[dtype])


def loss(attend, arrays):
    """Curved in both results; rows without a key count by their zeros only."""
    out, lse = attend(*arrays)
    weights = np.random.default_rng(5).normal(size=(*out.shape[:2], 1, 1))
    lse = jnp.where(jnp.isfinite(lse), lse, 0.0)
    return (weights * jnp.sin(out)).sum() + jnp.cos(lse).sum()


def tangents_of(arrays):
    rng = np.random.default_rng(7)
    return tuple(jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in arrays)


def grad(attend, arrays):
    return jax.grad(functools.partial(loss, attend))(arrays)


def jvp(attend, arrays):
    return jax.jvp(lambda *x: attend(*x), arrays, tangents_of(arrays))[1]


def grad_of_means(attend, arrays):
    def of_means(mean_k, mean_v):
        return loss(attend, (*arrays[:3], mean_k, mean_v))

    return jax.grad(of_means, (0, 1))(*arrays[3:])


def jvp_of_grad(attend, arrays):
    gradient = jax.grad(functools.partial(loss, attend))
    return jax.jvp(gradient, (arrays,), (tangents_of(arrays),))[1]


@pytest.mark.parametrize(
    "setting",
    mostly_nightly(
        [
            *itertools.product(
                (grad, jvp, grad_of_means, jvp_of_grad),
                ("raster", "tiled"),
                ("xla", "oracle"),
            )
        ],
        quick=[(grad, "raster", "xla")],
    ),
    ids=lambda setting: f"{setting[0].__name__}-{setting[1]}-{setting[2]}",
)
def test_derivatives_are_those_of_matrices(setting, assert_close):
    derivative, order, backend = setting
    x = Case("uneven sub-tiles, edges, ragged text")
    attend = functools.partial(x.attend, order=order, backend=backend)
    want = functools.partial(matrices, count=jnp.asarray(x.count, "float32"), xp=jnp)
    got, want = (
        jax.jit(functools.partial(derivative, f))(x.arrays) for f in (attend, want)
    )
    tolerance = SECOND_DERIVATIVE if derivative is jvp_of_grad else GRADIENT["float32"]
    for a, b in zip(got, want, strict=True):
        assert_close("derivatives of means", a, b, tolerance)


@pytest.mark.nightly
def test_nan_in_padded_text_reaches_nothing():
    """Neither results nor gradients: padding has no key and no mean."""
    x = Case("uneven sub-tiles, edges, ragged text")
    text = x.grid.text_tokens
    is_padding = np.zeros(x.qkv[0].shape, bool)
    for item, length in enumerate(x.lengths):
        is_padding[item, text.start + length : text.stop] = True

    def run(fill):
        arrays = (*(jnp.where(is_padding, fill, y) for y in x.qkv), *x.arrays[3:])
        out, pull_back = jax.vjp(lambda *arrays: x.attend(*arrays)[0], *arrays)
        return out, pull_back(jnp.where(is_padding, fill, jnp.ones_like(out)))

    for clean, got in zip(*map(jax.tree.leaves, (run(1.0), run(jnp.nan))), strict=True):
        np.testing.assert_array_equal(clean, got)


@pytest.mark.nightly
def test_few_query_blocks_at_a_time_give_the_same(monkeypatch):
    """As many as fit the bytes, which need not divide their number."""
    x = Case("uneven sub-tiles, edges, ragged text")
    row = 2 * 2 * x.grid.block_size * x.means.k.shape[1] * 4
    want = x.attend(*x.arrays)
    for rows in (1, 5):
        jax.clear_caches()
        monkeypatch.setattr(means_module, "MAX_CHUNK_BYTES", rows * row)
        for a, b in zip(x.attend(*x.arrays), want, strict=True):
            np.testing.assert_allclose(a, b, **ATTENTION["float32"])


@pytest.mark.nightly
def test_holds_no_map_of_all_means():
    """Forward and backward, where means are as many as tokens."""
    grid = VideoGrid(2, 64, 64)
    token = jax.ShapeDtypeStruct((1, grid.num_tokens, 1, 64), jnp.float32)
    cells = SubTiles(frames=2, height=64, width=64, tile=(8, 16), sub_tile=(1, 1))
    shape = (1, 1, grid.num_blocks, cells.num_columns)
    means = Means(token, token, jax.ShapeDtypeStruct(shape, jnp.uint8), cells)
    none_kept = np.zeros((1, 1, grid.num_blocks, grid.num_blocks), bool)
    mask = compress(none_kept, grid, capacity=1)

    def attend(q, k, v, means):
        return block_sparse_attention(
            q, k, v, mask, grid=grid, order="tiled", means=means, backend="xla"
        )

    def gradient(q, k, v, means):
        def loss(q, mean_k, mean_v):
            return attend(q, k, v, means._replace(k=mean_k, v=mean_v)).sum()

        return jax.grad(loss, (0, 1, 2))(q, *means[:2])

    one_map = grid.num_tokens**2 * 4
    for function in (attend, gradient):
        lowered = jax.jit(function).lower(*(token,) * 3, means)
        memory = lowered.compile().memory_analysis()
        assert memory.temp_size_in_bytes < 0.8 * one_map


@pytest.mark.nightly
def test_vmap_numpy_and_a_traced_scale_agree():
    x = Case("divisible")
    want = x.attend(*x.arrays, scale=0.5)
    of_numpy = x.attend(*map(np.asarray, x.arrays), scale=0.5)
    mapped = jax.vmap(lambda *arrays: x.attend(*arrays, scale=jnp.float32(0.5)))(
        *(y[None] for y in x.arrays)
    )
    for got in (of_numpy, jax.tree.map(lambda y: y[0], mapped)):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"k": lambda k: k[:, 1:]},
            ValueError,
            r"means\.k has shape .*B, M, N",
        ),
        ({"v": lambda v: v.astype("bfloat16")}, TypeError, r"means\.v has dtype bfl"),
        ({"dropped": lambda d: d[..., 1:]}, ValueError, r"means\.dropped has shape"),
        ({"dropped": lambda d: d.astype("int32")}, TypeError, "expected uint8"),
        (
            {"sub_tiles": lambda _: SubTiles(frames=1, height=4, width=8, **TILE)},
            ValueError,
            r"means\.sub_tiles=.* has 32 tokens",
        ),
    ],
    ids=["k", "v", "columns", "integers", "sub_tiles"],
)
def test_what_does_not_fit_is_refused(change, error, text):
    x = Case("divisible")
    changed = {name: f(getattr(x.means, name)) for name, f in change.items()}
    with pytest.raises(error, match=text):
        block_sparse_attention(
            *(*x.qkv, x.mask),
            grid=x.grid,
            order="tiled",
            means=x.means._replace(**changed),
        )


TILE = {"tile": (2, 4), "sub_tile": (1, 2)}


@pytest.mark.usefixtures("without_jaxtyping")
def test_a_tuple_is_no_means():
    x = Case("divisible")
    options = {"grid": x.grid, "order": "tiled", "means": tuple(x.means)}
    with pytest.raises(TypeError, match="means is tuple; expected Means"):
        block_sparse_attention(*x.qkv, x.mask, **options)


@pytest.mark.parametrize("sizes", [{"sub_tile": (0, 1)}, {"group_frames": 256}])
def test_sizes_of_sub_tiles_are_checked(sizes):
    given = {"frames": 2, "height": 4, "width": 8, "tile": (2, 4), "sub_tile": (1, 1)}
    name, value = next(iter(sizes.items()))
    with pytest.raises(ValueError, match=re.escape(f"{name}={value}")):
        SubTiles(**given | sizes)


@pytest.mark.parametrize("sub_tile", [(1, 1), (8, 4), (3, 2)], ids=str)
def test_hopper_takes_any_number_of_means(sub_tile):
    cells = SubTiles(frames=2, height=16, width=32, tile=(8, 16), sub_tile=sub_tile)
    problem = Problem(order="tiled", device=HOPPER, sub_tiles=cells, **HOPPER_TAKES)
    assert choose(problem, "auto").name == "hopper"


def test_the_choice_can_be_asked_for():
    q = jax.ShapeDtypeStruct((1, 64, 1, 8), jnp.float32)
    grid = VideoGrid(1, 8, 8, tile=(4, 4))
    cells = SubTiles(frames=1, height=8, width=8, tile=(4, 4), sub_tile=(2, 2))
    assert chosen_backend(q, grid=grid, order="tiled", sub_tiles=cells).name == "xla"
