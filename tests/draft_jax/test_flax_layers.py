"""The Flax layers against NumPy projections around the NumPy method."""

import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from draft_jax import (
    BlockMask,
    DraftAttention,
    DraftConfig,
    SparsitySchedule,
    VideoGrid,
    constant_step,
    draft_attention_fn,
    initial_mask,
)
from pallas_kernels import block_sparse_attention
from tests.draft_jax import naive_draft

GRID = VideoGrid(2, 5, 7, tile=(2, 4), text_length=6)  # S = 12, 1 text block
CONFIG = DraftConfig(sparsity=0.6)
FEATURES, HEADS, DIM = 12, 2, 8

# Largest error measured: 5e-7.
F32 = {"rtol": 1e-5, "atol": 5e-6}

make_layer = functools.partial(
    DraftAttention,
    num_heads=HEADS,
    in_features=FEATURES,
    qkv_features=HEADS * DIM,
    config=CONFIG,
    bias_init=nnx.initializers.normal(0.3),
)


def random_x(batch=2, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, GRID.num_tokens, FEATURES))
    return jnp.asarray(x, jnp.float32)


def numpy_parameters(layer):
    """Kernel and bias of each projection in float64."""
    return {
        name: [
            np.asarray(getattr(layer, name).kernel[...], np.float64),
            np.asarray(getattr(layer, name).bias[...], np.float64),
        ]
        for name in ("query", "key", "value", "out")
    }


def numpy_layer(parameters, x, *, sparsity=0.6, text_lengths=None, qk=lambda x, _: x):
    """Project, draft, attend, project; `qk(tokens, name)` follows the projection."""
    x = np.asarray(x, np.float64)
    q, k, v = (
        np.einsum("btc,cnd->btnd", x, parameters[name][0]) + parameters[name][1]
        for name in ("query", "key", "value")
    )
    q, k = qk(q, "query"), qk(k, "key")
    kept = naive_draft.percentile_mask(q, k, GRID, sparsity)
    out = naive_draft.attention(q, k, v, kept, GRID, text_lengths)
    return np.einsum("btnd,ndc->btc", out, parameters["out"][0]) + parameters["out"][1]


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
    ours = make_layer(config=DraftConfig(sparsity=0.0), rngs=nnx.Rngs(0))
    nnx.update(ours, nnx.state(flax_layer, nnx.Param))
    x = random_x()
    np.testing.assert_allclose(ours(x, grid=GRID), flax_layer(x), **F32)


def test_attention_fn_in_nnx_multi_head_attention():
    layer = nnx.MultiHeadAttention(
        HEADS,
        FEATURES,
        HEADS * DIM,
        bias_init=nnx.initializers.normal(0.3),
        decode=False,
        attention_fn=draft_attention_fn(GRID, CONFIG),
        rngs=nnx.Rngs(2),
    )
    x = random_x()
    expected = numpy_layer(numpy_parameters(layer), x)
    np.testing.assert_allclose(layer(x), expected, **F32)


def linen_layer(**options):
    options = {"attention_fn": draft_attention_fn(GRID, CONFIG)} | options
    return nn.MultiHeadDotProductAttention(
        num_heads=HEADS,
        qkv_features=HEADS * DIM,
        bias_init=nn.initializers.normal(0.3),
        **options,
    )


def test_attention_fn_in_linen_multi_head_attention():
    layer, x = linen_layer(), random_x()
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    parameters = {
        name: [np.asarray(p["kernel"], np.float64), np.asarray(p["bias"], np.float64)]
        for name, p in variables["params"].items()
    }
    out = jax.jit(layer.apply)(variables, x)
    np.testing.assert_allclose(out, numpy_layer(parameters, x), **F32)


def test_attention_fn_takes_any_number_of_batch_axes():
    rng = np.random.default_rng(0)
    shape = (3, 2, 1, GRID.num_tokens, HEADS, DIM)  # q, k, v, two batch axes
    q, k, v = jnp.asarray(rng.normal(size=shape), jnp.float32)
    attend = draft_attention_fn(GRID, CONFIG, scale=0.5)
    batched = attend(q, k, v)
    chex.assert_shape(batched, shape[1:])
    for item in range(2):
        tokens = [np.asarray(x[item], np.float64) for x in (q, k, v)]
        # A scale of 0.5 instead of 1 / sqrt(8) in the draft and in the attention.
        factor = 0.5 * DIM**0.5
        kept = naive_draft.percentile_mask(factor * tokens[0], tokens[1], GRID, 0.6)
        expected = naive_draft.attention(*tokens, kept, GRID, scale=0.5)
        np.testing.assert_allclose(batched[item], expected, **F32)
    np.testing.assert_array_equal(attend(q[0, 0], k[0, 0], v[0, 0]), batched[0, 0])


