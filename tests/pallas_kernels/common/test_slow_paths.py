"""The warning of a slow path: which line it is shown with."""

import subprocess
import sys

import pytest

# A process of its own: under test every function is wrapped by a checker of types,
# whose lines would be the ones that called.
SCRIPT = """
import functools, warnings
import jax
import jax.numpy as jnp
from draft_jax import DraftConfig, VideoGrid, compute_mask, draft_attention
from pallas_kernels import dense_attention
from pallas_kernels.common import device, slow_paths

a100 = device.Device(platform="gpu", kind="A100", compute_capability=(8, 0))
device.describe_device = lambda _: a100
grid = VideoGrid(1, 4, 8, tile=(4, 4))
x = jnp.ones((1, grid.num_tokens, 1, 8))
config = DraftConfig.paper(sparsity=0.5)
options = {"grid": grid, "config": config}
for name, call in {
    "compute_mask": functools.partial(compute_mask, x, x, **options),
    "draft_attention": functools.partial(draft_attention, x, x, x, **options),
    "under jit": functools.partial(jax.jit(draft_attention), x, x, x, **options),
    "dense_attention": functools.partial(dense_attention, x, x, x),
}.items():
    slow_paths._warned.clear()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        call()
    print(name, {w.filename for w in warned})
"""


@pytest.mark.nightly
def test_slow_paths_show_the_line_that_called():
    """Whatever lies between: an operation, the method, both, or jax."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        f"{name} {{'<string>'}}"
        for name in ("compute_mask", "draft_attention", "under jit", "dense_attention")
    ]
