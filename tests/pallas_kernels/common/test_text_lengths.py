"""Tokens of each block that text_lengths leaves."""

import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import VideoGrid
from pallas_kernels.common.interfaces import valid_lengths


@pytest.mark.parametrize("side", ["before", "after"])
def test_blocks_of_padding_have_no_tokens(side):
    """10 tokens of text are blocks of 4, 4 and 2; two tiles of 4 and 2 are video."""
    grid = VideoGrid(1, 2, 3, tile=(2, 2), text_length=10, text_side=side)
    text = {0: [0, 0, 0], 3: [3, 0, 0], 4: [4, 0, 0], 6: [4, 2, 0], 10: [4, 4, 2]}
    got = valid_lengths(grid, jnp.array(list(text), jnp.int32))
    for own, of_text in zip(got, text.values(), strict=True):
        want = [*of_text, 4, 2] if side == "before" else [4, 2, *of_text]
        np.testing.assert_array_equal(own, want)
