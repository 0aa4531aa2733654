r"""Runs every kernel once on small shapes, for NVIDIA's compute-sanitizer.

    compute-sanitizer --tool memcheck --kernel-regex kns=sm90 \
        python -m benchmarks.gpu.sanitize by-rows

`benchmarks.gpu.run sanitize` does that for all parts, a few side by side, under each
tool, and records what came out.
"""

import dataclasses
import os
from collections.abc import Callable

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common.inputs import random_mask
from benchmarks.common.options import make_parser
from draft_jax import (
    QKV,
    BlockMask,
    Compensation,
    DraftConfig,
    QKNorm,
    VideoGrid,
    draft_attention,
    joint_norm_rope_pool,
    make_means,
    norm_rope_pool,
)
from pallas_kernels import (
    Means,
    block_sparse_attention,
    dense_attention,
    unchecked_add_query_map,
    unchecked_row_attention,
)
from pallas_kernels.common.interfaces import Order
from pallas_kernels.tile_scores import Parts, tile_scores

HEADS, HEAD_DIM = 4, 128
TEXT_GRID = VideoGrid(2, 13, 32, text_length=40)  # with edge tiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """A part that calls block-sparse attention: once with gaps, once without."""

    grid: VideoGrid
    order: Order = "tiled"
    heads: int = 2
    head_dim: int = HEAD_DIM
    dtype: str = "bfloat16"
    text_lengths: tuple[int, ...] = ()  # one for each batch item
    growth: float = 0.0  # of the logits, in nats from one key block to the next
    sub_tile: tuple[int, int] | None = None  # of means over two frames, if any
    densities: tuple[float, ...] = (0.4, 1.0)

    @property
    def batch(self) -> int:
        """Batch items: one for each text length."""
        return len(self.text_lengths) or 1

    def qkv(self) -> tuple[jax.Array, ...]:
        """Makes q, k and v, whose logits grow from key block to key block if asked."""
        grid = self.grid
        size = (self.batch, grid.num_tokens, self.heads, self.head_dim)
        q, k, v = inputs(size, self.dtype)
        if not self.growth:
            return q, k, v
        block = np.repeat(np.arange(grid.num_blocks), grid.block_lengths)
        growing = self.growth * self.head_dim**0.5 * block
        q = q.at[..., 0].set(1.0)
        return q, k.at[..., 0].set(jnp.asarray(growing, k.dtype)[:, None]), v

    def means(self, k: jax.Array, v: jax.Array, mask: BlockMask) -> Means | None:
        """Makes means of what a mask skips, if this part has them."""
        if self.sub_tile is None:
            return None
        compensation = Compensation(sub_tile=self.sub_tile, frames=2)
        return make_means(k, v, mask, compensation=compensation, order=self.order)

    def __call__(self) -> None:
        """Runs the kernel at each density."""
        lengths = jnp.asarray(self.text_lengths, jnp.int32)
        attend = jax.jit(
            lambda q, k, v, mask, lengths: block_sparse_attention(
                q,
                k,
                v,
                mask,
                grid=self.grid,
                order=self.order,
                text_lengths=lengths if self.text_lengths else None,
                means=self.means(k, v, mask),
                backend="hopper",
            )
        )
        for density in self.densities:
            mask = random_mask(self.grid, self.batch, self.heads, density)
            check(f"{self}, density {density}", attend(*self.qkv(), mask, lengths))


def inputs(size: tuple[int, ...], dtype: str = "bfloat16") -> tuple[jax.Array, ...]:
    """Makes q, k and v from a standard normal distribution."""
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(key, size, dtype) for key in keys)


def check(name: str, *arrays: jax.Array) -> None:
    """Stops the program if a value is not finite."""
    for array in arrays:
        assert np.isfinite(np.asarray(array, np.float32)).all(), name
    print(f"{name}: finite", flush=True)


def dense() -> None:
    """Runs dense attention."""
    qkv = inputs((1, 4096 + 72, HEADS, HEAD_DIM))
    check("dense", jax.jit(dense_attention)(*qkv))


def draft() -> None:
    """Runs pooling and selection, and the attention that follows."""
    grid = TEXT_GRID
    for selection in ("percentile", "row_topk", "top_p"):
        config = DraftConfig.paper(selection=selection, sparsity=0.5)
        attend = jax.jit(
            lambda q, k, v, config=config: draft_attention(
                q, k, v, grid=grid, config=config
            )
        )
        qkv = inputs((1, grid.num_tokens, HEADS, HEAD_DIM))
        check(f"draft attention, {selection}", attend(*qkv))


def draft_with_means() -> None:
    """Runs a draft of sub-tiles and ranking by spread, and means behind the lists."""
    config = DraftConfig.paper(
        sparsity=0.5,
        selection="row_topk",
        draft_tile=(4, 4),
        compensation=Compensation(sub_tile=(2, 4), frames=2),
        ranking="spread",
    )
    attend = jax.jit(lambda *qkv: draft_attention(*qkv, grid=TEXT_GRID, config=config))
    qkv = inputs((1, TEXT_GRID.num_tokens, HEADS, HEAD_DIM))
    check("draft attention with means", attend(*qkv))


