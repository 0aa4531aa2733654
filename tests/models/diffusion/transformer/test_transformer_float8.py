"""Transformers whose linear layers are in FP8, of both families and the shipped one."""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from models.diffusion.transformer.float8 import (
    Float8Linear,
    use_float8_linears,
    weight_only,
)
from models.diffusion.transformer.layers import MLP
from models.float8 import product
from models.float8.rows import FLOAT8, ScaledRows, widen_rows
from models.hunyuan.config import HunyuanConfig
from models.hunyuan.inputs import HunyuanInputs
from models.hunyuan.transformer import WIDE_LINEARS as HUNYUAN_WIDE
from models.hunyuan.transformer import HunyuanTransformer
from models.wan.config import WanConfig
from models.wan.inputs import WanInputs
from models.wan.transformer import WIDE_LINEARS as WAN_WIDE
from models.wan.transformer import WanTransformer
from pallas_kernels.common.device import Device
from pallas_kernels.float8_rows import gelu_tanh
from tests.tiny_model import CONFIG as WAN

HUNYUAN = HunyuanConfig(
    dim=32,
    num_heads=2,
    num_double_blocks=2,
    num_single_blocks=2,
    num_refiner_blocks=1,
    rope_channels=(4, 6, 6),
    text_dim=16,
    text_length=8,
    pooled_dim=8,
    freq_dim=16,
    tile=(2, 4),
    dtype="float32",
)
# What stays as it is, by paths of kernels, written out.
WIDE = {
    "wan": {
        "condition_embedder.text_embedder.linear_1",
        "condition_embedder.text_embedder.linear_2",
        "condition_embedder.time_embedder.linear_1",
        "condition_embedder.time_embedder.linear_2",
        "condition_embedder.time_proj",
        "proj_out",
        "patch_embedding",
    },
    "hunyuan": {
        *(
            f"time_text_embed.{name}_embedder.linear_{i}"
            for name in ("timestep", "text", "guidance")
            for i in (1, 2)
        ),
        *(
            f"context_embedder.time_text_embed.{name}_embedder.linear_{i}"
            for name in ("timestep", "text")
            for i in (1, 2)
        ),
        "context_embedder.proj_in",
        *(f"context_embedder.refiner_blocks.attn.to_{x}" for x in ("q", "k", "v")),
        "context_embedder.refiner_blocks.attn.to_out",
        "context_embedder.refiner_blocks.ff.linear_1",
        "context_embedder.refiner_blocks.ff.linear_2",
        "context_embedder.refiner_blocks.norm_out.linear",
        "transformer_blocks.norm1.linear",
        "transformer_blocks.norm1_context.linear",
        "single_transformer_blocks.norm.linear",
        "norm_out.shift",
        "norm_out.scale",
        "proj_out",
        "x_embedder",
    },
}
MODELS = {
    "wan": (WanTransformer, WAN, WAN_WIDE),
    "hunyuan": (HunyuanTransformer, HUNYUAN, HUNYUAN_WIDE),
}


@functools.cache
def make(family, linears):
    cls, config, _ = MODELS[family]
    config = dataclasses.replace(config, linears=linears)
    model = cls(config, rngs=nnx.Rngs(0))
    kernel = model.proj_out.kernel  # zero when untrained
    kernel[...] = jax.random.normal(jax.random.key(1), kernel.shape) / 5
    return model


def make_inputs(family):
    def normal(*shape):
        return jax.random.normal(jax.random.key(len(shape)), shape)

    shared = {"latents": normal(1, 2, 8, 12, 16), "timesteps": jnp.asarray([500.0])}
    if family == "wan":
        text = (WAN.text_length, WAN.text_dim)
        return WanInputs(
            **shared, context=normal(1, *text), context_lengths=jnp.asarray([4])
        )
    return HunyuanInputs(
        **shared,
        context=normal(1, HUNYUAN.text_length, HUNYUAN.text_dim),
        context_mask=jnp.arange(HUNYUAN.text_length)[None] < 5,
        pooled=normal(1, HUNYUAN.pooled_dim),
        guidance=jnp.asarray([6000.0]),
        reference=None,
    )


def run(model, inputs):
    structure, state = nnx.split(model)
    return jax.jit(lambda state: nnx.merge(structure, state)(inputs)[0])(state)


def flat_state(model):
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): leaf[...] for path, leaf in flat}


def shapes(family, linears):
    """Shape and dtype of each parameter; nothing is computed."""
    cls, config, _ = MODELS[family]
    config = dataclasses.replace(config, linears=linears)
    model = nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(model))
    return {
        ".".join(map(str, path)): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in flat
    }


