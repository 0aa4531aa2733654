"""JSON records of benchmarks, with what their numbers depend on."""

import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.common.gpu_state import gpus

ROOT = pathlib.Path(__file__).resolve().parents[2]
CODE = ("*.py", "pyproject.toml", "requirements.lock")
PACKAGES = (
    *("jax", "jaxlib", "flax", "numpy", "jax-cuda13-plugin", "jax-cuda12-plugin"),
    *("nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "nvidia-cublas"),
    *("torch", "triton", "flash-attn-4", "nvidia-cutlass-dsl"),
)

_NUMBER = r"(?:-?\d[\d.eE+-]*|-?Infinity|NaN)"
# With line ends, which no string of JSON has.
_NUMBERS = re.compile(rf"\[\n\s+({_NUMBER}(?:,\n\s+{_NUMBER})*)\n\s+\]")


@contextmanager
def recorded(record: dict[str, Any]) -> Iterator[None]:
    """Puts an error into a record, so that other parts still run."""
    try:
        yield
    except Exception as error:
        record["error"] = f"{type(error).__name__}: {error}"[:1500]


def provenance() -> dict[str, Any]:
    """Commit, date, command, versions and GPUs, without starting JAX.

    Where the code is a copy of a checkout, the environment variable
    `BENCHMARK_COMMIT` says of which.
    """
    return {
        "commit": os.environ.get("BENCHMARK_COMMIT") or commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command(),
        "versions": versions(),
        "gpus": gpus(),
    }


def environment() -> dict[str, Any]:
    """Returns `provenance`, and the device that JAX uses."""
    import jax  # here, for some benchmarks leave the device to other processes

    return {"device": jax.devices()[0].device_kind, **provenance()}


@functools.cache  # records are written after every measurement
def commit() -> str:
    """The checkout's commit at the start, and whether its code had changed since."""
    found = _git("rev-parse", "--short", "HEAD")
    if not found:
        return "unknown"
    changed = _git("status", "--porcelain", "--", *CODE)
    return f"{found}, with changes" if changed else found


def _git(*arguments: str) -> str:
    """Output of a git command; nothing where it is missing or fails."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def command() -> str:
    """The command line that started this process."""
    main = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"-m {main.name}" if main else sys.argv[0]
    return " ".join(["python", program, *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def write_results(path: pathlib.Path, results: list, **facts: object) -> None:
    """Stores results with what they depend on; `facts` replace some of that."""
    write_json(path, {"environment": environment() | facts, "results": results})


class ResultFile:
    """Results that are printed and stored as they come.

    A run that is cut off has then told what it saw.
    """

    def __init__(self, path: pathlib.Path | None, **facts: object) -> None:
        """Takes the file, None for none, and what its environment says beside ours."""
        self.path, self.facts = path, facts
        self.results: list[dict[str, Any]] = []

    def add(self, result: dict[str, Any]) -> None:
        """Prints a result as a line of JSON and writes the file anew."""
        print(json.dumps(result), flush=True)
        self.keep(result)

    def keep(self, result: dict[str, Any]) -> None:
        """Writes the file anew without printing."""
        self.results.append(result)
        if self.path is not None:
            write_results(self.path, self.results, **self.facts)


def write_json(path: pathlib.Path, document: object) -> None:
    """Writes a JSON file, and its folder if need be; a list of numbers takes a line.

    A process that is ended meanwhile leaves the file that was there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f"{path.name}.part")
    text = json.dumps(document, indent=1)
    text = _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
    whole.write_text(f"{text}\n")
    whole.replace(path)
