"""Products whose reader applies scales and bias, against loops."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common.products import Product, check_product, filled_alike
from tests.pallas_kernels.pooling.naive_norm_rope import finish, random_product

PARTS = [(True, True, True), (False, False, True), (True, True, False)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_finished_products_are_those_of_loops(parts, dtype):
    product = random_product((2, 3, 2, 4), dtype, parts)
    finished = product.finished()
    assert finished.dtype == product.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(finished, finish(product))


def test_a_finished_product_is_its_values():
    values = jnp.ones((2, 3))
    assert Product(values).is_finished
    assert Product(values).finished() is values
    assert Product.of(np.ones((2, 3), np.float32)).values.dtype == jnp.float32


def test_products_are_filled_with_what_others_have():
    first = random_product((2, 3, 2, 4), "float32", (True, False, True))
    second = random_product((2, 5, 2, 4), "float32", (False, False, False))
    filled = filled_alike((first, second), num_rows=2)
    assert [part is not None for part in filled[1]] == [True, True, False, True]
    assert filled[1].rows.shape == (2, 5)
    assert filled[1].bias.shape == (2, 4)
    for before, after in zip((first, second), filled, strict=True):
        np.testing.assert_array_equal(after.finished(), finish(before))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": np.ones(2)}, r"q.rows has shape \(2,\); .* needs \(2, 3\)"),
        ({"columns": np.ones(8)}, r"q.columns has shape \(8,\); .* needs \(2, 4\)"),
        ({"bias": np.ones((3, 4))}, r"q.bias has shape \(3, 4\)"),
    ],
    ids=["rows", "columns", "bias"],
)
def test_parts_that_do_not_fit_are_named(changes, message):
    product = random_product((2, 3, 2, 4), "float32", (True, True, True))
    with pytest.raises(ValueError, match=message):
        check_product("q", product._replace(**changes), num_rows=2)
