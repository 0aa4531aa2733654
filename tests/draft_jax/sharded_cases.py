"""Public functions on 8 simulated devices, in a process of their own.

    python -m tests.draft_jax.sharded_cases MODE[/CALL] ...
    python -m tests.draft_jax.sharded_cases "tokens" "explicit tokens"
    python -m tests.draft_jax.sharded_cases misfits

Prints a JSON object: what each case found, for `test_sharded_arrays`. A mode alone
stands for all calls.
"""

import dataclasses
import functools
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    )

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import draft_jax
from draft_jax import (
    BlockMask,
    Correction,
    DraftConfig,
    DraftStep,
    VideoGrid,
    draft_attention_fn,
)
from tests.collectives import collectives
from tests.draft_jax import public_calls
from tests.draft_jax.public_calls import CALLS, CONFIG, HEAD_DIM, Inputs

Arrays = dict[str, Any]
GRID = VideoGrid(2, 3, 5, tile=(2, 2), text_length=3)  # S = 12, edges, text
# Each of 2 x 4 devices has 11 x 5. No other axis of an array is as long as the whole.
BATCH, HEADS = 22, 20
WHOLE = {BATCH, HEADS, BATCH * HEADS}
MESH_AXES = {BATCH: "x", HEADS: "y"}  # by the length of an array's axis
MODES = ("automatic", "explicit", "manual", "partly manual", "vmap", "explicit vmap")


def spec(shape: Sequence[int]) -> P:
    """How an array is sharded: along batch and heads."""
    return P(*map(MESH_AXES.get, shape))


def specs(tree: Any) -> Any:
    return jax.tree.map(lambda x: spec(x.shape), tree)


def is_shared(x: Any) -> bool:
    """Whether several devices have the same values: their gradient is a sum of all."""
    return not {*MESH_AXES.values()} <= {*spec(x.shape)}


# ------------------------------------------------------------------------- operations

# Calls that nothing is sharded in.
LEFT_OUT = {
    "draft_jax.check_finite": "outside of jit only",
    "draft_jax.check_positions": "outside of jit only",
    "draft_jax.initial_mask": "it takes no array",
    "draft_jax.BlockMask full": "it takes no array",
    "draft_jax.DraftAttention": "heads are channels outside: see `flax_layers`",
}


def forward_mode(call: Callable[..., Any]) -> Callable[[Inputs], Any]:
    def along_qkv(x: Inputs):
        def of_qkv(q, k, v):
            return call(x, q=q, k=k, v=v)

        return jax.jvp(of_qkv, (x.q, x.k, x.v), (x.k, x.v, x.q))[1]

    return along_qkv


def second(call: Callable[..., Any]) -> Callable[[Inputs], Any]:
    def first(x: Inputs, **changes: Any):
        return public_calls.gradients(call, dataclasses.replace(x, **changes))

    def of_qkv(x: Inputs):
        def loss(q, k, v):
            return sum((y**2).sum() for y in first(x, q=q, k=k, v=v))

        return jax.grad(loss, (0, 1, 2))(x.q, x.k, x.v)

    return of_qkv


def traced_scale(x: Inputs) -> jax.Array:
    return jnp.abs(x.scales[0].sum())


def traced_step(x: Inputs):
    """A step whose values are traced: both conditionals are in the program."""
    flag = x.scales[0][0] > 9
    step = DraftStep(dense=flag, refresh=~flag, budget=jnp.int32(20) + flag)
    capacity = draft_jax.mask_capacity(x.grid, CONFIG)
    mask = BlockMask(
        row_offsets=jnp.minimum(x.mask.row_offsets, capacity),
        block_ids=x.mask.block_ids[..., :capacity],
        grid=x.grid,
    )
    return draft_jax.scheduled_attention(
        x.q, x.k, x.v, grid=x.grid, config=CONFIG, step=step, mask=mask
    )


LONG = VideoGrid(1, 32, 32, tile=(8, 16), text_length=32)  # 1,056 tokens: corrected


def corrected(x: Inputs):
    """Attention of more tokens than the inputs have, for what begins at 1,024."""
    tokens = jnp.arange(LONG.num_tokens)[:, None, None]
    # Slow, as tiles that are nearly alike would be ranked by rounding.
    waves = jnp.cos(tokens * jnp.linspace(0.003, 0.02, HEAD_DIM))

    def lengthened(own):
        times = LONG.num_tokens // own.shape[1]
        return jnp.concatenate([own] * times, axis=1) * waves

    return draft_jax.draft_attention(
        *map(lengthened, (x.q, x.k, x.v)),
        grid=LONG,
        config=dataclasses.replace(CONFIG, correction=Correction()),
        text_lengths=x.lengths,
    )


