"""The figures of a HunyuanVideo benchmark, from its records.

What a figure says; one whose records are missing is left out:

  step_*_s                        a step at 768 x 1280
  step_90_bf16_speedup_over_cudnn dense step with cuDNN over one at 90 %
  video_*_s                       50 steps and decoding, from measured steps
  video_published                 dense video over one with the published rule: the
                                  first steps dense, in the others the first two layers
  video_10_dense                  dense video over one whose first tenth is dense
  matmul_share                    rate outside self-attention over the fastest product's
  draft_and_reorder_share         of a step at 90 %: new masks from pooled tokens, lists
                                  for the kernel, and every copy
  peak_bf16_gb                    the device's, weights and compilation included
  step_720p_over_768              steps at 90 %
  speedup_544p                    as at 768 x 1280
  vae_*                           from benchmarks.hunyuan.vae
  step_90_fp8_s, step_dense_fp8_s steps with linear layers in FP8
  step_90_fp8_speedup_over_cudnn  dense bfloat16 step with cuDNN, of the part in FP8,
                                  over the first
  step_default_90_fp8_s, _95      with the library's own selection, and over cuDNN
  fp8_linear_alone_speedup        linear layers of a block in bfloat16 over FP8, by
                                  themselves, rounding of inputs included
  outside_attention_speedup       what lies outside self-attention in a step at 90 %
"""

from collections.abc import Mapping
from typing import Any

from benchmarks.common.linear_times import weighted_speedup
from draft_jax import SparsitySchedule
from models.diffusion.schedulers import FlowEuler

Record = Mapping[str, Any]

NUM_STEPS = 50
SHIFT = 7.0
SPARSE, PUBLISHED = "0.9", "0.9+layers0,1"
LINEARS = {"projection": 4, "mlp in": 1, "mlp out": 1}  # of each shape in a block
STEPS = {
    "dense": "step_dense_s",
    "0.75": "step_75_s",
    "0.8": "step_80_s",
    SPARSE: "step_90_s",
    PUBLISHED: "step_90_published_s",
}


def published_dense_steps() -> int:
    """Steps that the published rule keeps dense in all layers."""
    threshold = SparsitySchedule.hunyuan_published().dense_above_timestep
    timesteps = FlowEuler(num_steps=NUM_STEPS, shift=SHIFT).timesteps
    return int((timesteps > threshold).sum())


def summarise(parts: Mapping[str, Record]) -> dict[str, float]:
    """Returns the figures that the records of these parts give, by name."""
    largest = parts.get("768p", {})
    modes = largest.get("modes", {})
    figures = {
        name: modes[mode]["median_ms"] / 1e3
        for mode, name in STEPS.items()
        if mode in modes
    }
    if "cudnn" in largest:
        figures["step_cudnn_s"] = largest["cudnn"]["median_ms"] / 1e3
    vae = parts.get("vae", {})
    figures |= {k: v for k, v in vae.items() if k.startswith("vae_")}
    peaks = [mode["peak_gb"] for mode in modes.values() if "peak_gb" in mode]
    if peaks:
        figures["peak_bf16_gb"] = max(peaks)
    if "share_of_matmul" in largest.get("outside", {}):
        figures["matmul_share"] = largest["outside"]["share_of_matmul"]
    if "time_by_part_ms" in largest and SPARSE in modes:
        by_part = largest["time_by_part_ms"]
        moved = by_part["draft"] + by_part["lists"] + by_part["copies"]
        share = moved / modes[SPARSE]["median_ms"]
        figures["draft_and_reorder_share"] = share
    figures |= _in_float8(parts)
    return figures | _ratios(figures, parts) | _videos(figures)


def _in_float8(parts: Mapping[str, Record]) -> dict[str, float]:
    """Figures of the part with linear layers in FP8."""
    narrow, wide = parts.get("768p_float8", {}), parts.get("768p", {})
    figures = {}
    for mode, name in (("dense", "step_dense_fp8_s"), (SPARSE, "step_90_fp8_s")):
        if mode in narrow.get("modes", {}):
            figures[name] = narrow["modes"][mode]["median_ms"] / 1e3
    for mode, record in narrow.get("default", {}).get("modes", {}).items():
        name = f"step_default_{mode.removeprefix('0.').ljust(2, '0')}_fp8_s"
        figures[name] = record["median_ms"] / 1e3
    speedup = weighted_speedup(narrow.get("linears", {}), LINEARS)
    if speedup is not None:
        figures["fp8_linear_alone_speedup"] = speedup
    if "outside" in narrow and "outside" in wide:
        wide_ms, ms = (part["outside"]["outside_ms"] for part in (wide, narrow))
        figures["outside_attention_speedup"] = wide_ms / ms
    return figures


def _ratios(
    figures: Mapping[str, float], parts: Mapping[str, Record]
) -> dict[str, float]:
    """Steps over others."""
    ratios = {}
    if {"step_cudnn_s", "step_90_s"} <= figures.keys():
        speedup = figures["step_cudnn_s"] / figures["step_90_s"]
        ratios["step_90_bf16_speedup_over_cudnn"] = speedup
    own = parts.get("768p_float8", {}).get("cudnn", {})
    if "median_ms" in own:
        names = ("step_90_fp8", "step_default_90_fp8", "step_default_95_fp8")
        for name in names:
            if f"{name}_s" in figures:
                speedup = own["median_ms"] / 1e3 / figures[f"{name}_s"]
                ratios[f"{name}_speedup_over_cudnn"] = speedup
    between = parts.get("720p", {}).get("modes", {}).get(SPARSE)
    if between and "step_90_s" in figures:
        ratio = between["median_ms"] / 1e3 / figures["step_90_s"]
        ratios["step_720p_over_768"] = ratio
    smallest = parts.get("544p", {})
    if "over_cudnn" in smallest.get("modes", {}).get(SPARSE, {}):
        ratios["speedup_544p"] = smallest["modes"][SPARSE]["over_cudnn"]
    return ratios


def _videos(figures: Mapping[str, float]) -> dict[str, float]:
    """Whole videos: times, and the dense one over the others."""
    needed = {"step_cudnn_s", "step_dense_s", "step_90_s", "vae_decode_s"}
    if not needed <= figures.keys():
        return {}
    dense = figures["step_dense_s"]

    def seconds(dense_steps: int, sparse: float) -> float:
        steps = dense_steps * dense + (NUM_STEPS - dense_steps) * sparse
        return steps + figures["vae_decode_s"]

    cudnn = NUM_STEPS * figures["step_cudnn_s"] + figures["vae_decode_s"]
    videos = {"10_dense": seconds(NUM_STEPS // 10, figures["step_90_s"])}
    if "step_90_published_s" in figures:
        sparse = figures["step_90_published_s"]
        videos["published"] = seconds(published_dense_steps(), sparse)
    return {
        "video_cudnn_s": cudnn,
        **{f"video_{name}_s": time for name, time in videos.items()},
        **{f"video_{name}": cudnn / time for name, time in videos.items()},
    }
