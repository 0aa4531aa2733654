"""The programs that `benchmarks.layer.run` times: stages, and whole layers."""

import dataclasses
import functools
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common.inputs import random_inputs
from benchmarks.common.shapes import SHAPES, Shape
from benchmarks.layer import means_stages, qk_stages
from draft_jax import (
    DraftConfig,
    DraftStep,
    VideoGrid,
    compute_mask,
    constant_step,
    draft_attention,
    initial_mask,
    pool_tokens,
    scheduled_attention,
    select_blocks,
)
from draft_jax.config import Selection
from draft_jax.draft.pooling import pool_queries_and_keys, tiling_of
from pallas_kernels import BackendName, block_sparse_attention
from pallas_kernels.common.interfaces import Order
from pallas_kernels.pooling.sm90 import pool_tiles as pooling_kernel
from pallas_kernels.ranking import xla as ranking_xla
from pallas_kernels.ranking.sm90 import backend as ranking_kernels

TINY = Shape(
    grid=VideoGrid(2, 16, 24, tile=(4, 8)), num_heads=2, head_dim=64, dtype="float32"
)
LONG = Shape(  # the longest rows that the selection kernels take: S = 8,192
    grid=VideoGrid(32, 128, 256, tile=(8, 16)),
    num_heads=2,
    head_dim=64,
    dtype="bfloat16",
)
LAYER_SHAPES = {"tiny": TINY, "long": LONG, **SHAPES}
SELECTIONS: tuple[Selection, ...] = ("percentile", "row_topk", "top_p")
SPARSITIES = (0.75, 0.9)
ORDERS: tuple[Order, ...] = ("tiled", "raster")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A program to time; `inputs` are the names of arrays made beforehand."""

    function: Callable
    inputs: tuple[str, ...]
    nbytes: float = 0.0  # that it must read and write, for its rate


def pool_xla(q, k, *, grid, order):
    """Pools both tensors through the XLA path."""
    return pool_tokens(q, grid, order=order), pool_tokens(k, grid, order=order)


def pool_matmul(q, k, *, grid):
    """Tiled order: sums as products with ones."""
    ones = jnp.ones((1, grid.block_size), q.dtype)

    def pool(x):
        tiles = x.reshape(x.shape[0], grid.num_visual_blocks, grid.block_size, -1)
        sums = jnp.einsum(
            "op,bspc->bsoc", ones, tiles, preferred_element_type=jnp.float32
        )
        return sums / grid.block_size

    return pool(q), pool(k)


def pool_kernel(q, k, *, grid, order, reductions=("mean",)):
    """Pools both tensors through the kernel, whatever the library would choose."""
    table = tiling_of(grid, order).table
    return pooling_kernel.pool_tiles(q, k, table, reductions=reductions)


def logits_of(q_pooled, k_pooled, precision=jax.lax.Precision.HIGHEST):
    """Products of pooled queries with pooled keys."""
    return jnp.einsum("bqnd,bknd->bnqk", q_pooled, k_pooled, precision=precision)


def softmax_and_select(logits, *, shape: Shape, config):
    """Turns logits into the map, the selection and the lists."""
    scores = jax.nn.softmax(logits * shape.head_dim**-0.5, axis=-1)
    return select_blocks(scores, grid=shape.grid, config=config)


def without_kernels(function, digit_bits: int):
    """The XLA path of a selection, whatever the device."""

    def run(*arguments):
        with (
            mock.patch.object(
                ranking_kernels, "why_unsupported", return_value="unwanted"
            ),
            mock.patch.object(ranking_xla, "DIGIT_BITS", digit_bits),
        ):
            return function(*arguments)

    return run


def stages(shape: Shape, backend: BackendName, dense: str) -> dict[str, Stage]:
    """Every program by name. Stages of one layer share a prefix."""
    table = {
        "copy": Stage(lambda q: -q, ("q",), 2 * tensor_bytes(shape)),
        "read": Stage(
            lambda q: q.astype(jnp.float32).sum(), ("q",), tensor_bytes(shape)
        ),
    }
    table |= pooling_stages(shape, backend)
    prepared = qk_stages.entries(shape, backend == "hopper")
    table |= {name: Stage(*entry) for name, entry in prepared.items()}
    table |= selection_stages(shape)
    table |= layer_stages(shape, backend)
    with_means = means_stages.entries(shape, backend)
    table |= {name: Stage(*entry) for name, entry in with_means.items()}
    attend = functools.partial(jax.nn.dot_product_attention, implementation=dense)
    table["dense"] = Stage(attend, ("q", "k", "v"))
    return table


def tensor_bytes(shape: Shape) -> int:
    """Bytes of Q."""
    size = shape.grid.num_tokens * shape.num_heads * shape.head_dim
    return size * jnp.dtype(shape.dtype).itemsize


def pooling_stages(shape: Shape, backend: BackendName) -> dict[str, Stage]:
    """Means of the tiles of Q and K."""
    grid, half = shape.grid, functools.partial
    pools: dict[str, Callable] = {}
    for order in ORDERS:
        pools[f"xla/{order}"] = half(pool_xla, grid=grid, order=order)
        pools[f"default/{order}"] = half(
            pool_queries_and_keys, grid=grid, config=DraftConfig.paper(), order=order
        )
        if backend == "hopper":
            pools[f"kernel/{order}"] = half(pool_kernel, grid=grid, order=order)
    if backend == "hopper":
        both = half(pool_kernel, grid=grid, order="tiled", reductions=("mean", "max"))
        pools["kernel/tiled-mean+max"] = both
    if not grid.has_short_blocks:
        pools["matmul/tiled"] = half(pool_matmul, grid=grid)
    nbytes = 2 * tensor_bytes(shape)
    return {f"pool/{n}": Stage(pool, ("q", "k"), nbytes) for n, pool in pools.items()}


def selection_stages(shape: Shape) -> dict[str, Stage]:
    """Returns stages from pooled Q and K to lists, in parts and at once (`mask`)."""
    grid, half = shape.grid, functools.partial
    table: dict[str, Stage] = {}
    for precision in ("highest", "high", "default"):
        logits = half(logits_of, precision=jax.lax.Precision(precision))
        table[f"logits/{precision}"] = Stage(logits, ("q_pooled", "k_pooled"))
    table["softmax"] = Stage(half(jax.nn.softmax, axis=-1), ("logits",))
    for name in SELECTIONS:
        config = DraftConfig.paper(sparsity=0.9, selection=name)
        select = half(select_blocks, grid=grid, config=config)
        table[f"select/{name}"] = Stage(select, ("scores",))
        for bits in (1, 2, 4) if name == "percentile" else (2,):
            select_xla = without_kernels(select, bits)
            table[f"select-xla-{bits}/{name}"] = Stage(select_xla, ("scores",))
        for sparsity in SPARSITIES if name == "percentile" else (0.9,):
            config = DraftConfig.paper(sparsity=sparsity, selection=name)
            select = half(softmax_and_select, shape=shape, config=config)
            table[f"softmax+select/{name}/{sparsity}"] = Stage(select, ("logits",))
    for order in ORDERS:
        config = DraftConfig.paper(sparsity=0.9)
        mask = half(compute_mask, grid=grid, config=config, order=order)
        table[f"mask/{order}"] = Stage(mask, ("q", "k"))
    return table


def layer_stages(shape: Shape, backend: BackendName) -> dict[str, Stage]:
    """Attention on given masks, whole layers, and layers of each kind of step."""
    grid, half = shape.grid, functools.partial
    qkv = ("q", "k", "v")
    table: dict[str, Stage] = {}
    for sparsity in SPARSITIES:
        sparse = half(block_sparse_attention, grid=grid, order="tiled", backend=backend)
        table[f"sparse/{sparsity}"] = Stage(sparse, (*qkv, f"mask_{sparsity}"))
        for order in ORDERS:
            layer = layer_of(shape, backend, order, sparsity)
            table[f"layer/{order}/{sparsity}"] = Stage(layer, qkv)
    config = DraftConfig.paper(sparsity=0.9)
    attend = half(
        scheduled_attention, grid=grid, config=config, order="tiled", backend=backend
    )

    def scheduled(step, q, k, v, mask):
        return attend(q, k, v, step=step, mask=mask)

    for name, step in steps(grid, config).items():
        # Known when it is traced, or an argument: then XLA waits on the host.
        inputs = (*qkv, "mask_0.9")
        table[f"scheduled/{name}"] = Stage(half(scheduled, step), inputs)
        table[f"scheduled-traced/{name}"] = Stage(scheduled, (f"step_{name}", *inputs))
    return table


def layer_of(
    shape: Shape, backend: BackendName, order: Order, sparsity: float
) -> Callable:
    """A whole layer of q, k and v."""
    return functools.partial(
        draft_attention,
        grid=shape.grid,
        config=DraftConfig.paper(sparsity=sparsity),
        order=order,
        backend=backend,
    )


def steps(grid, config) -> dict[str, DraftStep]:
    """The kinds of steps of a schedule."""
    refresh = constant_step(grid, config)
    reuse = dataclasses.replace(refresh, refresh=np.asarray(False))
    dense = constant_step(grid, config, dense=True)
    return {"refresh": refresh, "reuse": reuse, "dense": dense}


def make_inputs(shape: Shape) -> dict[str, object]:
    """The arrays that stages take, by name."""
    q, k, v = random_inputs(shape)
    grid = shape.grid
    pooled = jax.jit(functools.partial(pool_xla, grid=grid, order="tiled"))(q, k)
    logits = jax.jit(logits_of)(*pooled)
    scores = jax.jit(lambda x: jax.nn.softmax(x * shape.head_dim**-0.5, -1))(logits)
    config = DraftConfig.paper(sparsity=0.9)
    inputs = {"q": q, "k": k, "v": v, "q_pooled": pooled[0], "k_pooled": pooled[1]}
    inputs |= {"logits": logits, "scores": scores}
    inputs |= {f"step_{name}": step for name, step in steps(grid, config).items()}
    inputs |= qk_stages.make_inputs(shape)
    for sparsity in SPARSITIES:
        select = functools.partial(
            select_blocks, grid=grid, config=DraftConfig.paper(sparsity=sparsity)
        )
        inputs[f"mask_{sparsity}"] = jax.jit(select)(scores)
    inputs |= means_stages.make_inputs(inputs)
    start = initial_mask(grid, config, batch=1, num_heads=shape.num_heads)
    assert start.capacity == inputs["mask_0.9"].capacity
    return inputs