def traced_scale_of_scores(x: Inputs, config: DraftConfig):
    scale = traced_scale(x)
    return draft_jax.draft_scores(x.q, x.k, grid=x.grid, config=config, scale=scale)


OPERATIONS: dict[str, Callable[[Inputs], Any]] = {
    **{
        name: call
        for name, call in CALLS.items()
        if name not in LEFT_OUT and not name.endswith(" gradient")
    },
    # A dense step returns the mask that it was given: one that was made from nothing.
    "draft_jax.scheduled_attention dense": lambda x: public_calls.scheduled(
        x, dense=True
    )[0],
    "draft_attention, tiled": lambda x: public_calls.attend(
        dataclasses.replace(x, order="tiled")
    ),
    "draft_attention, corrected": corrected,
    "scheduled_attention, traced": traced_step,
    "block_sparse_attention, traced scale": lambda x: public_calls.sparse(
        x, scale=traced_scale(x)
    ),
    "dense_attention, traced scale": lambda x: public_calls.dense(
        x, scale=traced_scale(x)
    ),
    **{
        f"draft_scores {name}, traced scale": functools.partial(
            traced_scale_of_scores, config=config
        )
        for name, config in public_calls.CONFIGS.items()
    },
    "block_sparse_attention, forward mode": forward_mode(public_calls.sparse),
    "block_sparse_attention, second gradient": second(public_calls.sparse),
    "dense_attention, forward mode": forward_mode(public_calls.dense),
}


def is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def arrays_of(inputs: Inputs) -> Arrays:
    return {
        field.name: value
        for field in dataclasses.fields(Inputs)
        if field.name not in ("grid", "order", "forced", "layer")
        for value in [getattr(inputs, field.name)]
    }


def gradient(function: Callable[[Arrays], Any], chosen: Sequence[int]):
    """The gradient with respect to some of the leaves."""

    def of_arrays(arrays: Arrays):
        leaves, tree = jax.tree.flatten(arrays)

        def loss(own):
            given = [own.get(i, leaf) for i, leaf in enumerate(leaves)]
            results = jax.tree.leaves(function(jax.tree.unflatten(tree, given)))
            return sum((y**2).sum() for y in results if is_float(y))

        return jax.grad(loss)({i: leaves[i] for i in chosen})

    return of_arrays


# ------------------------------------------------------------------------------ modes


def mesh_of(mode: str):
    kind = AxisType.Explicit if "explicit" in mode else AxisType.Auto
    return jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind, kind))


def mapped(function: Callable[[Arrays], Any], mode: str):
    """Maps over the batch: what is left has a batch of one item."""

    def has_batch(x):
        return x.shape[:1] == (BATCH,)

    def run(arrays: Arrays):
        axes = jax.tree.map(lambda x: 0 if has_batch(x) else None, arrays)

        def of_item(own: Arrays):
            own = jax.tree.map(
                lambda x, whole: x[None] if has_batch(whole) else x, own, arrays
            )
            return jax.tree.map(lambda y: y[0], function(own))

        name = None if mode == "explicit vmap" else "x"
        return jax.vmap(of_item, in_axes=(axes,), spmd_axis_name=name)(arrays)

    return run


def under(mode: str, function: Callable[[Arrays], Any], arrays: Arrays, mesh):
    """The operation as it is called in this mode."""
    if "vmap" in mode:
        return mapped(function, mode)
    if "manual" not in mode:
        return function
    names = {"x"} if mode == "partly manual" else {"x", "y"}
    results = jax.eval_shape(function, arrays)
    in_specs, out_specs = jax.tree.map(
        lambda own: P(*(axis if axis in names else None for axis in own)),
        specs((arrays, results)),
    )
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(in_specs,),
        out_specs=out_specs,
        axis_names=names,
    )


def compare(function, expected, arrays: Arrays, mesh) -> dict[str, Any]:
    """Runs a program on all devices; `expected` is what one device computes."""
    sharded = jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, spec(x.shape))), arrays
    )
    program = jax.jit(function).lower(sharded).compile()
    text = program.as_text()
    out, expected = jax.tree.leaves(program(sharded)), jax.tree.leaves(expected)
    return {
        "collectives": {x.kind: x.num_bytes for x in collectives(text)},
        "whole axes": sorted(sizes_in(text) & WHOLE),
        "sharded as": [str(x.sharding.spec) for x in out],
        "wanted": [
            NamedSharding(mesh, spec(x.shape)).is_equivalent_to(x.sharding, x.ndim)
            for x in out
        ],
        "errors": [error(x, y) for x, y in zip(out, expected, strict=True)],
    }


