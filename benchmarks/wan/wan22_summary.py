"""Figures of `benchmarks.wan.wan22` from the records of its parts."""

from collections.abc import Mapping
from typing import Any

Record = dict[str, Any]


def summarise(parts: Mapping[str, Record]) -> dict[str, float]:
    """Returns the figures that records give; one without its records is left out."""
    figures = _of_expert(cases_of(parts.get("expert", {})))
    for part, name in (("fp8_pair", "fp8"), ("streamed", "bfloat16")):
        if "peak_gb" in parts.get(part, {}):
            figures[f"peak_{name}_gb"] = parts[part]["peak_gb"]
    if "switch_s" in parts.get("streamed", {}):
        figures["switch_s"] = parts["streamed"]["switch_s"]
    for part in ("ti2v", "held"):
        figures |= _of_ti2v(cases_of(parts.get(part, {})))
    return figures | _of_vae(cases_of(parts.get("vae", {})))


def cases_of(part: Record) -> dict[str, Record]:
    """Returns a part's cases; beside them stand its environment, or an error."""
    return {
        name: case
        for name, case in part.items()
        if isinstance(case, dict) and name != "environment"
    }


def _ratio(sparse: Record, mode: str, cudnn: Record) -> float | None:
    """Returns how much faster a sparse step is than a dense one, if both were timed."""
    found = sparse.get("modes", {}).get(mode, {})
    if "median_ms" not in found or "median_ms" not in cudnn:
        return None
    if not cudnn.get("has_cudnn"):
        return None
    return cudnn["median_ms"] / found["median_ms"]


def _known(figures: Mapping[str, float | None]) -> dict[str, float]:
    return {name: figure for name, figure in figures.items() if figure is not None}


def _of_expert(cases: Mapping[str, Record]) -> dict[str, float]:
    figures: dict[str, float | None] = {}
    sizes = dict.fromkeys(name.split(", ")[0] for name in cases if ", " in name)
    for index, size in enumerate(sizes):
        place = "_720p" if index else ""
        cudnn = cases.get(f"{size}, cudnn", {})
        for precision, suffix in (("float8", ""), ("bfloat16", "_bfloat16")):
            case = cases.get(f"{size}, {precision}", {})
            for mode, percent in (("0.75", 75), ("0.9", 90)):
                name = f"expert_step_{percent}{place}{suffix}_speedup_over_cudnn"
                figures[name] = _ratio(case, mode, cudnn)
        default = cases.get(f"{size}, default", {})
        name = f"expert_step_default_90{place}_speedup_over_cudnn"
        figures[name] = _ratio(default, "0.9", cudnn)
    return _known(figures)


def _of_ti2v(cases: Mapping[str, Record]) -> dict[str, float]:
    figures: dict[str, float | None] = {}
    cudnn = cases.get("cudnn", {})
    for name, case in cases.items():
        precision, _, what = name.partition(", ")
        words = what.replace("first frame ", "").split()
        words = ["fp8"] * (precision == "float8") + words
        figure = "_".join(["ti2v_step_85", *words, "speedup_over_cudnn"])
        figures[figure] = _ratio(case, "0.85", cudnn)
    return _known(figures)


def _of_vae(cases: Mapping[str, Record]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for dtype, suffix in (("float32", ""), ("bfloat16", "bfloat16_")):
        timed = [
            case
            for name, case in cases.items()
            if name.startswith(f"{dtype}, ") and "seconds" in case
        ]
        if not timed:
            continue
        fastest = min(timed, key=lambda case: case["seconds"])
        figures[f"vae_decode_{suffix}s"] = fastest["seconds"]
        if "peak_gb" in fastest:
            figures[f"vae_{suffix}peak_gb"] = fastest["peak_gb"]
    return figures
