"""A test that hangs is named, though nothing in Python can interrupt it."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TESTS = """
import threading
import jax
import jax.numpy as jnp

def test_before():
    pass

def test_that_hangs():
    def wait(x):
        threading.Event().wait()
        return x

    jax.block_until_ready(jax.pure_callback(wait, jnp.zeros(1), jnp.zeros(1)))

def test_after():
    pass
"""


@pytest.mark.nightly
def test_a_test_that_hangs_in_a_program_is_named(tmp_path):
    """With the method and the runner of the suite, and a shorter limit."""
    (tmp_path / "test_it.py").write_text(TESTS)
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())
    options = options["tool"]["pytest"]["ini_options"]
    assert options["timeout"] <= 300
    command = [
        *(sys.executable, "-m", "pytest", "-n", "1", "-p", "no:cacheprovider"),
        *("--timeout", "3", "--timeout-method", options["timeout_method"]),
    ]
    done = subprocess.run(
        [*command, "test_it.py"],
        cwd=tmp_path,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "FAILED test_it.py::test_that_hangs" in done.stdout
    assert "1 failed, 2 passed" in done.stdout
