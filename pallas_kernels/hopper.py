"""The backend "hopper": block-sparse attention on H100 and H200.

The forward pass is the kernel of `block_sparse_attention_sm90`; gradients are the XLA
backend's, from the kernel's output and log-sum-exp.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import sm90_plan as sm90
from pallas_kernels import xla
from pallas_kernels.block_sparse_attention_sm90 import (
    Work,
    attend_blocks,
    attend_blocks_again,
)
from pallas_kernels.interfaces import (
    Backend,
    BlockLayout,
    BlockLists,
    Problem,
    valid_lengths,
)

SUPPORTED_DTYPES = ("bfloat16", "float16")
SUPPORTED_HEAD_DIMS = (64, 128)
NUM_MULTIPROCESSORS = 132  # of an H100 or H200 SXM, where no GPU can be asked


def hopper_attention(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    mask: BlockLists,
    *,
    layout: BlockLayout,
    scale: float,
    text_lengths: Int[Array, " B"] | None,
    config: sm90.KernelConfig | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Float[Array, "B T N D"], Float[Array, "B N T"]]:
    """Attention over kept blocks on a Hopper GPU, differentiable in reverse mode.

    Args:
      q: Queries in tiled order, bfloat16 or float16.
      k: Keys.
      v: Values.
      mask: Kept block pairs.
      layout: Geometry of the blocks.
      scale: Factor on the logits.
      text_lengths: Valid text tokens of each batch item; None means all.
      config: Buffers and scheduling; chosen by head dimension when None.
      interpret: Run the kernel on the CPU in GPU interpret mode.

    Returns:
      The output in q's dtype and the float32 log-sum-exp [B, N, T]; zeros and -inf
      for queries without a valid key.

    Raises:
      ValueError: The dtype, head dimension or block size is not supported, or the
        config needs too much shared memory.
    """
    if cause := _why_unsupported_shape(q.dtype.name, q.shape[-1], layout.block_size):
        raise ValueError(f"the Hopper kernel cannot take these inputs: {cause}")
    if config is None:
        config = sm90.KernelConfig.for_head_dim(q.shape[-1])
    needed = sm90.smem_bytes(config, q.shape[-1], q.dtype.itemsize)
    if needed > sm90.MAX_SMEM_BYTES:
        raise ValueError(
            f"{config.num_slots=} needs {needed} bytes of shared memory; "
            f"{sm90.MAX_SMEM_BYTES} are available"
        )
    has_lengths = text_lengths is not None
    if text_lengths is None:
        text_lengths = jnp.full(q.shape[0], layout.text_length, jnp.int32)
    static = _Static(layout, float(scale), has_lengths, config, interpret)
    return _attention(static, q, k, v, mask.row_offsets, mask.block_ids, text_lengths)


class _Static(NamedTuple):
    layout: BlockLayout
    scale: float
    has_text_lengths: bool
    config: sm90.KernelConfig
    interpret: plgpu.InterpretGPUParams | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, q, k, v, row_offsets, block_ids, text_lengths):
    outputs, _ = _forward(static, q, k, v, row_offsets, block_ids, text_lengths)
    return outputs


def _forward(static: _Static, *arrays):
    out, lse = _batchable(static, *arrays)
    return (out, lse), (*arrays, out, lse)


def _backward(static: _Static, residuals, cotangents):
    return xla.attention_gradients(
        residuals, cotangents, layout=static.layout, scale=static.scale
    )


_attention.defvjp(_forward, _backward)


def _batchable(static: _Static, *arrays):
    """Runs the kernel; a mapped axis becomes part of the batch."""

    @jax.custom_batching.custom_vmap
    def run(*arrays):
        return _run(static, *arrays)

    @run.def_vmap
    def _(axis_size, in_batched, *arrays):
        def fold(x, is_batched):
            if not is_batched:
                x = jnp.broadcast_to(x, (axis_size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        folded = (fold(x, b) for x, b in zip(arrays, in_batched, strict=True))
        out, lse = _batchable(static, *folded)
        unfolded = (x.reshape(axis_size, -1, *x.shape[1:]) for x in (out, lse))
        return tuple(unfolded), (True, True)

    return run(*arrays)


@functools.partial(jax.jit, static_argnums=0)
def _run(static: _Static, q, k, v, row_offsets, block_ids, text_lengths):
    layout = static.layout
    batch, _, num_heads, _ = q.shape
    num_lists, num_blocks = batch * num_heads, layout.num_blocks
    geometry = _geometry(layout)  # type: ignore[arg-type]  # layouts are hashable
    if geometry.gather is not None:
        q, k, v = (x[:, geometry.gather] for x in (q, k, v))
    plan = _plan(static, geometry, q.shape)
    row_offsets = row_offsets.reshape(num_lists, num_blocks + 1)
    work = Work(
        row_offsets=row_offsets,
        block_ids=block_ids.reshape(num_lists, -1),
        order=_tile_order(jnp.diff(row_offsets)),
        num_tiles=jnp.full(1, num_lists * num_blocks, jnp.int32),
        starts=jnp.asarray(geometry.starts // sm90.ALIGNMENT),
        lengths=jnp.asarray(layout.block_lengths),
        valid=valid_lengths(layout, text_lengths),
    )
    out, lse = attend_blocks(q, k, v, work, plan=plan, interpret=static.interpret)
    if plan.config.lazy:
        out, lse = _repair(q, k, v, work, out, lse, plan, static.interpret)
    if geometry.gather is not None:
        out = out[:, geometry.scatter]
    lse = lse.reshape(batch, num_heads, num_blocks * sm90.BLOCK)
    if geometry.has_short_blocks:
        lse = lse[:, :, geometry.scatter]
    return out, lse


def _plan(static: _Static, geometry: "_Geometry", shape) -> sm90.Plan:
    batch, _, num_heads, head_dim = shape
    num_blocks = static.layout.num_blocks
    return sm90.Plan(
        config=static.config,
        num_blocks=num_blocks,
        num_heads=num_heads,
        head_dim=head_dim,
        num_ctas=batch * num_heads * num_blocks,
        persistent=False,
        scale=static.scale,
        starts_are_multiples=geometry.starts_are_multiples,
        masks_keys=geometry.has_short_blocks or static.has_text_lengths,
        masks_queries=static.has_text_lengths,
        has_short_blocks=geometry.stores_short_blocks,
        emulate_wgmma=static.interpret is not None,
    )


def _repair(q, k, v, work: Work, out, lse, plan: sm90.Plan, interpret):
    """Computes query blocks whose sums overflowed again, with exact maxima.

    That takes logits that grow by a factor of 2**128 from one key block to the next,
    or NaN in the inputs. Where there are none, which is the usual case, the second
    kernel ends as soon as it has read that.
    """
    failed = ~(lse < jnp.inf).all(axis=-1).ravel()
    (tiles,) = jnp.nonzero(failed, size=failed.size, fill_value=0)
    plan = dataclasses.replace(
        plan,
        config=dataclasses.replace(plan.config, lazy=False),
        num_ctas=min(_num_multiprocessors(), failed.size),
        persistent=True,
    )
    work = work._replace(
        order=tiles.astype(jnp.int32), num_tiles=failed.sum(dtype=jnp.int32)[None]
    )
    return attend_blocks_again(q, k, v, work, out, lse, plan=plan, interpret=interpret)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Geometry:
    """Where blocks lie in the arrays that the kernel reads.

    Attributes:
      starts: First token of each block.
      starts_are_multiples: Block r starts at token r * BLOCK.
      has_short_blocks: Some block is shorter than BLOCK.
      stores_short_blocks: A short block is followed by the next one's tokens.
      gather: Token of each place, if blocks must be moved apart, else None.
      scatter: Place of each token among blocks of full length.
    """

    starts: np.ndarray
    starts_are_multiples: bool
    has_short_blocks: bool
    stores_short_blocks: bool
    gather: np.ndarray | None
    scatter: np.ndarray


@functools.lru_cache(maxsize=64)
def _geometry(layout: BlockLayout) -> _Geometry:
    """Decides whether the kernel can read the sequence as it is.

    Swizzled copies start at multiples of 8 tokens. That holds for tiles of 8 x 16 on
    every grid whose edge tiles have a multiple of 8 tokens, which takes in 45 x 80 and
    30 x 52. Other sequences are copied to blocks of full length first.
    """
    num_blocks, num_tokens = layout.num_blocks, layout.num_tokens
    starts, lengths = layout.block_starts, layout.block_lengths
    multiples = np.arange(num_blocks, dtype=np.int32) * sm90.BLOCK
    block = np.repeat(np.arange(num_blocks), lengths)
    scatter = multiples[block] + np.arange(num_tokens) - starts[block]
    has_short_blocks = bool((lengths < sm90.BLOCK).any())
    is_aligned = (
        not (starts % sm90.ALIGNMENT).any()
        and num_tokens % sm90.ALIGNMENT == 0
        and num_tokens >= sm90.BLOCK
    )
    gather = None
    if not is_aligned:
        token = starts[:, None] + np.arange(sm90.BLOCK)
        gather = np.minimum(token, num_tokens - 1).ravel()
        starts = multiples
    return _Geometry(
        starts=starts,
        starts_are_multiples=bool((starts == multiples).all()),
        has_short_blocks=has_short_blocks,
        stores_short_blocks=has_short_blocks and is_aligned,
        gather=gather,
        scatter=scatter,
    )


def _tile_order(counts: Int[Array, "L R"]) -> Int[Array, " L*R"]:
    """Order in which the card takes query blocks.

    Heads follow each other, so that the CTAs share a head's K and V in L2. Within one,
    longest lists come first, so that the last CTAs to end have little left to do.
    """
    num_lists, num_blocks = counts.shape
    rows = jnp.argsort(-counts, axis=1, stable=True)
    order = rows + num_blocks * np.arange(num_lists)[:, None]
    return order.ravel().astype(jnp.int32)


def _num_multiprocessors() -> int:
    if jax.default_backend() != "gpu":
        return NUM_MULTIPROCESSORS
    return jax.local_devices()[0].core_count


def _why_unsupported_shape(dtype: str, head_dim: int, block_size: int) -> str | None:
    if dtype not in SUPPORTED_DTYPES:
        return f"it takes {' and '.join(SUPPORTED_DTYPES)}, not {dtype}"
    if head_dim not in SUPPORTED_HEAD_DIMS:
        accepted = " and ".join(map(str, SUPPORTED_HEAD_DIMS))
        return f"it takes a head dimension of {accepted}, not {head_dim}"
    if block_size != sm90.BLOCK:
        return (
            f"it takes blocks of {sm90.BLOCK} tokens, such as tile (8, 16), not "
            f"{block_size}"
        )
    return None


def _why_unsupported(problem: Problem) -> str | None:
    device = problem.device
    if device.compute_capability != (9, 0):
        capability = device.compute_capability
        found = "" if capability is None else f" (sm_{capability[0]}{capability[1]})"
        return (
            f"it needs an NVIDIA Hopper GPU (sm_90), not {device.platform} "
            f"{device.kind}{found}"
        )
    return _why_unsupported_shape(
        problem.dtype, problem.head_dim, problem.layout.block_size
    )


BACKEND = Backend(
    name="hopper",
    function=hopper_attention,
    why_unsupported=_why_unsupported,
    why_slow=lambda problem: None,
)
