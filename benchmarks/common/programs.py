"""Runs other programs: under a limit of time, with one compilation cache."""

import math
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence

CACHE_EVERYTHING = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def cache_in(folder: str) -> dict[str, str]:
    """Environment variables by which JAX keeps everything it compiles in a folder.

    A program that runs under a debugging tool can then load what it compiled without:
    compilation is slow under such tools, and has crashed and hung.
    """
    return CACHE_EVERYTHING | {"JAX_COMPILATION_CACHE_DIR": folder}


def run_limited(
    command: Sequence[str], limit: float, variables: Mapping[str, str]
) -> tuple[int | None, str]:
    """Exit status, None after `limit` seconds, and all that a command printed.

    The limit may be infinite. It ends what the command has started, too, which else
    would keep its output open.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | variables,
        start_new_session=True,
    )
    try:
        # `communicate` takes no infinity; None is its word for it.
        timeout = limit if math.isfinite(limit) else None
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]
    return process.returncode, output
