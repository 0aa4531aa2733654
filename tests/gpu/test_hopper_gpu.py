"""The Hopper kernel on a Hopper GPU, against float64 NumPy and a float32 oracle."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax.grid import VideoGrid
from pallas_kernels import (
    block_sparse_attention,
    block_sparse_attention_with_lse,
    chosen_backend,
)
from pallas_kernels.attention import reference as oracle
from pallas_kernels.attention.sm90 import backend as hopper
from pallas_kernels.attention.sm90.geometry import geometry_of
from pallas_kernels.attention.sm90.kernel import attend_blocks_again
from pallas_kernels.attention.sm90.partition_lists import partition_lists
from pallas_kernels.attention.sm90.plan import BLOCK, KernelConfig
from pallas_kernels.common import device
from pallas_kernels.common.device import current_device
from tests.pallas_kernels.attention.reference import (
    check_partition,
    compress,
    matrix_attention,
    random_mask,
    random_qkv,
)
from tests.tolerances import GPU_ATTENTION, GPU_LSE, GPU_RELATIVE


@pytest.fixture(autouse=True)
def only_on_hopper():
    current = current_device()
    if current.compute_capability != (9, 0):
        pytest.skip(f"needs a Hopper GPU (sm_90), not {current.kind}")


pytestmark = pytest.mark.gpu


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Shapes of one problem."""

    grid: VideoGrid
    text_lengths: tuple[int, ...] | None = None  # one for each batch item
    batch: int = 2
    num_heads: int = 2
    head_dim: int = 128
    dtype: str = "bfloat16"

    def random(self, *, density: float = 0.4, seed: int = 0):
        """q, k and v, and a map of kept blocks."""
        sizes = {"batch": self.batch, "num_heads": self.num_heads, "seed": seed}
        qkv = random_qkv(self.grid, head_dim=self.head_dim, dtype=self.dtype, **sizes)
        return qkv, random_mask(self.grid, density=density, **sizes)


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


