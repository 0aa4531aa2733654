"""Runs the tests that need a GPU, or NVIDIA's sanitizers, and records what came out.

    python -m benchmarks.gpu.run tests --output benchmarks/results/gpu_tests.json
    python -m benchmarks.gpu.run sanitize memcheck racecheck --jobs 2 \
        --output benchmarks/results/gpu_tests.json
    python -m benchmarks.gpu.run tests --limit 400 -- tests/gpu/test_layer_gpu.py -n 4

`tests` takes more of pytest's arguments after `--`. `sanitize` runs each part of
`benchmarks.gpu.sanitize` by itself. The record is written after every test and part,
newest run first, so that a run that is cut off tells what it saw, and which tests it
did not come to. The exit status is 1 if anything failed or did not run.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.common.options import add_output, make_parser
from benchmarks.common.programs import cache_in, run_limited
from benchmarks.common.records import provenance, write_json
from tests.tolerances import MEASURED

PYTEST = ("-o", "addopts=", "-p", "no:cacheprovider", "-m", "gpu", "--require-gpu")
DEFAULT_TESTS = ("tests/gpu", "-n", "8", "--dist", "loadgroup")
TOOLS = ("memcheck", "racecheck")
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)")
LONGEST_CAUSE = 400  # characters of what a failed test says


def recorder(path: pathlib.Path | None) -> Callable[[dict[str, Any]], None]:
    """A function that puts a run, and later what it has become, before older runs."""
    document: dict[str, Any] = {"runs": []}
    if path is not None and path.exists():
        document = json.loads(path.read_text())
    older = document["runs"]

    def record(run: dict[str, Any]) -> None:
        if path is not None:
            write_json(path, document | {"runs": [run, *older]})

    return record


class Results:
    """A pytest plugin: outcomes of tests, their causes and what they measured."""

    def __init__(self, run: dict[str, Any], record, limit: float) -> None:
        self.run, self.record = run, record
        self.start = time.monotonic()
        self.limit = limit
        self.collected: set[str] = set()
        self.outcomes: dict[str, str] = {}
        self.causes: dict[str, str] = {}
        self.measured: dict[str, float] = {}
        self.session: pytest.Session | None = None

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Keeps the session, which the limit of time stops."""
        self.session = session

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Notes the tests of a run in one process."""
        self.collected.update(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids) -> None:
        """Notes the tests that a worker has found."""
        del node
        self.collected.update(ids)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Notes the outcome of a test and writes the record."""
        test = report.nodeid
        tells = report.when == "call" or report.outcome != "passed"
        if tells and self.outcomes.get(test) != "failed":  # teardown comes last
            self.outcomes[test] = report.outcome
        if report.outcome == "failed":
            lines = report.longreprtext.strip().splitlines() or ["no message"]
            errors = [line for line in lines if line.startswith("E ")]
            self.causes[test] = "\n".join(errors or lines[-1:])[:LONGEST_CAUSE]
        properties: list[tuple[str, Any]] = report.user_properties
        for name, value in properties:
            if name.startswith(MEASURED):
                name = name.removeprefix(MEASURED)
                self.measured[name] = max(self.measured.get(name, 0.0), float(value))
        if tells:
            self.save()
        if time.monotonic() - self.start > self.limit:
            self._stop()

    def _stop(self) -> None:
        assert self.session is not None
        workers = self.session.config.pluginmanager.getplugin("dsession")
        for controller in filter(None, (self.session, workers)):
            controller.shouldstop = f"the limit of {self.limit} s is over"

    def save(self) -> None:
        """Writes the record with all that is known so far."""
        outcomes = [*self.outcomes.values()]
        not_run = sorted(self.collected - self.outcomes.keys())
        self.run |= {
            outcome: outcomes.count(outcome)
            for outcome in ("passed", "failed", "skipped")
        }
        self.run |= {
            "not_run": len(not_run),
            "seconds": round(time.monotonic() - self.start, 1),
            "failed_tests": dict(sorted(self.causes.items())),
            "not_run_tests": not_run,
            "measured": {
                k: float(f"{v:.3g}") for k, v in sorted(self.measured.items())
            },
        }
        self.record(self.run)


