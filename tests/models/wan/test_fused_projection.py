"""The Wan transformer where norm, rotation and pooling are one kernel."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu

from draft_jax import AttentionPlan, DraftConfig, VideoGrid, constant_step
from models.wan.inputs import WanInputs
from models.wan.transformer import WanTransformer
from pallas_kernels.common.device import Device
from pallas_kernels.pooling import api
from pallas_kernels.pooling.sm90 import norm_rope_pool as fused_kernel
from tests import tiny_model, tolerances
from tests.cases import mostly_nightly

H100 = Device(platform="gpu", kind="H100", compute_capability=(9, 0))


@functools.cache
def make_model():
    """Heads as the kernel takes them, and an output layer that is not zero."""
    config = dataclasses.replace(
        tiny_model.CONFIG,
        dim=256,
        num_heads=4,
        num_layers=1,
        tile=(2, 2),
    )
    model = WanTransformer(config, rngs=nnx.Rngs(0))
    kernel = model.proj_out.kernel
    kernel[...] = jax.random.normal(jax.random.key(1), kernel.shape) / 16
    return model


@pytest.mark.nightly
@pytest.mark.parametrize(
    "state",
    mostly_nightly(("refresh", "reuse", "dense-step", "dense-model"), ("refresh",)),
)
def test_the_kernel_changes_nothing(state):
    model, attention = make_model(), AttentionPlan.dense()
    if state != "dense-model":
        attention = AttentionPlan.draft(DraftConfig.paper(sparsity=0.5))
    grid, config = VideoGrid(1, 3, 4, tile=(2, 2)), model.config
    rng = np.random.default_rng(0)
    latents = jnp.asarray(rng.normal(size=(1, 1, 6, 8, 16)), jnp.float32)
    shape = (1, config.text_length, config.text_dim)
    context = jnp.asarray(rng.normal(size=shape), jnp.float32)
    step = None
    if state != "dense-model":
        step = dataclasses.replace(
            constant_step(grid, attention.config),
            dense=np.full(config.num_layers, state == "dense-step"),
            refresh=np.asarray(state == "refresh"),
        )
    structure, parameters = nnx.split(model)

    def run(parameters):
        merged = nnx.merge(structure, parameters)
        return merged(
            WanInputs(latents, jnp.ones(1) * 500, context),
            attention=attention,
            step=step,
        )

    plain = jax.jit(run)(parameters)
    api._fused.clear_cache()  # or a case before, of the same shapes, is what runs
    interpret = plgpu.InterpretGPUParams()
    kernel = mock.Mock(
        side_effect=functools.partial(fused_kernel.norm_rope_pool, interpret=interpret)
    )
    with (
        mock.patch.object(api, "current_device", return_value=H100),
        mock.patch.object(fused_kernel, "norm_rope_pool", kernel),
    ):
        fused = jax.jit(lambda parameters: run(parameters))(parameters)
    assert kernel.called
    np.testing.assert_allclose(fused[0], plain[0], **tolerances.FUSED_MODEL)
    for a, b in zip(jax.tree.leaves(fused[1]), jax.tree.leaves(plain[1]), strict=True):
        np.testing.assert_array_equal(a, b)