def run(name: str, mode: str) -> dict[str, Any]:
    """Runs a call, its gradient, and the gradient of what all devices share."""
    inputs = public_calls.make_inputs(GRID, batch=BATCH, heads=HEADS)
    arrays, mesh = arrays_of(inputs), mesh_of(mode)

    def function(arrays: Arrays):
        return OPERATIONS[name](dataclasses.replace(inputs, **arrays))

    found = {}

    def add(kind: str, program: Callable[[Arrays], Any], expected: Any) -> None:
        try:
            found[kind] = compare(program, expected, arrays, mesh)
        except Exception as cause:
            found[kind] = {"raised": f"{type(cause).__name__}: {cause}"[:3000]}

    results = jax.jit(function)(arrays)
    try:
        of_all_arrays = under(mode, function, arrays, mesh)
    except Exception as cause:
        return {"forward": {"raised": f"{type(cause).__name__}: {cause}"[:3000]}}
    add("forward", of_all_arrays, results)
    has_own_derivative = "gradient" in name or "forward mode" in name
    if has_own_derivative or not any(map(is_float, jax.tree.leaves(results))):
        return found
    leaves = jax.tree.leaves(arrays)
    floats = [i for i, x in enumerate(leaves) if is_float(x)]
    gradients = jax.jit(gradient(function, floats))(arrays)
    moving = [i for i in floats if jnp.any(gradients[i] != 0)]
    if own := [i for i in moving if not is_shared(leaves[i])]:
        of_own = under(mode, gradient(function, own), arrays, mesh)
        add("gradient", of_own, {i: gradients[i] for i in own})
    if shared := [i for i in moving if is_shared(leaves[i])]:
        of_shared = gradient(of_all_arrays, shared)
        add("gradient of shared", of_shared, {i: gradients[i] for i in shared})
    return found


def told(function: Callable[[], Any]) -> tuple[Any, list[str]]:
    """The result of a call, and what it warns of."""
    with warnings.catch_warnings(record=True) as issued:
        warnings.simplefilter("always")
        result = function()
    return result, [str(warning.message) for warning in issued]


TOKENS = VideoGrid(2, 4, 4, tile=(2, 2))  # 32, and no other axis is as long


# The call itself cuts the text off, which JAX refuses of sharded tokens.
CUT_TOKENS = (
    "draft_jax.joint_norm_rope_pool",
    "pallas_kernels.pooling.joint_norm_rope_pool",
)


def by_tokens(name: str, kind: AxisType) -> dict[str, Any]:
    """Runs a call whose tokens are sharded over two devices."""
    inputs = public_calls.make_inputs(TOKENS)
    arrays = arrays_of(inputs)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,), devices=jax.devices()[:2])

    def place(x):
        names = ("x" if size == TOKENS.num_tokens else None for size in x.shape)
        return jax.device_put(x, NamedSharding(mesh, P(*names)))

    def function(arrays: Arrays):
        return OPERATIONS[name](dataclasses.replace(inputs, **arrays))

    expected = jax.tree.leaves(jax.jit(function)(arrays))
    try:
        got = jax.tree.leaves(jax.jit(function)(jax.tree.map(place, arrays)))
    except Exception as cause:
        return {"raised": f"{type(cause).__name__}: {cause}"[:3000]}
    return {"errors": [error(x, y) for x, y in zip(got, expected, strict=True)]}


def misfits() -> dict[str, Any]:
    """Tokens are sharded, and heads unevenly: what is raised or warned of."""
    tokens = VideoGrid(2, 4, 4, tile=(2, 2))
    inputs = public_calls.make_inputs(tokens, heads=HEADS)
    attend = functools.partial(draft_jax.draft_attention, grid=tokens, config=CONFIG)
    q, k, v = inputs.q, inputs.k, inputs.v
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
        HEADS,
        qkv_features=HEADS * HEAD_DIM,
        attention_fn=draft_attention_fn(GRID, CONFIG),
    )
    nnx_layer = draft_jax.DraftAttention(
        HEADS, 24, HEADS * HEAD_DIM, config=CONFIG, rngs=nnx.Rngs(0)
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
            "collectives": sorted({x.kind for x in collectives(text)}),
            "whole axes": sorted(sizes_in(text) & {HEADS}),
            "error": error(program(sharded, whole), jax.jit(call)(parameters, x)),
        }
    return found


TOKEN_MODES = {"tokens": AxisType.Auto, "explicit tokens": AxisType.Explicit}
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
        mode, _, name = case.partition("/")
        if case in OTHERS:
            found[case] = OTHERS[case]()
            continue
        for call in [name] if name else OPERATIONS:
            if mode in TOKEN_MODES:
                if call not in CUT_TOKENS:
                    found[f"{mode}, {call}"] = by_tokens(call, TOKEN_MODES[mode])
                continue
            for kind, result in run(call, mode).items():
                found[f"{mode}, {call}, {kind}"] = result
    print(json.dumps(found))


if __name__ == "__main__":
    main()