@pytest.mark.parametrize("family", MODELS)
def test_layers_of_the_list_stay_as_they_are(family):
    wide, narrow = (shapes(family, x) for x in ("bfloat16", "float8"))
    kernels = {name.removesuffix(".kernel") for name in narrow if "kernel" in name}
    assert kernels == WIDE[family]
    all_kernels = {n.removesuffix(".kernel") for n in wide if n.endswith("kernel")}
    weights = {n.removesuffix(".weight") for n in narrow if n.endswith(".weight")}
    assert weights == all_kernels - WIDE[family]
    assert all(narrow[f"{name}.weight"].dtype == FLOAT8 for name in weights)
    others = {name: x for name, x in narrow.items() if ".weight" not in name}
    assert others
    assert others == {name: wide[name] for name in others}


@pytest.mark.nightly
@pytest.mark.parametrize("family", MODELS)
def test_weights_are_rounded_by_output_channel(family):
    wide, narrow = (flat_state(make(family, x)) for x in ("bfloat16", "float8"))
    names = [n.removesuffix(".weight") for n in narrow if n.endswith(".weight")]
    assert names
    for name in names:
        rows = ScaledRows(narrow[f"{name}.weight"], narrow[f"{name}.weight_scale"])
        kernel = np.asarray(wide[f"{name}.kernel"])
        got = np.swapaxes(widen_rows(rows), -1, -2)
        largest = np.abs(kernel).max(axis=-2)
        np.testing.assert_allclose(rows.scale, largest / 448, rtol=1e-6)
        step = np.maximum(np.abs(kernel) / 8, largest[..., None, :] / 448 / 512)
        assert (np.abs(got - kernel) <= step / 2 * (1 + 1e-5)).all(), name


@pytest.mark.nightly
@pytest.mark.parametrize("family", MODELS)
def test_steps_are_near_those_in_full_precision(family, measured):
    inputs = make_inputs(family)
    wide, narrow = (run(make(family, x), inputs) for x in ("bfloat16", "float8"))
    error = float(jnp.linalg.norm(narrow - wide) / jnp.linalg.norm(wide))
    measured("relative error of a step", error)
    # Rounding to three bits of fraction errs by 2.6 % (uniform: 2^-4 / sqrt(3) of
    # values spread over a power of two); some of it is averaged out.
    assert 1e-4 < error < 0.05


def widened(family):
    """The wide model with the weights that the one in FP8 stands for."""
    wide, narrow = (make(family, linears) for linears in ("bfloat16", "float8"))
    wide, rounded = nnx.merge(*nnx.split(wide)), flat_state(narrow)
    for path, leaf in nnx.to_flat_state(nnx.state(wide)):
        name = ".".join(map(str, path)).removesuffix(".kernel")
        if f"{name}.weight_scale" in rounded:
            rows = ScaledRows(
                rounded[f"{name}.weight"], rounded[f"{name}.weight_scale"]
            )
            leaf[...] = jnp.swapaxes(widen_rows(rows), -1, -2)
    return wide


@pytest.mark.parametrize(
    "family", ["wan", pytest.param("hunyuan", marks=pytest.mark.nightly)]
)
def test_weight_only_models_are_wide_ones_of_the_same_weights(family):
    narrow, inputs = make(family, "float8"), make_inputs(family)
    expected, got = run(widened(family), inputs), run(weight_only(narrow), inputs)
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * scale)
    # The model itself still rounds its inputs.
    far = run(narrow, inputs) - expected
    assert float(jnp.abs(far).max()) > 1e-3 * scale


@pytest.mark.nightly
def test_gradients_reach_the_inputs():
    model, inputs = make("wan", "float8"), make_inputs("wan")
    structure, state = nnx.split(model)

    def loss(latents):
        velocity, _ = nnx.merge(structure, state)(inputs._replace(latents=latents))
        return jnp.square(velocity).sum()

    gradient = jax.jit(jax.grad(loss))(inputs.latents)
    assert float(jnp.abs(gradient).max()) > 0
    assert bool(jnp.isfinite(gradient).all())


def test_lists_name_what_there_is():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first, self.last = (
                nnx.Linear(4, 3, rngs=rngs),
                nnx.Linear(3, 4, rngs=rngs),
            )

    model = Model(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"leave=\['las'\] lead to no linear layer"):
        use_float8_linears(model, leave=["las"])
    model = Model(nnx.Rngs(0))
    kernel = np.asarray(model.first.kernel[...])
    use_float8_linears(model, leave=["last"])
    assert isinstance(model.last, nnx.Linear)
    assert isinstance(model.first, Float8Linear)
    largest = np.abs(kernel).max(axis=0)  # of each output channel
    codes = kernel.T * (np.float32(448) / largest)[:, None]
    got = np.asarray(model.first.weight[...])
    np.testing.assert_array_equal(got, codes.astype(ml_dtypes.float8_e4m3fn))
    np.testing.assert_allclose(model.first.weight_scale[...], largest / 448, rtol=1e-6)


