"""Runs tests in forks of a process that has imported what is slow to import.

The process works in a copy of the checkout of its own. It reads a job from each line of
its standard input and answers with a line, both JSON:

    {"tests": [...], "limit": 60, "mutant": {"path": ..., "text": ...} or null,
     "marker": "nightly",                                    # "not nightly" by default
     "files": [...], "output": "lines.json"}                 # these two for lines
    {"outcome": "passed", "failed_test": null, "seconds": 3.2, "tail": "..."}

No backend of jax has started before the fork. Programs are compiled once for all
mutants that leave them as they are: jax's persistent cache keeps them.
"""

import contextlib
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

_OPTIONS = [
    *("-q", "-x", "--tb=line", "--no-header", "-p", "no:cacheprovider"),
]
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S.*?)(?: - |$)", re.MULTILINE)
# Imported once, before all forks. None of them starts a backend.
_SLOW_IMPORTS = (
    *("jax", "jax.numpy", "numpy", "flax.nnx", "flax.linen", "hypothesis", "chex"),
    *("jaxtyping", "beartype", "einops", "safetensors.numpy", "pytest_timeout"),
    *("jax.experimental.pallas.mosaic_gpu", "_pytest.assertion.rewrite"),
)


def run_tests(job: dict[str, Any], log: Path) -> dict[str, Any]:
    """Runs a job's tests in a fork and says how they ended."""
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        _run_in_child(job, log)
    status = _wait(child, job["limit"])
    text = log.read_text(errors="replace")
    failed = _FAILED.search(text)
    outcome = {0: "passed", 1: "failed", None: "timeout"}.get(status, "broken")
    return {
        "outcome": outcome,
        "failed_test": failed[1] if failed else None,
        "seconds": round(time.monotonic() - start, 2),
        "tail": text[-600:] if outcome != "passed" else "",
    }


def _run_in_child(job: dict[str, Any], log: Path) -> None:
    """Runs pytest in this process, which then ends whatever happens."""
    os.setsid()
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    status: int = 3
    try:
        import pytest

        plugins: list[object] = []
        options = _OPTIONS
        if job.get("output"):
            from benchmarks.mutation.lines import LinesOfTests

            plugins.append(LinesOfTests(Path.cwd(), job["files"], Path(job["output"])))
            options = [option for option in _OPTIONS if option != "-x"]
        marked = ["-m", job.get("marker", "not nightly and not gpu")]
        status = int(pytest.main([*options, *marked, *job["tests"]], plugins=plugins))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(child: int, limit: float) -> int | None:
    """Returns the exit status, or None after ending what takes longer than `limit`."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


@contextlib.contextmanager
def planted(mutant: dict[str, Any] | None, number: int):
    """Puts a mutant's text in its file; afterwards the file is as it was.

    Each mutant has a time of its own in the far future: Python compares a file's time
    and size with those of its compiled form, and the times only in seconds.
    """
    if mutant is None:
        yield
        return
    path = Path(mutant["path"])
    before, stat = path.read_bytes(), path.stat()
    path.write_text(mutant["text"])
    os.utime(path, (4e9 + number, 4e9 + number))
    try:
        yield
    finally:
        path.write_bytes(before)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def main() -> None:
    """Answers jobs until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in _SLOW_IMPORTS:
        with contextlib.suppress(ImportError):
            __import__(name)
    log = Path("worker.log").resolve()
    for number, line in enumerate(sys.stdin):
        job = json.loads(line)
        # Compiled forms are kept for the files as they are.
        sys.dont_write_bytecode = job["mutant"] is not None
        with planted(job["mutant"], number):
            answer = run_tests(job, log)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
