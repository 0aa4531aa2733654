"""Block-sparse attention in plain XLA: any platform, memory linear in tokens.

Rows (batch item, head, query block) are sorted by their number of kept blocks and
walked in groups, so that a group's rows take about equally many steps. Each step
gathers the next few kept key blocks of every row of the group and updates a running
softmax. The backward pass recomputes the probabilities block by block: dQ walks the
same lists, dK and dV the transposed ones. No row is written by two groups, so there
are no atomics and results are bit-identical from run to run.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.common.configuration import make_plain, register_configuration
from pallas_kernels.common.device import Device, current_device
from pallas_kernels.common.interfaces import (
    Backend,
    BlockGrid,
    BlockLists,
    Problem,
    valid_lengths,
)


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkConfig:
    """Amounts computed at once. Fields change only time and rounding."""

    group_tokens: int  # query tokens walked together, in whole blocks
    step_tokens: int  # key tokens gathered per row and step, in whole blocks
    upcast: bool  # multiply in float32 also for narrow inputs

    def __post_init__(self) -> None:
        make_plain(self)

    @classmethod
    def for_platform(cls, platform: str) -> "ChunkConfig":
        """Chooses by measurement on two CPU cores, by occupancy elsewhere.

        On the CPU, groups of 256 to 1,024 and steps of 128 and 256 tokens are within
        10 % of each other; longer steps waste more on the end of short rows. A GPU
        wants hundreds of independent matmuls in flight and its tensor cores.
        """
        if platform == "cpu":
            return cls(group_tokens=512, step_tokens=128, upcast=True)
        return cls(group_tokens=65_536, step_tokens=128, upcast=False)


class _Lists(NamedTuple):
    """Blocks that each of L = B * N * R rows walks, in CSR form."""

    start: Int[Array, " L"]  # first entry in ids[head]
    length: Int[Array, " L"]  # entries
    ids: Int[Array, "B*N M"]  # block within the head


class _Blocks(NamedTuple):
    """Everything the passes read, cut into L blocks of P tokens."""

    q: Float[Array, "L P D"]
    k: Float[Array, "L P D"]
    v: Float[Array, "L P D"]
    length: Int[Array, " L"]  # valid tokens of the block, as queries and as keys


def xla_attention(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    mask: BlockLists,
    *,
    grid: BlockGrid,
    scale: float,
    text_lengths: Int[Array, " B"] | None,
    config: ChunkConfig | None = None,
) -> tuple[Float[Array, "B T N D"], Float[Array, "B N T"]]:
    """Computes attention over kept blocks only; differentiable in reverse mode.

    Args:
      q: Queries in tiled order.
      k: Keys.
      v: Values.
      mask: Kept block pairs.
      grid: Geometry of the blocks.
      scale: Factor on the logits.
      text_lengths: Valid text tokens of each batch item; None means all.
      config: Group and step sizes; chosen by platform when None.

    Returns:
      The output in q's dtype and the float32 log-sum-exp [B, N, T]; zeros and -inf
      for queries without a valid key.
    """
    if config is None:
        config = ChunkConfig.for_platform(current_device(q).platform)
    if text_lengths is None:
        text_lengths = jnp.full(q.shape[0], grid.text_length, jnp.int32)
    static = (grid, scale, config)
    return _attention(static, q, k, v, mask.row_offsets, mask.block_ids, text_lengths)


def attention_gradients(
    residuals: tuple[Array, ...],
    cotangents: tuple[Float[Array, "B T N D"], Float[Array, "B N T"]],
    *,
    grid: BlockGrid,
    scale: float,
) -> tuple[Array | None, ...]:
    """Computes gradients of any backend's forward pass, for a `jax.custom_vjp`.

    Args:
      residuals: q, k, v, row_offsets, block_ids, text_lengths, and the forward
        pass's output and log-sum-exp.
      cotangents: Cotangents of the output and the log-sum-exp.
      grid: Geometry of the blocks.
      scale: Factor on the logits.

    Returns:
      Cotangents of the first six residuals; None for those of integers.
    """
    config = ChunkConfig.for_platform(current_device(residuals[0]).platform)
    return _backward((grid, scale, config), residuals, cotangents)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, q, k, v, row_offsets, block_ids, text_lengths):
    outputs, _ = _forward(static, q, k, v, row_offsets, block_ids, text_lengths)
    return outputs


@functools.partial(jax.jit, static_argnums=0)
def _forward(static, q, k, v, row_offsets, block_ids, text_lengths):
    grid, scale, config = static
    batch, _, num_heads, _ = q.shape
    blocks = _Blocks(
        q=_to_blocks(q, grid, config),
        k=_to_blocks(k, grid, config),
        v=_to_blocks(v, grid, config),
        length=_repeat_heads(valid_lengths(grid, text_lengths), num_heads),
    )
    lists = _row_lists(row_offsets, block_ids)
    out, lse = _walk(
        lists,
        own=(blocks.q, blocks.length),
        others=(blocks.k, blocks.v, blocks.length),
        init=_forward_init,
        step=functools.partial(_forward_step, scale=scale),
        finish=_forward_finish,
        num_blocks=grid.num_blocks,
        config=config,
    )
    out = _from_blocks(out, grid, batch).astype(q.dtype)
    lse = _from_blocks(lse, grid, batch).transpose(0, 2, 1)
    residuals = (q, k, v, row_offsets, block_ids, text_lengths, out, lse)
    return (out, lse), residuals


@functools.partial(jax.jit, static_argnums=0)
def _backward(static, residuals, cotangents):
    """Runs FlashAttention's backward pass over the kept blocks.

    ds = p * (dp - delta), where delta = sum(out * dout) - dlse holds for both
    outputs. Rows without a key have lse = -inf; their probabilities are zero.
    """
    grid, scale, config = static
    q, k, v, row_offsets, block_ids, text_lengths, out, lse = residuals
    d_out, d_lse = cotangents
    batch, _, num_heads, _ = q.shape
    has_key = lse != -jnp.inf
    delta = jnp.einsum(
        "btnd,btnd->bnt", out.astype(jnp.float32), d_out.astype(jnp.float32)
    )
    delta = jnp.where(has_key, delta - d_lse, 0.0)
    lse = jnp.where(has_key, lse, jnp.inf)
    blocks = _Blocks(
        q=_to_blocks(q, grid, config),
        k=_to_blocks(k, grid, config),
        v=_to_blocks(v, grid, config),
        length=_repeat_heads(valid_lengths(grid, text_lengths), num_heads),
    )
    d_out = _to_blocks(d_out, grid, config)
    lse, delta = (
        _to_blocks(x.transpose(0, 2, 1)[..., None], grid, config)[..., 0]
        for x in (lse, delta)
    )
    walk = functools.partial(_walk, num_blocks=grid.num_blocks, config=config)
    lists = _row_lists(row_offsets, block_ids)
    (d_q,) = walk(
        lists,
        own=(blocks.q, d_out, lse, delta, blocks.length),
        others=(blocks.k, blocks.v, blocks.length),
        init=lambda own: (jnp.zeros(own[0].shape, jnp.float32),),
        step=functools.partial(_query_grad_step, scale=scale),
        finish=lambda own, carry: carry,
    )
    d_k, d_v = walk(
        _transpose(lists, grid.num_blocks),
        own=(blocks.k, blocks.v, blocks.length),
        others=(blocks.q, d_out, lse, delta, blocks.length),
        init=lambda own: (jnp.zeros(own[0].shape, jnp.float32),) * 2,
        step=functools.partial(_key_grad_step, scale=scale),
        finish=lambda own, carry: carry,
    )
    grads = (_from_blocks(x, grid, batch).astype(q.dtype) for x in (d_q, d_k, d_v))
    return (*grads, None, None, None)


_attention.defvjp(_forward, _backward)


def _forward_init(own):
    q, _ = own
    return (
        jnp.full(q.shape[:-1], -jnp.inf, jnp.float32),
        jnp.zeros(q.shape[:-1], jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )


def _forward_step(own, others, valid, carry, *, scale):
    """Adds the gathered keys to the running maximum, sum and weighted values."""
    (q, _), (k, v) = own, others
    maximum, total, weighted = carry
    logits = scale * _dot("gpd,gkd->gpk", q, k)
    logits = jnp.where(valid[:, None], logits, -jnp.inf)
    new_maximum = jnp.maximum(maximum, logits.max(-1))
    # A row that has met no valid key yet must not compute -inf - -inf.
    finite_maximum = jnp.where(new_maximum == -jnp.inf, 0.0, new_maximum)
    decay = jnp.exp(maximum - finite_maximum)
    weights = jnp.exp(logits - finite_maximum[..., None])
    total = total * decay + weights.sum(-1)
    added = _dot("gpk,gkd->gpd", weights.astype(v.dtype), v)
    return new_maximum, total, weighted * decay[..., None] + added


def _forward_finish(own, carry):
    _, length = own
    maximum, total, weighted = carry
    is_query = jnp.arange(total.shape[-1]) < length[:, None]
    has_key = (total != 0) & is_query  # true for NaN, which must not become zero
    total = jnp.where(has_key, total, 1.0)
    out = jnp.where(has_key[..., None], weighted / total[..., None], 0.0)
    return out, jnp.where(has_key, maximum + jnp.log(total), -jnp.inf)


def _query_grad_step(own, others, valid, carry, *, scale):
    (q, d_out, lse, delta, _), (k, v) = own, others
    (d_q,) = carry
    logits = jnp.where(valid[:, None], scale * _dot("gpd,gkd->gpk", q, k), -jnp.inf)
    weights = jnp.exp(logits - lse[..., None])
    d_weights = _dot("gpd,gkd->gpk", d_out, v)
    d_logits = scale * weights * (d_weights - delta[..., None])
    return (d_q + _dot("gpk,gkd->gpd", d_logits.astype(k.dtype), k),)


def _key_grad_step(own, others, valid, carry, *, scale):
    """Adds a step of dK and dV: a row owns keys and walks the queries that keep it."""
    (k, v, length), (q, d_out, lse, delta) = own, others
    d_k, d_v = carry
    is_key = jnp.arange(k.shape[1]) < length[:, None]
    pairs = is_key[:, :, None] & valid[:, None]
    logits = jnp.where(pairs, scale * _dot("gkd,gpd->gkp", k, q), -jnp.inf)
    weights = jnp.exp(logits - lse[:, None])
    d_v = d_v + _dot("gkp,gpd->gkd", weights.astype(d_out.dtype), d_out)
    d_weights = _dot("gkd,gpd->gkp", v, d_out)
    d_logits = scale * weights * (d_weights - delta[:, None])
    return d_k + _dot("gkp,gpd->gkd", d_logits.astype(q.dtype), q), d_v


def _walk(
    lists: _Lists,
    *,
    own: tuple[Array, ...],
    others: tuple[Array, ...],
    init: Callable[[Any], Any],
    step: Callable[..., Any],
    finish: Callable[[Any, Any], tuple[Array, ...]],
    num_blocks: int,
    config: ChunkConfig,
) -> tuple[Array, ...]:
    """Runs `step` over each row's list of blocks, a group of rows at a time.

    `own` is read at the row itself, `others` at the blocks it walks, both [L, ...].
    The last of `others` is the blocks' valid length, which becomes a mask of the
    gathered tokens. Results are [L, ...] in the order of the rows.
    """
    num_rows = lists.length.shape[0]
    block_size = others[0].shape[1]
    width = min(max(config.step_tokens // block_size, 1), num_blocks)  # per step
    group_rows = min(max(config.group_tokens // block_size, 1), num_rows)
    num_groups = math.ceil(num_rows / group_rows)
    order = jnp.argsort(-lists.length, stable=True)
    # The last group is filled up with rows that are out of range and have no blocks.
    order = jnp.pad(
        order, (0, num_groups * group_rows - num_rows), constant_values=num_rows
    )
    *other_arrays, other_length = others

    def walk_group(rows):
        in_range = rows < num_rows
        rows = jnp.minimum(rows, num_rows - 1)
        count = jnp.where(in_range, lists.length[rows], 0)
        start, head = lists.start[rows], rows // num_blocks
        own_rows = tuple(_take(x, rows) for x in own)

        def advance(i, carry):
            entry = i * width + jnp.arange(width)
            ids = lists.ids.at[head[:, None], start[:, None] + entry].get(mode="clip")
            blocks = ids + (head * num_blocks)[:, None]
            gathered = tuple(_take(x, blocks) for x in other_arrays)
            gathered = tuple(
                x.reshape(group_rows, width * block_size, *x.shape[3:])
                for x in gathered
            )
            live = entry < count[:, None]
            length = jnp.where(live, other_length[blocks], 0)
            valid = jnp.arange(block_size) < length[..., None]
            return step(own_rows, gathered, valid.reshape(group_rows, -1), carry)

        num_steps = -(-count.max() // width)
        return finish(
            own_rows, jax.lax.fori_loop(0, num_steps, advance, init(own_rows))
        )

    results = jax.lax.map(walk_group, order.reshape(num_groups, group_rows))
    place = jnp.argsort(order[:num_rows])
    return tuple(
        x.reshape(num_groups * group_rows, *x.shape[2:])[place] for x in results
    )


def _take(x: Array, rows: Int[Array, "..."]) -> Array:
    """x[rows] for rows in range."""
    return x.at[rows].get(mode="promise_in_bounds")


def _dot(equation: str, a: Array, b: Array) -> Float[Array, "..."]:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _row_lists(row_offsets, block_ids) -> _Lists:
    return _Lists(
        start=row_offsets[..., :-1].ravel(),
        length=jnp.diff(row_offsets, axis=-1).ravel(),
        ids=block_ids.reshape(-1, block_ids.shape[-1]),
    )


def _transpose(lists: _Lists, num_blocks: int) -> _Lists:
    """Returns the query blocks that keep each key block, in ascending order."""
    num_heads, capacity = lists.ids.shape
    ends = (lists.start + lists.length).reshape(num_heads, num_blocks)
    entry = jnp.arange(capacity)

    def one_head(ends, ids):
        rows = jnp.searchsorted(ends, entry, side="right")
        columns = jnp.where(entry < ends[-1], ids, num_blocks)
        count = jnp.zeros(num_blocks, jnp.int32).at[columns].add(1, mode="drop")
        by_column = jnp.argsort(columns, stable=True)
        return jnp.cumsum(count) - count, count, rows[by_column].astype(jnp.int32)

    start, count, ids = jax.vmap(one_head)(ends, lists.ids)
    return _Lists(start=start.ravel(), length=count.ravel(), ids=ids)


def _repeat_heads(lengths: Int[Array, "B R"], num_heads: int) -> Int[Array, " L"]:
    """Repeats a block's length for each batch item and head."""
    return jnp.repeat(lengths[:, None], num_heads, axis=1).ravel()


