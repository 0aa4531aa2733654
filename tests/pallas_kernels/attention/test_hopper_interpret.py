"""The Hopper kernel on the CPU, in Pallas' GPU interpret mode with race detection.

Matrix products are emulated there, so these tests cover everything else: lists, ring,
barriers, masks, softmax, stores. The same cases run on a GPU in `tests/gpu`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from draft_jax.grid import VideoGrid
from pallas_kernels.attention.sm90 import backend as hopper
from pallas_kernels.attention.sm90.plan import KernelConfig
from pallas_kernels.common import device
from tests.cases import mostly_nightly
from tests.pallas_kernels.attention.reference import (
    compress,
    matrix_attention,
    numpy_attention,
    random_mask,
    random_qkv,
)
from tests.tolerances import (
    ATTENTION,
    GRADIENT_RELATIVE,
    HUGE_LOGITS,
    HUGE_LSE,
    LSE,
)

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
NUM_CTAS = 2  # fewer than query blocks, so that a CTA of a repair walks several


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    grid: VideoGrid
    num_heads: int = 1
    text_lengths: tuple[int, ...] = ()  # one for each batch item
    head_dim: int = 64
    dtype: str = "bfloat16"
    order: str = "tiled"
    density: float = 0.6
    config: dict[str, object] = dataclasses.field(default_factory=dict)


CASES = {
    "uneven-rows": Case(grid=VideoGrid(1, 8, 48), num_heads=2),
    "head-dim-128-exact": Case(
        grid=VideoGrid(1, 16, 16),
        head_dim=128,
        dtype="float16",
        config={"exact_softmax": True},
    ),
    "edge-tile-and-ragged-text": Case(
        grid=VideoGrid(1, 13, 16, text_length=40), text_lengths=(40, 7)
    ),
    # An odd number of query blocks: a pair spans both heads, the others share keys.
    "full-rows-in-pairs": Case(grid=VideoGrid(1, 8, 48), num_heads=2, density=1.0),
    "raster-edges-and-text": Case(
        grid=VideoGrid(1, 13, 32, text_length=40), order="raster"
    ),
    "boxes": Case(grid=VideoGrid(1, 13, 32), order="raster"),
    "sums-last-and-edges": Case(
        grid=VideoGrid(1, 13, 16), dtype="float16", config={"sums_last": True}
    ),
    "narrower-than-a-tile": Case(grid=VideoGrid(2, 13, 8), order="raster"),
    "three-widths": Case(grid=VideoGrid(1, 14, 20, text_length=136)),
    "text-before-and-empty": Case(
        grid=VideoGrid(1, 8, 16, text_length=136, text_side="before"),
        text_lengths=(0, 130),
        dtype="float16",
    ),
    "by-rows": Case(grid=VideoGrid(1, 9, 21, text_length=13), text_lengths=(13, 3)),
    # Six slots: a copy arrives while the next two are under way.
    "by-rows-ahead": Case(
        grid=VideoGrid(2, 5, 21),
        head_dim=128,
        order="raster",
        config={"num_slots": 6, "exact_softmax": True},
    ),
    # Whole tiles are short blocks, too: of 120 tokens, and of 110 that are copied by
    # rows.
    "short-tiles": Case(grid=VideoGrid(1, 22, 20, tile=(6, 20)), num_heads=2),
    "short-tiles-and-ragged-text": Case(
        grid=VideoGrid(1, 10, 20, tile=(6, 20), text_length=136), text_lengths=(136, 9)
    ),
    "short-tiles-by-rows": Case(grid=VideoGrid(1, 11, 20, tile=(11, 10))),
    "short-tiles-in-raster-order": Case(
        grid=VideoGrid(2, 10, 32, tile=(6, 16)), order="raster"
    ),
    "by-rows-fewer-than-a-block": Case(
        grid=VideoGrid(1, 3, 21, text_length=5), text_lengths=(3, 0)
    ),
}


pytestmark = pytest.mark.usefixtures("no_races")


@pytest.fixture(autouse=True)
def few_multiprocessors(monkeypatch):
    monkeypatch.setattr(device, "num_multiprocessors", lambda: NUM_CTAS)


def attend(q, k, v, mask, grid, lengths, *, scale=None, order="tiled", **config):
    config = KernelConfig(**{"num_slots": 3, **config})
    return hopper.hopper_attention(
        q,
        k,
        v,
        mask,
        grid=grid,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        text_lengths=jnp.asarray(lengths, jnp.int32) if lengths else None,
        order=order,
        config=config,
        interpret=INTERPRET,
    )


def relative_error(got, want):
    """Relative L2 error."""
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def inputs(case):
    sizes = {"batch": len(case.text_lengths) or 1, "num_heads": case.num_heads}
    qkv = random_qkv(case.grid, head_dim=case.head_dim, dtype=case.dtype, **sizes)
    return qkv, random_mask(case.grid, density=case.density, **sizes)


@pytest.mark.parametrize(
    "name",
    mostly_nightly(CASES, ("uneven-rows", "head-dim-128-exact", "boxes")),
)
def test_matches_numpy(name):
    case = CASES[name]
    qkv, dense = inputs(case)
    mask = compress(dense, case.grid)
    given = qkv
    if case.order == "raster":
        given = [x[:, case.grid.raster_order] for x in qkv]
    out, lse = attend(
        *given, mask, case.grid, case.text_lengths, order=case.order, **case.config
    )
    if case.order == "raster":
        out, lse = out[:, case.grid.tile_order], lse[:, :, case.grid.tile_order]
    want_out, want_lse = numpy_attention(
        *qkv, dense, case.grid, text_lengths=case.text_lengths or None
    )
    assert out.dtype == case.dtype
    np.testing.assert_allclose(out.astype("float32"), want_out, **ATTENTION[case.dtype])
    np.testing.assert_allclose(lse, want_lse, **LSE[case.dtype])


HUGE_GRID = VideoGrid(1, 8, 64)


def huge_inputs():
    q, k, v = random_qkv(HUGE_GRID, batch=1, num_heads=1, head_dim=64, dtype="float16")
    q, k = 10 * q, 30 * k
    return (q, k, v), random_mask(HUGE_GRID, batch=1, num_heads=1, density=0.7)


@pytest.mark.nightly
@pytest.mark.parametrize("scale", [1.0, -0.7], ids=str)
def test_huge_logits(scale):
    """Logits of 1e4 give no NaN; a negative scale turns the largest product around."""
    qkv, dense = huge_inputs()
    mask = compress(dense, HUGE_GRID)
    out, lse = attend(*qkv, mask, HUGE_GRID, (), scale=scale)
    want_out, want_lse = numpy_attention(*qkv, dense, HUGE_GRID, scale=scale)
    assert np.abs(want_lse[np.isfinite(want_lse)]).max() > 4e3
    np.testing.assert_allclose(out.astype("float32"), want_out, **HUGE_LOGITS)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-6)


@pytest.mark.nightly
def test_huge_logits_need_the_repair(monkeypatch):
    """Or the test above would say nothing about it."""
    monkeypatch.setattr(hopper, "repair", lambda q, k, v, work, *outputs, **_: outputs)
    qkv, dense = huge_inputs()
    mask = compress(dense, HUGE_GRID)
    # Other options than those of any test before: compiled programs are kept.
    _, lse = attend(*qkv, mask, HUGE_GRID, (), scale=1.0, num_slots=4)
    failed = ~(np.asarray(lse) < np.inf).reshape(-1, 128).all(axis=1)
    assert 2 <= failed.sum() <= failed.size


@pytest.mark.nightly
@pytest.mark.parametrize("growth", [12.0, 60.0], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_logits_that_grow_from_block_to_block(growth, dtype):
    """Float16 grows its references; bfloat16 is computed again where needed."""
    grid = VideoGrid(1, 8, 48)
    q, k, v = random_qkv(grid, batch=1, num_heads=1, head_dim=64, dtype=dtype)
    q = q.at[..., 0].set(1.0)
    block = np.arange(grid.num_tokens) // 128
    k = k.at[..., 0].set((growth * block).astype(dtype)[:, None])
    dense = np.ones((1, 1, grid.num_blocks, grid.num_blocks), bool)
    out, lse = attend(q, k, v, compress(dense, grid), grid, (), scale=1.0)
    want_out, want_lse = numpy_attention(q, k, v, dense, grid, scale=1.0)
    np.testing.assert_allclose(out.astype("float32"), want_out, **ATTENTION[dtype])
    np.testing.assert_allclose(lse, want_lse, **LSE[dtype])


@pytest.mark.nightly
def test_first_block_without_keys_and_logits_far_below_zero():
    """All weights would be too small for float32 if the reference stayed 0."""
    grid = VideoGrid(1, 8, 16, text_length=128, text_side="before")
    q, k, v = random_qkv(grid, batch=1, num_heads=1, head_dim=64, dtype="bfloat16")
    q, k = q.at[..., 0].set(20.0), k.at[..., 0].set(-20.0)
    dense = np.ones((1, 1, grid.num_blocks, grid.num_blocks), bool)
    out, lse = attend(q, k, v, compress(dense, grid), grid, (0,), scale=1.0)
    want_out, want_lse = numpy_attention(
        q, k, v, dense, grid, scale=1.0, text_lengths=(0,)
    )
    assert want_lse[0, 0, 128:].max() < -200
    np.testing.assert_allclose(out.astype("float32"), want_out, **ATTENTION["bfloat16"])
    np.testing.assert_allclose(lse, want_lse, **HUGE_LSE)


@pytest.mark.nightly
def test_nan_stays_nan():
    grid = VideoGrid(1, 8, 32)
    q, k, v = random_qkv(grid, batch=1, num_heads=1, head_dim=64, dtype="float16")
    q = q.at[0, 130, 0].set(jnp.nan)
    dense = np.ones((1, 1, grid.num_blocks, grid.num_blocks), bool)
    out, lse = attend(q, k, v, compress(dense, grid), grid, ())
    is_nan = np.arange(grid.num_tokens) == 130
    np.testing.assert_array_equal(np.isnan(lse)[0, 0], is_nan)
    np.testing.assert_array_equal(np.isnan(out).all(axis=(0, 2, 3)), is_nan)


GRADIENT_CASES = {
    "edges-and-ragged-text": Case(
        grid=VideoGrid(1, 13, 16, text_length=40), text_lengths=(40, 7), dtype="float16"
    ),
    "raster": Case(grid=VideoGrid(1, 13, 32, text_length=40), order="raster"),
    "short-tiles": Case(grid=VideoGrid(1, 10, 20, tile=(6, 20)), dtype="float16"),
    "raster-by-rows": Case(
        grid=VideoGrid(1, 9, 24), num_heads=2, dtype="float16", order="raster"
    ),
}


def sum_of(out, lse):
    """Has derivatives in all of both; -inf counts as 0."""
    lse = jnp.where(jnp.isfinite(lse), lse, 0.0)
    return jnp.sin(out.astype(jnp.float32)).sum() + jnp.cos(lse).sum()


def gradients_of(loss):
    """In one program: eager calls would compile every operation for itself."""
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))


def matrix_gradients(qkv, dense, grid, text_lengths=()):
    """By `jax.grad` through a softmax over whole float32 matrices."""

    def loss(q, k, v):
        return sum_of(
            *matrix_attention(q, k, v, dense, grid, text_lengths=text_lengths, xp=jnp)
        )

    return gradients_of(loss)(*(x.astype("float32") for x in qkv))


@pytest.mark.nightly
@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_gradients_match_dense_matrices(name):
    case = GRADIENT_CASES[name]
    qkv, dense = inputs(case)
    mask = compress(dense, case.grid)
    places = slice(None) if case.order == "tiled" else case.grid.raster_order

    def loss(q, k, v):
        return sum_of(
            *attend(q, k, v, mask, case.grid, case.text_lengths, order=case.order)
        )

    got = gradients_of(loss)(*(x[:, places] for x in qkv))
    want = matrix_gradients(qkv, dense, case.grid, case.text_lengths)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == case.dtype
        assert relative_error(x, y[:, places]) < GRADIENT_RELATIVE[case.dtype]


@pytest.mark.nightly
def test_vmap_and_grad():
    """A mapped axis joins the batch."""
    case = Case(grid=VideoGrid(1, 13, 16), dtype="float16")
    q, k, v = random_qkv(case.grid, num_heads=1, head_dim=64, dtype="float16")
    dense = random_mask(case.grid, num_heads=1)
    mask = compress(dense, case.grid)

    def loss(q, k, v):
        def one(q, k, v, mask):
            mask = jax.tree.map(lambda x: x[None], mask)
            return attend(q[None], k[None], v[None], mask, case.grid, ())

        return sum_of(*jax.vmap(one)(q, k, v, mask))

    got = gradients_of(loss)(q, k, v)
    for x, y in zip(got, matrix_gradients((q, k, v), dense, case.grid), strict=True):
        assert relative_error(x, y) < GRADIENT_RELATIVE["float16"]