def run_tests(options: argparse.Namespace) -> bool:
    """Runs pytest in this process; its workers are others."""
    # Processes that share a GPU take memory as they need it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    run = provenance()
    results = Results(run, recorder(options.output), options.limit)
    pytest.main([*PYTEST, *(options.pytest or DEFAULT_TESTS)], plugins=[results])
    results.save()
    if not results.collected:
        run["failed_tests"] = {"collection": "pytest found no tests"}
        results.record(run)
    print(json.dumps(run, indent=1))
    return bool(results.collected) and not run["failed_tests"] and not run["not_run"]


def run_sanitizers(options: argparse.Namespace) -> bool:
    """Runs each part under each tool, a few parts at a time."""
    deadline = time.monotonic() + options.limit
    run = provenance()
    found = {tool: dict.fromkeys(options.parts, "not run") for tool in options.tools}
    record = recorder(options.output)
    with (
        tempfile.TemporaryDirectory() as cache,
        concurrent.futures.ThreadPoolExecutor(options.jobs) as pool,
    ):
        parts = [
            pool.submit(sanitize, part, options.tools, deadline, cache)
            for part in options.parts
        ]
        for done in concurrent.futures.as_completed(parts):
            part, outcomes = done.result()
            for tool, outcome in outcomes.items():
                found[tool][part] = outcome
                print(f"{tool} {part}: {outcome}", flush=True)
            record(run | found)
    return all(
        outcome == "0 found"
        for by_part in found.values()
        for outcome in by_part.values()
    )


def sanitize(
    part: str, tools: list[str], deadline: float, cache: str
) -> tuple[str, dict[str, str]]:
    """Counts the errors or hazards that each tool finds in one part.

    The part runs without a tool first, which compiles it into the cache.
    """
    outcomes: dict[str, str] = {}
    if time.monotonic() >= deadline:
        return part, outcomes
    program = [sys.executable, "-m", "benchmarks.gpu.sanitize", part]

    def run(*under: str) -> tuple[int | None, str]:
        left = max(deadline - time.monotonic(), 0.0)
        return run_limited([*under, *program], left, cache_in(cache))

    status, output = run()
    if status != 0:
        outcome = f"without a tool, {_failure(status, output)}"
        return part, dict.fromkeys(tools, outcome)
    for tool in tools:
        if time.monotonic() >= deadline:
            break
        under = ("compute-sanitizer", "--tool", tool, "--kernel-regex", "kns=sm90")
        status, output = run(*under)
        counts = SUMMARY.findall(output)
        if status == 0 and counts:
            outcomes[tool] = f"{sum(map(int, counts))} found"
        else:
            outcomes[tool] = _failure(status, output)
    return part, outcomes


def _failure(status: int | None, output: str) -> str:
    """Describes how a program ended, with the end of what it printed."""
    ended = "stopped by the limit" if status is None else f"exit status {status}"
    tail = "\n".join(output.strip().splitlines()[-5:])[-LONGEST_CAUSE:]
    return f"{ended}: {tail}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(required=True)
    tests = commands.add_parser("tests", help="the tests marked gpu")
    tests.add_argument("pytest", nargs="*", help="its arguments, after --")
    tests.set_defaults(run=run_tests)
    sanitizers = commands.add_parser(
        "sanitize", help="the parts of benchmarks.gpu.sanitize"
    )
    sanitizers.add_argument("tools", nargs="+", choices=TOOLS)
    sanitizers.add_argument("--parts", nargs="+", help="default: all")
    sanitizers.add_argument("--jobs", type=int, default=2, help="parts at a time")
    sanitizers.set_defaults(run=run_sanitizers)
    for command in (tests, sanitizers):
        add_output(command)
        command.add_argument(
            "--limit", type=float, default=float("inf"), help="seconds for all of it"
        )
    options = parser.parse_args(arguments)
    if options.run is run_sanitizers and options.parts is None:
        from benchmarks.gpu.sanitize import PARTS

        options.parts = [*PARTS]
    return options


def main(arguments: list[str] | None = None) -> None:
    """Runs one command; the exit status is 1 if anything failed or did not run."""
    options = parse(arguments)
    sys.exit(0 if options.run(options) else 1)


if __name__ == "__main__":
    main()
