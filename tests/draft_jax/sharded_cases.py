"""Operations on 8 simulated devices, in a process of their own.

    python -m tests.draft_jax.sharded_cases OPERATION/MODE ...
    python -m tests.draft_jax.sharded_cases misfits

Prints a JSON object: what each case found, for `test_sharded_arrays`.
"""

import functools
import json
import os
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import draft_jax
import pallas_kernels
from draft_jax import (
    QKV,
    BlockMask,
    DraftConfig,
    DraftStep,
    QKNorm,
    VideoGrid,
    draft_attention_fn,
)
from pallas_kernels import ranking

Arrays = dict[str, Any]
GRID = VideoGrid(2, 3, 5, tile=(2, 2), text_length=3)  # S = 12, edges, text
NO_TEXT = VideoGrid(2, 3, 5, tile=(2, 2))
# Each of 2 x 4 devices has 11 x 5. No other axis of an array is as long as the whole.
BATCH, HEADS, DIM = 22, 20, 8
WHOLE = {BATCH, HEADS, BATCH * HEADS}
MEANS = DraftConfig.compensated(
    sparsity=0.5,
    draft_tile=(1, 2),
    compensation=draft_jax.Compensation(sub_tile=(1, 1), frames=2),
)
CONFIG = DraftConfig.paper(sparsity=0.5)
NORM = QKNorm(over="head")
COLLECTIVES = r"(all-\w+|collective-\w+|reduce-scatter|ragged-\w+)(?:-start)?\("
AXES = {
    "q": "B T N D",
    "k": "B T N D",
    "v": "B T N D",
    "lengths": "B",
    "row_offsets": "B N R",
    "block_ids": "B N M",
    "scores": "B N S S",
    "scale": "D",
    "rope": "T half",
    "flag": "",
}
MESH_AXES = {"B": "x", "N": "y"}


def spec(axes: str) -> P:
    return P(*(MESH_AXES.get(axis) for axis in axes.split()))


