"""The figures of a Wan benchmark with linear layers in FP8, from its records.

What a figure says; one whose records are missing is left out. Those of steps are of the
largest size:

  fp8_linear_speedup         linear layers of a block in bfloat16 over those in FP8, by
                             themselves, rounding of inputs included
  outside_attention_speedup  what lies outside self-attention in a step of the last mode
  float8_gb                  weights on the device
  step_*_fp8_s               steps in FP8, by percent of sparsity
  step_*_fp8_speedup         the same step in bfloat16 over it
  step_*_speedup_over_cudnn  the dense bfloat16 step with cuDNN's attention over it
"""

from collections.abc import Mapping
from typing import Any

from benchmarks.common.linear_times import weighted_speedup

Record = Mapping[str, Any]

# Layers of each shape in a block: queries, keys, values and output of self-attention,
# and query and output of cross-attention, whose keys and values are of few rows.
COUNTS = {"projection": 6, "ffn.linear_1": 1, "ffn.linear_2": 1}


def summarise(results: Record) -> dict[str, float]:
    """Returns the figures that a record gives, by name."""
    narrow = results.get("float8", {})
    figures = {}
    speedup = weighted_speedup(narrow.get("linears", {}), COUNTS)
    if speedup is not None:
        figures["fp8_linear_speedup"] = speedup
    if "load" in narrow:
        figures["float8_gb"] = narrow["load"]["gb"]
    if not narrow.get("cases"):
        return figures
    wide_case, case = results["cases"][-1], narrow["cases"][-1]
    if "outside" in case and "outside" in wide_case:
        wide_ms, ms = (x["outside"]["outside_ms"] for x in (wide_case, case))
        figures["outside_attention_speedup"] = wide_ms / ms
    return figures | step_figures(wide_case, case)


def step_figures(wide_case: Record, case: Record) -> dict[str, float]:
    """Returns figures of the steps of one size, in bfloat16 and in FP8."""
    figures = {}
    wide_modes = wide_case.get("modes", {})
    for mode, record in case.get("modes", {}).items():
        name = "step_" + mode.removeprefix("0.").ljust(2, "0")
        figures[f"{name}_fp8_s"] = record["median_ms"] / 1e3
        if mode in wide_modes:
            ratio = wide_modes[mode]["median_ms"] / record["median_ms"]
            figures[f"{name}_fp8_speedup"] = ratio
        if "cudnn" in wide_case:
            ratio = wide_case["cudnn"]["median_ms"] / record["median_ms"]
            figures[f"{name}_speedup_over_cudnn"] = ratio
    return figures
