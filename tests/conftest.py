"""Markers, options and fixtures shared by every test."""

import os
import shutil

import jax
import numpy as np
import pytest

from tests.tolerances import MEASURED

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


@pytest.fixture
def measured(record_property):
    """Records the largest value of each name, for JUnit files and the summary."""
    largest: dict[str, float] = {}

    def record(name: str, value: float) -> None:
        largest[name] = max(largest.get(name, 0.0), float(value))

    yield record
    for name, value in largest.items():
        record_property(MEASURED + name, value)


@pytest.fixture
def assert_close(measured):
    """numpy.testing.assert_allclose that records the largest difference it let pass."""

    def check(name: str, got, want, tolerance: dict[str, float]) -> None:
        got, want = (np.asarray(x).astype(np.float64) for x in (got, want))
        np.testing.assert_allclose(got, want, **tolerance)
        differ = got != want  # infinities may be equal
        differences = np.abs(got[differ] - want[differ])
        measured(name, differences.max(initial=0.0))

    return check


def pytest_terminal_summary(terminalreporter) -> None:
    """Prints what tests measured, the largest of all of them."""
    largest: dict[str, float] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name.startswith(MEASURED):
                    largest[name] = max(largest.get(name, 0.0), value)
    for name, value in sorted(largest.items()):
        terminalreporter.write_line(f"{name} {value:.3g}")
