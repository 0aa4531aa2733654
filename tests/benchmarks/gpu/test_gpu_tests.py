"""Records of `benchmarks.gpu.run`, from a run that fails and from pretended ones."""

import argparse
import json
import time
import types

import jax
import pytest

from benchmarks.gpu import run as gpu_tests


def options(tmp_path, **others):
    path = tmp_path / "record.json"
    defaults = {"output": path, "limit": 600.0}
    return path, argparse.Namespace(**defaults | others)


def report(test, when="call", outcome="passed", text="", **measured):
    properties = [(f"measured: {name}", value) for name, value in measured.items()]
    return types.SimpleNamespace(
        nodeid=test,
        when=when,
        outcome=outcome,
        longreprtext=text,
        user_properties=properties,
    )


@pytest.fixture
def results():
    """A plugin whose records are kept in `.records`, and a session it may stop."""
    records = []
    plugin = gpu_tests.Results({}, lambda run: records.append(dict(run)), limit=600.0)
    plugin.records = records
    manager = types.SimpleNamespace(getplugin=lambda name: None)
    plugin.session = types.SimpleNamespace(
        config=types.SimpleNamespace(pluginmanager=manager), shouldstop=False
    )
    plugin.pytest_xdist_node_collection_finished(None, list("abcd"))
    return plugin


def test_outcomes(results):
    for each in (
        report("a", when="setup"),
        report("a", error=0.25),
        report("a", when="teardown"),
        report("b", error=0.5, outcome="failed", text="x = 1\nE   x is 1\nE   not 2"),
        report("b", when="teardown"),
        report("c", when="setup", outcome="skipped"),
    ):
        results.pytest_runtest_logreport(each)
    last = results.records[-1]
    assert {key: last[key] for key in ("passed", "failed", "skipped", "not_run")} == {
        "passed": 1,
        "failed": 1,
        "skipped": 1,
        "not_run": 1,
    }
    assert last["failed_tests"] == {"b": "E   x is 1\nE   not 2"}
    assert last["not_run_tests"] == ["d"]
    assert last["measured"] == {"error": 0.5}
    assert not results.session.shouldstop


def test_a_failed_teardown_is_a_failure(results):
    results.pytest_runtest_logreport(report("a"))
    results.pytest_runtest_logreport(report("a", "teardown", "failed", "a message"))
    assert results.records[-1]["failed_tests"] == {"a": "a message"}
    assert results.records[-1]["passed"] == 0


def test_the_limit_ends_a_run(results):
    results.limit = 0.0
    results.pytest_runtest_logreport(report("a"))
    assert "limit" in results.session.shouldstop


def test_a_run_on_this_machine(tmp_path, monkeypatch, capsys):
    """Without a GPU each test fails, and the record says why, before older ones."""
    if jax.default_backend() == "gpu":
        pytest.skip("the tests would pass")
    monkeypatch.setenv("BENCHMARK_COMMIT", "abc1234")
    path, given = options(
        tmp_path, pytest=["tests/gpu/test_layer_gpu.py", "-n", "0", "-q"]
    )
    path.write_text(json.dumps({"what": "kept", "runs": [{"commit": "older"}]}))
    assert not gpu_tests.run_tests(given)
    capsys.readouterr()
    document = json.loads(path.read_text())
    assert document["what"] == "kept"
    run, older = document["runs"]
    assert older == {"commit": "older"}
    assert run["commit"] == "abc1234"
    assert run["failed"] == len(run["failed_tests"]) >= 1
    assert run["not_run"] == run["passed"] == 0
    assert all("needs an NVIDIA GPU" in x for x in run["failed_tests"].values())
    assert run["versions"]["jax"]


SANITIZER = """
echo "caches in $JAX_COMPILATION_CACHE_DIR"
case "$*" in
*"--tool memcheck"*text) echo "========= ERROR SUMMARY: 0 errors" ;;
*"--tool racecheck"*text)
    echo "========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)" ;;
*draft) echo "========= ERROR SUMMARY: 0 errors"; echo "finite: no"; exit 1 ;;
*boxes) echo "killed" ;;
*dense) sleep 60 & wait ;;
esac
"""
PYTHON = """
case "$*" in
*prepare) echo "finite: no"; exit 1 ;;
*) touch "$JAX_COMPILATION_CACHE_DIR/compiled" ;;
esac
"""


@pytest.fixture
def sanitizer(stand_ins):
    """Programs in place of compute-sanitizer and of Python without it."""
    stand_ins({"compute-sanitizer": SANITIZER, "python": PYTHON})


def test_sanitizers(sanitizer, tmp_path, capsys):
    path, given = options(
        tmp_path,
        tools=["memcheck", "racecheck"],
        parts=["text", "draft", "boxes", "prepare"],
        jobs=2,
    )
    assert not gpu_tests.run_sanitizers(given)
    run = json.loads(path.read_text())["runs"][0]
    assert run["memcheck"]["text"] == "0 found"
    assert run["racecheck"]["text"] == "3 found"
    assert run["memcheck"]["draft"].startswith("exit status 1: ")
    assert run["memcheck"]["boxes"].startswith("exit status 0: caches in ")
    assert run["memcheck"]["boxes"].endswith("killed")
    assert run["racecheck"]["prepare"] == "without a tool, exit status 1: finite: no"
    path, given = options(tmp_path, tools=["memcheck"], parts=["text"], jobs=1)
    assert gpu_tests.run_sanitizers(given)
    given.limit = 0.0
    assert not gpu_tests.run_sanitizers(given)
    assert json.loads(path.read_text())["runs"][0]["memcheck"]["text"] == "not run"
    capsys.readouterr()


def test_one_sanitizer(sanitizer, tmp_path):
    """What a part compiles is kept; the limit ends what the tool has started too."""
    start = time.monotonic()
    cache = tmp_path / "cache"
    cache.mkdir()
    part, outcomes = gpu_tests.sanitize("dense", ["memcheck"], start + 2, str(cache))
    assert time.monotonic() - start < 30
    assert part == "dense"
    assert outcomes == {"memcheck": f"stopped by the limit: caches in {cache}"}
    assert (cache / "compiled").exists()


def test_command_line(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # as sanitize sets it
    found = gpu_tests.parse(["sanitize", "racecheck", "--jobs", "3"])
    assert found.tools == ["racecheck"]
    assert "by-rows" in found.parts
    found = gpu_tests.parse(["tests", "--limit", "9", "--", "tests/gpu", "-k", "x"])
    assert found.pytest == ["tests/gpu", "-k", "x"]
    assert found.limit == 9.0
    with pytest.raises(SystemExit):
        gpu_tests.parse(["sanitize", "everything"])
