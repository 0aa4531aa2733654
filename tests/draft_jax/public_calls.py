"""One call of each public function, for tests of what holds for all of them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import draft_jax
import pallas_kernels
from draft_jax import (
    QKV,
    BlockMask,
    Compensation,
    DraftAttention,
    DraftConfig,
    PooledTokens,
    Product,
    QKNorm,
    VideoGrid,
    constant_step,
    draft_attention_fn,
    initial_mask,
)
from draft_jax.draft.pooling import tiling_of
from pallas_kernels import pooling, ranking
from pallas_kernels.common import Order

BATCH, HEADS, HEAD_DIM = 2, 2, 8
PUBLIC = frozenset(
    f"{module.__name__}.{name}"
    for module in (draft_jax, pallas_kernels, ranking, pooling)
    for name in module.__all__
)
# Types, and functions of Python's numbers: they hand nothing to a device.
NOT_COMPUTED = frozenset(
    {
        "draft_jax.AttentionPlan",
        "draft_jax.Compensation",
        "draft_jax.Correction",
        "draft_jax.DraftConfig",
        "draft_jax.DraftStep",
        "draft_jax.MaskMaker",
        "draft_jax.PooledTokens",
        "draft_jax.Product",
        "draft_jax.QKNorm",
        "draft_jax.QKV",
        "draft_jax.SparsitySchedule",
        "draft_jax.SparsityWarning",
        "draft_jax.StepKind",
        "draft_jax.StepPlan",
        "draft_jax.VideoGrid",
        "draft_jax.constant_step",
        "draft_jax.extra_work",
        "draft_jax.kept_pairs_budget",
        "draft_jax.mask_capacity",
        "pallas_kernels.BackendChoice",
        "pallas_kernels.BackendName",
        "pallas_kernels.Means",
        "pallas_kernels.RESIDUAL_NAMES",
        "pallas_kernels.SlowBackendWarning",
        "pallas_kernels.SubTiles",
        "pallas_kernels.chosen_backend",
        "pallas_kernels.ranking.RankingPath",
        "pallas_kernels.ranking.WORD_BITS",
        "pallas_kernels.ranking.all_set",
        "pallas_kernels.ranking.choose_path",
        "pallas_kernels.pooling.MeanSquares",
        "pallas_kernels.pooling.PooledVideo",
        "pallas_kernels.pooling.Projected",
        "pallas_kernels.pooling.QKNorm",
        "pallas_kernels.pooling.QKV",
        "pallas_kernels.pooling.Reduction",
        "pallas_kernels.pooling.Rope",
        "pallas_kernels.pooling.Scales",
        "pallas_kernels.pooling.Tiling",
        "pallas_kernels.pooling.VideoPooling",
        "pallas_kernels.why_no_cudnn",
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """Arguments of the calls; arrays are NumPy's or jax's."""

    grid: VideoGrid
    order: Order
    q: Any
    k: Any
    v: Any
    visual: Any  # queries without text
    lengths: Any  # None without text
    kept: Any  # pairs of all blocks
    kept_visual: Any
    scores: Any
    forced: np.ndarray
    scales: Any
    rope: Any
    rows: Any  # scales of products, and their bias
    columns: Any
    bias: Any
    mask: BlockMask
    pooled: PooledTokens
    layer: DraftAttention


def make_inputs(
    grid: VideoGrid,
    order: Order = "raster",
    convert: Callable[[Any], Any] = jnp.asarray,
    *,
    batch: int = BATCH,
    heads: int = HEADS,
) -> Inputs:
    """Makes inputs whose arrays went through `convert`."""
    rng = np.random.default_rng(0)
    maps, visual_tokens = (batch, heads), grid.num_visual_tokens
    num_blocks, num_visual = grid.num_blocks, grid.num_visual_blocks

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    q, k, v = normal(3, batch, grid.num_tokens, heads, HEAD_DIM)
    angles = normal(visual_tokens, HEAD_DIM // 2)
    kept = rng.random((*maps, num_blocks, num_blocks)) < 0.5
    kept |= np.eye(num_blocks, dtype=bool)
    mask = BlockMask.from_dense(kept, grid=grid)
    pooled = PooledTokens(
        q_mean=jnp.asarray(normal(batch, num_visual, heads, HEAD_DIM)),
        k_mean=jnp.asarray(normal(batch, num_visual, heads, HEAD_DIM)),
    )
    lengths = None
    if grid.text_length:
        lengths = np.resize(np.array([grid.text_length, 0], np.int32), batch)
    arrays = {
        "q": q,
        "k": k,
        "v": v,
        "visual": q[:, grid.visual_tokens],
        "lengths": lengths,
        "kept": kept,
        "kept_visual": kept[..., grid.visual_blocks, grid.visual_blocks],
        "scores": rng.dirichlet(np.ones(num_visual), (*maps, num_visual)),
        "scales": tuple(normal(2, HEAD_DIM)),
        "rope": (np.cos(angles), np.sin(angles)),
        "mask": jax.tree.map(np.asarray, mask),
        "pooled": pooled,
    }
    arrays["scores"] = arrays["scores"].astype(np.float32)
    arrays["rows"] = normal(batch, grid.num_tokens)
    arrays["columns"], arrays["bias"] = normal(2, heads, HEAD_DIM)
    layer = DraftAttention(
        heads, heads * HEAD_DIM, config=CONFIG, order=order, rngs=nnx.Rngs(0)
    )
    return Inputs(
        grid=grid,
        order=order,
        forced=np.eye(num_visual, dtype=bool),
        layer=layer,
        **jax.tree.map(convert, arrays),
    )


CONFIG = DraftConfig.paper(sparsity=0.5)
COMPENSATION = Compensation(sub_tile=(1, 2), frames=2)
EXACT = DraftConfig.paper(ranking="exact_spread", compensation=COMPENSATION)
CONFIGS = {
    "percentile": CONFIG,
    "row_topk": DraftConfig.paper(
        sparsity=0.5,
        selection="row_topk",
        keep_own_tile=True,
        draft_tile=(1, 2),
        compensation=COMPENSATION,
        ranking="spread",
    ),
    "top_p": DraftConfig.paper(sparsity=0.5, selection="top_p", pooling="mean+max"),
}
NORM = QKNorm(over="head")


def attend(x: Inputs, config: DraftConfig = CONFIG, **changes):
    arguments = {"q": x.q, "k": x.k, "v": x.v} | changes
    return draft_jax.draft_attention(
        **arguments, grid=x.grid, config=config, order=x.order, text_lengths=x.lengths
    )


def sizes(x: Inputs) -> dict[str, int]:
    """Returns what masks without an array are made for."""
    return {"batch": x.q.shape[0], "num_heads": x.q.shape[2]}


def scheduled(x: Inputs, **step):
    return draft_jax.scheduled_attention(
        x.q,
        x.k,
        x.v,
        grid=x.grid,
        config=CONFIG,
        step=constant_step(x.grid, CONFIG, **step),
        mask=initial_mask(x.grid, CONFIG, **sizes(x)),
        order=x.order,
    )


def sparse(x: Inputs, function=pallas_kernels.block_sparse_attention, **changes):
    arguments = {"q": x.q, "k": x.k, "v": x.v, "text_lengths": x.lengths} | changes
    return function(**arguments, mask=x.mask, grid=x.grid, order=x.order)


def gradients(function: Callable[..., Any], x: Inputs):
    def loss(q, k, v):
        return (function(x, q=q, k=k, v=v) ** 2).sum()

    return jax.grad(loss, (0, 1, 2))(x.q, x.k, x.v)


def dense(x: Inputs, **changes):
    arguments = {"q": x.q, "k": x.k, "v": x.v} | changes
    return pallas_kernels.dense_attention(
        **arguments, grid=x.grid, text_lengths=x.lengths
    )


def rows(x: Inputs):
    arrays = x.pooled.q_mean, x.k, x.v, x.lengths
    *qkv, lengths = jax.tree.map(jnp.asarray, arrays)  # NumPy's are for checked calls
    return pallas_kernels.unchecked_row_attention(
        *qkv, grid=x.grid, scale=0.3, text_lengths=lengths
    )


def query_map(x: Inputs):
    q, k, v = map(jnp.asarray, (x.q, x.k, x.v))
    offset = k.mean(1)
    matrix = jnp.einsum("bnd,bne->bnde", offset, v.mean(1))
    return pallas_kernels.unchecked_add_query_map(
        v, q, matrix, offset, tokens=(1, q.shape[1] - 1)
    )


def prepare(x: Inputs):
    return draft_jax.norm_rope_pool(
        x.q,
        x.k,
        grid=x.grid,
        config=CONFIG,
        norm=NORM,
        scales=x.scales,
        text_scales=x.scales[::-1] if x.grid.text_length else None,
        rope=x.rope,
        order=x.order,
    )


def prepare_products(x: Inputs):
    return draft_jax.norm_rope_pool(
        Product(x.q, x.rows, x.columns, x.bias),
        Product(x.k, bias=x.bias),
        grid=x.grid,
        config=CONFIG,
        norm=NORM,
        scales=x.scales,
        rope=x.rope,
        order=x.order,
    )


def parts(x: Inputs, **changes):
    """Queries, keys and values of the video, and those of the text.

    A grid without text gets the first tokens of the video as text.
    """
    arrays = {"q": x.q, "k": x.k, "v": x.v} | changes
    text = x.grid.text_tokens if x.grid.text_length else slice(0, 3)
    return tuple(
        QKV(*(array[:, tokens] for array in arrays.values()))
        for tokens in (x.grid.visual_tokens, text)
    )


def prepare_joint(x: Inputs, **changes):
    video, text = parts(x, **changes)
    return draft_jax.joint_norm_rope_pool(
        video,
        text,
        grid=dataclasses.replace(x.grid, text_length=text.q.shape[1]),
        config=CONFIG,
        norm=NORM,
        scales=x.scales,
        text_scales=x.scales[::-1],
        rope=x.rope,
        order=x.order,
    )


def counts(x: Inputs, value: int):
    return jnp.full(x.grid.num_visual_blocks, value, jnp.int32)


def by_rows(x: Inputs):
    words = ranking.pack(x.kept)
    first_columns = np.arange(words.shape[-1], dtype=np.int32) * ranking.WORD_BITS
    return ranking.compress_rows(words, first_columns, x.grid.num_blocks**2)


# Names of public functions, and after a space which call of it.
CALLS: dict[str, Callable[[Inputs], Any]] = {
    **{
        f"draft_jax.draft_attention {name}": lambda x, c=config: attend(x, c)
        for name, config in CONFIGS.items()
    },
    "draft_jax.draft_attention gradient": lambda x: gradients(attend, x),
    "draft_jax.compute_mask pooled": lambda x: draft_jax.compute_mask(
        x.q, x.k, grid=x.grid, config=CONFIG, pooled=x.pooled, budget=3, scale=0.5
    ),
    "draft_jax.make_means": lambda x: draft_jax.make_means(
        x.k, x.v, x.mask, compensation=COMPENSATION, order=x.order
    ),
    "draft_jax.draft_scores": lambda x: draft_jax.draft_scores(
        x.q, x.k, grid=x.grid, config=CONFIG, order=x.order
    ),
    "draft_jax.draft_scores exact spread": lambda x: draft_jax.draft_scores(
        x.q, x.k, grid=x.grid, config=EXACT, order=x.order
    ),
    "draft_jax.select_blocks": lambda x: draft_jax.select_blocks(
        x.scores, grid=x.grid, config=CONFIG, budget=np.int32(5)
    ),
    "draft_jax.scheduled_attention": scheduled,
    "draft_jax.scheduled_attention dense": lambda x: scheduled(x, dense=True),
    "draft_jax.initial_mask": lambda x: initial_mask(x.grid, CONFIG, **sizes(x)),
    "draft_jax.norm_rope_pool": prepare,
    "draft_jax.norm_rope_pool of products": prepare_products,
    "draft_jax.joint_norm_rope_pool": prepare_joint,
    "draft_jax.joint_norm_rope_pool gradient": lambda x: gradients(
        lambda x, **changes: jnp.concatenate(prepare_joint(x, **changes)[:3], axis=1), x
    ),
    "draft_jax.pool_tokens": lambda x: draft_jax.pool_tokens(
        x.visual, x.grid, order=x.order, reduction="max"
    ),
    "draft_jax.check_finite": lambda x: draft_jax.check_finite(q=x.q),
    "draft_jax.check_positions": lambda x: draft_jax.check_positions(
        np.argwhere(np.ones((x.grid.frames, x.grid.height, x.grid.width))), grid=x.grid
    ),
    "draft_jax.BlockMask from_dense": lambda x: BlockMask.from_dense(
        x.kept, grid=x.grid
    ),
    "draft_jax.BlockMask from_visual": lambda x: BlockMask.from_visual(
        x.kept_visual, grid=x.grid
    ),
    "draft_jax.BlockMask full": lambda x: BlockMask.full(grid=x.grid, **sizes(x)),
    "draft_jax.BlockMask looked at": lambda x: (
        x.mask.to_dense(),
        x.mask.row_ids(),
        x.mask.density,
        x.mask.counts,
    ),
    "draft_jax.DraftAttention": lambda x: x.layer(
        x.q.reshape(*x.q.shape[:2], -1), grid=x.grid
    ),
    "draft_jax.DraftAttentionFn": lambda x: draft_attention_fn(
        x.grid, CONFIG, order=x.order
    )(x.q, x.k, x.v),
    "pallas_kernels.block_sparse_attention": sparse,
    "pallas_kernels.block_sparse_attention gradient": lambda x: gradients(sparse, x),
    "pallas_kernels.block_sparse_attention_with_lse": lambda x: sparse(
        x, pallas_kernels.block_sparse_attention_with_lse, text_lengths=None
    ),
    "pallas_kernels.block_sparse_attention_with_lse oracle": lambda x: sparse(
        x,
        pallas_kernels.block_sparse_attention_with_lse,
        text_lengths=None,
        backend="oracle",
    ),
    "pallas_kernels.dense_attention": dense,
    "pallas_kernels.dense_attention gradient": lambda x: gradients(dense, x),
    "pallas_kernels.unchecked_row_attention": rows,
    "pallas_kernels.unchecked_add_query_map": query_map,
    "pallas_kernels.ranking.pack": lambda x: ranking.pack(x.kept),
    "pallas_kernels.ranking.compress_rows": by_rows,
    "pallas_kernels.ranking.select_in_maps": lambda x: ranking.select_in_maps(
        x.scores, jnp.int32(30), forced=x.forced
    ),
    "pallas_kernels.ranking.select_in_rows": lambda x: ranking.select_in_rows(
        x.scores, counts(x, 3), forced=x.forced
    ),
    "pallas_kernels.ranking.select_to_mass": lambda x: ranking.select_to_mass(
        x.scores, counts(x, 1), counts(x, 5), forced=x.forced, mass=0.8
    ),
    "pallas_kernels.pooling.pool_tiles": lambda x: pooling.pool_tiles(
        x.q, x.k, tiling_of(x.grid, x.order), reductions=("mean", "max")
    ),
    "pallas_kernels.pooling.norm_rope_pool": lambda x: pooling.norm_rope_pool(
        x.q, x.k, tiling_of(x.grid, x.order), rope=x.rope
    ),
    "pallas_kernels.pooling.joint_norm_rope_pool": lambda x: (
        pooling.joint_norm_rope_pool(*parts(x), tiling_of(x.grid, x.order), rope=x.rope)
    ),
    "pallas_kernels.pooling.reduce_tiles": lambda x: pooling.reduce_tiles(
        x.q, tiling_of(x.grid, x.order)
    ),
}
# Called by others of the table with the arguments that they check.
CALLED_BY = {
    "pallas_kernels.pooling.deviations_of_tiles": "draft_jax.draft_scores exact spread",
    "pallas_kernels.pooling.means_of_tiles": "draft_jax.draft_attention row_topk",
    "pallas_kernels.pooling.pool_sub_tiles": "draft_jax.make_means",
    "pallas_kernels.pooling.pool_video": "draft_jax.draft_attention row_topk",
    "pallas_kernels.pooling.reduce_sub_tiles": "draft_jax.make_means",
    "pallas_kernels.ranking.unpack": "draft_jax.draft_attention row_topk",
    "draft_jax.draft_attention_fn": "draft_jax.DraftAttentionFn",
    "pallas_kernels.unchecked_block_sparse_attention": (
        "pallas_kernels.block_sparse_attention"
    ),
    "pallas_kernels.unchecked_dense_attention": "pallas_kernels.dense_attention",
    "draft_jax.BlockMask": "draft_jax.BlockMask full",
    "draft_jax.compute_mask": "draft_jax.draft_attention percentile",
}
