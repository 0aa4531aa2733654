"""Markers and options shared by every test."""

import os
import shutil

import jax
import pytest

# Pallas' interpret mode blocks one thread of XLA's pool for each warpgroup, and one
# more. The pool has a thread per core: on a machine with two cores tests would wait for
# ever now and then. Read when the CPU backend starts.
os.environ.setdefault("PJRT_NPROC", "8")

# Most of the suite's time is compilation of small programs for the CPU, and nearly half
# of that LLVM's optimisation. Beside a GPU nothing is changed.
if shutil.which("nvidia-smi") is None:
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_backend_optimization_level" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0".strip()


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
