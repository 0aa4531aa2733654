"""The Wan transformer with its kernels: against float32 on XLA, step by step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from draft_jax import AttentionPlan, DraftConfig, SparsitySchedule
from models.wan.config import WanConfig
from models.wan.inputs import WanInputs
from models.wan.transformer import WanTransformer
from tests.gpu.without_kernels import on_xla, relative_error
from tests.tolerances import GPU_MODEL_ERROR_RATIO, GPU_WAN_SHARED_PAIRS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::pallas_kernels.SlowBackendWarning"),
]

# 21 x 9 x 24 tokens, with edge blocks, and enough of them for every kernel.
LATENT_SHAPE = (1, 21, 18, 48, 16)
CONFIG = WanConfig(
    dim=256,
    ffn_dim=512,
    num_heads=2,
    num_layers=3,
    in_channels=16,
    out_channels=16,
    text_dim=64,
    text_length=32,
    freq_dim=64,
    dtype="bfloat16",
    param_dtype="float32",
)

ATTENTION = AttentionPlan.draft(DraftConfig.paper(sparsity=0.75))


@pytest.fixture(scope="module")
def parameters():
    model = WanTransformer(CONFIG, rngs=nnx.Rngs(0))
    kernel = model.proj_out.kernel  # it starts at zero
    kernel[...] = jax.random.normal(jax.random.key(0), kernel.shape) / 16
    return nnx.state(model)


@pytest.fixture(scope="module")
def plan():
    """Sparse with new masks, the same reused, and one dense layer from the start."""
    model = nnx.eval_shape(lambda: WanTransformer(CONFIG, rngs=nnx.Rngs(0)))
    return SparsitySchedule(dense_layers=(0,), mask_refresh=2).plan(
        np.array([900.0, 600.0]),
        num_layers=CONFIG.num_layers,
        grid=model.grid(LATENT_SHAPE),
        config=ATTENTION.config,
    )


def make_inputs():
    keys = jax.random.split(jax.random.key(1), 2)
    context = jax.random.normal(keys[0], (1, CONFIG.text_length, CONFIG.text_dim))
    return WanInputs(
        latents=jax.random.normal(keys[1], LATENT_SHAPE),
        timesteps=jnp.full(1, 700.0),
        context=context,
        context_lengths=jnp.full(1, 20),
    )


def run(parameters, step, masks=None, *, dtype="bfloat16"):
    """Jitted anew, with the step's values known; the program's text beside."""
    config = dataclasses.replace(CONFIG, dtype=dtype)
    structure = nnx.graphdef(
        nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0)))
    )

    @jax.jit
    def call(parameters, inputs, masks):
        model = nnx.merge(structure, parameters)
        return model(inputs, attention=ATTENTION, step=step, masks=masks)

    program = call.lower(parameters, make_inputs(), masks).compile()
    velocity, masks = program(parameters, make_inputs(), masks)
    return np.asarray(velocity, np.float64), masks, program.as_text()


def test_velocities_are_as_exact_as_those_of_xla(parameters, plan):
    """With masks given, so that no pair on the threshold makes a difference."""
    _, masks, _ = run(parameters, plan.step(0))
    velocities, errors = {}, {}
    for kind, dense in {
        "mixed": plan.step(1).dense,
        "sparse": np.full(CONFIG.num_layers, False),
        "dense": np.full(CONFIG.num_layers, True),
    }.items():
        step = dataclasses.replace(plan.step(1), dense=dense)
        got, kept, text = run(parameters, step, masks)
        jax.tree.map(np.testing.assert_array_equal, kept, masks)
        assert "block_sparse_attention_sm90" in text
        assert " conditional(" not in text
        with on_xla():
            exact, _, _ = run(parameters, step, masks, dtype="float32")
            narrow, _, _ = run(parameters, step, masks)
        of_xla = relative_error(narrow, exact)
        velocities[kind], errors[kind] = got, (relative_error(got, exact), of_xla)
        print(kind, errors[kind], flush=True)
    # What the other kind of attention changes is well above any error.
    change = relative_error(velocities["sparse"], velocities["dense"])
    for error, of_xla in errors.values():
        assert error <= GPU_MODEL_ERROR_RATIO * of_xla
        assert change > 2 * max(error, of_xla)


def test_traced_steps_give_what_known_ones_do(parameters, plan):
    structure = nnx.graphdef(
        nnx.eval_shape(lambda: WanTransformer(CONFIG, rngs=nnx.Rngs(0)))
    )

    @jax.jit
    def traced(parameters, inputs, step, masks):
        model = nnx.merge(structure, parameters)
        return model(inputs, attention=ATTENTION, step=step, masks=masks)

    masks = None
    for index in range(2):
        velocity, other = traced(parameters, make_inputs(), plan.step(index), masks)
        known, masks, _ = run(parameters, plan.step(index), masks)
        shared = [
            (a.to_dense() & b.to_dense()).sum() / a.to_dense().sum()
            for a, b in zip(_layers(masks), _layers(other), strict=True)
        ]
        assert min(shared) >= GPU_WAN_SHARED_PAIRS
        masks = other
        if index:  # by the same masks
            np.testing.assert_allclose(known, velocity, rtol=0, atol=2e-2)


def _layers(masks):
    return [
        jax.tree.map(lambda leaf, n=n: leaf[n], masks) for n in range(CONFIG.num_layers)
    ]
