"""The state of a run: its clock, its programs, and the file of results."""

import argparse
import concurrent.futures
import json
import math
import os
import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.common.records import environment, write_json

Record = dict[str, Any]
Program = concurrent.futures.Future[Any]

COMPILERS = 64  # threads; XLA needs one core for most of a program


class Bench:
    """Results that are written as they come, and programs compiled side by side."""

    def __init__(self, options: argparse.Namespace, counts: list[int]) -> None:
        self.options, self.counts = options, counts
        self.start = time.perf_counter()
        self._end = options.limit
        self.document: Record = {
            "environment": environment(),
            "sparsity": options.sparsity,
            "devices": counts,
            "variables": {
                name: value
                for name, value in os.environ.items()
                if name.startswith(("NCCL_", "XLA_"))
            },
            "summary": {},
        }
        self._programs: list[Program] = []
        # Python traces one program at a time; XLA compiles many.
        self._lowering = concurrent.futures.ThreadPoolExecutor(1)
        self._compiling = concurrent.futures.ThreadPoolExecutor(COMPILERS)

    def passed_s(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start

    def left_s(self) -> float:
        """Seconds that the part that runs may still take."""
        return self._end - self.passed_s()

    def begin(self) -> None:
        """Starts the clock of a part."""
        end = self.passed_s() + self.options.part_limit
        self._end = min(self.options.limit, end)

    def keep(self, part: str, name: str, record: Record, shown: Record) -> None:
        """Keeps a record, prints what is shown of it, and writes the file anew."""
        self.document.setdefault(part, {})[name] = record
        print(f"[{self.passed_s():6.1f} s] {part}, {name}: {json.dumps(shown)}")
        self.save()

    def summarise(self, **figures: float) -> None:
        """Adds figures to the summary."""
        self.document["summary"] |= figures
        self.save()

    def save(self) -> None:
        """Writes the file anew, if there is one."""
        self.document["seconds"] = round(self.passed_s(), 1)
        if self.options.output is not None:
            write_json(self.options.output, self.document)

    def compile(
        self, lower: Callable[[], jax.stages.Lowered], options: Record | None = None
    ) -> Program:
        """Starts to compile a program; they are traced in the order of these calls.

        Args:
          lower: Traces it.
          options: XLA's, for this program.
        """
        lowered = self._lowering.submit(lower)

        def finish() -> Any:
            traced = lowered.result()
            start = time.perf_counter()
            program = traced.compile(compiler_options=options)
            return program, time.perf_counter() - start

        self._programs.append(self._compiling.submit(finish))
        return self._programs[-1]

    def wait_for_programs(self, seconds: float) -> None:
        """Waits for all programs, so that XLA disturbs no measurement, but not longer.

        Args:
          seconds: The most to wait.
        """
        seconds = min(seconds, self.left_s())
        timeout = seconds if math.isfinite(seconds) else None
        done, late = concurrent.futures.wait(self._programs, timeout=timeout)
        self.document["programs"] = {
            "seconds": round(self.passed_s(), 1),
            "compiled": len(done),
            "late": len(late),
        }
        print(f"[{self.passed_s():6.1f} s] programs: {len(done)}, late {len(late)}")

    def program(self, program: Program) -> tuple[Any, float]:
        """Waits for a program; returns it and the seconds that XLA took.

        Raises:
          TimeoutError: The part's time is over.
        """
        left_s = max(self.left_s(), 0.1)
        return program.result(timeout=left_s if math.isfinite(left_s) else None)

    def close(self) -> None:
        """Gives up programs that nobody waits for."""
        for pool in (self._lowering, self._compiling):
            pool.shutdown(wait=False, cancel_futures=True)
