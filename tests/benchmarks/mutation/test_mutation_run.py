"""Mutation runs: which tests meet a mutant, how a trial ends, and what is counted."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common.records import ROOT
from benchmarks.mutation.lines import TestsOfLines
from benchmarks.mutation.run import Trial, check_sources, explain, summarize
from benchmarks.mutation.worker import planted

MODULE = """def sign(x):
    if x < 0:
        return -1
    return 1
"""
TESTS = """import thing


def test_negative():
    assert thing.sign(-2) == -1


def test_positive():
    assert thing.sign(2) == 1


def test_wrong():
    assert thing.sign(2) == 3


def test_never_ends():
    while thing.sign(2) < 0:
        pass
"""
JOBS = [
    {"tests": ["test_thing.py"], "output": "lines.json", "files": ["thing.py"]},
    {"tests": ["test_thing.py::test_positive"]},
    {"tests": ["test_thing.py::test_positive"], "mutant": "return 2"},
    {"tests": ["test_thing.py::test_never_ends"], "mutant": "return -1", "limit": 3},
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What a worker says of some jobs, and the lines that it found."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "thing.py").write_text(MODULE)
    (folder / "test_thing.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu\n    nightly\n")
    jobs = []
    for job in JOBS:
        mutant = None
        if "mutant" in job:
            text = MODULE.replace("return 1", job["mutant"])
            mutant = {"path": "thing.py", "text": text}
        jobs.append(json.dumps({"limit": 60, **job, "mutant": mutant}))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.mutation.worker"],
        input="\n".join(jobs),
        cwd=folder,
        env={"PYTHONPATH": f"{folder}:{ROOT}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (folder / "thing.py").read_text() == MODULE
    found = json.loads((folder / "lines.json").read_text())
    return [json.loads(line) for line in done.stdout.splitlines()], found


def test_outcomes_of_a_worker(answers):
    outcomes = [(answer["outcome"], answer["failed_test"]) for answer in answers[0]]
    assert outcomes == [
        ("failed", "test_thing.py::test_wrong"),
        ("passed", None),
        ("failed", "test_thing.py::test_positive"),
        ("timeout", None),
    ]


def test_lines_of_each_test_that_passes(answers):
    lines = {test: entry["lines"] for test, entry in answers[1].items()}
    assert lines == {
        "test_thing.py::test_negative": {"thing.py": [2, 3]},
        "test_thing.py::test_positive": {"thing.py": [2, 4]},
        "test_thing.py::test_never_ends": {"thing.py": [2, 4]},
    }


def test_a_planted_mutant_leaves_no_trace(tmp_path):
    file = tmp_path / "thing.py"
    file.write_text(MODULE)
    before = file.stat().st_mtime_ns
    with planted({"path": str(file), "text": "x = 1\n"}, 3):
        assert file.read_text() == "x = 1\n"
        assert file.stat().st_mtime != before
    assert (file.read_text(), file.stat().st_mtime_ns) == (MODULE, before)


FOUND = {
    "tests/test_other.py::quick": {"seconds": 0.1, "lines": {"a/thing.py": [1]}},
    "tests/test_other.py::slow": {"seconds": 9.0, "lines": {"a/thing.py": [1, 2]}},
    "tests/a/test_thing.py::own": {"seconds": 2.0, "lines": {"a/thing.py": [1]}},
    "tests/test_rest.py::none": {"seconds": 0.1, "lines": {"a/rest.py": [1]}},
}


def test_own_tests_come_first_then_the_quickest():
    tests = TestsOfLines(FOUND)
    first = ["tests/a/test_thing.py::own", "tests/test_other.py::quick"]
    of = functools.partial(tests.of, on_import=False)
    assert of("a/thing.py", 1) == [*first, "tests/test_other.py::slow"]
    assert of("a/thing.py", 2) == [first[0], "tests/test_other.py::slow"]
    assert of("a/thing.py", 7) == first[:1]
    assert of("a/absent.py", 1) == []
    every = [*first, "tests/test_other.py::slow"]
    assert tests.of("a/thing.py", 2, on_import=True) == every


def test_one_case_of_each_function_comes_first():
    names = ["t.py::f[1]", "t.py::f[2]", "t.py::g", "t.py::f[3]", "t.py::h[1]"]
    found = {
        name: {"seconds": number, "lines": {"a/thing.py": [1]}}
        for number, name in enumerate(names)
    }
    expected = ["t.py::f[1]", "t.py::g", "t.py::h[1]", "t.py::f[2]", "t.py::f[3]"]
    assert TestsOfLines(found).of("a/thing.py", 1, on_import=False) == expected


class FakeWorker:
    """Runs nothing: says which tests fail, with a mutant and without."""

    def __init__(self, fails_with, fails_without=()):
        self.fails_with, self.fails_without = fails_with, fails_without
        self.runs = []

    def run(self, tests, limit, *, mutant=None, marker=None):
        self.runs.append((tests, mutant is not None))
        fails = self.fails_without if mutant is None else self.fails_with
        failed = next((test for test in tests if test in fails), None)
        outcome = "passed" if failed is None else "failed"
        return {"outcome": outcome, "failed_test": failed, "tail": ""}


@pytest.fixture
def mutant(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.mutation.run.ROOT", tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thing.py").write_text(MODULE)
    return {"path": "a/thing.py", "line": 1, "edit": [0, 3, "def"]}


OWN, QUICK, SLOW = TestsOfLines(FOUND).of("a/thing.py", 1, on_import=False)


@pytest.mark.parametrize(
    ("fails_with", "fails_without", "status", "by"),
    [
        ([SLOW], [], "noticed", SLOW),
        ([], [], "survived", None),
        ([OWN], [OWN], "survived", None),
        ([OWN, SLOW], [OWN], "noticed", SLOW),
    ],
    ids=["noticed", "survived", "fails anyway", "another notices"],
)
def test_a_trial(mutant, fails_with, fails_without, status, by):
    worker = FakeWorker(fails_with, fails_without)
    result = Trial(TestsOfLines(FOUND), 45)(worker, mutant)
    assert (result["status"], result.get("by")) == (status, by)


def test_a_trial_spends_its_seconds_and_no_more(mutant):
    worker = FakeWorker([SLOW])
    result = Trial(TestsOfLines(FOUND), 5)(worker, mutant)
    assert result["status"] == "survived"
    assert [test for tests, _ in worker.runs for test in tests] == [OWN, QUICK]


def test_nightly_tests_of_the_files_that_run_the_line(mutant):
    files = [OWN.split("::")[0], QUICK.split("::")[0]]
    worker = FakeWorker([files[1]])
    result = Trial(TestsOfLines(FOUND), 45, nightly=True)(worker, mutant)
    assert (result["status"], result["by"]) == ("noticed", files[1])
    assert [tests for tests, _ in worker.runs] == [[files[0]], [files[1]]]
    result = Trial(TestsOfLines(FOUND), 45, nightly=True)(FakeWorker([]), mutant)
    assert result["status"] == "survived"


def test_the_share_is_of_mutants_that_change_something():
    statuses = ["noticed"] * 3 + ["survived", "equivalent", "pending"]
    mutants = [
        {"id": str(i), "area": "ab"[i % 2], "status": status}
        for i, status in enumerate(statuses)
    ]
    summary = summarize(mutants)
    assert summary["share"] == 0.75
    assert summary["by_area"]["a"] == {"noticed": 2, "equivalent": 1}
    record = {"mutants": mutants}
    explain(record, "3", "a size only")
    assert summarize(mutants)["share"] == 1.0
    assert mutants[3]["reason"] == "a size only"
    with pytest.raises(SystemExit, match="no mutant is called 'x'"):
        explain(record, "x", "")


def test_a_record_of_another_commit_is_refused(mutant):
    known = {**mutant, "id": "m", "old": "def", "length": 4}
    check_sources([known])
    for wrong in ({"old": "del"}, {"length": 5}):
        with pytest.raises(SystemExit, match="check out the record's commit"):
            check_sources([{**known, **wrong}])


def test_the_recorded_run():
    """At least 92 % are noticed, and each survivor that changes nothing says why."""
    file = Path(ROOT, "benchmarks", "results", "mutation.json")
    record = json.loads(file.read_text())
    assert record["summary"] == summarize(record["mutants"])
    assert record["summary"]["share"] >= 0.92
    assert record["summary"]["mutants"] >= 100
    for mutant in record["mutants"]:
        assert mutant["status"] != "equivalent" or mutant["reason"]
