"""Products with weights in FP8 on the card, against the same numbers in float64."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from models.float8.product import compiler_options, scaled_product
from models.float8.rows import quantise_rows
from tests.float8_rounding import numpy_round
from tests.gpu.without_kernels import relative_error

pytestmark = pytest.mark.gpu

ROWS, INNER, OUTER = 300, 1024, 768
# cuBLASLt's default accumulation of FP8 errs by 0.4 % here and rounding to bfloat16,
# twice, by 0.2 %.
MOST = {False: 8e-3, True: 4e-3}


@pytest.mark.parametrize("weight_only", [False, True])
def test_products_match_float64(weight_only):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, INNER)) * np.exp(rng.normal(size=(ROWS, 1)))
    x, weight = x.astype(ml_dtypes.bfloat16), rng.normal(size=(OUTER, INNER))
    bias = rng.normal(size=OUTER).astype(np.float32)
    rows = quantise_rows(jnp.asarray(weight, jnp.float32))
    apply = jax.jit(
        functools.partial(scaled_product, dtype="bfloat16", weight_only=weight_only),
        compiler_options=compiler_options(rows),
    )
    got = np.asarray(apply((jnp.asarray(x),), rows, jnp.asarray(bias)), np.float64)
    wide = x.astype(np.float64) if weight_only else numpy_round(x)
    expected = wide @ numpy_round(weight).T + bias
    error = relative_error(got, expected)
    print(weight_only, error, flush=True)
    assert error < MOST[weight_only]
