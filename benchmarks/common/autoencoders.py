"""What the benchmarks of video autoencoders share.

Each case runs in a process of its own, so that its peak memory is its own and one that
fails does not stop the others; it is recorded with its cause.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.common.machine import host_peak_bytes
from benchmarks.common.records import ROOT, provenance, write_json

GIB = 2**30


def random_autoencoder[M: nnx.Module](make: Callable[[], M]) -> M:
    """Returns a model of normal weights that keep the size of what passes through.

    Args:
      make: Builds the model; only its shapes are looked at.
    """
    rng = np.random.default_rng(0)
    graph, state = nnx.split(nnx.eval_shape(make))

    def fill(leaf):
        if len(leaf.shape) == 1:  # scales and biases alike; any value will do
            return jnp.full(leaf.shape, 0.5, leaf.dtype)
        values = rng.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(values * np.prod(leaf.shape[:-1]) ** -0.5, leaf.dtype)

    return nnx.merge(graph, jax.tree.map(fill, state))


def count_flops(lowered: Any) -> float | None:
    """Arithmetic of a lowered program, by XLA's count; None if it does not count."""
    try:
        cost = lowered.cost_analysis()
    except (NotImplementedError, RuntimeError):  # some platforms do not count
        cost = None
    return float((cost or {}).get("flops", 0.0)) or None  # those of GPUs say 0


def peak_bytes() -> int:
    """Most memory in use so far: of the device, or on CPUs of the process."""
    stats = jax.local_devices()[0].memory_stats()
    return host_peak_bytes() if stats is None else stats["peak_bytes_in_use"]


def run_cases(
    module: str,
    cases: Iterable[dict[str, Any]],
    limit_s: float,
    output: Path | None,
    summarise: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
) -> int:
    """Runs each case in a child, and writes the file of records anew after each.

    Args:
      module: The benchmark, which prints a record as its last line for `--case`.
      cases: What `--case` takes.
      limit_s: Seconds for each case.
      output: JSON file; None for none.
      summarise: Makes the file's "summary" of the records so far; None for none.

    Returns:
      The exit status: 1 if a case failed.
    """
    results: dict[str, Any] = {"environment": provenance(), "records": []}
    for case in cases:
        record = case | _run_in_process(module, case, limit_s)
        results["records"].append(record)
        print(json.dumps(record), flush=True)
        if summarise:
            results["summary"] = summarise(results["records"])
        if output:
            write_json(output, results)
    return int(any("error" in record for record in results["records"]))


def _run_in_process(
    module: str, case: dict[str, Any], limit_s: float
) -> dict[str, Any]:
    """Runs a case in a child; a failure is a record, too."""
    command = [sys.executable, "-m", module, "--case", json.dumps(case)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {limit_s} s"}
    if done.returncode:
        return {"error": done.stderr.strip()[-1000:]}
    return json.loads(done.stdout.splitlines()[-1])
