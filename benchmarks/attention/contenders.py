"""The kernels that `benchmarks.attention.run` compares, one row of a table each.

A contender gives a call, which returns the output [B, T, N, D], and how to wait for it.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common.shapes import Shape
from draft_jax import BlockMask, VideoGrid
from pallas_kernels import block_sparse_attention

Call = Callable[[], Any]
Wait = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """One implementation of attention.

    `make` takes a `Shape`, q, k and v, and of sparse attention a mask.
    """

    make: Callable[..., tuple[Call, Wait]]
    is_sparse: bool = False
    needs: str | None = None  # the module of another library
    dtype: str | None = None  # of its inputs, if not that of the shape

    @property
    def is_installed(self) -> bool:
        """Whether the library that it needs can be imported."""
        if self.needs is None:
            return True
        try:
            return importlib.util.find_spec(self.needs) is not None
        except ModuleNotFoundError:  # of what the module is in
            return False


def ours(shape: Shape, qkv, mask: BlockMask):
    """This project's kernel."""
    run = _our_program(shape.grid)
    return functools.partial(run, *qkv, mask), jax.block_until_ready


@functools.lru_cache(maxsize=1)
def _our_program(grid: VideoGrid):
    run = functools.partial(
        block_sparse_attention, grid=grid, order="tiled", backend="hopper"
    )
    return jax.jit(run)


def cudnn_dense(shape: Shape, qkv):
    """Flash attention of cuDNN, through JAX."""
    run = jax.jit(
        functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    )
    return functools.partial(run, *qkv), jax.block_until_ready


def mgpu_dense(shape: Shape, qkv):
    """JAX's Mosaic GPU kernel, which does not scale logits, so queries are scaled.

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
    """Counts [B, N, R] of kept blocks, and their ids [B, N, R, R] padded with zeros."""
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


CONTENDERS = {
    "cudnn": Contender(make=cudnn_dense),
    "attention_mgpu": Contender(make=mgpu_dense, dtype="float16"),
    "fa3": Contender(make=flash_attention_3, needs="flash_attn_interface"),
    "fa4": Contender(make=flash_attention_4, needs="flash_attn.cute"),
    "ours": Contender(make=ours, is_sparse=True),
    "flex_attention": Contender(make=flex_attention, is_sparse=True, needs="torch"),
    "fa4_sparse": Contender(
        make=flash_attention_4_sparse, is_sparse=True, needs="flash_attn.cute"
    ),
}