def scores() -> None:
    """Scores parts of tiles: some query blocks for each CTA, and logits that grow."""
    num, heads = 264, 150
    weights = (0.125,) * num
    parts = Parts(per_tile=8, query_weights=weights, key_weights=weights)
    q, k, _ = inputs((1, num, heads, HEAD_DIM), "float32")
    growing = 100 * HEAD_DIM**0.5 * (jnp.arange(num) // 128)  # nats by key block
    k = k.at[..., 0].set(growing[:, None])
    check("scores", tile_scores(q.at[..., 0].set(1.0), k, parts))


def prepare() -> None:
    """Runs norm, rotation and pooling."""
    grid = TEXT_GRID
    angles = jnp.ones((grid.num_visual_tokens, HEAD_DIM // 2))
    q, k, pooled = norm_rope_pool(
        *inputs((1, grid.num_tokens, HEADS, HEAD_DIM))[:2],
        grid=grid,
        config=DraftConfig.paper(),
        norm=QKNorm(over="head"),
        scales=(jnp.ones(HEAD_DIM), jnp.ones(HEAD_DIM)),
        rope=(jnp.cos(angles), jnp.sin(angles)),
        order="tiled",
    )
    check("norm, rotation and pooling", q, k, *jax.tree.leaves(pooled))


def prepare_joint() -> None:
    """Runs norm, rotation and pooling of a video and its text, joined."""
    grid = TEXT_GRID
    angles = jnp.ones((grid.num_visual_tokens, HEAD_DIM // 2))
    video, text = (
        QKV(*inputs((1, tokens, HEADS, HEAD_DIM)))
        for tokens in (grid.num_visual_tokens, grid.text_length)
    )
    scales = (jnp.ones(HEAD_DIM), jnp.ones(HEAD_DIM))
    results = joint_norm_rope_pool(
        video,
        text,
        grid=grid,
        config=DraftConfig.paper(),
        norm=QKNorm(over="head"),
        scales=scales,
        text_scales=scales,
        rope=(jnp.cos(angles), jnp.sin(angles)),
        order="tiled",
    )
    check("norm, rotation and pooling, joined", *jax.tree.leaves(results))


def exact_rows() -> None:
    """Runs attention of a few queries, whose keys are cut into parts."""
    grid = VideoGrid(16, 16, 32, text_length=128)
    q, k, v = inputs((2, grid.num_tokens, HEADS, HEAD_DIM))
    attend = jax.jit(
        lambda rows, k, v, lengths: unchecked_row_attention(
            rows, k, v, grid=grid, scale=HEAD_DIM**-0.5, text_lengths=lengths
        )
    )
    lengths = jnp.asarray([128, 7], jnp.int32)
    check("exact rows", attend(q[:, :200], k, v, lengths))


def query_map() -> None:
    """Adds maps of queries: to a short last block, and to some of the tokens."""
    for tokens, head_dim in ((1096, HEAD_DIM), (64, 64)):
        out, q, _ = inputs((2, tokens, HEADS, head_dim))
        matrix, *_ = inputs((2, HEADS, head_dim, head_dim))
        add = jax.jit(
            lambda out, q, matrix, tokens=tokens: unchecked_add_query_map(
                out, q, matrix, matrix[..., 0], tokens=(5, tokens - 3)
            )
        )
        check(f"map of {tokens} queries", add(out, q, matrix))


BEFORE = VideoGrid(1, 13, 32, text_length=136, text_side="before")
PARTS: dict[str, Callable[[], None]] = {
    "text": Attention(grid=TEXT_GRID, heads=HEADS),
    "raster": Attention(grid=TEXT_GRID, heads=HEADS, order="raster"),
    "boxes": Attention(grid=VideoGrid(2, 13, 32), heads=HEADS, order="raster"),
    "widths": Attention(grid=VideoGrid(2, 14, 20), heads=HEADS),
    "head-dim-64": Attention(grid=VideoGrid(2, 13, 32), head_dim=64),
    "float16": Attention(grid=VideoGrid(1, 16, 48), dtype="float16", growth=12.0),
    "text-lengths": Attention(
        grid=VideoGrid(1, 13, 32, text_length=40), text_lengths=(40, 7)
    ),
    "text-before": Attention(grid=BEFORE, text_lengths=(0, 130), order="raster"),
    "by-rows": Attention(grid=VideoGrid(2, 13, 21, text_length=37)),
    "by-rows-raster": Attention(
        grid=VideoGrid(1, 13, 21, text_length=37), order="raster"
    ),
    # More nats than a row's sum holds: the second launch computes every block again.
    "repair": Attention(grid=VideoGrid(2, 13, 32), growth=60.0, densities=(1.0,)),
    "repair-float16": Attention(
        grid=TEXT_GRID, dtype="float16", growth=400.0, densities=(1.0,)
    ),
    "means": Attention(grid=VideoGrid(3, 16, 32), sub_tile=(2, 2)),
    "means-edges": Attention(grid=TEXT_GRID, sub_tile=(2, 4), order="raster"),
    "means-boxes": Attention(
        grid=VideoGrid(3, 13, 32), sub_tile=(2, 2), order="raster", head_dim=64
    ),
    "means-by-rows": Attention(grid=VideoGrid(2, 13, 21), sub_tile=(4, 4)),
    "means-float16": Attention(
        grid=VideoGrid(3, 16, 32), sub_tile=(1, 1), dtype="float16", growth=60.0
    ),
    "dense": dense,
    "draft": draft,
    "draft-means": draft_with_means,
    "scores": scores,
    "prepare": prepare,
    "prepare-joint": prepare_joint,
    "exact-rows": exact_rows,
    "query-map": query_map,
}


def main() -> None:
    """Runs the parts that are named."""
    parser = make_parser(__doc__)
    parser.add_argument("parts", nargs="*", choices=PARTS, help="default: all")
    for part in parser.parse_args().parts or PARTS:
        PARTS[part]()


if __name__ == "__main__":
    main()
