"""Output of attention plus a map of the queries, for Hopper (sm_90).

A CTA of one warpgroup takes some consecutive blocks of 64 tokens of a head. The head's
matrix comes to shared memory once, queries and output of two blocks are on their way or
worked on. Sums leave through the memory that the output came to. Two CTAs fit on a
multiprocessor, so that one's copies run while the other one waits.

Barrier      arrives  waits
matrix_full  TMA      all threads: the head's matrix has landed
full         TMA      all threads, once for each block: queries and output have

Hazards
-------
- A slot is copied into again once its sum has been read out of it.
- The last block may reach past the sequence. What is read there is zeros, and TMA
  stores nothing there.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.common.batching import fold_mapped_axes
from pallas_kernels.common.lanes import (
    ALIGNMENT,
    ROWS,
    WGMMA,
    WGMMA_COLUMN,
    smem_transforms,
)
from pallas_kernels.common.validation import why_not_among
from pallas_kernels.query_map.sm90 import emulated, instructions

DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 128)
SLOTS = 2  # blocks that are on their way or worked on
BLOCKS = 8  # of a CTA: a 24th of what it reads is the matrix


def why_unsupported(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> str | None:
    """Returns why the kernel takes such queries on no device, or None.

    Args:
      shape: That of the queries, [B, T, N, D].
      dtype: Theirs.
    """
    _, num_tokens, _, head_dim = shape
    if cause := why_not_among(DTYPES, jnp.dtype(dtype).name):
        return cause
    if cause := why_not_among(HEAD_DIMS, head_dim, "a head dimension of {}"):
        return cause
    if num_tokens < ROWS:
        return f"it takes {ROWS} tokens or more, not {num_tokens}"
    if num_tokens % ALIGNMENT:
        return (
            f"it takes a multiple of {ALIGNMENT} tokens, not {num_tokens}; text may be "
            "padded to one (`text_lengths`)"
        )
    return None


def add_query_map(
    out: Float[Array, "B T N D"],
    q: Float[Array, "B T N D"],
    matrix: Float[Array, "B N D D"],
    offset: Float[Array, "B N D"],
    *,
    tokens: tuple[int, int],
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Float[Array, "B T N D"]:
    """Computes the sum; see `pallas_kernels.query_map.unchecked_add_query_map`.

    Args:
      out: As there.
      q: As there.
      matrix: As there.
      offset: As there.
      tokens: As there.
      interpret: Run on the CPU in GPU interpret mode.

    Raises:
      ValueError: The kernel cannot take these queries on any device.
    """
    if cause := why_unsupported(q.shape, q.dtype):
        raise ValueError(f"the kernel for a map of queries cannot take them: {cause}")
    run = functools.partial(_run, tokens=tokens, interpret=interpret)
    small = matrix.astype(q.dtype), offset.astype(jnp.float32)
    return fold_mapped_axes(run)(out.astype(q.dtype), q, *small)[0].astype(out.dtype)


def _run(out, q, matrix, offset, *, tokens: tuple[int, int], interpret):
    batch, num_tokens, num_heads, head_dim = q.shape
    num_blocks = -(-num_tokens // ROWS)

    def smem(*shape: int) -> Any:
        size = (*shape, head_dim)
        return plgpu.SMEM(size, q.dtype, transforms=smem_transforms())

    result = plgpu.kernel(
        functools.partial(
            _body,
            tokens=tokens,
            add=instructions.add_product if interpret is None else emulated.add_product,
        ),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types={
            "matrix_smem": smem(head_dim),
            "q_smem": smem(SLOTS, ROWS),
            "out_smem": smem(SLOTS, ROWS),
            "matrix_full": plgpu.Barrier(),
            "full": plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
        },
        # CTAs that run together work on all heads of the same tokens.
        grid=(-(-num_blocks // BLOCKS), batch, num_heads),
        grid_names=("part", "batch", "head"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="query_map_sm90",
        interpret=interpret,
    )(out, q, matrix, offset)
    return (result,)


def _body(
    out_gmem,
    q_gmem,
    matrix_gmem,
    offset_gmem,
    result_gmem,
    *,
    matrix_smem,
    q_smem,
    out_smem,
    matrix_full,
    full,
    tokens: tuple[int, int],
    add: Any,
):
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    num_tokens = q_gmem.shape[1]
    first = lax.axis_index("part") * BLOCKS
    count = jnp.minimum(-(-num_tokens // ROWS) - first, BLOCKS)

    def first_token(step):
        return (first + step) * ROWS

    def rows_of(array, step):
        return array.at[batch, pl.ds(first_token(step), ROWS), head]

    def fetch(step, slot) -> None:
        for array, smem in ((q_gmem, q_smem), (out_gmem, out_smem)):
            plgpu.copy_gmem_to_smem(rows_of(array, step), smem.at[slot], full.at[slot])

    plgpu.copy_gmem_to_smem(matrix_gmem.at[batch, head], matrix_smem, matrix_full)
    for step in range(SLOTS):
        pl.when(step < count)(functools.partial(fetch, step, step))
    offset = plgpu.load(
        offset_gmem.at[batch, head], layout=WGMMA_COLUMN, optimized=False
    )
    plgpu.barrier_wait(matrix_full)

    def take(step, _):
        slot = lax.rem(step, jnp.int32(SLOTS))
        plgpu.barrier_wait(full.at[slot])
        change = add(offset, q_smem.at[slot], matrix_smem)
        token = plgpu.broadcasted_iota(jnp.int32, change.shape, 0, layout=WGMMA)
        token += first_token(step)
        is_mapped = (token >= tokens[0]) & (token < tokens[1])
        rows = plgpu.load(out_smem.at[slot], layout=WGMMA).astype(jnp.float32)
        total = rows + jnp.where(is_mapped, change, 0.0)
        out_smem[slot] = total.astype(out_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[slot], rows_of(result_gmem, step))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # see the first hazard
        pl.when(step + SLOTS < count)(lambda: fetch(step + SLOTS, slot))

    lax.fori_loop(0, count, take, None)
    plgpu.wait_smem_to_gmem(0)
