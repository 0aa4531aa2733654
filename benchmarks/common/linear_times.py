"""Times of linear layers in bfloat16 and in FP8, and what FP8 costs in precision.

A layer in FP8 rounds its input, multiplies, and applies scales and bias, as it does in
a model; there, parts of that are fused with what lies around it. What a record says:

  bfloat16_ms, float8_ms   of a layer with a bias, bfloat16 in and out
  speedup                  the first over the second
  quantise_ms              of rounding its input alone
  error                    relative L2 distance of FP8's results to bfloat16's
  accumulation_error       to FP8's with full accumulation, which is asked for by
                           precision "highest"
  full_ms                  of a layer with that
  int8_ms, int8_error      as of FP8, of a layer in int8, which models do not have: its
                           rows are rounded evenly, up to 127
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.common.gpu_state import GpuState
from benchmarks.common.machine import MatmulShape
from models.float8.product import compiler_options, scaled_product
from models.float8.rows import ScaledRows, quantise_rows

SECONDS = 0.5  # of all calls that are timed
LARGEST_INT8 = 127

Record = dict[str, Any]


def linear_times(shapes: Mapping[str, MatmulShape]) -> dict[str, Record]:
    """Returns the record of each layer: rows, inner size and columns by name."""
    return {name: linear_time(*shape) for name, shape in shapes.items()}


def weighted_speedup(
    times: Mapping[str, Record], counts: Mapping[str, int]
) -> float | None:
    """Returns how much faster FP8 is for so many layers of each kind together."""
    if any("speedup" not in times.get(name, {}) for name in counts):
        return None
    wide, narrow = (
        sum(count * times[name][key] for name, count in counts.items())
        for key in ("bfloat16_ms", "float8_ms")
    )
    return wide / narrow


def linear_time(rows: int, inner: int, columns: int) -> Record:
    """Returns the record of one layer; see the module."""
    keys = jax.random.split(jax.random.key(0))
    normal = jax.jit(jax.random.normal, static_argnums=(1, 2))
    x = normal(keys[0], (rows, inner), jnp.bfloat16)
    weight = normal(keys[1], (columns, inner), jnp.bfloat16)
    bias = jnp.ones(columns, jnp.bfloat16)
    narrow = jax.jit(quantise_rows)(weight)
    kernel = jax.jit(jnp.transpose)(weight)
    options = compiler_options(narrow)

    def in_float8(x, narrow, bias):
        return scaled_product((x,), narrow, bias, dtype="bfloat16")

    wide = jax.jit(lambda x, kernel, bias: x @ kernel + bias)
    float8 = jax.jit(in_float8, compiler_options=options)
    full = jax.jit(_with_full_accumulation(in_float8), compiler_options=options)
    record: Record = {"shape": [rows, inner, columns]}
    record |= {"bfloat16_ms": time_ms(lambda: wide(x, kernel, bias))}
    with GpuState() as state:
        record["float8_ms"] = time_ms(lambda: float8(x, narrow, bias))
    record["full_ms"] = time_ms(lambda: full(x, narrow, bias))
    round_rows = jax.jit(quantise_rows)
    record["quantise_ms"] = time_ms(lambda: round_rows(x))
    even = jax.jit(_int8_rows)(weight)
    int8 = jax.jit(_in_int8, compiler_options=options)  # cuBLASLt's, too
    record["int8_ms"] = time_ms(lambda: int8(x, even, bias))
    result, expected = float8(x, narrow, bias), wide(x, kernel, bias)
    return record | {
        "speedup": record["bfloat16_ms"] / record["float8_ms"],
        "tflops": 2e-9 * rows * inner * columns / record["float8_ms"],
        "error": float(_distance(result, expected)),
        "int8_error": float(_distance(int8(x, even, bias), expected)),
        "accumulation_error": float(_distance(result, full(x, narrow, bias))),
        "has_float8": "$f8" in _text(float8, x, narrow, bias),
        **state.summary,
    }


def _with_full_accumulation(function: Callable) -> Callable:
    """Returns the function under precision "highest", which cuBLASLt obeys."""

    def call(x, narrow: ScaledRows, bias):
        with jax.default_matmul_precision("highest"):
            return function(x, narrow, bias)

    return call


def _int8_rows(x):
    """Returns rows in int8, and what each is multiplied by."""
    wide = x.astype(jnp.float32)
    scale = jnp.abs(wide).max(-1) / LARGEST_INT8
    return jnp.round(wide / scale[:, None]).astype(jnp.int8), scale


def _in_int8(x, rows, bias):
    values, scale = _int8_rows(x)
    axes = (((1,), (1,)), ((), ()))
    product = jax.lax.dot_general(
        values, rows[0], axes, preferred_element_type=jnp.int32
    )
    total = product.astype(jnp.float32) * scale[:, None] * rows[1] + bias
    return total.astype(x.dtype)


def _text(jitted: Any, *arguments: Any) -> str:
    return jitted.lower(*arguments).compile().as_text()


@jax.jit
def _distance(found: jax.Array, expected: jax.Array) -> jax.Array:
    found, expected = (x.astype(jnp.float32) for x in (found, expected))
    return jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)


def time_ms(call: Callable[[], Any]) -> float:
    """Returns the median milliseconds of a call, of five rows of calls."""
    for _ in range(3):
        jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    once = time.perf_counter() - start
    in_a_row = max(1, min(1000, int(SECONDS / 5 / once)))
    samples = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(in_a_row):
            out = call()
        jax.block_until_ready(out)
        samples.append(1e3 * (time.perf_counter() - start) / in_a_row)
    return statistics.median(samples)
