"""The Hopper kernel on a Hopper GPU, against float64 NumPy and a float32 oracle."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax.grid import VideoGrid
from pallas_kernels import block_sparse_attention, chosen_backend, hopper, oracle
from pallas_kernels.interfaces import current_device
from pallas_kernels.partition_lists_sm90 import partition_lists
from pallas_kernels.sm90_geometry import geometry
from pallas_kernels.sm90_plan import KernelConfig
from tests.pallas_kernels.reference import (
    check_partition,
    compress,
    matrix_attention,
    random_mask,
    random_qkv,
)
from tests.tolerances import GPU_ATTENTION, GPU_LSE, GPU_RELATIVE


@pytest.fixture(autouse=True)
def only_on_hopper():
    device = current_device()
    if device.compute_capability != (9, 0):
        pytest.skip(f"needs a Hopper GPU (sm_90), not {device.kind}")


pytestmark = pytest.mark.gpu


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Two batch items, two heads."""

    grid: VideoGrid
    text_lengths: tuple[int, int] | None = None
    head_dim: int = 128
    dtype: str = "bfloat16"


CASES = {
    "divisible": Case(grid=VideoGrid(4, 16, 32)),
    "many-blocks-per-cta": Case(grid=VideoGrid(12, 24, 64), head_dim=64),
    "float16": Case(grid=VideoGrid(4, 16, 32), dtype="float16"),
    "edges": Case(grid=VideoGrid(3, 45, 80)),
    "edges-and-ragged-text": Case(
        grid=VideoGrid(3, 45, 80, text_length=40), text_lengths=(40, 7)
    ),
    "text-before-and-empty": Case(
        grid=VideoGrid(3, 30, 52, text_length=264, text_side="before"),
        text_lengths=(0, 130),
        head_dim=64,
        dtype="float16",
    ),
    "blocks-not-aligned": Case(
        grid=VideoGrid(3, 15, 26, text_length=13), text_lengths=(13, 0), head_dim=64
    ),
    "fewer-tokens-than-a-block": Case(grid=VideoGrid(1, 3, 5)),
}
# Tests of one case share compiled programs: `--dist loadgroup` keeps them together.
every_case = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in CASES]
)
CONFIGS = {
    "no-ping-pong": {"ping_pong": False},
    "no-overlap": {"overlap": False},
    "shared-memory-barriers": {"named_barriers": False},
    "exact-softmax": {"lazy": False},
    "no-pairs": {"pairs": False},
    "all-rows": {"skip_rows": False},
    "four-slots": {"num_slots": 4},
}


@functools.partial(
    jax.jit, static_argnames=("grid", "scale", "has_lengths", "order", "config")
)
def attend(
    q, k, v, mask, lengths, *, grid, scale, has_lengths, order="tiled", config=None
):
    """Takes and returns tiled order; the kernel reads and writes `order`."""
    if order == "raster":
        q, k, v = (x[:, grid.raster_order] for x in (q, k, v))
    out, lse = hopper.hopper_attention(
        q,
        k,
        v,
        mask,
        layout=grid,
        scale=scale,
        text_lengths=lengths if has_lengths else None,
        order=order,
        config=config,
    )
    if order == "raster":
        out, lse = out[:, grid.tile_order], lse[:, :, grid.tile_order]
    return out, lse


@functools.partial(jax.jit, static_argnames=("grid", "scale", "has_lengths"))
def reference(q, k, v, mask, lengths, *, grid, scale, has_lengths):
    with jax.default_matmul_precision("highest"):
        return oracle.oracle_attention(
            *(x.astype(jnp.float32) for x in (q, k, v)),
            mask,
            layout=grid,
            scale=scale,
            text_lengths=lengths if has_lengths else None,
        )


def options_of(case):
    lengths = jnp.asarray(case.text_lengths or (0, 0), jnp.int32)
    return lengths, {
        "grid": case.grid,
        "scale": case.head_dim**-0.5,
        "has_lengths": case.text_lengths is not None,
    }


def poison():
    """Leaves NaN in memory that the next outputs may be given."""
    jnp.full(64 << 20, jnp.nan).block_until_ready()


def relative_error(x, want):
    x, want = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, want))
    return np.linalg.norm(x - want) / np.linalg.norm(want)


@pytest.mark.parametrize("order", ["tiled", "raster"])
@every_case
def test_matches_numpy(name, order):
    case = CASES[name]
    lengths, options = options_of(case)
    options["order"] = order
    qkv = random_qkv(case.grid, head_dim=case.head_dim, dtype=case.dtype)
    dense = random_mask(case.grid)
    poison()
    out, lse = attend(*qkv, compress(dense, case.grid), lengths, **options)
    want, want_lse = matrix_attention(
        *qkv, dense, case.grid, text_lengths=case.text_lengths
    )
    assert out.dtype == case.dtype
    np.testing.assert_allclose(
        out.astype(jnp.float32), want, **GPU_ATTENTION[case.dtype]
    )
    np.testing.assert_allclose(lse, want_lse, **GPU_LSE)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["many-blocks-per-cta", "edges-and-ragged-text"])
def test_every_configuration(name, config):
    case = CASES[name]
    lengths, options = options_of(case)
    default = KernelConfig.for_head_dim(case.head_dim)
    options["config"] = dataclasses.replace(default, **CONFIGS[config])
    qkv = random_qkv(case.grid, head_dim=case.head_dim, dtype=case.dtype)
    dense = random_mask(case.grid)
    mask = compress(dense, case.grid)
    out, lse = attend(*qkv, mask, lengths, **options)
    want, want_lse = matrix_attention(
        *qkv, dense, case.grid, text_lengths=case.text_lengths
    )
    np.testing.assert_allclose(
        out.astype(jnp.float32), want, **GPU_ATTENTION[case.dtype]
    )
    np.testing.assert_allclose(lse, want_lse, **GPU_LSE)
    again = attend(*qkv, mask, lengths, **options)
    jax.tree.map(np.testing.assert_array_equal, again, (out, lse))


