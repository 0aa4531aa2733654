"""Plants a sample of small faults in the code, one at a time, and counts those noticed.

    pip install -e '.[dev,mutation]'
    python -m benchmarks.mutation.run --output benchmarks/results/mutation.json \
        --sample 500 --seed 0 --workers 2 --minutes 60

The first run draws the mutants and writes them to the output; another with the same
output goes on where it stopped, or with `--again` tries survivors once more.

A mutant meets the quick tests that run its line, those of its module's own test file
first, then the quickest, up to `--seconds` in sum. Which tests run a line is kept in
`--lines`; test files that are new or have changed are run once for it. `--nightly`
tries survivors again, with nightly tests of the files whose quick tests run their line.

A survivor that changes nothing is recorded with its reason:

    python -m benchmarks.mutation.run --output ... --explain ID "why it changes nothing"

`summary` counts what was noticed, what survived, what changes nothing (equivalent), and
the share that was noticed of those that change something.
"""

import argparse
import ast
import collections
import concurrent.futures
import hashlib
import json
import os
import pathlib
import queue
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.common.records import ROOT, provenance, write_json
from benchmarks.mutation.lines import TestsOfLines
from models.files import output_file

TESTS = (
    *("tests/draft_jax", "tests/pallas_kernels", "tests/models/checkpoints"),
    *("tests/models/diffusion", "tests/models/wan"),
    *("tests/test_dataclasses.py", "tests/test_highest_precision.py"),
)
FILES_SECONDS = 240.0  # most time for the quick tests of a file, or the nightly ones
FIRST_SECONDS, FIRST_FILES = 15.0, 2  # of the first of two runs of a mutant's tests
NOT_COPIED = (".*", "__pycache__", "results", "outputs", "*venv*", "*wheels*")
NIGHTLY_FILES = 3  # whose nightly tests a survivor meets
# One thread for each worker; programs are compiled once and kept for all mutants.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false "
    "--xla_backend_optimization_level=0",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "COLUMNS": "300",
}