def make_arrays() -> Arrays:
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    shape, blocks = (BATCH, GRID.num_tokens, HEADS, DIM), GRID.num_blocks
    kept = rng.random((BATCH, HEADS, blocks, blocks)) < 0.5
    mask = BlockMask.from_dense(kept, grid=GRID)
    visual = GRID.num_visual_blocks
    return {
        "q": normal(*shape),
        "k": normal(*shape),
        "v": normal(*shape),
        "lengths": jnp.asarray(rng.integers(0, GRID.text_length + 1, BATCH)),
        "row_offsets": mask.row_offsets,
        "block_ids": mask.block_ids,
        "scores": jax.nn.softmax(normal(BATCH, HEADS, visual, visual)),
        "scale": normal(DIM),
        "rope": normal(GRID.num_visual_tokens, DIM // 2),
        "flag": jnp.asarray(False),
    }


# ------------------------------------------------------------------------- operations


def mask_of(x: Arrays) -> BlockMask:
    lists = {name: x[name] for name in ("row_offsets", "block_ids")}
    return BlockMask(**lists, grid=GRID)


def draft(x: Arrays, config: DraftConfig = CONFIG, order="raster"):
    return draft_jax.draft_attention(
        x["q"], x["k"], x["v"], grid=GRID, config=config, order=order
    )


def scheduled(x: Arrays):
    """A step whose values are traced: both conditionals are in the program."""
    flag = x["flag"]
    step = DraftStep(dense=flag, refresh=~flag, budget=jnp.int32(20) + flag)
    config = DraftConfig.paper(sparsity=0.5)
    capacity = draft_jax.mask_capacity(GRID, config)
    mask = BlockMask(
        row_offsets=jnp.minimum(x["row_offsets"], capacity),
        block_ids=x["block_ids"][..., :capacity],
        grid=GRID,
    )
    out, mask = draft_jax.scheduled_attention(
        x["q"], x["k"], x["v"], grid=GRID, config=config, step=step, mask=mask
    )
    return out, mask.row_offsets, mask.block_ids


def sparse(x: Arrays, function=pallas_kernels.block_sparse_attention):
    return function(
        x["q"],
        x["k"],
        x["v"],
        mask_of(x),
        grid=GRID,
        order="raster",
        text_lengths=x["lengths"],
        scale=x["scale"].sum(),
    )


def dense(x: Arrays):
    return pallas_kernels.dense_attention(
        x["q"], x["k"], x["v"], grid=GRID, text_lengths=x["lengths"]
    )


def prepare(x: Arrays):
    q, k, pooled = draft_jax.norm_rope_pool(
        x["q"],
        x["k"],
        grid=GRID,
        config=CONFIG,
        norm=NORM,
        scales=(x["scale"], x["scale"]),
        rope=(x["rope"], x["rope"]),
    )
    return q, k, pooled.q_mean, pooled.k_mean


def prepare_joint(x: Arrays):
    parts = (GRID.visual_tokens, GRID.text_tokens)
    video, text = (QKV(*(x[name][:, tokens] for name in "qkv")) for tokens in parts)
    q, k, v, pooled = draft_jax.joint_norm_rope_pool(
        video,
        text,
        grid=GRID,
        config=CONFIG,
        norm=NORM,
        scales=(x["scale"], x["scale"]),
        rope=(x["rope"], x["rope"]),
    )
    return q, k, v, pooled.q_mean


def masks(x: Arrays, **options):
    config = DraftConfig.paper(sparsity=0.5, **options)
    mask = draft_jax.compute_mask(x["q"], x["k"], grid=GRID, config=config)
    return mask.row_offsets, mask.block_ids, mask.to_dense(), mask.density


def select(x: Arrays, **options):
    config = DraftConfig.paper(sparsity=0.5, **options)
    mask = draft_jax.select_blocks(x["scores"], grid=NO_TEXT, config=config)
    return mask.row_offsets, mask.block_ids


def rank(x: Arrays):
    forced = np.eye(NO_TEXT.num_blocks, dtype=bool)
    words = ranking.select_in_maps(x["scores"], jnp.int32(30), forced=forced)
    rows = ranking.select_in_rows(
        x["scores"], jnp.full(len(forced), 3, jnp.int32), forced=forced
    )
    first = np.arange(words.shape[-1], dtype=np.int32) * ranking.WORD_BITS
    return words, rows, *ranking.compress_rows(words, first, 100)


def pool(x: Arrays):
    visual = x["q"][:, GRID.visual_tokens]
    scores = draft_jax.draft_scores(x["q"], x["k"], grid=GRID, config=CONFIG)
    return draft_jax.pool_tokens(visual, GRID, reduction="max"), scores


def gradient(function: Callable[[Arrays], Any]) -> Callable[[Arrays], Any]:
    def of_qkv(x: Arrays):
        def loss(q, k, v):
            results = function(x | {"q": q, "k": k, "v": v})
            return sum((y**2).sum() for y in jax.tree.leaves(results))

        return jax.grad(loss, (0, 1, 2))(x["q"], x["k"], x["v"])

    return of_qkv


def forward_mode(function: Callable[[Arrays], Any]) -> Callable[[Arrays], Any]:
    def along_qkv(x: Arrays):
        own = {name: x[name] for name in "qkv"}
        moved = {"q": x["k"], "k": x["v"], "v": x["q"]}
        return jax.jvp(lambda own: function(x | own), (own,), (moved,))[1]

    return along_qkv


QKV_RESULT = ("B T N D",) * 3
LISTS = ("B N R", "B N M")
# Operation and axes of its results.
OPERATIONS: dict[str, tuple[Callable[[Arrays], Any], Any]] = {
    "draft": (draft, "B T N D"),
    "draft, tiled": (functools.partial(draft, order="tiled"), "B T N D"),
    "draft, gradient": (gradient(draft), QKV_RESULT),
    "draft, means": (functools.partial(draft, config=MEANS), "B T N D"),
    "draft, means, gradient": (
        gradient(functools.partial(draft, config=MEANS)),
        QKV_RESULT,
    ),
    "scheduled": (scheduled, ("B T N D", *LISTS)),
    "scheduled, gradient": (gradient(lambda x: scheduled(x)[0]), QKV_RESULT),
    "sparse": (sparse, "B T N D"),
    "sparse, log-sum-exp": (
        functools.partial(
            sparse, function=pallas_kernels.block_sparse_attention_with_lse
        ),
        ("B T N D", "B N T"),
    ),
    "sparse, gradient": (gradient(sparse), QKV_RESULT),
    "sparse, forward mode": (forward_mode(sparse), "B T N D"),
    "sparse, second": (gradient(gradient(sparse)), QKV_RESULT),
    "dense": (dense, "B T N D"),
    "dense, gradient": (gradient(dense), QKV_RESULT),
    "dense, forward mode": (forward_mode(dense), "B T N D"),
    "norm_rope_pool": (prepare, ("B T N D", "B T N D", "B S N D", "B S N D")),
    "norm_rope_pool, gradient": (
        gradient(lambda x: (*prepare(x)[:2], x["v"])),
        QKV_RESULT,
    ),
    "joint": (prepare_joint, (*QKV_RESULT, "B S N D")),
    "joint, gradient": (gradient(lambda x: prepare_joint(x)[:3]), QKV_RESULT),
    "mask": (masks, (*LISTS, "B N R C", "B N")),
    "mask, top_p": (
        functools.partial(masks, selection="top_p", pooling="mean+max"),
        (*LISTS, "B N R C", "B N"),
    ),
    "select": (select, LISTS),
    "select, row_topk": (functools.partial(select, selection="row_topk"), LISTS),
    "rank": (rank, ("B N R W", "B N R W", *LISTS)),
    "pool": (pool, ("B S N D", "B N S S")),
    "flax": (
        lambda x: draft_attention_fn(GRID, CONFIG)(x["q"], x["k"], x["v"]),
        "B T N D",
    ),
}
MODES = ("automatic", "explicit", "manual", "partly manual", "vmap", "explicit vmap")


# ------------------------------------------------------------------------------ modes


def mesh_of(mode: str):
    kind = AxisType.Explicit if "explicit" in mode else AxisType.Auto
    return jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind, kind))


