"""What `benchmarks.common.records` says that a result depends on."""

import json
import re
import sys
import types

import jax
import pytest

from benchmarks.common import records


@pytest.fixture(autouse=True)
def forgotten_commit():
    """Git is asked once; each test starts before that, and leaves no answer behind."""
    records.commit.cache_clear()
    yield
    records.commit.cache_clear()


@pytest.mark.parametrize(
    ("answers", "commit"),
    [
        ({}, "unknown"),
        ({"rev-parse": "1a"}, "1a"),
        ({"rev-parse": "1a", "status": " M x.py"}, "1a, with changes"),
    ],
    ids=["no-git", "clean", "changed"],
)
def test_commit_is_the_checkouts(monkeypatch, answers, commit):
    monkeypatch.delenv("BENCHMARK_COMMIT", raising=False)
    monkeypatch.setattr(records, "_git", lambda name, *_: answers.get(name, ""))
    assert records.provenance()["commit"] == commit
    monkeypatch.setattr(records, "_git", lambda *_: pytest.fail("git is asked again"))
    assert records.provenance()["commit"] == commit
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


def test_numbers_of_a_list_share_a_line(tmp_path):
    path = tmp_path / "x.json"
    document = {
        "numbers": [[1, -2.5e-07], [float("inf")]],
        "words": ["a,\n  b", "[\n 1\n]"],
        "mixed": [1, "two", None],
        "none": [],
    }
    records.write_json(path, document)
    assert json.loads(path.read_text()) == document
    lines = [line.strip() for line in path.read_text().splitlines()]
    assert "[1, -2.5e-07]," in lines
    assert lines.count("1,") == 1  # of the list that has a word, too


def test_a_process_that_is_ended_leaves_a_whole_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    records.write_json(path, {"figure": 1})

    def end(self, text):
        with self.open("w") as file:
            file.write(text[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(type(path), "write_text", end)
    with pytest.raises(KeyboardInterrupt):
        records.write_json(path, {"figure": 2})
    assert json.loads(path.read_text()) == {"figure": 1}