class Worker:
    """A process that runs tests in a copy of the checkout; see `worker`."""

    def __init__(self, folder: pathlib.Path, cache: pathlib.Path) -> None:
        ignored = shutil.ignore_patterns(*NOT_COPIED)
        shutil.copytree(ROOT, folder, ignore=ignored)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.mutation.worker"],
            cwd=folder,
            env={
                **os.environ,
                **ENVIRONMENT,
                "PYTHONPATH": str(folder),
                "JAX_COMPILATION_CACHE_DIR": str(cache),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, tests: list[str], limit: float, **job: Any) -> dict[str, Any]:
        """Returns how tests ended, with a mutant planted if there is one."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        line = json.dumps({"mutant": None, **job, "tests": tests, "limit": limit})
        print(line, file=stdin, flush=True)
        answer = stdout.readline()
        if not answer:
            raise RuntimeError("a worker ended; its messages are above")
        return json.loads(answer)

    def stop(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()


class Workers:
    """All workers, lent one at a time to threads."""

    def __init__(self, count: int, folder: pathlib.Path) -> None:
        cache = folder / "cache"
        self._all = [Worker(folder / f"worker-{i}", cache) for i in range(count)]
        self._free: queue.Queue[Worker] = queue.Queue()
        for worker in self._all:
            self._free.put(worker)

    def map(self, function, items, end: float) -> Iterator[tuple[Any, Any]]:
        """Yields each item with `function(worker, item)`; starts none after `end`."""

        def call(item):
            if time.monotonic() > end:
                return None
            worker = self._free.get()
            try:
                return function(worker, item)
            finally:
                self._free.put(worker)

        with concurrent.futures.ThreadPoolExecutor(len(self._all)) as pool:
            futures = {pool.submit(call, item): item for item in items}
            for future in concurrent.futures.as_completed(futures):
                if (result := future.result()) is not None:
                    yield futures[future], result

    def stop(self) -> None:
        """Ends all processes."""
        for worker in self._all:
            worker.stop()


def gather_lines(
    workers: Workers,
    path: pathlib.Path,
    names: list[str],
    files: list[str],
    end: float,
) -> TestsOfLines:
    """Returns which tests of files and folders run which lines of some files.

    Test files that `path` does not know are run, and what they found is kept there.
    """
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    wanted = {
        file.relative_to(ROOT).as_posix(): file.read_bytes()
        for name in names
        for file in sorted([ROOT / name, *(ROOT / name).rglob("*")])
        if file.match("test_*.py")
    }
    # The largest first: they take longest.
    digests = {name: hashlib.sha256(text).hexdigest() for name, text in wanted.items()}
    stale = [
        name for name in wanted if known.get(name, {}).get("digest") != digests[name]
    ]
    stale.sort(key=lambda name: len(wanted[name]), reverse=True)

    def gather(worker: Worker, name: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            output = pathlib.Path(folder, "lines.json")
            job = {"files": files, "output": str(output)}
            answer = worker.run([name], FILES_SECONDS, **job)
            found = json.loads(output.read_text()) if output.exists() else {}
        print(f"{answer['seconds']:6.1f} s {len(found):4} tests of {name}", flush=True)
        return {"digest": digests[name], "outcome": answer["outcome"], "tests": found}

    for name, entry in workers.map(gather, stale, end):
        known[name] = entry
        path.write_text(json.dumps(known))
    found: dict[str, Any] = {}
    for name in wanted:
        found |= known.get(name, {}).get("tests", {})
    return TestsOfLines(found)


class Trial:
    """Tries mutants; remembers which tests fail without one.

    Args:
      tests: Says which tests run a line.
      seconds: Most seconds of tests for a mutant, as they took without it.
      nightly: Try the nightly tests of a few files instead.
    """

    def __init__(
        self, tests: TestsOfLines, seconds: float, *, nightly: bool = False
    ) -> None:
        self._tests, self._seconds, self._nightly = tests, seconds, nightly
        self._passing: set[str] = set()
        self._failing: set[str] = set()
        self._lock = threading.Lock()

    def __call__(self, worker: Worker, mutant: dict[str, Any]) -> dict[str, Any]:
        """Returns the outcome of a mutant: `status`, and the test that failed."""
        source = (ROOT / mutant["path"]).read_text()
        start, end, new = mutant["edit"]
        planted = {
            "path": mutant["path"],
            "text": source[:start] + new + source[end:],
        }
        start_time = time.monotonic()
        tests = self._tests.of(
            mutant["path"],
            mutant["line"],
            on_import=_runs_on_import(source, mutant["line"]),
        )
        attempt = self._try_nightly if self._nightly else self._try
        result = attempt(worker, planted, tests)
        return {**result, "seconds": round(time.monotonic() - start_time, 1)}

    def _try(self, worker: Worker, planted: dict, tests: list[str]) -> dict[str, Any]:
        tried = 0
        for part in self._parts(tests):
            while part:
                allowed = 30 + 3 * sum(self._tests.seconds[test] for test in part)
                answer = worker.run(part, allowed, mutant=planted)
                failed = answer["failed_test"]
                if answer["outcome"] == "passed":
                    tried += len(part)
                    break
                if failed is None or self._passes_without(worker, failed):
                    return {
                        "status": "noticed",
                        "by": failed or answer["outcome"],
                        **({} if failed else {"tail": answer["tail"]}),
                    }
                part = [test for test in part if test != failed]
        return {"status": "survived", "tests_tried": tried}

    def _try_nightly(
        self, worker: Worker, planted: dict, tests: list[str]
    ) -> dict[str, Any]:
        files = list(dict.fromkeys(test.split("::")[0] for test in tests))
        for file in files[:NIGHTLY_FILES]:
            job = {"marker": "nightly and not gpu"}
            answer = worker.run([file], FILES_SECONDS, mutant=planted, **job)
            failed = answer["failed_test"]
            # One that takes too long may take as long without the mutant.
            fails = answer["outcome"] == "failed" and failed is not None
            if fails and self._passes_without(worker, failed, **job):
                return {"status": "noticed", "by": failed}
        return {"status": "survived", "nightly_files_tried": files[:NIGHTLY_FILES]}

    def _parts(self, tests: list[str]) -> list[list[str]]:
        """Divides the tests in two runs: the likeliest of few files, and the others."""
        total = 0.0
        first: list[str] = []
        second: list[str] = []
        files: set[str] = set()
        for test in tests:
            if test in self._failing:
                continue
            total += self._tests.seconds[test]
            if total > self._seconds and first:
                break
            files.add(test.split("::")[0])
            few = len(files) <= FIRST_FILES and total <= FIRST_SECONDS
            (first if few or not first else second).append(test)
        return [first, second]

    def _passes_without(self, worker: Worker, test: str, **job: str) -> bool:
        """Tells whether a test passes on the code as it is; each is run once.

        A test file that cannot be imported could be when its lines were gathered.
        """
        if "::" not in test:
            return True
        with self._lock:
            if test in self._passing or test in self._failing:
                return test in self._passing
        passes = worker.run([test], FILES_SECONDS, **job)["outcome"] == "passed"
        with self._lock:
            (self._passing if passes else self._failing).add(test)
        return passes


def _runs_on_import(source: str, line: int) -> bool:
    """Tells whether a line is outside of all functions' bodies."""
    return not any(
        isinstance(node, ast.FunctionDef)
        and node.body[0].lineno <= line <= (node.end_lineno or 0)
        for node in ast.walk(ast.parse(source))
    )


