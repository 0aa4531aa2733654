"""Markers and options shared by every test."""

import jax
import pytest

# Callbacks, of which Pallas' interpret mode is made, may wait for ever for a program
# that the CPU backend runs in the background (jax-ml/jax#25861).
jax.config.update("jax_cpu_enable_async_dispatch", False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-gpu",
        action="store_true",
        help="fail, instead of skip, tests marked gpu on a machine without one",
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None or jax.default_backend() == "gpu":
        return
    reason = f"needs an NVIDIA GPU; jax runs on {jax.default_backend()}"
    if item.config.getoption("--require-gpu"):
        pytest.fail(f"--require-gpu: {reason}", pytrace=False)
    pytest.skip(reason)