def test_attention_fn_is_hashable_by_its_arguments():
    first = draft_attention_fn(GRID, CONFIG)
    assert first == draft_attention_fn(GRID, CONFIG)
    assert hash(first) == hash(draft_attention_fn(GRID, CONFIG))
    assert first != draft_attention_fn(GRID, CONFIG, order="tiled")


def test_attention_fn_promotes_dtypes():
    shape = (1, GRID.num_tokens, 1, 4)
    half = jnp.ones(shape, jnp.bfloat16)
    attend = draft_attention_fn(GRID, CONFIG)
    mixed = jax.eval_shape(attend, half, half, jnp.ones(shape))
    assert mixed.dtype == jnp.float32
    chosen = jax.eval_shape(functools.partial(attend, dtype=jnp.float16), *[half] * 3)
    assert chosen.dtype == jnp.float16


REFUSED = {
    "bias": {"bias": jnp.zeros((1, 1, 1, 1))},
    "mask": {"mask": jnp.ones((1, 1, 1, 1), bool)},
    "dropout_rate": {"dropout_rate": 0.1},
    "precision": {"precision": "highest"},
    "module": {"module": nnx.Module()},
    "is_causal": {"is_causal": True},
    "input_positions": {"input_positions": jnp.arange(3)},
    "einsum_dot_general": {"einsum_dot_general": jax.lax.dot_general},
    "qk_attn_weights_einsum": {"qk_attn_weights_einsum": jnp.einsum},
    "attn_weights_value_einsum": {"attn_weights_value_einsum": jnp.einsum},
}


@pytest.mark.parametrize("name", REFUSED)
def test_attention_fn_refuses_what_it_cannot_do(name):
    q = jnp.ones((1, GRID.num_tokens, 1, 4))
    with pytest.raises(NotImplementedError, match=rf"{name}.* is not supported by dra"):
        draft_attention_fn(GRID, CONFIG)(q, q, q, **REFUSED[name])


def test_dropout_is_accepted_when_deterministic():
    q = jnp.ones((1, GRID.num_tokens, 1, 4))
    attend = draft_attention_fn(GRID, CONFIG)
    out = attend(q, q, q, dropout_rate=0.5, deterministic=True)
    np.testing.assert_array_equal(out, attend(q, q, q))


def nnx_layer(**options):
    attention_fn = draft_attention_fn(GRID, CONFIG)
    options = {"decode": False, "attention_fn": attention_fn} | options
    return nnx.MultiHeadAttention(
        HEADS, FEATURES, HEADS * DIM, rngs=nnx.Rngs(0), **options
    )


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("mask=array", lambda x, mask: nnx_layer()(x, mask=mask)),
        ("is_causal=True", lambda x, mask: nnx_layer()(x, is_causal=True)),
        ("sow_weights", lambda x, mask: nnx_layer()(x, sow_weights=True)),
        (
            "dropout_rate=0.1",
            lambda x, mask: nnx_layer(dropout_rate=0.1, deterministic=False)(
                x, rngs=nnx.Rngs(dropout=0)
            ),
        ),
        (
            "mask=array",
            lambda x, mask: linen_layer().init(jax.random.key(0), x, mask=mask),
        ),
        (
            "sow_weights",
            lambda x, mask: linen_layer().init(jax.random.key(0), x, sow_weights=True),
        ),
        (
            "dropout_rate=0.1",
            lambda x, mask: linen_layer(dropout_rate=0.1, deterministic=False).init(
                jax.random.key(0), x
            ),
        ),
    ],
    ids=[
        "nnx-mask",
        "nnx-causal",
        "nnx-sow",
        "nnx-dropout",
        "linen-mask",
        "linen-sow",
        "linen-dropout",
    ],
)
def test_options_of_the_flax_layers_are_refused(message, call):
    mask = jnp.ones((2, 1, GRID.num_tokens, GRID.num_tokens), bool)
    with pytest.raises(NotImplementedError, match=message):
        call(random_x(), mask)


def test_wrong_number_of_tokens_is_named():
    with pytest.raises(ValueError, match="7 tokens; VideoGrid"):
        nnx_layer()(random_x()[:, :7])


@pytest.mark.usefixtures("without_annotations")
def test_cross_attention_is_named():
    with pytest.raises(ValueError, match=r"k has shape .* must equal q's shape"):
        nnx_layer()(random_x(), random_x()[:, :7])


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
    for mask in (None, dense):
        with pytest.raises(TypeError, match=r"mask is \w+; expected a BlockMask"):
            layer.scheduled(random_x(), grid=GRID, step=step, mask=mask)
    other = DraftConfig(sparsity=0.9)
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


@pytest.mark.usefixtures("without_annotations")
def test_bad_order_of_the_attention_fn():
    with pytest.raises(ValueError, match="order='morton' must be one of"):
        draft_attention_fn(GRID, CONFIG, order="morton")


def test_attention_fn_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        draft_attention_fn(GRID, CONFIG).order = "tiled"
