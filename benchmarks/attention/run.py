"""Times block-sparse attention against dense and sparse attention of other libraries.

    python -m benchmarks.attention.run --output benchmarks/results/attention_h100.json

Every contender gets the same random normal inputs in one process. Effective TFLOP/s
counts the work of the kept blocks: 4 * T^2 * N * D * density / time, with the density
in token pairs. Dense contenders run once for each shape. A contender that cannot run is
recorded with its cause, and so is one whose output is not this project's for the same
mask (`benchmarks.common.agreement`). If this project's kernel fails, the command does.
"""

import argparse
import dataclasses
import functools
import importlib.util
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

# PyTorch shares the card: take memory as it is needed.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import agreement
from benchmarks.common.gpu_state import GpuState
from benchmarks.common.records import write_results
from draft_jax import BlockMask, DraftConfig, VideoGrid, compute_mask
from pallas_kernels import block_sparse_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One attention problem with batch 1."""

    grid: VideoGrid
    num_heads: int
    head_dim: int
    dtype: str = "bfloat16"

    @property
    def dense_flops(self) -> float:
        """Of attention over all pairs of tokens: two products."""
        return 4.0 * self.grid.num_tokens**2 * self.num_heads * self.head_dim


SHAPES = {
    "hunyuan": Shape(grid=VideoGrid(33, 48, 80), num_heads=24, head_dim=128),
    "hunyuan-edges": Shape(
        grid=VideoGrid(33, 45, 80, text_length=256), num_heads=24, head_dim=128
    ),
    "wan": Shape(grid=VideoGrid(21, 48, 80), num_heads=40, head_dim=128),
    "head-dim-64": Shape(grid=VideoGrid(33, 48, 80), num_heads=24, head_dim=64),
}
DENSITIES = (1.0, 0.5, 0.25, 0.1)


def random_inputs(shape: Shape, seed: int = 0) -> tuple[jax.Array, ...]:
    """q, k and v from a standard normal distribution."""
    size = (1, shape.grid.num_tokens, shape.num_heads, shape.head_dim)
    keys = jax.random.split(jax.random.key(seed), 3)
    make = jax.jit(lambda key: jax.random.normal(key, size, shape.dtype))
    return tuple(make(key) for key in keys)


def random_mask(
    grid: VideoGrid, batch: int, num_heads: int, density: float, seed: int = 0
) -> BlockMask:
    """Keeps each block pair with this probability, and one of each row at least.

    Built in NumPy, with room for every pair, so that all densities share one shape.
    """
    rng = np.random.default_rng(seed)
    size = grid.num_blocks
    offsets = np.zeros((batch, num_heads, size + 1), np.int32)
    ids = np.zeros((batch, num_heads, size * size), np.int32)
    for index in np.ndindex(batch, num_heads):
        kept = rng.random((size, size), np.float32) < density
        kept[np.arange(size), rng.integers(0, size, size)] = True
        np.cumsum(kept.sum(1), out=offsets[index][1:])
        columns = np.nonzero(kept)[1]
        ids[index][: columns.size] = columns
    return BlockMask(
        row_offsets=jnp.asarray(offsets), block_ids=jnp.asarray(ids), grid=grid
    )


def smooth_inputs(shape: Shape, seed: int = 0) -> tuple[jax.Array, ...]:
    """q, k and v whose attention prefers tokens near in space and time.

    Sums of a few slow plane waves over the grid, another set for each head, plus
    noise: drafts of them keep whole neighbourhoods, as those of a video model do.
    """
    grid = shape.grid
    axes = [np.arange(n) / n for n in (grid.frames, grid.height, grid.width)]
    place = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    place = np.pad(place, ((0, grid.text_length), (0, 0)))[grid.tile_order]
    rng = np.random.default_rng(seed)
    waves = rng.normal(size=(3, shape.num_heads * shape.head_dim)) * 12
    phase = rng.uniform(0, 2 * np.pi, shape.num_heads * shape.head_dim)
    size = (1, grid.num_tokens, shape.num_heads, shape.head_dim)
    signal = jnp.cos(jnp.asarray(place, jnp.float32) @ waves + phase).reshape(size)

    @jax.jit  # the signal is an argument, or it would be a constant of a gigabyte
    def make(key, signal, amplitude):
        noise = jax.random.normal(key, size, jnp.float32)
        return (noise + amplitude * signal).astype(shape.dtype)

    keys = jax.random.split(jax.random.key(seed), 3)
    amplitudes = (1.0, 1.0, 0.0)
    return tuple(make(k, signal, a) for k, a in zip(keys, amplitudes, strict=True))


def draft_mask(shape: Shape, q: jax.Array, k: jax.Array, density: float) -> BlockMask:
    """What the draft of q and k selects at this share of visual block pairs."""
    config = DraftConfig(sparsity=min(1 - density, 1 - 1e-6))
    select = functools.partial(
        compute_mask, grid=shape.grid, config=config, order="tiled"
    )
    return jax.jit(select)(q, k)


def time_calls(
    call: Callable[[], object], wait: Callable[[object], None], budget_s: float
):
    """Milliseconds of single calls: two to warm up, then five to fifty."""
    for _ in range(2):
        wait(call())
    start = time.perf_counter()
    wait(call())
    once = time.perf_counter() - start
    samples = []
    for _ in range(min(max(int(budget_s / max(once, 1e-6)), 5), 50)):
        start = time.perf_counter()
        wait(call())
        samples.append(1e3 * (time.perf_counter() - start))
    return samples


def summary(samples: list[float], flops: float) -> dict[str, float]:
    """Median, spread and rate."""
    median = statistics.median(samples)
    return {
        "median_ms": median,
        "min_ms": min(samples),
        "max_ms": max(samples),
        "calls": len(samples),
        "effective_tflops": flops / median / 1e9,
    }


# ---------------------------------------------------------------- contenders
# Each gives a call, which returns the output [B, T, N, D], and how to wait for it.


def ours(shape: Shape, qkv, mask: BlockMask):
    """This project's kernel."""
    run = _our_program(shape.grid)
    return functools.partial(run, *qkv, mask), jax.block_until_ready


