"""Dense attention against NumPy loops, jax.nn and the block-sparse full mask."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax.grid import VideoGrid
from pallas_kernels import dense_attention
from pallas_kernels.attention import dense_api
from pallas_kernels.attention.dense_api import choose, why_no_cudnn
from pallas_kernels.attention.dense_xla import chunk_size, chunked_attention
from pallas_kernels.common.device import Device
from pallas_kernels.common.slow_paths import SlowBackendWarning
from tests.cases import mostly_nightly
from tests.pallas_kernels.attention.reference import CASES, numpy_attention, random_qkv
from tests.tolerances import ATTENTION, GRADIENT
from tests.warnings_once import forget_warnings

# The package's attribute of this name is the function, not the module.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES)
def test_matches_numpy(case, dtype):
    grid, lengths = CASES[case]
    q, k, v = random_qkv(grid, dtype=dtype)
    text_lengths = None if lengths is None else jnp.asarray(lengths)
    out = dense_attention(q, k, v, grid=grid, text_lengths=text_lengths, scale=0.3)
    every_pair = np.ones((2, 2, grid.num_blocks, grid.num_blocks), bool)
    want, _ = numpy_attention(
        q, k, v, every_pair, grid, scale=0.3, text_lengths=lengths
    )
    assert out.dtype == q.dtype
    np.testing.assert_allclose(out.astype("float32"), want, **ATTENTION[dtype])


@pytest.mark.nightly
@pytest.mark.parametrize("one_head_at_a_time", [True, False])
@pytest.mark.parametrize("chunk", mostly_nightly([1, 7, 100], [7]))
def test_any_chunk_gives_the_same(chunk, one_head_at_a_time):
    grid, lengths = CASES["text-before-ragged"]
    q, k, v = random_qkv(grid)
    token = np.arange(grid.num_tokens)
    valid = (token >= 11) | (token < np.asarray(lengths)[:, None])
    weight = jnp.asarray(np.random.default_rng(2).normal(size=q.shape))
    weight = weight * valid[:, :, None, None]

    def chunked(q, k, v):
        out = chunked_attention(
            q,
            k,
            v,
            jnp.asarray(valid),
            scale=0.25,
            chunk=chunk,
            one_head_at_a_time=one_head_at_a_time,
        )
        return (out * weight).sum()

    def plain(q, k, v):
        mask = jnp.asarray(valid)[:, None, None]
        out = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=0.25)
        return (out * weight).sum()

    got = jax.value_and_grad(chunked, argnums=(0, 1, 2))(q, k, v)
    want = jax.value_and_grad(plain, argnums=(0, 1, 2))(q, k, v)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for x, y in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(x, y, **GRADIENT["float32"])


def test_grid_is_not_needed_without_text_lengths():
    q, k, v = random_qkv(VideoGrid(1, 4, 8))
    want = jax.nn.dot_product_attention(q, k, v)
    np.testing.assert_allclose(dense_attention(q, k, v), want, **ATTENTION["float32"])


def test_holds_no_map_of_all_pairs():
    shape = jax.ShapeDtypeStruct((1, 16_384, 1, 8), jnp.float32)
    for function in (
        dense_attention,
        jax.grad(lambda q, k, v: dense_attention(q, k, v).sum(), argnums=(0, 1, 2)),
    ):
        memory = jax.jit(function).lower(shape, shape, shape).compile()
        used = memory.memory_analysis().temp_size_in_bytes
        assert used < 16_384**2 * 4 / 8


@pytest.mark.parametrize(
    ("dtype", "head_dim", "device", "message"),
    [
        ("bfloat16", 64, Device(platform="cpu"), "not an NVIDIA GPU"),
        ("bfloat16", 64, Device(platform="gpu", kind="MI300X"), "not an NVIDIA GPU"),
        ("bfloat16", 64, (7, 5), "older than Ampere"),
        ("float32", 64, (9, 0), "not float32"),
        ("float16", 12, (9, 0), "head_dim=12 must be a multiple of 8"),
        ("float16", 136, (9, 0), "up to 128"),
        ("float16", 128, (8, 0), None),
        ("bfloat16", 64, (9, 0), None),
    ],
)
def test_why_no_cudnn(dtype, head_dim, device, message):
    if isinstance(device, tuple):
        device = Device(platform="gpu", kind="GPU", compute_capability=device)
    cause = why_no_cudnn(dtype, head_dim, device)
    assert cause is None if message is None else message in cause


def gpu(*capability):
    return Device(platform="gpu", kind="GPU", compute_capability=capability or None)


LONG = (1, 8192, 2, 128)
CHOICES = {  # shape, dtype, device, pads before the video, path, what a warning says
    "hopper": (LONG, "bfloat16", gpu(9, 0), False, "hopper", None),
    "short": ((1, 4088, 2, 128), "bfloat16", gpu(9, 0), False, "cudnn", None),
    "short-odd": ((1, 4095, 2, 128), "bfloat16", gpu(9, 0), False, "cudnn", None),
    "odd": (
        (1, 8193, 2, 128),
        "bfloat16",
        gpu(9, 0),
        False,
        "cudnn",
        "'hopper': .*multiple of 8 tokens, at least 4096, not 8193",
    ),
    "text-first": (LONG, "float16", gpu(9, 0), True, "cudnn", 'text_side="after"'),
    "head-dim": ((1, 8192, 2, 96), "float16", gpu(9, 0), False, "cudnn", None),
    "ampere": (LONG, "bfloat16", gpu(8, 0), True, "cudnn", None),
    "float32": (
        LONG,
        "float32",
        gpu(9, 0),
        False,
        "xla",
        "'cudnn': .*takes bfloat16 and float16, not float32",
    ),
    "wide": (
        (1, 64, 1, 384),
        "bfloat16",
        gpu(8, 0),
        False,
        "xla",
        "'cudnn': head_dim=384 must be",
    ),
    "amd": (LONG, "bfloat16", gpu(), False, "xla", "not an NVIDIA GPU"),
    "cpu": (LONG, "float32", Device(platform="cpu"), True, "xla", None),
    "tpu": (LONG, "bfloat16", Device(platform="tpu"), False, "xla", None),
}


@pytest.mark.parametrize("case", CHOICES)
def test_path_and_warning(case):
    shape, dtype, device, pads_before_video, path, warning = CHOICES[case]
    choice = choose(shape, dtype, device, pads_before_video=pads_before_video)
    assert choice.name == path
    if warning is None:
        assert choice.slower_because is None
    else:
        assert re.search(warning, choice.slower_because)


@pytest.mark.parametrize(
    ("side", "has_lengths", "path"),
    [("after", True, "hopper"), ("before", False, "hopper"), ("before", True, "cudnn")],
)
def test_padding_before_the_video_is_not_for_hopper(
    monkeypatch, side, has_lengths, path
):
    def attend(q, *arrays, path, **others):
        paths.append(path)
        return q

    paths = []
    monkeypatch.setattr(dense_api, "current_device", lambda *arrays: gpu(9, 0))
    monkeypatch.setattr(dense_api, "_attend", attend)
    forget_warnings()
    grid = VideoGrid(4, 32, 32, text_length=8, text_side=side)
    q = jnp.zeros((1, grid.num_tokens, 1, 64), jnp.bfloat16)
    lengths = jnp.array([5]) if has_lengths else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dense_attention(q, q, q, grid=grid, text_lengths=lengths)
    assert paths == [path]
    told = [str(w.message) for w in caught if w.category is SlowBackendWarning]
    assert ['text_side="after"' in text for text in told] == [True] * (path == "cudnn")


def test_slower_path_warns_once(monkeypatch):
    monkeypatch.setattr(dense_api, "current_device", lambda *arrays: gpu(9, 0))
    forget_warnings()
    q, k, v = random_qkv(VideoGrid(1, 4, 8))
    with pytest.warns(SlowBackendWarning, match="dense_attention runs on .*float32"):
        dense_attention(q, k, v)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dense_attention(q, k, v)
        forget_warnings()
        dense_attention(q, k, v, backend="xla")


@pytest.mark.usefixtures("without_jaxtyping")
def test_unknown_backend_is_named():
    q, k, v = random_qkv(VideoGrid(1, 4, 8))
    with pytest.raises(ValueError, match=r"backend='hopper' must be one of \('auto'"):
        dense_attention(q, k, v, backend="hopper")


@pytest.mark.parametrize(
    ("shape", "device", "expected"),
    [
        # 2^21 logits of a head: 910 queries, in three equal chunks.
        ((1, 2304, 12, 128), Device(platform="cpu"), 768),
        ((1, 75_600, 40, 128), Device(platform="cpu"), 27),  # 2^21 / 75,600 = 27.7
        # 2^27 logits of all heads: 4,854 queries; 1,920 are fewer.
        ((1, 1_920, 12, 128), gpu(9, 0), 1_920),
        ((2, 32_760, 12, 128), gpu(9, 0), 170),  # 170.7
        ((1, 3 << 20, 12, 128), gpu(9, 0), 16),  # never fewer than 16
        ((1, 5, 1, 8), Device(platform="cpu"), 5),
    ],
)
def test_chunks_are_equal_and_hold_bounded_logits(shape, device, expected):
    assert chunk_size(shape, device) == expected
