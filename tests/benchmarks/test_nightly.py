"""The recorder of whole test runs, with a program in place of `./run`."""

import json
import sys

import pytest

from benchmarks import nightly

REPORT = """<testsuites><testsuite>
<testcase classname="tests.a" name="test_one" time="1"/>
<testcase classname="tests.a" name="test_two"><skipped message="no GPU"/></testcase>
<testcase classname="tests.a" name="test_three"/>
{more}</testsuite></testsuites>"""
FAILURES = """
<testcase classname="tests.b" name="test_four"><failure message="no"/></testcase>
<testcase classname="tests.a" name="test_five"><error message="fixture"/></testcase>
"""
PROGRAM = "import sys; open(sys.argv[1].split('=')[1], 'w').write({!r}); sys.exit({})"


@pytest.fixture
def pretend(monkeypatch):
    """Puts a program that writes this report in place of one environment's run."""

    def put(name, report, status):
        command = (sys.executable, "-c", PROGRAM.format(report, status))
        monkeypatch.setitem(nightly.COMMANDS, name, command)
        monkeypatch.setitem(nightly.PYTHONS, name, sys.executable)

    return put


def test_runs_are_recorded(pretend, tmp_path, capsys):
    pretend("newest", REPORT.format(more=""), 0)
    pretend("oldest", REPORT.format(more=FAILURES), 1)
    path = tmp_path / "nightly.json"
    assert nightly.main(["--output", str(path)]) == 1
    capsys.readouterr()
    document = json.loads(path.read_text())
    summary = document["summary"]
    assert {
        key: summary[f"newest_{key}"] for key in ("passed", "failed", "skipped")
    } == {
        "passed": 2,
        "failed": 0,
        "skipped": 1,
    }
    assert summary["oldest_failed"] == 2
    assert summary["oldest_passed"] == 2
    assert summary["all_passed"] is False
    assert document["runs"]["oldest"]["failed_tests"] == [
        "tests.a::test_five",
        "tests.b::test_four",
    ]
    assert document["runs"]["newest"]["versions"]["python"]
    assert document["commit"]


def test_one_run(pretend, tmp_path, capsys):
    pretend("newest", REPORT.format(more=""), 0)
    path = tmp_path / "nightly.json"
    assert nightly.main(["--only", "newest", "--output", str(path)]) == 0
    capsys.readouterr()
    assert json.loads(path.read_text())["runs"].keys() == {"newest"}


def test_a_run_without_a_report_has_not_passed(monkeypatch, capsys):
    monkeypatch.setitem(nightly.COMMANDS, "newest", ("true",))
    monkeypatch.setitem(nightly.PYTHONS, "newest", sys.executable)
    assert nightly.main(["--only", "newest"]) == 1
    assert '"all_passed": false' in capsys.readouterr().out
