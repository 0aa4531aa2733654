"""Runs every test on the newest and on the oldest supported jax and records it.

    python -m benchmarks.nightly --output benchmarks/results/nightly.json

The runs are `./run test --all` and `./run test --oldest --all`, which also install what
they need. Tests of GPU kernels are skipped on a machine without a GPU:
`benchmarks.gpu.run` records those. The file is written after each run. `summary` has
counts and seconds under flat names such as `newest_passed`. The exit status is 1 if a
test failed or a run broke off.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common.records import ROOT, provenance, write_json
from models.files import output_file

COMMANDS = {
    "newest": ("./run", "test", "--all"),
    "oldest": ("./run", "test", "--oldest", "--all"),
}
PYTHONS = {"newest": ".venv/bin/python", "oldest": ".venv-oldest/bin/python"}
VERSIONS = (
    "import json; from benchmarks.common.records import versions; "
    "print(json.dumps(versions()))"
)
COUNTS = ("passed", "failed", "skipped", "seconds")


def run(command: Sequence[str], python: str) -> dict[str, Any]:
    """Runs all tests in one environment.

    Args:
      command: Runs pytest with the arguments that are put after it.
      python: The environment's interpreter, which says what is installed.

    Returns:
      The command, its exit status, versions, counts, wall time and failed tests.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder, "report.xml")
        done = subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT, check=False)
        counts = read_report(report) if report.exists() else {"failed_tests": []}
    found = subprocess.run(
        [python, "-c", VERSIONS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "command": " ".join(command),
        "exit_status": done.returncode,
        "seconds": round(time.monotonic() - start, 1),
        **counts,
        "versions": json.loads(found.stdout) if found.returncode == 0 else {},
    }


def read_report(report: pathlib.Path) -> dict[str, Any]:
    """Counts outcomes in a JUnit file of pytest; errors of fixtures are failures."""
    outcomes: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for case in ET.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        name = f"{case.get('classname')}::{case.get('name')}"
        if kinds & {"failure", "error"}:
            outcomes["failed"].append(name)
        else:
            outcomes["skipped" if "skipped" in kinds else "passed"].append(name)
    counts = {outcome: len(names) for outcome, names in outcomes.items()}
    return {**counts, "failed_tests": sorted(outcomes["failed"])}


def summarize(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Counts, seconds and jax of every run under flat names."""
    summary: dict[str, Any] = {}
    for name, each in runs.items():
        summary[f"{name}_jax"] = each["versions"].get("jax", "unknown")
        summary |= {f"{name}_{key}": each[key] for key in COUNTS if key in each}
    summary["all_passed"] = all(
        each["exit_status"] == 0 and each.get("passed", 0) > 0 for each in runs.values()
    )
    return summary


def main(arguments: list[str] | None = None) -> int:
    """Runs the environments asked for; the exit status says whether all passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=COMMANDS, help="one jax instead of both")
    parser.add_argument("--output", type=output_file, help="JSON file")
    options = parser.parse_args(arguments)
    facts = provenance()
    runs: dict[str, dict[str, Any]] = {}
    for name in [options.only] if options.only else COMMANDS:
        runs[name] = run(COMMANDS[name], PYTHONS[name])
        summary = summarize(runs)
        print(json.dumps(summary, indent=1), flush=True)
        if options.output is not None:
            write_json(options.output, {"summary": summary, **facts, "runs": runs})
    return 0 if summary["all_passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