def _to_blocks(
    x: Float[Array, "B T N D"], grid: BlockGrid, config: ChunkConfig
) -> Float[Array, "L P D"]:
    """Cuts a sequence into blocks; short ones are filled up with other tokens."""
    batch, _, num_heads, head_dim = x.shape
    if config.upcast:
        x = x.astype(jnp.float32)
    num_blocks, block_size = grid.num_blocks, grid.block_size
    if (grid.block_lengths != block_size).any():
        token = grid.block_starts[:, None] + np.arange(block_size)
        x = x[:, np.minimum(token, grid.num_tokens - 1).ravel()]
    x = x.reshape(batch, num_blocks, block_size, num_heads, head_dim)
    return x.transpose(0, 3, 1, 2, 4).reshape(-1, block_size, head_dim)


def _from_blocks(
    x: Float[Array, "L P ..."], grid: BlockGrid, batch: int
) -> Float[Array, "B T N ..."]:
    """Joins blocks to a sequence: the inverse of `_to_blocks`."""
    num_blocks, block_size = grid.num_blocks, grid.block_size
    x = x.reshape(batch, -1, num_blocks, block_size, *x.shape[2:])
    x = jnp.moveaxis(x, 1, 3)
    x = x.reshape(batch, num_blocks * block_size, *x.shape[3:])
    if (grid.block_lengths == block_size).all():
        return x
    block = np.repeat(np.arange(num_blocks), grid.block_lengths)
    offset = np.arange(grid.num_tokens) - grid.block_starts[block]
    return x[:, block * block_size + offset]


def _why_slow(problem: Problem) -> str | None:
    if problem.device.platform == "gpu":
        return (
            f"it gathers K and V blocks through the memory of {problem.device.kind}, "
            "which a fused kernel does not"
        )
    return None


def _attention_on(*arrays, device: Device, **options):
    config = ChunkConfig.for_platform(device.platform)
    return xla_attention(*arrays, config=config, **options)


BACKEND = Backend(
    name="xla",
    function=_attention_on,
    why_unsupported=lambda problem: None,
    why_slow=_why_slow,
)