@functools.lru_cache(maxsize=1)
def _our_program(grid: VideoGrid):
    run = functools.partial(block_sparse_attention, grid=grid, backend="hopper")
    return jax.jit(run)


def cudnn_dense(shape: Shape, qkv):
    """cuDNN's flash attention through JAX."""
    run = jax.jit(
        functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    )
    return functools.partial(run, *qkv), jax.block_until_ready


def mgpu_dense(shape: Shape, qkv):
    """JAX's own Mosaic GPU kernel, which does not scale logits, so queries are scaled.

    Its buffers are float16, so its inputs are too.
    """
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    config = attention_mgpu.TuningConfig(
        block_q=64, block_kv=128, max_concurrent_steps=2
    )
    q, k, v = (x.astype(jnp.float16) for x in qkv)
    q = q * jnp.float16(shape.head_dim**-0.5)
    run = functools.partial(attention_mgpu.attention, q, k, v, config=config)
    return run, jax.block_until_ready


def flash_attention_3(shape: Shape, qkv):
    """FlashAttention-3, where it is installed."""
    import flash_attn_interface

    tensors = _to_torch(qkv)
    return functools.partial(
        flash_attn_interface.flash_attn_func, *tensors
    ), _torch_wait


def flash_attention_4(shape: Shape, qkv):
    """FlashAttention-4 (CuTe), where it is installed."""
    from flash_attn.cute import flash_attn_func

    return functools.partial(flash_attn_func, *_to_torch(qkv)), _torch_wait


def flash_attention_4_sparse(shape: Shape, qkv, mask: BlockMask):
    """FlashAttention-4 with the same kept blocks, all of them full."""
    import torch
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    _refuse_short_blocks(shape)
    counts, indices = (torch.tensor(x).cuda() for x in rows_of_lists(mask))
    blocks = BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(counts),
        mask_block_idx=torch.zeros_like(indices),
        full_block_cnt=counts,
        full_block_idx=indices,
        block_size=(128, 128),
    )
    run = functools.partial(flash_attn_func, block_sparse_tensors=blocks)
    return functools.partial(run, *_to_torch(qkv)), _torch_wait


def rows_of_lists(mask: BlockMask) -> tuple[np.ndarray, np.ndarray]:
    """Kept blocks of each row, and their numbers [B, N, R, R] with zeros after them."""
    counts = np.asarray(mask.counts)
    size = counts.shape[-1]
    indices = np.zeros((*counts.shape, size), np.int32)
    used = np.arange(mask.capacity) < np.asarray(mask.row_offsets)[..., -1:]
    indices[np.arange(size) < counts[..., None]] = np.asarray(mask.block_ids)[used]
    return counts, indices


def _refuse_short_blocks(shape: Shape) -> None:
    if shape.grid.has_short_blocks:
        raise ValueError("short blocks would need a mask of tokens")


def flex_attention(shape: Shape, qkv, mask: BlockMask):
    """PyTorch's FlexAttention with the same kept blocks; tokens are not masked."""
    import torch
    from torch.nn.attention import flex_attention as flex

    _refuse_short_blocks(shape)
    q, k, v = (x.transpose(1, 2).contiguous() for x in _to_torch(qkv))
    counts, indices = (torch.tensor(x).cuda() for x in rows_of_lists(mask))
    # Every kept block is full: no element of it is masked.
    block_mask = flex.BlockMask.from_kv_blocks(
        torch.zeros_like(counts),
        torch.zeros_like(indices),
        counts,
        indices,
        BLOCK_SIZE=128,
    )
    run = functools.partial(_compiled_flex(), q, k, v, block_mask=block_mask)
    return lambda: run().transpose(1, 2), _torch_wait  # a view


@functools.lru_cache(maxsize=1)
def _compiled_flex():
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _to_torch(arrays):
    import torch

    return tuple(torch.utils.dlpack.from_dlpack(x) for x in arrays)


