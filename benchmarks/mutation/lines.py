"""A plugin of pytest that says which lines of which files each test runs.

It uses `sys.monitoring`, which tells of a line once in each test and costs nothing
after. Code under jit counts where it is traced: a test that finds the program in jax's
cache does not run its lines. Lines that run on import belong to no test.
"""

import json
import sys
import types
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest

_TOOL = sys.monitoring.COVERAGE_ID


class LinesOfTests:
    """Collects lines and seconds of each test that passes, and writes them at the end.

    Args:
      root: The checkout.
      files: Files of interest, relative to it.
      output: JSON file: for each test its seconds, and its lines by file.
    """

    def __init__(self, root: Path, files: list[str], output: Path) -> None:
        self._names = {str(root / file): file for file in files}
        self._output = output
        self._lines: dict[str, set[int]] = defaultdict(set)
        self._seconds: dict[str, float] = defaultdict(float)
        self._failed: set[str] = set()
        self._found: dict[str, dict] = {}

    def pytest_configure(self) -> None:
        """Starts listening to lines."""
        sys.monitoring.use_tool_id(_TOOL, "lines of tests")
        sys.monitoring.register_callback(
            _TOOL, sys.monitoring.events.LINE, self._on_line
        )
        sys.monitoring.set_events(_TOOL, sys.monitoring.events.LINE)

    def _on_line(self, code: types.CodeType, line: int) -> object:
        name = self._names.get(code.co_filename)
        if name is not None:
            self._lines[name].add(line)
        return sys.monitoring.DISABLE

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        """Attributes to a test what runs in its setup, call and teardown."""
        self._lines.clear()
        sys.monitoring.restart_events()
        result = yield
        if item.nodeid not in self._failed:
            self._found[item.nodeid] = {
                "seconds": round(self._seconds[item.nodeid], 3),
                "lines": {name: sorted(found) for name, found in self._lines.items()},
            }
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Adds the seconds of a part of a test; one that does not pass is left out."""
        self._seconds[report.nodeid] += report.duration
        if not report.passed:
            self._failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        """Writes the file."""
        self._output.write_text(json.dumps(self._found))


class TestsOfLines:
    """Says which tests run a line, quickest first.

    Args:
      found: What `LinesOfTests` wrote, of all test files.
    """

    __test__ = False  # no class of tests

    def __init__(self, found: dict[str, dict]) -> None:
        self.seconds = {test: entry["seconds"] for test, entry in found.items()}
        self._by_line: dict[tuple[str, int], list[str]] = defaultdict(list)
        self._by_file: dict[str, list[str]] = defaultdict(list)
        for test, entry in sorted(found.items(), key=lambda item: item[1]["seconds"]):
            for file, lines in entry["lines"].items():
                self._by_file[file].append(test)
                for line in lines:
                    self._by_line[file, line].append(test)

    def of(self, file: str, line: int, *, on_import: bool) -> list[str]:
        """Returns the tests that run a line, or any of its file if it runs on import.

        Before them come those of the test files named after it, which may run it in
        another process. Of each, the quickest come first, and one case of a function
        before others of it.
        """
        tests = self._by_file[file] if on_import else self._by_line[file, line]
        folder, stem = f"tests/{Path(file).parent}", Path(file).stem.strip("_")
        own = [
            test
            for test in self.seconds
            if test.startswith(f"{folder}/test_") and stem in test.split("::")[0]
        ]
        own.sort(key=self.seconds.__getitem__)
        return list(dict.fromkeys([*_cases_last(own), *_cases_last(tests)]))


def _cases_last(tests: Iterable[str]) -> list[str]:
    """Puts one case of each function before the second of any: they differ more."""
    cases: Counter[str] = Counter()
    rank = {}
    for test in tests:
        function = test.partition("[")[0]
        rank[test] = cases[function]
        cases[function] += 1
    return sorted(rank, key=rank.__getitem__)