@pytest.mark.parametrize("order", ["tiled", "raster"])
@every_case
def test_random_masks(name, order):
    """Fresh inputs and masks through one compiled program, each run twice."""
    case = CASES[name]
    lengths, options = options_of(case)
    for seed in range(40):
        density = (0.02, 0.1, 0.3, 0.6, 1.0)[seed % 5]
        qkv = random_qkv(case.grid, head_dim=case.head_dim, dtype=case.dtype, seed=seed)
        mask = compress(random_mask(case.grid, density=density, seed=seed), case.grid)
        poison()
        out, lse = attend(*qkv, mask, lengths, order=order, **options)
        again = attend(*qkv, mask, lengths, order=order, **options)
        want, want_lse = reference(*qkv, mask, lengths, **options)
        jax.tree.map(np.testing.assert_array_equal, again, (out, lse))
        np.testing.assert_allclose(lse, want_lse, **GPU_LSE)
        assert jnp.isfinite(out).all()
        assert relative_error(out, want) < GPU_RELATIVE[case.dtype]


def test_error_is_that_of_cudnn():
    grid = VideoGrid(8, 16, 48)
    qkv = random_qkv(grid, head_dim=128, dtype="bfloat16")
    mask = compress(np.ones((2, 2, grid.num_blocks, grid.num_blocks), bool), grid)
    lengths = jnp.zeros(2, jnp.int32)
    options = {"grid": grid, "scale": 128**-0.5, "has_lengths": False}
    out, _ = attend(*qkv, mask, lengths, **options)
    cudnn = jax.nn.dot_product_attention(*qkv, implementation="cudnn")
    want, _ = reference(*qkv, mask, lengths, **options)
    assert relative_error(out, want) <= 1.2 * relative_error(cudnn, want)


@pytest.mark.parametrize("scale", [1.0, -0.7], ids=str)
def test_huge_logits(scale):
    grid = VideoGrid(3, 16, 32)
    q, k, v = random_qkv(grid, head_dim=128, dtype="float16")
    q, k = 10 * q, 30 * k
    mask = compress(random_mask(grid), grid)
    lengths = jnp.zeros(2, jnp.int32)
    options = {"grid": grid, "scale": scale, "has_lengths": False}
    out, lse = attend(q, k, v, mask, lengths, **options)
    want, want_lse = reference(q, k, v, mask, lengths, **options)
    assert jnp.abs(jnp.where(jnp.isfinite(want_lse), want_lse, 0.0)).max() > 4e3
    assert relative_error(out, want) < 0.02
    np.testing.assert_allclose(lse, want_lse, **GPU_LSE)


@pytest.mark.parametrize("density", [0.02, 0.3, 1.0])
def test_partition_of_lists(density):
    grid = VideoGrid(6, 30, 52, text_length=40)
    classes = geometry(grid, "tiled").width_of_block
    mask = compress(random_mask(grid, density=density), grid)
    offsets = mask.row_offsets.reshape(4, -1)
    ids = mask.block_ids.reshape(4, -1)
    got = partition_lists(offsets, ids, classes, num_classes=3)
    check_partition(got, offsets, ids, classes)


@pytest.mark.parametrize("growth", [12.0, 60.0, 400.0], ids=str)
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(dtype, marks=pytest.mark.xdist_group(f"grow-{dtype}"))
        for dtype in ("float16", "bfloat16")
    ],
)
def test_logits_that_grow_from_block_to_block(growth, dtype):
    """The last overflows and is repaired."""
    grid = VideoGrid(3, 16, 64)
    q, k, v = random_qkv(grid, head_dim=128, dtype=dtype)
    q = q.at[..., 0].set(1.0)
    block = np.arange(grid.num_tokens) // 128
    k = k.at[..., 0].set(jnp.asarray(growth * block, dtype)[:, None])
    mask = compress(random_mask(grid, density=0.7), grid)
    lengths = jnp.zeros(2, jnp.int32)
    options = {"grid": grid, "scale": 1.0, "has_lengths": False}
    out, lse = attend(q, k, v, mask, lengths, **options)
    want, want_lse = reference(q, k, v, mask, lengths, **options)
    # Float32 rounds logits of this size, on both sides, and so the weights.
    rounding = 2.0**-23 * float(jnp.abs(want_lse).max())
    assert relative_error(out, want) < GPU_RELATIVE[dtype] + rounding
    np.testing.assert_allclose(lse, want_lse, **GPU_LSE)


def test_gradients_are_those_of_xla():
    grid = VideoGrid(3, 45, 80)
    q, k, v = random_qkv(grid, head_dim=64, dtype="bfloat16")
    mask = compress(random_mask(grid), grid)
    choice = chosen_backend(q, mask, grid=grid, backend="hopper")
    assert choice.slower_because is None

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(backend, q, k, v, mask):
        def loss(q, k, v):
            out = block_sparse_attention(q, k, v, mask, grid=grid, backend=backend)
            return jnp.sin(out.astype(jnp.float32)).sum()

        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    for got, want in zip(
        gradients("hopper", q, k, v, mask),
        gradients("xla", q, k, v, mask),
        strict=True,
    ):
        assert relative_error(got, want) < 0.02
