"""Random weights that are made on the device."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from benchmarks.common.random_weights import random_model


class Model(nnx.Module):
    """Two layers on one stack, and a norm."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(jnp.zeros((2, 30, 40), jnp.bfloat16))
        self.bias = nnx.Param(jnp.zeros(50))
        self.norm = nnx.LayerNorm(7, rngs=rngs)


def test_numbers_are_normal_and_norms_multiply_by_one():
    model = random_model(lambda: Model(nnx.Rngs(0)))
    kernel, bias = model.kernel[...], model.bias[...]
    assert (kernel.dtype, bias.dtype) == (jnp.bfloat16, jnp.float32)
    values = np.asarray(kernel, np.float32)
    assert values.shape == (2, 30, 40)
    # 2,400 numbers of standard deviation 0.02: four standard errors.
    np.testing.assert_allclose(values.std(), 0.02, atol=4 * 0.02 / np.sqrt(2 * 2400))
    np.testing.assert_allclose(values.mean(), 0.0, atol=4 * 0.02 / np.sqrt(2400))
    assert len(np.unique(np.asarray(bias))) == 50
    assert model.norm.scale is not None
    np.testing.assert_array_equal(model.norm.scale[...], np.ones(7))


def test_layers_leaves_and_seeds_differ():
    models = [random_model(lambda: Model(nnx.Rngs(0)), seed) for seed in (0, 0, 1)]
    kernels = [np.asarray(model.kernel[...], np.float32) for model in models]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert (kernels[0] != kernels[2]).mean() > 0.9
    assert (kernels[0][0] != kernels[0][1]).mean() > 0.9


def test_devices_of_a_mesh_make_the_same_numbers():
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    of_one, of_all = (
        random_model(lambda: Model(nnx.Rngs(0)), mesh=m) for m in (None, mesh)
    )
    for one, every in zip(
        *(jax.tree.leaves(nnx.state(m)) for m in (of_one, of_all)), strict=True
    ):
        assert every.sharding.mesh == mesh
        for part in every.addressable_shards:
            np.testing.assert_array_equal(part.data, one)


def test_weights_in_fp8_stand_for_numbers_as_small_as_others():
    class Float8(nnx.Module):
        def __init__(self) -> None:
            self.weight = nnx.Param(jnp.zeros((2, 30, 40), jnp.float8_e4m3fn))
            self.weight_scale = nnx.Param(jnp.zeros((2, 30)))

    model = random_model(Float8)
    codes = np.asarray(model.weight[...], np.float32)
    assert np.isfinite(codes).all()
    values = codes * np.asarray(model.weight_scale[...])[..., None]
    np.testing.assert_allclose(values.std(), 0.02, atol=4 * 0.02 / np.sqrt(2 * 2400))
