"""Values sown inside a module: read where asked for, free where not."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.diffusion.capture import call_and_capture, sow_if_captured


class Doubler(nnx.Module):
    def __init__(self, times=1):
        self.times = times

    def __call__(self, x):
        for _ in range(self.times):
            sow_if_captured(self, seen=2 * x)
        return x + 1


class Outer(nnx.Module):
    def __init__(self):
        self.inner = Doubler()

    def __call__(self, x):
        return self.inner(x)


def test_captured_by_the_names_of_modules():
    module = Outer()
    result, sown = call_and_capture(module, jnp.arange(3))
    np.testing.assert_array_equal(result, [1, 2, 3])
    assert list(sown) == ["inner"]
    np.testing.assert_array_equal(sown["inner"]["seen"], [0, 2, 4])
    again, _ = call_and_capture(module, jnp.arange(3))  # nothing is left from before
    np.testing.assert_array_equal(again, result)


def test_nothing_is_stored_where_nobody_captures():
    module = Outer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(jnp.arange(3))
    assert not jax.tree.leaves(nnx.state(module))


def test_a_name_is_sown_once():
    with pytest.raises(ValueError, match=r"'seen'.* was sown 2 times; expected once"):
        call_and_capture(Doubler(times=2), jnp.arange(3))
