"""Kernels for Hopper GPUs under a mesh: seen without one, by lowering.

Where the checks of `jax.shard_map` see a kernel, the types of its results must say
along which mesh axes they vary.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.draft_jax.sharded_hopper_cases import CALLS, KINDS, POOLINGS

ROOT = Path(__file__).parents[2]
MOST_ERROR = 1e-6  # measured: 0


def run(kind):
    command = [sys.executable, "-m", "tests.draft_jax.sharded_hopper_cases", kind]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_lower_where_their_heads_are(kind):
    found = run(kind)
    assert {*CALLS} < {*found}
    assert {case: cause for case, cause in found.items() if cause} == {}


@pytest.mark.nightly
def test_xla_takes_the_heads_of_a_device_that_a_kernel_does_not():
    """The kernel was chosen by all heads: only the partitioner knows a device's own."""
    found = run("few heads")
    assert len(found) == 2 * len(POOLINGS)
    for case, result in found.items():
        assert result["error"] <= MOST_ERROR, case
        assert result["is told"], case
