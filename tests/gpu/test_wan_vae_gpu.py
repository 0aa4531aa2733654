"""Wan's autoencoder on a GPU, against diffusers on a CPU."""

import jax
import numpy as np
import pytest

from models.wan.vae.codec import WanVAECodec
from tests import tiny_vae
from tests.tolerances import GPU_VAE_PARITY, GPU_VAE_RELATIVE

pytestmark = pytest.mark.gpu


def run_case(name, **changes):
    """Pixels and latents, each with what diffusers made of the same inputs."""
    outputs, _ = tiny_vae.load_fixture()
    codec = WanVAECodec(model=tiny_vae.make_model(name, **changes))
    latents, video = tiny_vae.make_arrays(name)
    return (
        (np.asarray(codec.decode(latents)), outputs[f"{name}/video"]),
        (np.asarray(codec.encode(video)), outputs[f"{name}/latents"]),
    )


@pytest.mark.parametrize("convolution", ["3d", "2d"])
@pytest.mark.parametrize("name", ["deep", "small"])
def test_full_precision_matches_diffusers(name, convolution):
    with jax.default_matmul_precision("highest"):
        pairs = run_case(name, convolution=convolution)
    for got, expected in pairs:
        np.testing.assert_allclose(got, expected, **GPU_VAE_PARITY)


@pytest.mark.parametrize("convolution", ["3d", "2d"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_default_precision_stays_close(dtype, convolution):
    """float32 by TF32 products, and bfloat16."""
    for got, expected in run_case("deep", dtype=dtype, convolution=convolution):
        relative = np.linalg.norm(got - expected) / np.linalg.norm(expected)
        assert relative < GPU_VAE_RELATIVE[dtype]