def _torch_wait(_):
    import torch

    torch.cuda.synchronize()


DENSE = {
    "cudnn": cudnn_dense,
    "attention_mgpu": mgpu_dense,
    "fa3": flash_attention_3,
    "fa4": flash_attention_4,
}
SPARSE = {
    "ours": ours,
    "flex_attention": flex_attention,
    "fa4_sparse": flash_attention_4_sparse,
}
MODULES = {
    "fa3": "flash_attn_interface",
    "fa4": "flash_attn.cute",
    "flex_attention": "torch",
    "fa4_sparse": "flash_attn.cute",
}


def measure(
    contender: str, make, flops: float, budget_s: float, check=None
) -> dict[str, object]:
    """One record; a failure is one too, and an output in which `check` finds one."""
    module = MODULES.get(contender)
    if module is not None and not _is_installed(module):
        return {"error": f"{module} is not installed"}
    try:
        call, wait = make()
        out = call()  # compiles
        wait(out)
        checked = {} if check is None else check(out)
        del out
        if "error" in checked:
            return checked
        with GpuState() as state:
            samples = time_calls(call, wait, budget_s)
        return {**summary(samples, flops), **checked, **state.summary}
    except Exception as error:  # recorded: other contenders still run
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of what the module is in
        return False


def check_against_ours(shape: Shape, qkv, mask: BlockMask):
    """What `measure` checks the others' outputs with; None where ours fails."""
    tokens = agreement.one_token_of_each_block(shape.grid)
    try:
        call, _ = ours(shape, qkv, mask)
        want = agreement.rows_at(call(), tokens)
    except Exception as error:  # others are still timed
        print(f"outputs are not compared: {error}"[:500], file=sys.stderr)
        return None
    return functools.partial(agreement.compare, want=want, tokens=tokens)


def run_shape(name: str, options: argparse.Namespace, report) -> None:
    """All contenders and masks of one shape."""
    shape = SHAPES[name]
    grid = shape.grid
    contenders = options.contenders
    qkv = random_inputs(shape)

    def record(contender, mask_kind, density, result):
        report(
            {
                "shape": name,
                "tokens": grid.num_tokens,
                "heads": shape.num_heads,
                "head_dim": shape.head_dim,
                "dtype": "float16" if contender == "attention_mgpu" else shape.dtype,
                "contender": contender,
                "mask": mask_kind,
                "density": density,
                **result,
            }
        )

    def run_dense(contender, mask_kind, check):
        make = functools.partial(DENSE[contender], shape, qkv)
        result = measure(contender, make, shape.dense_flops, options.seconds, check)
        record(contender, mask_kind, 1.0, result)

    dense = [contender for contender in contenders if contender in DENSE]
    if dense:
        full = BlockMask.full(grid=grid, batch=1, num_heads=shape.num_heads)
        check_dense = check_against_ours(shape, qkv, full)
    for contender in dense:
        run_dense(contender, "dense", check_dense)
    for mask_kind in options.masks:
        inputs = qkv if mask_kind == "random" else smooth_inputs(shape)
        for density in options.densities:
            if mask_kind == "draft" and density == 1.0:
                continue  # the same as a random mask of density 1
            if mask_kind == "random":
                mask = random_mask(grid, 1, shape.num_heads, density)
            else:
                q, k, _ = inputs
                mask = draft_mask(shape, q, k, density)
            kept = float(np.mean(np.asarray(mask.density)))
            flops = shape.dense_flops * kept
            check = check_against_ours(shape, inputs, mask)
            for contender in contenders:
                if contender in SPARSE:
                    make = functools.partial(SPARSE[contender], shape, inputs, mask)
                    result = measure(contender, make, flops, options.seconds, check)
                    record(contender, mask_kind, kept, result)
    if "cudnn" in contenders:  # again, for the card has become warm
        run_dense("cudnn", "dense, at the end", check_dense)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[*SHAPES])
    parser.add_argument("--densities", nargs="+", type=float, default=[*DENSITIES])
    parser.add_argument(
        "--masks", nargs="+", choices=("random", "draft"), default=["random", "draft"]
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=[*DENSE, *SPARSE],
        default=[*DENSE, *SPARSE],
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    results: list[dict[str, object]] = []

    def report(result):
        results.append(result)
        rate = result.get("effective_tflops", math.nan)
        print(
            f"{result['shape']:14s} {result['contender']:15s} {result['mask']:7s}"
            f"{result['density']:7.3f} {result.get('median_ms', math.nan):9.2f} ms"
            f"{rate:8.0f} TFLOP/s  {result.get('error', '')}",
            flush=True,
        )
        if options.output is not None:
            write_results(options.output, results)

    for name in options.shapes:
        run_shape(name, options, report)
    failed = [r for r in results if r["contender"] == "ours" and "error" in r]
    if failed:
        sys.exit(f"this project's kernel failed in {len(failed)} of {len(results)}")


if __name__ == "__main__":
    main()
