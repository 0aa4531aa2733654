"""Contexts with the rows that a token refiner sees."""

import jax.numpy as jnp
import numpy as np
import pytest

from models.diffusion.contexts import context_mask, join_contexts
from models.diffusion.interfaces import TextContext

SPLIT = [[True, False, True, True]]  # text, padding, and the image's rows


def make_context(*lengths, mask=None):
    rows = jnp.ones((len(lengths), 4, 2))
    mask = None if mask is None else jnp.asarray(mask)
    return TextContext(rows, jnp.asarray(lengths, jnp.int32), mask=mask)


def test_the_first_rows_are_real_where_no_mask_says_otherwise():
    expected = [[True, True, True, False], [False] * 4]
    np.testing.assert_array_equal(context_mask(make_context(3, 0)), expected)
    split = make_context(3, mask=SPLIT)
    np.testing.assert_array_equal(context_mask(split), SPLIT)


@pytest.mark.parametrize("masked", ["prompts", "negative", "both"])
def test_masks_are_joined(masked):
    first = [[True, True, True, False]]
    sides, expected = [], []
    for side in ("prompts", "negative"):
        has_mask = masked in (side, "both")
        sides.append(make_context(3, mask=SPLIT if has_mask else None))
        expected += SPLIT if has_mask else first
    joined = join_contexts(*sides)
    np.testing.assert_array_equal(joined.mask, expected)
    np.testing.assert_array_equal(joined.lengths, [3, 3])


def test_without_masks_there_is_none_to_join():
    assert join_contexts(make_context(3), make_context(1)).mask is None