def summarize(mutants: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts outcomes; the share is of mutants that change something."""
    counts = collections.Counter(mutant["status"] for mutant in mutants)
    noticed, survived = counts["noticed"], counts["survived"]
    by_area = {
        area: dict(
            collections.Counter(m["status"] for m in mutants if m["area"] == area)
        )
        for area in sorted({mutant["area"] for mutant in mutants})
    }
    return {
        "mutants": len(mutants),
        "noticed": noticed,
        "survived": survived,
        "equivalent": counts["equivalent"],
        "pending": counts["pending"],
        "share": round(noticed / max(1, noticed + survived), 4),
        "by_area": by_area,
    }


def load_or_draw(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the record of an earlier run, or a new one with its sample."""
    if options.output.exists():
        record = json.loads(options.output.read_text())
    else:
        from benchmarks.mutation.mutants import sample_mutants  # needs cosmic-ray

        mutants = sample_mutants(ROOT, options.sample, options.seed)
        random.Random(options.seed).shuffle(mutants)  # a part is a sample, too
        for mutant in mutants:
            mutant["status"] = "pending"
        record = {**provenance(), "seed": options.seed, "mutants": mutants}
    return record


def explain(record: dict[str, Any], name: str, reason: str) -> None:
    """Marks a survivor as one that changes nothing."""
    found = [mutant for mutant in record["mutants"] if mutant["id"] == name]
    if not found:
        raise SystemExit(f"no mutant is called {name!r}")
    for mutant in found:
        mutant |= {"status": "equivalent", "reason": reason}


def check_sources(mutants: list[dict[str, Any]]) -> None:
    """Exits unless each mutant's text is that of the file it was drawn from."""
    for mutant in mutants:
        source = (ROOT / mutant["path"]).read_text()
        start, end, _ = mutant["edit"]
        if source[start:end] != mutant["old"] or source.count("\n") != mutant["length"]:
            raise SystemExit(
                f"{mutant['path']} is not as it was when {mutant['id']} was drawn: "
                "check out the record's commit"
            )


def try_mutants(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Tries what is pending, or survivors again, and writes the record after each."""
    wanted = "survived" if options.again or options.nightly else "pending"
    pending = [mutant for mutant in record["mutants"] if mutant["status"] == wanted]
    end = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        workers = Workers(options.workers, pathlib.Path(folder))
        try:
            files = sorted({mutant["path"] for mutant in record["mutants"]})
            tests = gather_lines(workers, options.lines, options.tests, files, end)
            trial = Trial(tests, options.seconds, nightly=options.nightly)
            for mutant, result in workers.map(trial, pending, end):
                mutant |= result
                print(json.dumps({"id": mutant["id"], **result}), flush=True)
                write_json(
                    options.output,
                    {"summary": summarize(record["mutants"]), **record},
                )
        finally:
            workers.stop()


def main(arguments: list[str] | None = None) -> None:
    """Draws, tries or explains mutants, as the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=output_file, required=True, help="JSON file")
    parser.add_argument("--sample", type=int, default=500, help="mutants to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="0 only draws")
    parser.add_argument("--minutes", type=float, default=60, help="start none after")
    parser.add_argument("--seconds", type=float, default=45, help="of tests per mutant")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files or folders")
    parser.add_argument("--again", action="store_true", help="try survivors again")
    parser.add_argument("--nightly", action="store_true", help="with nightly tests")
    parser.add_argument("--explain", nargs=2, metavar=("ID", "REASON"))
    parser.add_argument(
        "--lines",
        type=pathlib.Path,
        default=pathlib.Path(tempfile.gettempdir(), "lines_of_tests.json"),
        help="which tests run which lines; made where it is missing",
    )
    parser.add_argument("--scratch", help="folder for the workers' copies")
    options = parser.parse_args(arguments)
    record = load_or_draw(options)
    record.pop("summary", None)
    if options.explain:
        explain(record, *options.explain)
    elif options.workers:
        check_sources(record["mutants"])
        try_mutants(options, record)
    summary = summarize(record["mutants"])
    write_json(options.output, {"summary": summary, **record})
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
