"""Memory that a machine has used, and the rate of its matrix products."""

import contextlib
import pathlib
import re
import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.common.gpu_state import GpuState

GB = 1e9
MATMUL_SECONDS = 1.0

MatmulShape = tuple[int, int, int]  # rows, inner size, columns


def device_memory() -> dict[str, float]:
    """Gigabytes in use on the device, and the most so far; nothing on a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    names = {"in_use_gb": "bytes_in_use", "peak_gb": "peak_bytes_in_use"}
    return {ours: stats[name] / GB for ours, name in names.items() if name in stats}


def host_peak_bytes(*, reset: bool = False) -> int:
    """Most memory of this process so far, or since it was reset to what it is now."""
    if reset:
        # Where it is forbidden, growth counts from the peak so far and is too small.
        with contextlib.suppress(OSError):
            pathlib.Path("/proc/self/clear_refs").write_text("5")
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # type: ignore[index]


def matmul_rates(shapes: Mapping[str, MatmulShape]) -> dict[str, Any]:
    """Rates of bfloat16 products by name: these, and a large square one.

    Args:
      shapes: A model's own products.
    """
    side = 8192 if jax.default_backend() == "gpu" else 64
    shapes = {"square": (side, side, side), **shapes}
    return {name: matmul_rate(*shape) for name, shape in shapes.items()}


def matmul_rate(rows: int, inner: int, columns: int) -> dict[str, Any]:
    """Time and TFLOP/s of a bfloat16 product of normal numbers, over a second."""
    keys = jax.random.split(jax.random.key(0))
    normal = jax.jit(jax.random.normal, static_argnums=(1, 2))
    a = normal(keys[0], (rows, inner), jnp.bfloat16)
    b = normal(keys[1], (inner, columns), jnp.bfloat16)
    product = jax.jit(jnp.dot)
    for _ in range(3):
        jax.block_until_ready(product(a, b))
    start = time.perf_counter()
    jax.block_until_ready(product(a, b))
    once = time.perf_counter() - start
    in_a_row = max(1, min(1000, int(MATMUL_SECONDS / 5 / once)))
    samples = []
    with GpuState() as state:
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(in_a_row):
                out = product(a, b)
            jax.block_until_ready(out)
            samples.append((time.perf_counter() - start) / in_a_row)
    seconds = statistics.median(samples)
    return {
        "shape": [rows, inner, columns],
        "median_ms": 1e3 * seconds,
        "tflops": 2e-12 * rows * inner * columns / seconds,
        **state.summary,
    }
