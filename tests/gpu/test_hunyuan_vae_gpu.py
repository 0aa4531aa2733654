"""HunyuanVideo's autoencoder on a GPU, against diffusers on a CPU."""

import jax
import numpy as np
import pytest

from models.hunyuan.vae.codec import HunyuanVAECodec
from models.hunyuan.vae.tiling import HunyuanTiling
from tests import tiny_hunyuan_vae
from tests.tolerances import GPU_VAE_PARITY, GPU_VAE_RELATIVE

pytestmark = pytest.mark.gpu
TILING = HunyuanTiling(size=(16, 16, 16), step=(12, 12, 12))


def run_case(name, tiling=None, **changes):
    """Pixels and latents, each with what diffusers made of the same inputs."""
    outputs, _ = tiny_hunyuan_vae.load_fixture()
    model = tiny_hunyuan_vae.make_model(name, **changes)
    codec = HunyuanVAECodec(model=model, tiling=tiling)
    latents, video = tiny_hunyuan_vae.make_arrays(name)
    return (
        (np.asarray(codec.decode(latents)), outputs[f"{name}/0/video"]),
        (np.asarray(codec.encode(video)), outputs[f"{name}/0/latents"]),
    )


@pytest.mark.parametrize("convolution", ["3d", "2d"])
@pytest.mark.parametrize(("name", "tiling"), [("deep", None), ("long", TILING)])
def test_full_precision_matches_diffusers(name, tiling, convolution):
    with jax.default_matmul_precision("highest"):
        pairs = run_case(name, tiling, convolution=convolution)
    for got, expected in pairs:
        np.testing.assert_allclose(got, expected, **GPU_VAE_PARITY)


@pytest.mark.parametrize("convolution", ["3d", "2d"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_default_precision_stays_close(dtype, convolution):
    """float32 by TF32 products, and bfloat16."""
    for got, expected in run_case("deep", dtype=dtype, convolution=convolution):
        relative = np.linalg.norm(got - expected) / np.linalg.norm(expected)
        assert relative < GPU_VAE_RELATIVE[dtype]
