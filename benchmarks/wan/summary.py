"""The figures of Wan benchmarks with linear layers in FP8, from their records.

What a figure says; one whose records are missing is left out.

`benchmarks.wan.run`, steps of the largest size:

  fp8_linear_speedup         linear layers of a block in bfloat16, by themselves, over
                             the same less what FP8 saves in a block without attention:
                             rounding counts as what it adds to norms and GELU, and
                             scales as what they add to what comes after
  fp8_linear_alone_speedup   linear layers of a block by themselves, one over the other:
                             each rounds its own input and applies its scales
  outside_attention_speedup  what lies outside self-attention in a step of the last mode
  float8_gb                  weights on the device
  step_*_fp8_s               steps in FP8, by percent of sparsity
  step_*_fp8_speedup         the same step in bfloat16 over it
  step_*_speedup_over_cudnn  the dense bfloat16 step with cuDNN's attention over it

`benchmarks.wan.speed`, all in FP8, and over cuDNN is over that step as well, if both
are of one run:

  fp8_linear_speedup, fp8_linear_alone_speedup, outside_attention_speedup   as above
  step_90_speedup_over_cudnn          the paper's selection, sparsity 0.9
  step_90_480p_speedup_over_cudnn     the same at the small size
  step_default_90, step_default_95    the library's selection, over cuDNN
  peak_gb                             of the process until the video was decoded
  peak_steps_gb                       of the process until its steps had ended
  video_speedup_over_cudnn            as many dense steps as the video has, over all of
                                      the video: steps, decoding, writing
  video_published_speedup_over_cudnn  the same of the video by the published rules
  video_default_90                    the same, its sparse steps taking the time of the
                                      library's selection
  look_s                              a look at attention, its program being there
  image_encode_s                      first frame to latents and tokens, compiling too
  image_step_90_s, 720p_step_90_s     a sparse step of image-to-video, and at 720p
  image_decode_s, 720p_decode_s       decoding of such a video
  image_peak_gb, 720p_peak_gb         of the process until then
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
    figures = linear_figures(narrow.get("linears", {}))
    if "load" in narrow:
        figures["float8_gb"] = narrow["load"]["gb"]
    if not narrow.get("cases"):
        return figures
    wide_case, case = results["cases"][-1], narrow["cases"][-1]
    if "outside" in case and "outside" in wide_case:
        wide_ms, ms = (x["outside"]["outside_ms"] for x in (wide_case, case))
        figures["outside_attention_speedup"] = wide_ms / ms
    return figures | step_figures(wide_case, case)


def linear_figures(linears: Record) -> dict[str, float]:
    """Returns figures of linear layers, of what `measure_linears` returned."""
    alone = weighted_speedup(linears, COUNTS)
    if alone is None:
        return {}
    figures, block = {"fp8_linear_alone_speedup": alone}, linears.get("block", {})
    if {"bfloat16_ms", "float8_ms"} <= block.keys():
        wide = sum(n * linears[name]["bfloat16_ms"] for name, n in COUNTS.items())
        saved = block["bfloat16_ms"] - block["float8_ms"]
        figures["fp8_linear_speedup"] = wide / (wide - saved)
    return figures


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


def speed_figures(parts: Record, num_steps: int) -> dict[str, float]:
    """Returns the figures of `benchmarks.wan.speed`.

    Args:
      parts: Its records by part.
      num_steps: Steps of the video.
    """
    figures = linear_figures(parts.get("linears", {}))
    outside = [
        parts.get("outside", {}).get(precision, {}).get("outside", {}).get("outside_ms")
        for precision in ("bfloat16", "float8")
    ]
    if None not in outside:
        figures["outside_attention_speedup"] = outside[0] / outside[1]
    small = parts.get("480p", {})
    if "median_ms" in small.get("cudnn", {}):
        ratio = small["cudnn"]["median_ms"] / small["modes"]["0.9"]["median_ms"]
        figures["step_90_480p_speedup_over_cudnn"] = ratio
    figures |= _peaks(parts.get("video", {}))
    if "seconds" in (look := parts.get("look", {})):
        figures["look_s"] = look["seconds"]
    figures |= _single_figures(parts)
    dense = parts.get("cudnn", {})
    if "median_ms" not in dense:
        return figures
    dense_ms, run = dense["median_ms"], dense.get("environment")
    parts = {k: part for k, part in parts.items() if part.get("environment") == run}
    steps_ms = {"step_90_speedup_over_cudnn": sparse_ms(parts)}
    modes = parts.get("default", {}).get("modes", {})
    for name, mode in (("step_default_90", "0.9"), ("step_default_95", "0.95")):
        steps_ms[name] = modes.get(mode, {}).get("median_ms")
    figures |= {name: dense_ms / ms for name, ms in steps_ms.items() if ms is not None}
    for name, seconds in _video_seconds(parts).items():
        figures[name] = num_steps * dense_ms / 1e3 / seconds
    return figures


def _peaks(video: Record) -> dict[str, float]:
    """Returns the most memory, with decoding and before it."""
    found = {"peak_gb": video, "peak_steps_gb": video.get("after_steps", {})}
    return {k: peaks["peak_gb"] for k, peaks in found.items() if "peak_gb" in peaks}


def _single_figures(parts: Record) -> dict[str, float]:
    """Returns figures of the parts that make a short video."""
    figures = {}
    for part in ("image", "720p"):
        record = parts.get(part, {})
        if "sparse" in (median_ms := record.get("median_ms", {})):
            figures[f"{part}_step_90_s"] = median_ms["sparse"] / 1e3
        for name in ("encode_s", "decode_s", "peak_gb"):
            if name in record:
                figures[f"{part}_{name}"] = record[name]
    return figures


def _video_seconds(parts: Record) -> dict[str, float]:
    """Returns how long videos take, by the name of their figure."""
    found, video = {}, parts.get("video", {})
    if "seconds" in video:
        found["video_speedup_over_cudnn"] = video["seconds"]
        default = parts.get("default", {}).get("modes", {}).get("0.9")
        if default is not None:
            sparse = sum(work in ("sparse", "last") for work in video["work_per_step"])
            more_ms = default["median_ms"] - video["median_ms"]["sparse"]
            found["video_default_90"] = video["seconds"] + sparse * more_ms / 1e3
    if "seconds" in (published := parts.get("published", {})):
        found["video_published_speedup_over_cudnn"] = published["seconds"]
    return found


def sparse_ms(parts: Record) -> float | None:
    """Returns the time of a sparse step, of the whole video if there was one."""
    for part in ("video", "steps"):
        found = parts.get(part, {}).get("median_ms", {})
        if "sparse" in found:
            return found["sparse"]
    return None