def mapped(function: Callable[[Arrays], Any], results: Any, mode: str):
    """Maps over the batch: what is left has a batch of one item."""

    def of_item(x: Arrays):
        own = {n: a[None] if "B" in AXES[n] else a for n, a in x.items()}
        return jax.tree.map(lambda y: y[0], function(own))

    axes = {name: 0 if "B" in AXES[name] else None for name in AXES}
    name = None if mode == "explicit vmap" else "x"
    return jax.vmap(of_item, in_axes=(axes,), spmd_axis_name=name)


def under(mode: str, function: Callable[[Arrays], Any], results: Any, mesh):
    """The operation as it is called in this mode."""
    if "vmap" in mode:
        return mapped(function, results, mode)
    if "manual" not in mode:
        return function
    specs = jax.tree.map(spec, (AXES, results))
    names = {"x"} if mode == "partly manual" else {"x", "y"}
    in_specs, out_specs = jax.tree.map(
        lambda s: P(*(axis if axis in names else None for axis in s)), specs
    )
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(in_specs,),
        out_specs=out_specs,
        axis_names=names,
    )


def run(case: str) -> dict[str, Any]:
    """Runs an operation on all devices, and on one."""
    name, _, mode = case.partition("/")
    function, results = OPERATIONS[name]
    arrays, mesh = make_arrays(), mesh_of(mode)
    sharded = {
        name: jax.device_put(x, NamedSharding(mesh, spec(AXES[name])))
        for name, x in arrays.items()
    }
    program = jax.jit(under(mode, function, results, mesh)).lower(sharded).compile()
    text = program.as_text()
    out = jax.tree.leaves(program(sharded))
    wanted = jax.tree.leaves(jax.tree.map(spec, results))
    expected = jax.tree.leaves(jax.jit(function)(arrays))
    return {
        "collectives": sorted(set(re.findall(COLLECTIVES, text))),
        "whole axes": sorted(sizes_in(text) & WHOLE),
        "sharded as": [str(x.sharding.spec) for x in out],
        "wanted": [
            NamedSharding(mesh, s).is_equivalent_to(x.sharding, x.ndim)
            for x, s in zip(out, wanted, strict=True)
        ],
        "errors": [error(x, y) for x, y in zip(out, expected, strict=True)],
    }


