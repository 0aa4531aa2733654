"""Means behind the lists of the Hopper kernel, in GPU interpret mode and lowered.

A mean that stands for n tokens must do what n keys at its place do: expected values
come from loops that repeat it so often.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from draft_jax.block_mask import BlockMask
from draft_jax.grid import VideoGrid
from pallas_kernels import Means, SubTiles
from pallas_kernels.attention.reference import oracle_attention
from pallas_kernels.attention.sm90 import backend as hopper
from pallas_kernels.attention.sm90.plan import KernelConfig
from pallas_kernels.common import device
from tests.cases import mostly_nightly
from tests.pallas_kernels.attention.reference import (
    compress,
    random_mask,
    random_qkv,
)
from tests.tolerances import ATTENTION, GRADIENT_RELATIVE, LSE

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
NUM_CTAS = 2  # fewer than query blocks, so that a CTA of a repair walks several


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    grid: VideoGrid
    sub_tile: tuple[int, int] = (2, 2)
    frames: int = 2
    batch: int = 1
    num_heads: int = 1
    text_lengths: tuple[int, ...] = ()
    head_dim: int = 64
    dtype: str = "bfloat16"
    order: str = "tiled"
    density: float = 0.5
    scale: float = 0.125
    growth: float = 0.0  # of the mean keys' logits from one block of means to the next
    config: dict[str, object] = dataclasses.field(default_factory=dict)

    @property
    def cells(self) -> SubTiles:
        grid = self.grid
        return SubTiles(
            frames=grid.frames,
            height=grid.height,
            width=grid.width,
            tile=grid.tile,
            sub_tile=self.sub_tile,
            group_frames=self.frames,
        )


CASES = {
    "each-place-a-mean": Case(grid=VideoGrid(2, 8, 16), sub_tile=(1, 1), frames=1),
    # The last group has one frame, and the last block of means is half empty.
    "three-blocks-of-means": Case(grid=VideoGrid(5, 8, 16), frames=1),
    "edges-and-ragged-text": Case(
        grid=VideoGrid(3, 13, 16, text_length=40),
        batch=2,
        text_lengths=(40, 7),
        sub_tile=(2, 4),  # of an edge tile's five rows: two, two, one and none
    ),
    "boxes": Case(grid=VideoGrid(3, 13, 32), order="raster", num_heads=2),
    "raster-rows-of-tiles": Case(
        grid=VideoGrid(2, 13, 32, text_length=40), order="raster", sub_tile=(4, 4)
    ),
    "by-rows": Case(grid=VideoGrid(3, 9, 21), order="raster", sub_tile=(4, 4)),
    # Of a column six means, and ten; others are of no token.
    "columns-of-six": Case(grid=VideoGrid(3, 13, 16), sub_tile=(3, 8)),
    "columns-of-ten": Case(
        grid=VideoGrid(3, 11, 20, tile=(6, 20), text_length=40),
        order="raster",
        sub_tile=(3, 4),
    ),
    "head-dim-128-exact": Case(
        grid=VideoGrid(2, 16, 16),
        head_dim=128,
        dtype="float16",
        sub_tile=(1, 1),
        config={"exact_softmax": True},
    ),
    "nothing-kept": Case(grid=VideoGrid(2, 8, 32), density=0.0, sub_tile=(2, 4)),
    "negative-scale": Case(
        grid=VideoGrid(2, 8, 32), scale=-0.2, density=0.3, sub_tile=(2, 8), num_heads=2
    ),
    "float16-grows": Case(grid=VideoGrid(5, 8, 16), dtype="float16", growth=12.0),
    "repaired": Case(grid=VideoGrid(5, 8, 16), growth=60.0, frames=1),
}

pytestmark = pytest.mark.usefixtures("no_races")


@pytest.fixture(autouse=True)
def few_multiprocessors(monkeypatch):
    monkeypatch.setattr(device, "num_multiprocessors", lambda: NUM_CTAS)


def problem(case: Case):
    """q, k and v in tiled order, the map of kept blocks, and means of random values.

    Means need not be those of the tokens. Those of cells without a token are large.
    """
    sizes = {"batch": case.batch, "num_heads": case.num_heads}
    qkv = random_qkv(case.grid, head_dim=case.head_dim, dtype=case.dtype, **sizes)
    dense = random_mask(case.grid, density=case.density, **sizes)
    text = case.grid.text_blocks
    dense[:, :, text] = dense[..., text] = True
    rng = np.random.default_rng(1)
    cells = case.cells
    size = (case.batch, cells.num_cells, case.num_heads, case.head_dim)
    k, v = (rng.normal(size=size) for _ in range(2))
    k[:, cells.tokens_per_frame == 0] = v[:, cells.tokens_per_frame == 0] = 100.0
    q = qkv[0]
    if case.growth:
        q = q.at[..., 0].set(1.0)
        block = np.arange(cells.num_cells) // 128
        k[..., 0] = case.growth * (block + 1)[:, None] / case.scale
    k, v = (jnp.asarray(x, case.dtype) for x in (k, v))
    means = Means(k, v, jnp.asarray(dropped_frames(dense, case)), cells)
    return (q, *qkv[1:]), dense, means


def dropped_frames(dense, case: Case):
    """Counts, by loops, the frames of each column whose tile a query block drops."""
    cells, visual = case.cells, range(*case.grid.visual_blocks.indices(10**6))
    tiles = cells.num_tiles // cells.frames
    dropped = np.zeros((*dense.shape[:3], cells.num_columns), np.uint8)
    for place, block in enumerate(visual):
        column = place // tiles // case.frames * tiles + place % tiles
        dropped[..., column] += ~dense[..., block]
    text = case.grid.text_blocks
    dropped[:, :, text] = 0
    return dropped


def expected(qkv, dense, means: Means, case: Case):
    """Repeats each mean as often as it counts, beside the kept and valid keys."""
    q, k, v, mean_k, mean_v = (
        np.asarray(x, np.float64) for x in (*qkv, means.k, means.v)
    )
    grid, cells = case.grid, case.cells
    block_of = np.repeat(np.arange(grid.num_blocks), grid.block_lengths)
    text = np.arange(grid.num_tokens)[grid.text_tokens]
    dropped = np.asarray(means.dropped, int)
    out, lse = np.zeros_like(q), np.full(np.moveaxis(q[..., 0], 1, 2).shape, -np.inf)
    for b, t, n in np.ndindex(q.shape[:3]):
        padding = text[case.text_lengths[b] :] if case.text_lengths else []
        if t in padding:
            continue
        keys = np.setdiff1d(np.flatnonzero(dense[b, n, block_of[t]][block_of]), padding)
        frames = np.repeat(dropped[b, n, block_of[t]], cells.per_column)
        counts = frames * cells.tokens_per_frame
        all_k = np.concatenate([k[b, keys, n], np.repeat(mean_k[b, :, n], counts, 0)])
        all_v = np.concatenate([v[b, keys, n], np.repeat(mean_v[b, :, n], counts, 0)])
        if not len(all_k):
            continue
        logits = case.scale * all_k @ q[b, t, n]
        weights = np.exp(logits - logits.max())
        out[b, t, n] = weights @ all_v / weights.sum()
        lse[b, n, t] = logits.max() + np.log(weights.sum())
    return out, lse


def attend(qkv, dense, means, case: Case, *, interpret):
    grid = case.grid
    if case.order == "raster":
        qkv = [x[:, grid.raster_order] for x in qkv]
    out, lse = hopper.hopper_attention(
        *qkv,
        compress(dense, grid),
        grid=grid,
        scale=case.scale,
        text_lengths=(
            jnp.asarray(case.text_lengths, jnp.int32) if case.text_lengths else None
        ),
        order=case.order,
        means=means,
        config=KernelConfig(**{"num_slots": 3, **case.config}),
        interpret=interpret,
    )
    if case.order == "raster":
        out, lse = out[:, grid.tile_order], lse[:, :, grid.tile_order]
    return out, lse


@pytest.mark.parametrize("name", mostly_nightly(CASES, ("each-place-a-mean",)))
def test_a_mean_counts_as_the_tokens_it_stands_for(name):
    case = CASES[name]
    qkv, dense, means = problem(case)
    out, lse = attend(qkv, dense, means, case, interpret=INTERPRET)
    want_out, want_lse = expected(qkv, dense, means, case)
    assert out.dtype == case.dtype
    np.testing.assert_allclose(out.astype("float32"), want_out, **ATTENTION[case.dtype])
    np.testing.assert_allclose(lse, want_lse, **LSE[case.dtype])


@pytest.mark.nightly
def test_gradients_reach_means():
    case = Case(grid=VideoGrid(3, 8, 16), dtype="float16", sub_tile=(4, 4))
    qkv, dense, means = problem(case)
    mask = compress(dense, case.grid)

    def attend_hopper(q, k, v, mean_k, mean_v):
        given = means._replace(k=mean_k, v=mean_v)
        return attend((q, k, v), dense, given, case, interpret=INTERPRET)

    def attend_oracle(q, k, v, mean_k, mean_v):
        options = {"grid": case.grid, "scale": case.scale, "text_lengths": None}
        given = means._replace(k=mean_k, v=mean_v)
        return oracle_attention(q, k, v, mask, means=given, **options)

    def gradients(function, arrays):
        def loss(*arrays):
            out, lse = function(*arrays)
            return jnp.sin(out.astype(jnp.float32)).sum() + jnp.cos(lse).sum()

        return jax.jit(jax.grad(loss, argnums=range(5)))(*arrays)

    arrays = (*qkv, means.k, means.v)
    got = gradients(attend_hopper, arrays)
    want = gradients(attend_oracle, [x.astype("float32") for x in arrays])
    for x, y in zip(got, want, strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        error = np.linalg.norm(x - y) / np.linalg.norm(y)
        assert error < GRADIENT_RELATIVE["float16"]


LOWERED = {  # sub-tile, frames, order, head_dim, dtype
    "hunyuan": (VideoGrid(33, 48, 80), (2, 2), 4, "tiled", 128, "bfloat16"),
    "boxes": (VideoGrid(33, 45, 80), (2, 4), 1, "raster", 128, "bfloat16"),
    "text": (
        VideoGrid(33, 45, 80, text_length=256),
        (4, 4),
        4,
        "raster",
        64,
        "float16",
    ),
    "by-rows": (VideoGrid(4, 30, 52), (1, 1), 4, "raster", 128, "bfloat16"),
}


@pytest.mark.parametrize("name", mostly_nightly(LOWERED, ("boxes",)))
def test_lowers_for_cuda(name):
    grid, sub_tile, frames, order, head_dim, dtype = LOWERED[name]
    cells = Case(grid=grid, sub_tile=sub_tile, frames=frames).cells
    q = jax.ShapeDtypeStruct((1, grid.num_tokens, 3, head_dim), dtype)
    mean = jax.ShapeDtypeStruct((1, cells.num_cells, 3, head_dim), dtype)
    dropped = (1, 3, grid.num_blocks, cells.num_columns)
    means = Means(mean, mean, jax.ShapeDtypeStruct(dropped, jnp.uint8), cells)
    mask = jax.eval_shape(lambda: BlockMask.full(grid=grid, batch=1, num_heads=3))

    @jax.jit
    def run(q, k, v, mask, means):
        options = {"scale": 0.1, "text_lengths": None, "order": order}
        return hopper.hopper_attention(q, k, v, mask, grid=grid, means=means, **options)

    traced = run.trace(q, q, q, mask, means)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
