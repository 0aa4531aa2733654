"""Fixtures of the kernels' tests."""

import types

import jax
import numpy as np
import pytest
from jax._src import callback

# Race reports have no public name; a release that moves them must fail this import.
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, shared_memory


@pytest.fixture(scope="module", autouse=True)
def numpy_arguments():
    """Interpret mode's callbacks get their arguments as NumPy's arrays.

    They read them with NumPy anyway, and a third of the time of a kernel's tests was
    making jax's arrays of them, nearly all of one element.
    """

    def to_numpy(args, device):
        del device
        return jax.tree.map(np.array, args)  # copies: XLA's buffers end with the call

    to_int = shared_memory._to_int

    def array_to_int(x):
        return x.item() if isinstance(x, np.ndarray) else to_int(x)

    api = types.SimpleNamespace(**vars(callback.api) | {"device_put": to_numpy})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callback, "api", api)
        patch.setattr(shared_memory, "_to_int", array_to_int)
        yield


class Launches:
    """What race detection found in each kernel that was interpreted."""

    def __init__(self) -> None:
        self.states: list[gpu_callbacks.GPURaceDetectionState] = []

    def check(self) -> None:
        """Raises AssertionError if any of the kernels had a race."""
        jax.effects_barrier()  # a kernel may still run
        racing = [i for i, state in enumerate(self.states) if state.races_found]
        assert not racing, f"races in launches {racing} of {len(self.states)}"


@pytest.fixture
def launches(monkeypatch) -> Launches:
    """The kernels that the test interprets, from here on.

    jax tells of the last one only, by `get_races`, and most tests launch several. On
    jax 0.11 a race is printed and nothing raised.
    """
    found = Launches()
    new_state = gpu_callbacks.GPURaceDetectionState

    def record(*args, **kwargs):
        found.states.append(new_state(*args, **kwargs))
        return found.states[-1]

    monkeypatch.setattr(gpu_callbacks, "GPURaceDetectionState", record)
    return found


@pytest.fixture
def no_races(launches):
    """Any race that interpret mode reports fails a test, even where values agree."""
    yield
    launches.check()
