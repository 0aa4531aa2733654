"""The HunyuanVideo transformer with its kernels: against float32 on XLA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from draft_jax import AttentionPlan, DraftConfig
from models.diffusion.layer_state import sparse_step
from models.hunyuan.config import HunyuanConfig
from models.hunyuan.inputs import HunyuanInputs
from models.hunyuan.transformer import HunyuanTransformer
from tests.gpu.without_kernels import on_xla, relative_error
from tests.tolerances import GPU_MODEL_ERROR_RATIO

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::pallas_kernels.SlowBackendWarning"),
]

# 21 x 9 x 24 tokens, with edge blocks, and enough of them for every kernel.
LATENT_SHAPE = (1, 21, 18, 48, 16)
# HunyuanVideo's heads, text and rotary channels; fewer of its blocks.
CONFIG = HunyuanConfig(
    dim=512,
    num_heads=4,
    num_double_blocks=2,
    num_single_blocks=2,
    text_dim=64,
    pooled_dim=32,
    mlp_ratio=2.0,
    dtype="bfloat16",
    param_dtype="float32",
)
VALID = 60  # text tokens
ATTENTION = AttentionPlan.draft(DraftConfig.paper(sparsity=0.75))


@pytest.fixture(scope="module")
def parameters():
    """Random ones; the gates and the last layer must not start at zero."""
    state = nnx.state(HunyuanTransformer(CONFIG, rngs=nnx.Rngs(0)))
    leaves, structure = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noise = [
        leaf + 0.02 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, noise)


def make_inputs(padding=0.0):
    keys = jax.random.split(jax.random.key(1), 3)
    shape = (1, CONFIG.text_length, CONFIG.text_dim)
    mask = jnp.arange(CONFIG.text_length)[None] < VALID
    context = jax.random.normal(keys[0], shape)
    return HunyuanInputs(
        latents=jax.random.normal(keys[1], LATENT_SHAPE),
        timesteps=jnp.full(1, 700.0),
        context=jnp.where(mask[..., None], context, padding),
        context_mask=mask,
        pooled=jax.random.normal(keys[2], (1, CONFIG.pooled_dim)),
        guidance=jnp.full(1, 6016.0),
    )


def run(parameters, step, masks=None, *, dtype="bfloat16", padding=0.0):
    """Jitted anew, with the step's values known; the program's text beside."""
    config = dataclasses.replace(CONFIG, dtype=dtype)
    structure = nnx.graphdef(
        nnx.eval_shape(lambda: HunyuanTransformer(config, rngs=nnx.Rngs(0)))
    )

    @jax.jit
    def call(parameters, inputs, masks):
        model = nnx.merge(structure, parameters)
        return model(inputs, attention=ATTENTION, step=step, masks=masks)

    inputs = make_inputs(padding)
    program = call.lower(parameters, inputs, masks).compile()
    velocity, masks = program(parameters, inputs, masks)
    return np.asarray(velocity, np.float64), masks, program.as_text()


def first_step():
    model = nnx.eval_shape(lambda: HunyuanTransformer(CONFIG, rngs=nnx.Rngs(0)))
    grid = model.grid(LATENT_SHAPE)
    return sparse_step(grid, ATTENTION.config, CONFIG.num_layers)


def test_velocities_are_as_exact_as_those_of_xla(parameters):
    """With masks given, so that no pair on the threshold makes a difference."""
    new = first_step()
    _, masks, _ = run(parameters, new)
    velocities, errors = {}, {}
    for kind, dense in {
        "sparse": [False] * 4,
        "mixed": [True, False, False, True],
        "dense": [True] * 4,
    }.items():
        step = dataclasses.replace(
            new, dense=np.asarray(dense), refresh=np.asarray(False)
        )
        got, kept, text = run(parameters, step, masks)
        jax.tree.map(np.testing.assert_array_equal, kept, masks)
        assert "block_sparse_attention_sm90" in text
        assert "norm_rope_pool_sm90" in text
        assert " conditional(" not in text
        with on_xla():
            exact, _, _ = run(parameters, step, masks, dtype="float32")
            narrow, _, _ = run(parameters, step, masks)
        of_xla = relative_error(narrow, exact)
        velocities[kind], errors[kind] = got, (relative_error(got, exact), of_xla)
        print(kind, errors[kind], flush=True)
    change = relative_error(velocities["sparse"], velocities["dense"])
    for error, of_xla in errors.values():
        assert error <= GPU_MODEL_ERROR_RATIO * of_xla
        assert change > 2 * max(error, of_xla)


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_padded_text_does_not_reach_the_video(parameters, dense):
    step = dataclasses.replace(first_step(), dense=np.full(4, dense))
    expected, _, _ = run(parameters, step)
    for padding in (np.nan, np.inf, 1e4):
        got, _, _ = run(parameters, step, padding=padding)
        np.testing.assert_array_equal(got, expected)
