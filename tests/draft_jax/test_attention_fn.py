"""Draft attention as Flax's own layers call it, against the NumPy method."""

import dataclasses
import functools
import inspect

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from draft_jax import (
    DraftAttentionFn,
    draft_attention_fn,
)
from tests.draft_jax import naive_draft
from tests.draft_jax.flax_cases import (
    CONFIG,
    DIM,
    F32,
    FEATURES,
    GRID,
    HEADS,
    numpy_layer,
    numpy_parameters,
    random_x,
)


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


@pytest.mark.nightly
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


REFUSED = {
    "bias": {"bias": jnp.zeros((1, 1, 1, 1))},
    "mask": {"mask": jnp.ones((1, 1, 1, 1), bool)},
    "dropout_rate": {"dropout_rate": 0.1},
    "precision": {"precision": "highest"},
    "precision of one": {"precision": ("default", "highest")},
    "module": {"module": nnx.Module()},
    "is_causal": {"is_causal": True},
    "input_positions": {"input_positions": jnp.arange(3)},
    "einsum_dot_general": {"einsum_dot_general": jax.lax.dot_general},
    "qk_attn_weights_einsum": {"qk_attn_weights_einsum": jnp.einsum},
    "attn_weights_value_einsum": {"attn_weights_value_einsum": jnp.einsum},
}


MEANS_NOTHING = {
    "precision": [
        None,
        "default",
        "DEFAULT",
        jax.lax.Precision.DEFAULT,
        (jax.lax.Precision.DEFAULT, jax.lax.Precision.DEFAULT),
        jax.lax.DotAlgorithmPreset.DEFAULT,
    ],
    "dropout_rate": [0, 0.0, np.float32(0)],
    "deterministic": [True, False, None],
    "broadcast_dropout": [True, False],
    "dropout_rng": [None, jax.random.key(0)],
    "is_causal": [False, np.False_],
    "force_fp32_for_softmax": [True, False],
    "dtype": [None, jnp.float32, "float32"],
    "module": [None],
    "text_lengths": [None, jnp.asarray([6])],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in MEANS_NOTHING.items() for value in values],
    ids=str,
)
@pytest.mark.usefixtures("without_annotations")
def test_attention_fn_takes_what_models_pass_on(name, value):
    """Arguments that change nothing: the defaults of Flax, in every spelling."""
    q = jax.ShapeDtypeStruct((1, GRID.num_tokens, 1, 4), jnp.float32)
    attend = functools.partial(draft_attention_fn(GRID, CONFIG), **{name: value})
    assert jax.eval_shape(attend, q, q, q) == q


def test_attention_fn_knows_each_argument_of_flax():
    """Linen passes only those that are named: others would vanish silently."""
    known = inspect.signature(DraftAttentionFn.__call__).parameters
    for function in (nnx.dot_product_attention, nn.dot_product_attention):
        assert set(inspect.signature(function).parameters) <= set(known)


@pytest.mark.parametrize("name", REFUSED)
def test_attention_fn_refuses_what_it_cannot_do(name):
    q = jnp.ones((1, GRID.num_tokens, 1, 4))
    argument, *_ = REFUSED[name]
    with pytest.raises(
        NotImplementedError, match=rf"{argument}.* is not supported by dra"
    ):
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
    message = r"k has shape .* must equal q's shape .*: this is self-attention only"
    with pytest.raises(ValueError, match=message):
        nnx_layer()(random_x(), random_x()[:, :7])


@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.parametrize("batch", [(3, 2), (6,), (2, 3, 1), (3,), (1, 6)], ids=str)
@pytest.mark.usefixtures("without_annotations")
def test_batches_that_differ_are_refused(batch, name):
    """Also those of as many items, which would pair with the wrong ones."""
    heads = (GRID.num_tokens, 1, 4)
    arrays = {key: jnp.ones((2, 3, *heads)) for key in ("query", "key", "value")}
    arrays[name] = jnp.ones((*batch, *heads))
    with pytest.raises(ValueError, match=rf"{name} has shape .* query's batch \(2, 3"):
        draft_attention_fn(GRID, CONFIG)(**arrays)


def test_a_mask_of_tokens_points_to_text_lengths():
    mask = jnp.ones((2, 1, GRID.num_tokens, GRID.num_tokens), bool)
    with pytest.raises(NotImplementedError, match=r"mask=.*: padding .* text_lengths"):
        nnx_layer()(random_x(), mask=mask)


def with_lengths(lengths):
    return functools.partial(draft_attention_fn(GRID, CONFIG), text_lengths=lengths)


def test_text_lengths_in_the_layers_of_flax():
    x, lengths = random_x(), (2, 6)
    bound = with_lengths(jnp.asarray(lengths))
    layer = nnx_layer(attention_fn=bound, bias_init=nnx.initializers.normal(0.3))
    expected = numpy_layer(numpy_parameters(layer), x, text_lengths=lengths)
    np.testing.assert_allclose(layer(x), expected, **F32)
    linen = linen_layer(attention_fn=bound)
    weights = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    np.testing.assert_allclose(linen.apply({"params": weights}, x), expected, **F32)


@pytest.mark.usefixtures("without_annotations")
def test_text_lengths_have_the_axes_of_the_batch():
    rng = np.random.default_rng(0)
    shape = (3, 1, 2, GRID.num_tokens, 1, 4)  # q, k, v, two batch axes
    q, k, v = jnp.asarray(rng.normal(size=shape), jnp.float32)
    lengths = jnp.asarray([[2, 6]])
    got = with_lengths(lengths)(q, k, v)
    no_axes = with_lengths(lengths[0, 0])
    assert jax.eval_shape(no_axes, q[0, 0], k[0, 0], v[0, 0]).shape == shape[3:]
    tokens = [np.asarray(x[0], np.float64) for x in (q, k, v)]
    kept = naive_draft.percentile_mask(*tokens[:2], GRID, 0.6)
    want = naive_draft.attention(*tokens, kept, GRID, (2, 6))
    np.testing.assert_allclose(got[0], want, **F32)
    with pytest.raises(ValueError, match=r"text_lengths has shape \(2,\); .*\(1, 2\)"):
        with_lengths(lengths[0])(q, k, v)


@pytest.mark.usefixtures("without_annotations")
def test_bad_order_of_the_attention_fn():
    with pytest.raises(ValueError, match="order='morton' must be one of"):
        draft_attention_fn(GRID, CONFIG, order="morton")


def test_attention_fn_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        draft_attention_fn(GRID, CONFIG).order = "tiled"
