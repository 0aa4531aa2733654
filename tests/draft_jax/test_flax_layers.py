"""The Flax layers against NumPy projections around the NumPy method."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from draft_jax import (
    BlockMask,
    DraftConfig,
    SparsitySchedule,
    constant_step,
    draft_attention,
    draft_attention_fn,
    initial_mask,
)
from pallas_kernels import block_sparse_attention
from tests.draft_jax import naive_draft
from tests.draft_jax.flax_cases import (
    CONFIG,
    DIM,
    F32,
    FEATURES,
    GRID,
    HEADS,
    make_layer,
    numpy_layer,
    numpy_parameters,
    random_x,
)


def test_layer_matches_numpy():
    layer = make_layer(rngs=nnx.Rngs(0))
    x, lengths = random_x(), (2, 6)
    out = nnx.jit(layer.__class__.__call__, static_argnames="grid")(
        layer, x, grid=GRID, text_lengths=jnp.asarray(lengths)
    )
    expected = numpy_layer(numpy_parameters(layer), x, text_lengths=lengths)
    np.testing.assert_allclose(out, expected, **F32)


def test_norm_and_rotation_of_queries_and_keys():
    layer = make_layer(normalize_qk=True, rngs=nnx.Rngs(1))
    rng = np.random.default_rng(3)
    scales = {name: rng.uniform(0.5, 2, DIM) for name in ("query", "key")}
    layer.query_norm.scale[...] = jnp.asarray(scales["query"], jnp.float32)
    layer.key_norm.scale[...] = jnp.asarray(scales["key"], jnp.float32)
    angle = rng.uniform(0, 6, (GRID.num_tokens, 1, 1))

    def rotate(x, xp=np):
        first, second = x[..., ::2], x[..., 1::2]
        pair = (
            xp.cos(angle) * first - xp.sin(angle) * second,
            xp.sin(angle) * first + xp.cos(angle) * second,
        )
        return xp.stack(pair, -1).reshape(x.shape)

    def numpy_qk(x, name):
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scales[name]
        return rotate(x)

    x = random_x()
    out = layer(x, grid=GRID, qk_transform=lambda x: rotate(x, jnp).astype(jnp.float32))
    expected = numpy_layer(numpy_parameters(layer), x, qk=numpy_qk)
    np.testing.assert_allclose(out, expected, **F32)


def test_tiled_layer_equals_raster_layer_after_permutation():
    x = random_x()
    raster = make_layer(rngs=nnx.Rngs(0))
    tiled = make_layer(order="tiled", rngs=nnx.Rngs(0))
    got = tiled(x[:, GRID.tile_order], grid=GRID)
    np.testing.assert_allclose(got, raster(x, grid=GRID)[:, GRID.tile_order], **F32)


def test_weights_move_to_and_from_the_layer_of_flax():
    flax_layer = nnx.MultiHeadAttention(
        HEADS, FEATURES, HEADS * DIM, decode=False, rngs=nnx.Rngs(4)
    )
    ours = make_layer(config=DraftConfig.paper(sparsity=0.0), rngs=nnx.Rngs(0))
    nnx.update(ours, nnx.state(flax_layer, nnx.Param))
    x = random_x()
    np.testing.assert_allclose(ours(x, grid=GRID), flax_layer(x), **F32)


def rotated(x):
    """A rotary embedding that computes in float32, whatever comes in."""
    return x.astype(jnp.float32)


MIXED = {  # float32 queries and keys, bfloat16 values; and a dtype, if one is given
    "draft_attention": lambda q, v, dtype: draft_attention(
        *(x if dtype is None else x.astype(dtype) for x in (q, q, v)),
        grid=GRID,
        config=CONFIG,
    ),
    "draft_attention_fn": lambda q, v, dtype: draft_attention_fn(GRID, CONFIG)(
        q, q, v, dtype=dtype
    ),
    "layer": lambda q, v, dtype: make_layer(
        dtype=dtype, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )(random_x().astype(jnp.bfloat16), grid=GRID, qk_transform=rotated),
    "scheduled layer": lambda q, v, dtype: make_layer(
        dtype=dtype, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    ).scheduled(
        random_x().astype(jnp.bfloat16),
        grid=GRID,
        step=constant_step(GRID, CONFIG),
        mask=initial_mask(GRID, CONFIG, batch=2, num_heads=HEADS),
        qk_transform=rotated,
    )[0],
}


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.usefixtures("without_annotations")
def test_mixed_dtypes_are_one_rule(name):
    """Refused by one message; a dtype that is given is what all are cast to."""
    q = jnp.ones((1, GRID.num_tokens, 1, 4))
    call = functools.partial(MIXED[name], q, q.astype(jnp.bfloat16))
    with pytest.raises(
        TypeError, match="v has dtype bfloat16; it must equal q's dtype float32: cast"
    ):
        call(None)
    assert jax.eval_shape(functools.partial(call, jnp.float16)).dtype == jnp.float16


def test_gradient_of_the_parameters_matches_finite_differences():
    """Along random directions, of the NumPy layer. Selection is constant nearby."""
    layer = make_layer(rngs=nnx.Rngs(0))
    x = random_x(batch=1)
    rng = np.random.default_rng(1)
    weight = rng.normal(size=x.shape)

    @nnx.jit
    def gradient(layer):
        return nnx.grad(lambda layer: (layer(x, grid=GRID) * weight).sum())(layer)

    grads = gradient(layer)
    parameters = numpy_parameters(layer)
    for name in parameters:
        direction = [rng.normal(size=p.shape) for p in parameters[name]]
        plus, minus = (
            (
                numpy_layer(
                    parameters
                    | {
                        name: [
                            p + sign * 1e-6 * d
                            for p, d in zip(parameters[name], direction, strict=True)
                        ]
                    },
                    x,
                )
                * weight
            ).sum()
            for sign in (1, -1)
        )
        got = sum(
            (np.asarray(grads[name][field][...], np.float64) * d).sum()
            for field, d in zip(("kernel", "bias"), direction, strict=True)
        )
        np.testing.assert_allclose(got, (plus - minus) / 2e-6, rtol=1e-4, atol=1e-3)


class Block(nnx.Module):
    """A residual layer, as models stack them."""

    def __init__(self, rngs: nnx.Rngs):
        self.attention = make_layer(rngs=rngs)

    def __call__(self, x):
        return x + self.attention(x, grid=GRID)


@pytest.mark.nightly
def test_scan_over_layers_with_remat_equals_a_loop():
    x = random_x()

    @nnx.split_rngs(splits=2)
    @nnx.vmap(axis_size=2)
    def create(rngs: nnx.Rngs):
        return Block(rngs)

    stacked = create(nnx.Rngs(5))

    def scanned(blocks, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def forward(block, x):
            return block(x)

        return jnp.sin(forward(blocks, x)).sum()

    def looped(blocks, x):
        graph, state = nnx.split(blocks)
        for index in range(2):
            layer = nnx.merge(graph, jax.tree.map(lambda leaf, i=index: leaf[i], state))
            x = layer(x)
        return jnp.sin(x).sum()

    got, got_grads = nnx.jit(nnx.value_and_grad(scanned))(stacked, x)
    want, want_grads = nnx.jit(nnx.value_and_grad(looped))(stacked, x)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    chex.assert_trees_all_close(
        nnx.to_pure_dict(got_grads), nnx.to_pure_dict(want_grads), rtol=1e-4, atol=2e-5
    )


@pytest.mark.nightly
def test_vmap_over_items_equals_a_batch():
    layer, x = make_layer(rngs=nnx.Rngs(0)), random_x()
    batched = layer(x, grid=GRID)
    got = nnx.vmap(lambda layer, x: layer(x[None], grid=GRID), in_axes=(None, 0))(
        layer, x
    )
    np.testing.assert_allclose(got[:, 0], batched, **F32)


def test_schedule_steps_do_not_retrace_the_layer():
    layer, x = make_layer(rngs=nnx.Rngs(0)), random_x()
    schedule = SparsitySchedule(dense_fraction=0.5, mask_refresh=2)
    plan = schedule.plan(
        np.linspace(1000, 250, 4), num_layers=1, grid=GRID, config=CONFIG
    )
    mask = initial_mask(GRID, CONFIG, batch=2, num_heads=HEADS)
    chex.clear_trace_counter()  # it counts by name, over the whole session

    @nnx.jit
    @chex.assert_max_traces(n=1)
    def run(layer, x, step, mask):
        return layer.scheduled(x, grid=GRID, step=step, mask=mask)

    outs = []
    for step in plan:
        out, mask = run(layer, x, step.for_layer(0), mask)
        outs.append(out)
    parameters = numpy_parameters(layer)
    dense = numpy_layer(parameters, x, sparsity=0.0)
    sparse = numpy_layer(parameters, x)
    for out, expected in zip(outs, (dense, dense, sparse, sparse), strict=True):
        np.testing.assert_allclose(out, expected, **F32)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"qkv_features": 15}, ValueError, "qkv_features=15 must be a multiple of num"),
        ({"order": "morton"}, ValueError, "order='morton' must be one of"),
        ({"num_heads": 0}, ValueError, "num_heads=0 must be a positive integer"),
    ],
    ids=["features", "order", "heads"],
)
@pytest.mark.usefixtures("without_annotations")
def test_bad_layer(options, error, message):
    with pytest.raises(error, match=message):
        make_layer(**options, rngs=nnx.Rngs(0))


@pytest.mark.usefixtures("without_annotations")
def test_a_scheduled_layer_needs_a_mask_that_fits():
    layer, step = make_layer(rngs=nnx.Rngs(0)), constant_step(GRID, CONFIG)
    dense = jnp.ones((2, HEADS, GRID.num_blocks, GRID.num_blocks), bool)
    with pytest.raises(TypeError, match=r"mask is \w+; expected a BlockMask"):
        layer.scheduled(random_x(), grid=GRID, step=step, mask=dense)
    other = DraftConfig.paper(sparsity=0.9)
    mask = initial_mask(GRID, other, batch=2, num_heads=HEADS)
    with pytest.raises(ValueError, match=r"mask has capacity \d+; VideoGrid.* need"):
        layer.scheduled(random_x(), grid=GRID, step=step, mask=mask)


def test_own_mask_between_the_projections():
    layer, x = make_layer(rngs=nnx.Rngs(0)), random_x()
    kept = np.random.default_rng(1).random((2, HEADS, 12, 12)) < 0.4
    q, k, v = layer.project(x)
    mask = BlockMask.from_visual(kept, grid=GRID)
    attended = block_sparse_attention(q, k, v, mask, grid=GRID, order="raster")
    parameters = numpy_parameters(layer)
    q, k, v = (
        np.einsum("btc,cnd->btnd", np.asarray(x, np.float64), kernel) + bias
        for kernel, bias in (parameters[name] for name in ("query", "key", "value"))
    )
    want = naive_draft.attention(q, k, v, naive_draft.add_text(kept, GRID), GRID)
    kernel, bias = parameters["out"]
    want = np.einsum("btnd,ndc->btc", want, kernel) + bias
    np.testing.assert_allclose(layer.out(attended), want, **F32)
