"""Times of calls: one program after another, and programs that take turns."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from benchmarks.common.gpu_state import GpuState

Turns = dict[str, dict[str, list[float]]]  # by program: milliseconds, clock, power


def time_calls(
    call: Callable[[], object], wait: Callable[[Any], object], budget_s: float
) -> list[float]:
    """Milliseconds of single calls: two to warm up, then five to fifty."""
    for _ in range(2):
        wait(call())
    start = time.perf_counter()
    wait(call())
    once = time.perf_counter() - start
    samples = []
    for _ in range(min(max(int(budget_s / max(once, 1e-6)), 5), 50)):
        start = time.perf_counter()
        wait(call())
        samples.append(1e3 * (time.perf_counter() - start))
    return samples


def measure(
    make: Callable[[], tuple[Callable[[], object], Callable[[Any], object]]],
    flops: float,
    budget_s: float,
    check: Callable[[Any], dict[str, object]] | None = None,
) -> dict[str, object]:
    """Times a program and makes a record of it; a failure is one too.

    Args:
      make: Gives a call and how to wait for what it returns.
      flops: Arithmetic of a call, for its rate.
      budget_s: Seconds that its samples may take together.
      check: Takes the first output; what it returns goes into the record. With the
        key "error" that is all of the record, and the program is not timed.

    Returns:
      Times, rate, the GPU's clock and power and what was checked; or an "error".
    """
    try:
        call, wait = make()
        out = call()  # compiles
        wait(out)
        checked = {} if check is None else check(out)
        del out
        if "error" in checked:
            return checked
        with GpuState() as state:
            samples = time_calls(call, wait, budget_s)
    except Exception as error:  # recorded: other programs still run
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    times = spread(samples)
    rate = {"calls": len(samples), "effective_tflops": flops / times["median_ms"] / 1e9}
    return {**times, **rate, **checked, **state.summary}


def spread(samples: list[float]) -> dict[str, float]:
    """Median and extremes of milliseconds."""
    return {
        "median_ms": statistics.median(samples),
        "min_ms": min(samples),
        "max_ms": max(samples),
    }


def run_for(call: Callable[[], object], seconds: float) -> tuple[int, float]:
    """Calls for some seconds, two calls in flight at a time.

    Returns:
      The number of calls, and the seconds until the last has ended.
    """
    start, calls, last = time.perf_counter(), 0, None
    while time.perf_counter() - start < seconds:
        out = call()
        jax.block_until_ready(last)  # one call behind: the GPU never waits
        last, calls = out, calls + 1
    jax.block_until_ready(last)
    return calls, time.perf_counter() - start


def take_turns(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    settle_s: float,
    block_s: float,
) -> Turns:
    """Runs programs in turns.

    A GPU moves its clock by several percent within seconds, with what ran before, so
    figures of programs that were timed one after the other cannot be subtracted.

    Args:
      calls: Programs by name.
      rounds: Turns of each program.
      settle_s: Seconds at the start of a turn that do not count.
      block_s: Seconds of a turn that count.

    Returns:
      Milliseconds of a call and the GPU's state in each round, by name.
    """
    turns: Turns = {
        name: {"ms": [], "sm_clock_mhz": [], "power_w": []} for name in calls
    }
    for _ in range(rounds):
        for name, call in calls.items():
            run_for(call, settle_s)
            with GpuState() as state:
                number, seconds = run_for(call, block_s)
            turns[name]["ms"].append(1e3 * seconds / number)
            for key in ("sm_clock_mhz", "power_w"):
                if key in state.summary:
                    turns[name][key].append(state.summary[key])
    return turns


def slowdown(turns: Turns, own: str, *, over: str) -> dict[str, object]:
    """Returns by what share a program takes longer than another, for each round."""
    rounds = zip(turns[own]["ms"], turns[over]["ms"], strict=True)
    losses = [round(ms / other - 1, 4) for ms, other in rounds]
    return {"loss": statistics.median(losses), "losses": losses}