def drawn_case(number: int) -> tuple[Case, str]:
    """Sizes from a generator, and an order; a third or so is copied row by row."""
    rng = np.random.default_rng(number)
    multiple, text_multiple = rng.choice([32, 16, 16, 8, 1]), rng.choice([8, 8, 8, 1])
    text_length = int(rng.choice([0, rng.integers(1, 300)])) // text_multiple
    grid = VideoGrid(
        int(rng.integers(1, 5)),
        int(rng.integers(1, 25)),
        int(multiple * rng.integers(1, 64 // multiple + 1)),
        tile=((8, 16), (8, 16), (16, 8), (4, 32))[rng.integers(4)],
        text_length=int(text_length * text_multiple),
        text_side=str(rng.choice(["before", "after"])),
    )
    batch = int(rng.integers(1, 3))
    lengths = tuple(map(int, rng.integers(0, grid.text_length + 1, batch)))
    case = Case(
        grid=grid,
        text_lengths=lengths if grid.text_length and rng.random() < 0.5 else None,
        batch=batch,
        num_heads=int(rng.integers(1, 4)),
        head_dim=int(rng.choice([64, 128])),
        dtype=str(rng.choice(["bfloat16", "float16"])),
    )
    return case, str(rng.choice(["tiled", "raster"]))


CONFIGS = {
    "exact-softmax": {"exact_softmax": True},
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
        grid=grid,
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
            grid=grid,
            scale=scale,
            text_lengths=lengths if has_lengths else None,
        )


def options_of(case):
    lengths = jnp.asarray(case.text_lengths or (0,) * case.batch, jnp.int32)
    return lengths, {
        "grid": case.grid,
        "scale": case.head_dim**-0.5,
        "has_lengths": case.text_lengths is not None,
    }


@functools.partial(jax.jit, static_argnames="scale")
def float32_block(q, k, v, is_key, *, scale):
    """Attention of one query block [B, 128, N, D] over the keys [B, N, T] it keeps."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    with jax.default_matmul_precision("highest"):
        logits = scale * jnp.einsum("btnd,bsnd->bnts", q, k)
        logits = jnp.where(is_key[:, :, None], logits, -jnp.inf)
        out = jnp.einsum("bnts,bsnd->btnd", jax.nn.softmax(logits, -1), v)
    has_key = is_key.any(-1)[:, None, :, None]
    return jnp.where(has_key, out, 0.0), jax.nn.logsumexp(logits, -1)


def relative_error(x, want):
    x, want = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, want))
    return np.linalg.norm(x - want) / np.linalg.norm(want)


@pytest.mark.parametrize("order", ["tiled", "raster"])
@every_case
def test_matches_numpy(name, order, assert_close):
    case = CASES[name]
    lengths, options = options_of(case)
    options["order"] = order
    qkv, dense = case.random()
    out, lse = attend(*qkv, compress(dense, case.grid), lengths, **options)
    want, want_lse = matrix_attention(
        *qkv, dense, case.grid, text_lengths=case.text_lengths
    )
    assert out.dtype == case.dtype
    tolerance = GPU_ATTENTION[case.dtype]
    assert_close(f"GPU_ATTENTION {case.dtype}", out, want, tolerance)
    assert_close("GPU_LSE", lse, want_lse, GPU_LSE)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["many-blocks-per-cta", "edges-and-ragged-text"])
def test_every_configuration(name, config, assert_close):
    case = CASES[name]
    lengths, options = options_of(case)
    default = KernelConfig.for_head_dim(case.head_dim)
    options["config"] = dataclasses.replace(default, **CONFIGS[config])
    qkv, dense = case.random()
    mask = compress(dense, case.grid)
    out, lse = attend(*qkv, mask, lengths, **options)
    want, want_lse = matrix_attention(
        *qkv, dense, case.grid, text_lengths=case.text_lengths
    )
    tolerance = GPU_ATTENTION[case.dtype]
    assert_close(f"GPU_ATTENTION {case.dtype}", out, want, tolerance)
    assert_close("GPU_LSE", lse, want_lse, GPU_LSE)
    again = attend(*qkv, mask, lengths, **options)
    jax.tree.map(np.testing.assert_array_equal, again, (out, lse))


@pytest.fixture
def check_random_masks(measured, assert_close):
    """Fresh inputs and masks through one compiled program, each run twice."""

    def check(case: Case, order: str, num_masks: int) -> None:
        lengths, options = options_of(case)
        for seed in range(num_masks):
            density = (0.02, 0.1, 0.3, 0.6, 1.0)[seed % 5]
            qkv, dense = case.random(density=density, seed=seed)
            mask = compress(dense, case.grid)
            out, lse = attend(*qkv, mask, lengths, order=order, **options)
            again = attend(*qkv, mask, lengths, order=order, **options)
            want, want_lse = reference(*qkv, mask, lengths, **options)
            jax.tree.map(np.testing.assert_array_equal, again, (out, lse))
            assert_close("GPU_LSE", lse, want_lse, GPU_LSE)
            assert jnp.isfinite(out).all()
            if not (want != 0).any():
                assert not (out != 0).any()
                continue
            error = relative_error(out, want)
            measured(f"GPU_RELATIVE {case.dtype}", error)
            assert error < GPU_RELATIVE[case.dtype]

    return check


@pytest.mark.parametrize("order", ["tiled", "raster"])
@every_case
def test_random_masks(name, order, check_random_masks):
    check_random_masks(CASES[name], order, 40)


@pytest.mark.parametrize("number", range(24))
def test_drawn_cases(number, check_random_masks):
    """Grids, tiles, text, batches, heads, dtypes and orders that nobody chose."""
    check_random_masks(*drawn_case(number), 10)


@pytest.mark.parametrize("order", ["tiled", "raster"])
@pytest.mark.parametrize("name", CASES)
def test_every_output_is_written(name, order, monkeypatch, assert_close):
    """Either launch replaces all of outputs full of NaN, and both by the same values.

    Both are given outputs to write in place, as the second is in use: first with the
    second left out, then with the first left out, so that the second has every query
    block to do. An element that a launch did not write would still be NaN.
    """
    case = CASES[name]
    lengths, options = options_of(case)
    qkv, dense = case.random()
    mask = compress(dense, case.grid)
    # Traced anew: its jit would give what it had compiled without the changes below.
    monkeypatch.setattr(hopper, "_run", hopper._run.__wrapped__)

    def nan_outputs(q, k, v, work, *, plan, interpret=None):
        lse = jnp.full((work.row_offsets.shape[0], plan.num_blocks, BLOCK), jnp.nan)
        return jnp.full(q.shape, jnp.nan, q.dtype), lse

    def first_launch(*inputs, plan, interpret=None):
        outputs = nan_outputs(*inputs, plan=plan)
        return attend_blocks_again(*inputs, *outputs, plan=plan, interpret=interpret)

    def run():
        program = jax.jit(lambda *x: attend.__wrapped__(*x, order=order, **options))
        out, lse = program(*qkv, mask, lengths)
        assert jnp.isfinite(out).all()
        assert (lse < jnp.inf).all()  # false for NaN
        return out, lse

    with monkeypatch.context() as patch:
        patch.setattr(hopper, "attend_blocks", first_launch)
        patch.setattr(hopper, "repair", lambda q, k, v, work, *outputs, **_: outputs)
        out, lse = run()
    monkeypatch.setattr(hopper, "attend_blocks", nan_outputs)
    again, lse_again = run()
    assert relative_error(again, out) < 2 * GPU_RELATIVE[case.dtype]
    assert_close("GPU_LSE", lse_again, lse, GPU_LSE)


CUDNN_GRIDS = (VideoGrid(16, 8, 16), VideoGrid(8, 16, 48), VideoGrid(8, 32, 64))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("grid", CUDNN_GRIDS, ids=lambda grid: f"{grid.num_tokens}")
def test_error_is_that_of_cudnn(grid, head_dim, dtype, measured):
    """Of the same rows: 16 query blocks, which are all of the smallest grid."""
    case = Case(grid=grid, head_dim=head_dim, dtype=dtype)
    lengths, options = options_of(case)
    qkv, dense = case.random()
    mask = compress(np.ones_like(dense), grid)
    out, _ = attend(*qkv, mask, lengths, **options)
    cudnn = jax.nn.dot_product_attention(*qkv, implementation="cudnn")
    is_key = jnp.ones((2, 2, grid.num_tokens), bool)

    def blocks_of(x):
        return x.reshape(2, grid.num_blocks, BLOCK, 2, head_dim)[
            :, :: grid.num_blocks // 16
        ]

    q_blocks = jnp.moveaxis(blocks_of(qkv[0]), 1, 0)
    run = functools.partial(float32_block, scale=options["scale"])
    want = jnp.stack([run(q, *qkv[1:], is_key)[0] for q in q_blocks], axis=1)
    own, other = (relative_error(blocks_of(x), want) for x in (out, cudnn))
    measured(f"error over cuDNN's, {dtype}", own / other)
    assert own <= 1.2 * other


@pytest.mark.parametrize("order", ["tiled", "raster"])
def test_benchmark_shape(order, measured, assert_close):
    """126,720 tokens: query blocks with no, some, all and one of the key blocks."""
    case = Case(grid=VideoGrid(33, 48, 80), batch=1)
    lengths, options = options_of(case)
    qkv, dense = case.random(density=0.1)
    mask = compress(dense, case.grid)
    out, lse = attend(*qkv, mask, lengths, order=order, **options)
    size = case.grid.num_blocks
    for block in (0, 1, size // 3, size // 2, size - 1):
        rows = slice(block * BLOCK, (block + 1) * BLOCK)
        is_key = jnp.asarray(np.repeat(dense[:, :, block], BLOCK, axis=-1))
        q, k, v = qkv
        want, want_lse = float32_block(q[:, rows], k, v, is_key, scale=options["scale"])
        assert_close("GPU_LSE", lse[:, :, rows], want_lse, GPU_LSE)
        for head in range(2):
            got = out[:, rows, head]
            if dense[0, head, block].any():
                error = relative_error(got, want[:, :, head])
                measured("GPU_RELATIVE bfloat16", error)
                assert error < GPU_RELATIVE["bfloat16"]
            else:
                assert not (got != 0).any()


@pytest.mark.parametrize("order", ["tiled", "raster"])
def test_auto_takes_this_kernel(order):
    """Output and log-sum-exp through the public function, to the bit."""
    case = CASES["edges-and-ragged-text"]
    lengths, options = options_of(case)
    qkv, dense = case.random()
    mask = compress(dense, case.grid)
    choice = chosen_backend(qkv[0], grid=case.grid, order=order)
    assert choice.name == "hopper"
    assert choice.slower_because is None

    @jax.jit
    def run(q, k, v, mask, lengths):
        if order == "raster":
            q, k, v = (x[:, case.grid.raster_order] for x in (q, k, v))
        return block_sparse_attention_with_lse(
            q,
            k,
            v,
            mask,
            grid=case.grid,
            text_lengths=lengths,
            order=order,
        )

    out, lse = run(*qkv, mask, lengths)
    if order == "raster":
        out, lse = out[:, case.grid.tile_order], lse[:, :, case.grid.tile_order]
    want, want_lse = attend(*qkv, mask, lengths, order=order, **options)
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(lse, want_lse)


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
    classes = geometry_of(grid, "tiled").width_of_block
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


@pytest.mark.parametrize("order", ["tiled", "raster"])
def test_gradients_match_float32(order):
    grid = VideoGrid(1, 45, 80)
    q, k, v = random_qkv(grid, head_dim=64, dtype="bfloat16")
    mask = compress(random_mask(grid), grid)
    lengths, options = options_of(Case(grid=grid, head_dim=64))
    places = slice(None) if order == "tiled" else grid.raster_order

    def loss(out):
        return jnp.sin(out.astype(jnp.float32)).sum()

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(attention, q, k, v):
        return jax.grad(lambda *x: loss(attention(*x)), argnums=(0, 1, 2))(q, k, v)

    def in_order(q, k, v):
        return block_sparse_attention(
            q, k, v, mask, grid=grid, order=order, backend="hopper"
        )

    def exact(q, k, v):
        return reference(q, k, v, mask, lengths, **options)[0]

    got = gradients(in_order, *(x[:, places] for x in (q, k, v)))
    want = gradients(exact, *(x.astype("float32") for x in (q, k, v)))
    for own, exact_one in zip(got, want, strict=True):
        assert relative_error(own, exact_one[:, places]) < 0.01


def test_the_gpu_says_how_many_ctas_run_at_once(monkeypatch):
    """The number for other machines would order launches for another GPU."""
    monkeypatch.setattr(device, "NUM_MULTIPROCESSORS", 7)
    found = device.num_multiprocessors()
    assert found == jax.local_devices()[0].core_count
    assert 100 <= found <= 132  # of an H100 PCIe to an SXM
