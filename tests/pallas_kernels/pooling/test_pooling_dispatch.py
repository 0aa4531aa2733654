"""Each device gets the kernel or the XLA path of an operation, with the same result."""

import contextlib
import functools
import warnings
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import SlowBackendWarning
from pallas_kernels.common.device import Device
from pallas_kernels.pooling import (
    QKV,
    Tiling,
    api,
    joint_norm_rope_pool,
    norm_rope_pool,
    pool_tiles,
    reference,
    tiles,
)
from pallas_kernels.pooling.sm90 import norm_rope_pool as fused_kernel
from tests import tolerances
from tests.pallas_kernels.pooling.cases import NORMS, TILINGS, random_case
from tests.warnings_once import forget_warnings

H100 = Device(platform="gpu", kind="H100", compute_capability=(9, 0))
CPU = Device(platform="cpu")
BOTH = ("mean", "max")
RASTER = TILINGS["raster"]
BEFORE = Tiling(frames=1, height=3, width=6, tile=(2, 4), order="raster", start=4)


@contextlib.contextmanager
def on(device):
    """Dispatch as on a device."""
    with (
        mock.patch.object(api, "current_device", return_value=device),
        mock.patch.object(tiles, "current_device", return_value=device),
    ):
        yield


@pytest.fixture
def interpreted():
    """The fused kernel runs in interpret mode."""
    run = functools.partial(
        fused_kernel.norm_rope_pool, interpret=plgpu.InterpretGPUParams()
    )
    with mock.patch.object(fused_kernel, "norm_rope_pool", run):
        yield


@pytest.mark.parametrize(
    "device",
    [pytest.param(H100, marks=pytest.mark.nightly), CPU],
    ids=["kernel", "xla"],
)
@pytest.mark.usefixtures("interpreted")
def test_each_path_agrees_with_the_reference(device):
    norm = NORMS["heads"]
    q, k, scales, rope = random_case(RASTER, norm, "bfloat16")
    with on(device):
        *written, pooled = norm_rope_pool(
            q, k, RASTER, norm=norm, scales=scales, rope=rope, reductions=BOTH
        )
    chex.assert_trees_all_equal_shapes_and_dtypes(written, [q, k])
    for i, x in enumerate((q, k)):
        expected = reference.norm_rope(
            x, norm=norm, scale=scales[i], rope=rope, visual_tokens=RASTER.tokens
        )
        np.testing.assert_allclose(
            written[i].astype(jnp.float32), expected, **tolerances.NORM_ROPE["bfloat16"]
        )
        for j, reduction in enumerate(BOTH):
            expected = reference.pool_tiles(
                written[i], RASTER.table, reduction=reduction
            )
            np.testing.assert_allclose(pooled[2 * i + j], expected, **tolerances.POOLED)


@pytest.mark.nightly
@pytest.mark.usefixtures("interpreted")
def test_kernel_has_the_gradients_of_the_xla_path():
    norm = NORMS["head"]
    arrays = random_case(BEFORE, norm)

    def loss(q, k, scales, rope, device):
        with on(device):
            q, k, pooled = norm_rope_pool(
                q, k, BEFORE, norm=norm, scales=scales, rope=rope
            )
        return jnp.sin(q).sum() + jnp.cos(k).sum() + pooled[0].sum()

    fused, plain = (jax.grad(loss, (0, 1, 2, 3))(*arrays, d) for d in (H100, CPU))
    chex.assert_trees_all_equal_shapes_and_dtypes(fused, plain)
    for a, b in zip(jax.tree.leaves(fused), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, **tolerances.GRADIENT["float32"])


@pytest.mark.nightly
@pytest.mark.usefixtures("interpreted")
def test_kernel_has_the_gradients_of_parts():
    """Those of the XLA path; that of v is a slice."""
    norm = NORMS["head"]
    q, k, scales, rope = random_case(BEFORE, norm)
    text_scales = random_case(BEFORE, norm, seed=1)[2]
    q, k = (x[:, : BEFORE.tokens.stop] for x in (q, k))
    video, text = (
        QKV(*(x[:, tokens] for x in (q, k, k)))
        for tokens in (BEFORE.tokens, slice(0, BEFORE.start))
    )

    def loss(video, text, scales, text_scales, rope, device):
        with on(device):
            q, k, v, pooled = joint_norm_rope_pool(
                video,
                text,
                BEFORE,
                norm=norm,
                scales=scales,
                text_scales=text_scales,
                rope=rope,
            )
        total = jnp.sin(q).sum() + jnp.cos(k).sum() + (v**2).sum()
        return total + pooled[0].sum()

    arrays = (video, text, scales, text_scales, rope)
    fused, plain = (jax.grad(loss, range(5))(*arrays, d) for d in (H100, CPU))
    chex.assert_trees_all_equal_shapes_and_dtypes(fused, plain)
    for a, b in zip(jax.tree.leaves(fused), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, **tolerances.GRADIENT["float32"])
    np.testing.assert_array_equal(fused[0].v, 2 * video.v)
    np.testing.assert_array_equal(fused[1].v, 2 * text.v)


@pytest.mark.nightly
@pytest.mark.usefixtures("interpreted")
def test_pooling_can_be_left_out():
    q, k, _, rope = random_case(RASTER, None)
    run = functools.partial(norm_rope_pool, q, k, RASTER, rope=rope)
    with on(H100):
        assert run(pool_anyway=False)[2] is not None
        assert run(reductions=())[2] is None
    with on(CPU):
        assert run(pool_anyway=False)[2] is None
        assert run(reductions=())[2] is None
        assert run()[2] is not None


def test_a_slower_norm_warns_once():
    forget_warnings()
    q = jnp.zeros((1, 60, 4, 96))
    with on(H100):
        with pytest.warns(SlowBackendWarning, match="4 heads of 96 channels"):
            norm_rope_pool(q, q, RASTER, reductions=())
        norm_rope_pool(q, q, RASTER, reductions=())  # a second one would raise


@pytest.mark.parametrize(
    ("capability", "heads", "cause"),
    [
        ((9, 0), (3, 64), r"multiple of 128, not 3 \* 64: give each device"),
        ((8, 0), (2, 64), r"needs an NVIDIA Hopper GPU \(sm_90\), not gpu X100"),
        (None, (2, 64), "needs an NVIDIA Hopper GPU"),
    ],
    ids=["channels", "ampere", "not-nvidia"],
)
def test_a_gpu_without_the_kernel_warns_once(capability, heads, cause):
    device = Device(platform="gpu", kind="X100", compute_capability=capability)
    q = jnp.ones((1, 60, *heads))
    forget_warnings()
    with on(device):
        with pytest.warns(SlowBackendWarning, match=f"pooling runs on XLA .*{cause}"):
            pool_tiles(q, q, RASTER)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pool_tiles(q, q, RASTER)


def test_a_cpu_does_not_warn():
    q = jnp.ones((1, 60, 3, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pool_tiles(q, q, RASTER)