@pytest.mark.parametrize("left", ["linear_1", "linear_2"])
def test_layers_in_fp8_stand_beside_wide_ones(left):
    mlp = MLP(
        (8, 12, 4),
        gelu_tanh,
        dtype="float32",
        param_dtype="float32",
        rngs=nnx.Rngs(0),
    )
    x = jax.random.normal(jax.random.key(0), (1, 5, 8))
    expected = mlp(x)
    use_float8_linears(mlp, leave=[left])
    error = jnp.linalg.norm(mlp(x) - expected) / jnp.linalg.norm(expected)
    assert 1e-4 < float(error) < 0.1


def kernels_in(jaxpr):
    """How often each kernel for rows stands in a program; loops count once."""
    found = collections.Counter()
    for equation in jaxpr.eqns:
        inner = [
            getattr(part, "jaxpr", part)
            for value in equation.params.values()
            for part in (value if isinstance(value, (tuple, list)) else (value,))
            if hasattr(getattr(part, "jaxpr", part), "eqns")
        ]
        name = re.search(r"name=(\w+_rows)_sm90", str(equation)) if inner else None
        deeper = sum(map(kernels_in, inner), collections.Counter())
        found += deeper or collections.Counter([name[1]] if name else [])
    return found


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        # Normed: before q, k and v; and where attention's outputs are added, before
        # cross-attention's q and before the network.
        # Rounded as they are: attention's two outputs, and text.
        (
            "wan",
            {"ffn_dim": 1024},
            {"norm_rows": 1, "add_norm_rows": 2, "round_rows": 3, "gelu_rows": 1},
        ),
        # Normed: in double blocks twice for video and text, in single ones once.
        # Rounded as they are: attention's outputs, in double blocks the text's, too.
        pytest.param(
            "hunyuan",
            {},
            {"norm_rows": 5, "round_rows": 3, "gelu_rows": 3},
            marks=pytest.mark.nightly,
        ),
    ],
    ids=["wan", "hunyuan"],
)
def test_a_block_rounds_each_input_once(family, changes, expected, monkeypatch):
    """In one kernel each where there are kernels: on a GPU that is only named."""
    cls, config, _ = MODELS[family]
    config = dataclasses.replace(
        config, dim=512, num_heads=32, linears="float8", **changes
    )
    hopper = Device(platform="gpu", kind="H100", compute_capability=(9, 0))
    monkeypatch.setattr(product, "current_device", lambda *_: hopper)
    model = nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0)))
    structure, state = nnx.split(model)
    jaxpr = jax.make_jaxpr(lambda state, x: nnx.merge(structure, state)(x)[0])(
        state, make_inputs(family)
    )
    assert kernels_in(jaxpr.jaxpr) == expected


@pytest.mark.parametrize("config", [WAN, HUNYUAN], ids=["wan", "hunyuan"])
def test_configurations_name_precisions(config):
    with pytest.raises(ValueError, match="linears='fp8' must be one of"):
        dataclasses.replace(config, linears="fp8")
    with pytest.raises(ValueError, match=r"linears='float8' needs dtype .* 'float16'"):
        dataclasses.replace(config, linears="float8", dtype="float16")


WAN_DIM, WAN_FFN, WAN_LAYERS = 5120, 13824, 40
DIM, HIDDEN, DOUBLE, SINGLE = 3072, 4 * 3072, 20, 40


@pytest.mark.parametrize(
    ("cls", "config", "weights", "rows", "most_gb"),
    [
        (
            WanTransformer,
            WanConfig.t2v_14b(param_dtype="bfloat16"),
            WAN_LAYERS * (8 * WAN_DIM**2 + 2 * WAN_DIM * WAN_FFN),
            WAN_LAYERS * (9 * WAN_DIM + WAN_FFN),
            14.6,
        ),
        (
            HunyuanTransformer,
            HunyuanConfig.video_13b(param_dtype="bfloat16"),
            DOUBLE * 2 * (4 * DIM**2 + 2 * DIM * HIDDEN)
            + SINGLE * (4 * DIM**2 + 2 * DIM * HIDDEN),
            DOUBLE * 2 * (5 * DIM + HIDDEN) + SINGLE * (4 * DIM + HIDDEN),
            16.6,
        ),
    ],
    ids=["wan", "hunyuan"],
)
def test_published_models_take_half_the_memory(cls, config, weights, rows, most_gb):
    """By their shapes: a byte less for each weight of a block, and scales in float32.

    `weights` and `rows` (output channels) are those of all blocks.
    """

    def count_bytes(linears):
        changed = dataclasses.replace(config, linears=linears)
        state = nnx.state(nnx.eval_shape(lambda: cls(changed, rngs=nnx.Rngs(0))))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))

    narrow = count_bytes("float8")
    assert count_bytes("bfloat16") - narrow == weights - 4 * rows
    assert narrow < 1e9 * most_gb
