"""Runs a script as a process of its own: a request and an answer through files."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from models.checkpoints.memory_map import CheckpointError

INSTALL_HUNYUAN_EXTRA = "pip install draft-attention-jax[hunyuan]"
_NAME = "the process of the text encoder"
# Everything is on this machine; transformers would ask the hub for what is missing.
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_KINDS: dict[str, type[Exception]] = {
    "checkpoint": CheckpointError,
    "device": ValueError,
    "import": ImportError,
    "memory": MemoryError,
    "other": ChildProcessError,
}


class WorkerTracebackError(Exception):
    """The traceback of an error in the other process, as that error's cause."""


def run_worker(
    request: Mapping[str, Any], *, script: Path, python: str = sys.executable
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Runs a script on a request, and waits for its answer.

    The process ends with this one, however this one ends, and with any exception
    that is raised while it runs, such as KeyboardInterrupt.

    Args:
      request: Values that JSON has.
      script: File to run: it is given a folder with `request.json`, in which it
        writes `answer.json`, and arrays in `answer.safetensors`. It should end when
        its stdin does.
      python: Interpreter that runs it.

    Returns:
      The answer, and its arrays by name.

    Raises:
      CheckpointError: The process could not read the model.
      ChildProcessError: It ended without an answer, or with an error of its own.
      ImportError: It lacks a package.
      MemoryError: There is not enough memory for it.
      ValueError: The machine lacks the device that was asked for.
    """
    with tempfile.TemporaryDirectory(prefix="draft-video-text-") as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(request))
        status = _run([python, "-P", os.fspath(script), name], folder / "log")
        try:
            answer = json.loads((folder / "answer.json").read_text())
        except (OSError, ValueError):
            raise ChildProcessError(
                f"{_NAME} ended {_describe(status)} without an answer"
                f"{_last_lines(folder / 'log')}"
            ) from None
        if "error" in answer:
            _raise(**answer["error"])
        arrays = folder / "answer.safetensors"
        try:
            return answer, safetensors.numpy.load_file(arrays)
        except (OSError, safetensors.SafetensorError) as error:
            raise ChildProcessError(
                f"{_NAME} gave an answer that cannot be read: {error}"
            ) from error


def _run(command: list[str], log: Path) -> int:
    """Runs a command to its end, or kills it; returns its status."""
    with log.open("wb") as output:
        # In a session of its own, Ctrl-C in a terminal does not reach it.
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | _ENVIRONMENT,
            start_new_session=True,
        )
        try:
            return process.wait()
        finally:
            process.kill()  # of one that has ended this does nothing
            process.wait()
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()


def _raise(kind: str, message: str, traceback: str) -> None:
    cause = WorkerTracebackError(f"\n\n{traceback}")
    if kind == "import":
        message = f"{message}; install what it needs with {INSTALL_HUNYUAN_EXTRA}"
    raise _KINDS.get(kind, ChildProcessError)(f"{_NAME}: {message}") from cause


def _describe(status: int) -> str:
    if status >= 0:
        return f"with status {status}"
    name = signal.Signals(-status).name
    reason = "; perhaps memory ran out," if name == "SIGKILL" else ""
    return f"by {name}{reason}"


def _last_lines(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()[-3:]
    return "; it wrote: " + " | ".join(lines) if lines else ""
