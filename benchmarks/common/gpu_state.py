"""GPUs, and their clock and power while something is timed, from nvidia-smi."""

import functools
import os
import shutil
import statistics
import subprocess

QUERY = ("clocks.sm", "power.draw")
INTERVAL_MS = 50


@functools.cache  # records are written after every measurement
def gpus() -> tuple[str, ...]:
    """Names and drivers of all GPUs; none where nvidia-smi is missing or fails."""
    if not shutil.which("nvidia-smi"):
        return ()
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return () if found.returncode else tuple(found.stdout.strip().splitlines())


class GpuState:
    """Samples the GPU in the background, as a context manager.

    After it, `summary` holds the median clock in MHz and power in W, or nothing where
    nvidia-smi is missing.
    """

    def __init__(self) -> None:
        self.summary: dict[str, float] = {}
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "GpuState":
        if shutil.which("nvidia-smi"):
            # Of several GPUs, the one that the process sees first.
            gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
            command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", f"--id={gpu}"]
            options = ["--format=csv,noheader,nounits", f"--loop-ms={INTERVAL_MS}"]
            self._process = subprocess.Popen(
                command + options,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process is None:
            return
        self._process.terminate()
        lines, _ = self._process.communicate()
        rows = [row for line in lines.splitlines() if (row := _numbers(line))]
        if rows:
            clock, power = (
                statistics.median(column) for column in zip(*rows, strict=True)
            )
            self.summary = {"sm_clock_mhz": clock, "power_w": power}


def _numbers(line: str) -> tuple[float, ...] | None:
    """The values of one sample; None for a cut line or one without a reading."""
    try:
        values = tuple(float(value) for value in line.split(","))
    except ValueError:
        return None
    return values if len(values) == len(QUERY) else None
