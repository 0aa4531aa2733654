"""Markers, options and fixtures shared by every test."""

import gc
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

import jax
import jaxtyping
import numpy as np
import pytest

from tests.browser import NAMES, find_chromium
from tests.tolerances import MEASURED

# Pallas' interpret mode blocks one thread of XLA's pool for each warpgroup, and one
# more. The pool has a thread per core: on a machine with two cores tests would wait for
# ever now and then. Read when the CPU backend starts.
os.environ.setdefault("PJRT_NPROC", "8")

# A program on the CPU has a hundred memory maps or so, of 65,530 that Linux gives.
MOST_MEMORY_MAPS, LOOK_EVERY = 20_000, 16
DONE = pytest.StashKey[int]()  # tests that are over

LEFT_OUT = pytest.StashKey[int]()  # nightly tests that are not run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all",
        action="store_true",
        help="run the tests marked nightly, too",
    )
    parser.addoption(
        "--optimized",
        action="store_true",
        help="compile for the CPU at XLA's default level, as users do: takes longer",
    )
    parser.addoption(
        "--require-gpu",
        action="store_true",
        help="fail, instead of skip, tests marked gpu on a machine without one",
    )
    parser.addoption(
        "--require-torch",
        action="store_true",
        help="fail, instead of skip, tests marked torch where it is not installed",
    )
    parser.addoption(
        "--require-browser",
        action="store_true",
        help="fail, instead of skip, tests marked browser where there is no Chromium",
    )
    parser.addoption(
        "--require-app",
        action="store_true",
        help="fail, instead of skip, tests marked app without Gradio or Playwright",
    )
    parser.addoption(
        "--torch-python",
        default=sys.executable,
        help="interpreter with torch and transformers, for tests marked torch",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Sets the environment of the tests, before any backend has started."""
    keep_out_of_the_users_cache(config)
    turn_optimisation_off(config)


def keep_out_of_the_users_cache(config: pytest.Config) -> None:
    """Gives `draft-video` a cache of its own; workers of xdist share it.

    Matplotlib's list of fonts lies in the user's cache too and takes seconds to make.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    fonts = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("MPLCONFIGDIR", str(fonts / "matplotlib"))
    cache = tempfile.TemporaryDirectory(prefix="draft-video-tests-")
    config.add_cleanup(cache.cleanup)
    os.environ["XDG_CACHE_HOME"] = cache.name
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)


def turn_optimisation_off(config: pytest.Config) -> None:
    """Turns LLVM's optimisation off.

    Most of the suite's time is compilation of small programs for the CPU, and nearly
    half of that LLVM's optimisation. Beside a GPU nothing is changed.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if config.getoption("--optimized") or "xla_backend_optimization_level" in flags:
        return
    if shutil.which("nvidia-smi") is None:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0".strip()


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Leaves nightly tests out, but for those of files named on the command line."""
    if config.getoption("--all") or "nightly" in config.option.markexpr:
        return
    folder = config.invocation_params.dir
    named = {(folder / argument.split("::")[0]).resolve() for argument in config.args}
    left_out = [
        item
        for item in items
        if item.get_closest_marker("nightly") and item.path not in named
    ]
    config.stash[LEFT_OUT] = len(left_out)
    if hasattr(config, "workeroutput"):  # a worker of xdist, which tells its controller
        config.workeroutput["left_out"] = len(left_out)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        kept = {*items} - {*left_out}
        items[:] = [item for item in items if item in kept]


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Takes modules and tests out of what is searched for garbage again and again.

    They are millions of objects, and stay: a twentieth of the suite's time.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.set_threshold(10_000, 20, 10)  # of new objects, which tracing makes many of
        gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """Takes from a worker what only workers know: they all collect the same tests."""
    output = getattr(node, "workeroutput", None) or {}  # none of one that crashed
    if "left_out" in output:
        node.config.stash[LEFT_OUT] = output["left_out"]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        reason = f"needs an NVIDIA GPU; jax runs on {jax.default_backend()}"
        _skip(item, "--require-gpu", reason)
    if item.get_closest_marker("torch") and not has_torch(item.config):
        _skip(item, "--require-torch", "needs torch and transformers")
    if item.get_closest_marker("browser") and find_chromium() is None:
        _skip(item, "--require-browser", f"needs one of {', '.join(NAMES)}")
    if item.get_closest_marker("app") and not has_app_extra():
        _skip(item, "--require-app", "needs gradio and playwright: extra browser")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Lets go of compiled programs now and then: XLA crashes without memory maps."""
    done = item.config.stash.get(DONE, 0) + 1
    item.config.stash[DONE] = done
    if done % LOOK_EVERY == 0 and _num_memory_maps() > MOST_MEMORY_MAPS:
        jax.clear_caches()
        gc.collect()


def _num_memory_maps() -> int:
    """Returns how many maps the process has; 0 where none can be counted."""
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


def _skip(item: pytest.Item, required: str, reason: str) -> None:
    """Skips a test, or fails it if an option says that it must run."""
    if item.config.getoption(required):
        pytest.fail(f"{required}: {reason}", pytrace=False)
    pytest.skip(reason)


def has_app_extra() -> bool:
    """Whether tests marked app have what they need beside Chromium."""
    return all(importlib.util.find_spec(name) for name in ("gradio", "playwright"))


def has_torch(config: pytest.Config) -> bool:
    """Whether tests marked torch have an interpreter; one that is named must do."""
    if config.getoption("--torch-python") != sys.executable:
        return True
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


@pytest.fixture
def without_jaxtyping():
    """Users run without checked annotations; our own messages must do the work."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


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
    """Prints the largest of all values that tests measured, and what was left out."""
    largest: dict[str, float] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name.startswith(MEASURED):
                    largest[name] = max(largest.get(name, 0.0), value)
    for name, value in sorted(largest.items()):
        terminalreporter.write_line(f"{name} {value:.3g}")
    if left_out := terminalreporter.config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(
            f"{left_out} nightly tests were left out: ./run test --all runs them too"
        )
