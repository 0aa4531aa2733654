"""Times a Wan block's linear layers among what makes their inputs and reads results.

In a model FP8 changes more than products: norms and GELU round, and scales are applied
by what comes after. So the block runs without its attention, once in bfloat16 and once
in FP8: norms and modulation, projections of queries, keys and values, output layers,
gates and residual stream, and the feed-forward network. What attention would return is
given. The difference of both times is what FP8 saves in a block, rounding included.
"""

import concurrent.futures
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from benchmarks.common.gpu_state import GpuState
from benchmarks.common.linear_times import linear_times, time_ms
from benchmarks.common.machine import MatmulShape
from benchmarks.common.random_weights import random_model
from models.diffusion.transformer.float8 import use_float8_linears
from models.diffusion.transformer.layers import (
    modulated_norm,
    sum_and_norm,
    unfinished,
)
from models.float8.product import compiler_options
from models.wan.config import WanConfig
from models.wan.layers import WanBlock

Record = dict[str, Any]


def matmul_shapes(config: WanConfig, num_tokens: int) -> dict[str, MatmulShape]:
    """Rows, inner size and columns of the model's own products."""
    dim, hidden = config.dim, config.ffn_dim
    return {
        "projection": (num_tokens, dim, dim),
        "ffn.linear_1": (num_tokens, dim, hidden),
        "ffn.linear_2": (num_tokens, hidden, dim),
    }


def measure_linears(config: WanConfig, num_tokens: int) -> Record:
    """Returns times of layers by themselves, by name, and of a `block`.

    Args:
      config: Sizes of the model.
      num_tokens: Tokens of the video.
    """
    alone = linear_times(matmul_shapes(config, num_tokens))
    return alone | {"block": block_times(config, num_tokens)}


def block_times(config: WanConfig, num_tokens: int) -> Record:
    """Returns milliseconds of a block without attention, in both precisions."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        blocks = {
            f"{linears}_ms": pool.submit(_Block, config, linears, num_tokens)
            for linears in ("bfloat16", "float8")
        }
        made = {name: block.result() for name, block in blocks.items()}
    record: Record = {"tokens": num_tokens}
    for name, block in made.items():
        with GpuState() as state:
            record[name] = time_ms(block)
    return record | state.summary


class _Block:
    """The compiled block with weights and inputs of its own."""

    def __init__(self, config: WanConfig, linears: str, num_tokens: int) -> None:
        config = dataclasses.replace(config, param_dtype="bfloat16")

        def make() -> WanBlock:
            block = WanBlock(config, rngs=nnx.Rngs(0))
            if linears == "float8":
                use_float8_linears(block, leave=())
            return block

        structure, state = nnx.split(random_model(make))
        keys = jax.random.split(jax.random.key(0), 3)
        size = (1, num_tokens, config.dim)
        dtypes = ("float32", config.dtype, config.dtype)
        normal = jax.jit(jax.random.normal, static_argnums=(1, 2))
        arrays = [
            normal(k, size, jnp.dtype(d)) for k, d in zip(keys, dtypes, strict=True)
        ]
        self._arguments = (state, jnp.ones((6, 1, 1, config.dim)), *arrays)

        def run(state, modulation, *arrays):
            return apply(nnx.merge(structure, state), modulation, *arrays)

        jitted = jax.jit(run, compiler_options=compiler_options(state))
        self._program = jitted.lower(*self._arguments).compile()

    def __call__(self) -> Any:
        """Runs the block."""
        return self._program(*self._arguments)


def apply(
    block: WanBlock,
    modulation: Float[Array, "6 1 1 E"],
    x: Float[Array, "B T E"],
    attended: Float[Array, "B T E"],
    crossed: Float[Array, "B T E"],
) -> tuple[Any, ...]:
    """Runs what a block does beside attention.

    Args:
      block: Its layers.
      modulation: Shift, scale and gate of attention and of the network.
      x: The residual stream.
      attended: What self-attention returns.
      crossed: What cross-attention returns.

    Returns:
      Queries and keys, which the kernel of their norm finishes, values, queries of
      cross-attention, and the residual stream.
    """
    shift_1, scale_1, gate_1, shift_3, scale_3, gate_3 = modulation
    own, cross, ffn, eps = block.attn1, block.attn2, block.ffn, block.eps
    normed = modulated_norm(x, 1 + scale_1, shift_1, eps=eps, before=own.to_q)
    qk = (unfinished(layer, normed) for layer in (own.to_q, own.to_k))
    qkv = *qk, own.to_v(normed)
    norm, out = block.norm2, unfinished(own.to_out, attended)
    assert norm is not None, "Wan's blocks have one"
    x, normed = sum_and_norm(
        x, out, gate_1, *norm.parameters(), eps=norm.eps, before=cross.to_q
    )
    query, out = cross.to_q(normed), unfinished(cross.to_out, crossed)
    x, normed = sum_and_norm(
        x, out, None, 1 + scale_3, shift_3, eps=eps, before=ffn.linear_1
    )
    return *qkv, query, x + ffn(normed).astype(jnp.float32) * gate_3