def told(function: Callable[[], Any]) -> tuple[Any, list[str]]:
    """The result of a call, and what it warns of."""
    with warnings.catch_warnings(record=True) as issued:
        warnings.simplefilter("always")
        result = function()
    return result, [str(warning.message) for warning in issued]


def misfits() -> dict[str, Any]:
    """Tokens are sharded, and heads unevenly: what is raised or warned of."""
    arrays = {name: x[:2] for name, x in make_arrays().items() if name in "qkv"}
    tokens = VideoGrid(2, 4, 4, tile=(2, 2))
    attend = functools.partial(
        draft_jax.draft_attention, grid=tokens, config=DraftConfig.paper(sparsity=0.5)
    )
    q, k, v = (x[:, : tokens.num_tokens] for x in arrays.values())
    expected = jax.jit(attend)(q, k, v)
    found: dict[str, Any] = {}
    for kind in (AxisType.Explicit, AxisType.Auto):
        mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
        by_tokens = NamedSharding(mesh, P(None, "x", None, None))
        sharded = jax.device_put((q, k, v), by_tokens)
        try:
            out, found["warned"] = told(lambda: jax.jit(attend)(*sharded))  # noqa: B023
        except ValueError as cause:
            found["raised"] = str(cause)
    found["error"] = error(out, expected)

    def uneven(*qkv):  # 20 heads of 8 devices
        qkv = (jax.lax.with_sharding_constraint(x, by_heads) for x in qkv)
        return attend(*qkv)

    by_heads = NamedSharding(mesh, P(None, None, "x", None))
    out, found["warned, uneven"] = told(lambda: jax.jit(uneven)(q, k, v))
    found["error, uneven"] = error(out, expected)
    return found


def flax_layers() -> dict[str, Any]:
    """Layers whose kernels are sharded by heads: what their programs communicate."""
    mesh = jax.make_mesh(
        (4,), ("y",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4]
    )
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 33, 24)), jnp.float32)
    linen_layer = linen.MultiHeadDotProductAttention(
        HEADS, qkv_features=HEADS * DIM, attention_fn=draft_attention_fn(GRID, CONFIG)
    )
    nnx_layer = draft_jax.DraftAttention(
        HEADS, 24, HEADS * DIM, config=CONFIG, rngs=nnx.Rngs(0)
    )
    graph, state = nnx.split(nnx_layer)
    calls = {
        "linen": (linen_layer.apply, linen_layer.init(jax.random.key(0), x)),
        "nnx": (lambda state, x: nnx.merge(graph, state)(x, grid=GRID), state),
    }

    def by_heads(leaf):
        names = ("y" if size == HEADS else None for size in leaf.shape)
        return jax.device_put(leaf, NamedSharding(mesh, P(*names)))

    found = {}
    for name, (call, parameters) in calls.items():
        sharded = jax.tree.map(by_heads, parameters)
        whole = jax.device_put(x, NamedSharding(mesh, P()))
        program = jax.jit(call).lower(sharded, whole).compile()
        text = program.as_text()
        found[name] = {
            "collectives": sorted(set(re.findall(COLLECTIVES, text))),
            "whole axes": sorted(sizes_in(text) & {HEADS}),
            "error": error(program(sharded, whole), jax.jit(call)(parameters, x)),
        }
    return found


OTHERS = {"misfits": misfits, "flax layers": flax_layers}


def sizes_in(text: str) -> set[int]:
    """Sizes of the axes of all arrays of a compiled program."""
    dims = re.findall(r"(?:pred|[suf]\d+)\[([\d,]+)\]", text)
    return {int(n) for own in dims for n in own.split(",") if n}


def error(x, y) -> float:
    """Largest difference, relative to the largest value; integers count whole."""
    x, y = np.asarray(x), np.asarray(y)
    if np.array_equal(x, y):
        return 0.0
    if x.dtype != np.float32:
        return float((x != y).sum())
    return float(np.abs(x - y).max() / np.abs(y).max())


def main() -> None:
    found = {}
    for case in sys.argv[1:]:
        try:
            found[case] = OTHERS[case]() if case in OTHERS else run(case)
        except Exception as cause:
            found[case] = {"raised": f"{type(cause).__name__}: {cause}"[:3000]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
