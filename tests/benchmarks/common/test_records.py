"""What `benchmarks.common.records` says that a result depends on."""

import json
import re
import sys
import types

import jax

from benchmarks.common import records


def test_commit_is_the_checkouts(monkeypatch):
    monkeypatch.delenv("BENCHMARK_COMMIT", raising=False)
    monkeypatch.setattr(records, "_git", lambda *_: "")
    assert records.provenance()["commit"] == "unknown"
    monkeypatch.setattr(records, "_git", lambda name, *_: {"rev-parse": "1a"}.get(name))
    assert records.provenance()["commit"] == "1a"
    monkeypatch.setattr(records, "_git", lambda name, *_: "1a")
    assert records.provenance()["commit"] == "1a, with changes"
    monkeypatch.setenv("BENCHMARK_COMMIT", "2b")
    assert records.provenance()["commit"] == "2b"


def test_git_missing(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert records.commit() == "unknown"


def test_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/benchmarks/layer.py", "turns", "--rounds=3"])
    spec = types.SimpleNamespace(name="benchmarks.layer.run")
    module = types.SimpleNamespace(__spec__=spec)
    monkeypatch.setitem(sys.modules, "__main__", module)
    assert records.command() == "python -m benchmarks.layer.run turns --rounds=3"
    module.__spec__ = None
    assert records.command() == "python /x/benchmarks/layer.py turns --rounds=3"


def test_results_are_stored(tmp_path):
    path = tmp_path / "folder" / "x.json"
    records.write_results(path, [{"median_ms": 1.5}], device="another")
    document = json.loads(path.read_text())
    assert document["results"] == [{"median_ms": 1.5}]
    where = document["environment"]
    assert where["device"] == "another"
    assert where["versions"]["jax"] == jax.__version__
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00$", where["date"])
