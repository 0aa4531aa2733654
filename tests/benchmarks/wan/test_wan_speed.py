"""The benchmark of everything together on a tiny model, and its sums by hand."""

import json

import numpy as np
import pytest

from benchmarks.wan import speed as wan_speed
from benchmarks.wan import video as wan_video
from benchmarks.wan.summary import speed_figures
from models.diffusion.caches import MagCache, published_ratios

TINY = ["--model", "tiny", "--steps", "10", "--sparsity", "0.5"]
LINEAR = {"bfloat16_ms": 6.0, "float8_ms": 3.0, "speedup": 2.0}
PARTS = {
    "linears": {
        "projection": LINEAR,
        "ffn.linear_1": LINEAR,
        "ffn.linear_2": LINEAR,
        # Eight layers take 48 ms by themselves; FP8 saves 16 of them.
        "block": {"bfloat16_ms": 60.0, "float8_ms": 44.0},
    },
    "steps": {"median_ms": {"sparse": 600.0, "skipped": 1.0}},
    "video": {
        "seconds": 20.0,
        "peak_gb": 30.0,
        "after_steps": {"peak_gb": 29.5},
        "median_ms": {"sparse": 500.0},
        "work_per_step": ["dense", *["sparse"] * 9, "last"],
    },
    "published": {"seconds": 25.0},
    "cudnn": {"median_ms": 2000.0},
    "default": {"modes": {"0.9": {"median_ms": 1000.0}, "0.95": {"median_ms": 800.0}}},
    "480p": {"modes": {"0.9": {"median_ms": 10.0}}, "cudnn": {"median_ms": 30.0}},
    "look": {"first_s": 30.0, "seconds": 2.5},
    "image": {
        "encode_s": 12.0,
        "median_ms": {"sparse": 700.0},
        "decode_s": 7.0,
        "peak_gb": 31.0,
    },
    "720p": {"median_ms": {"sparse": 500.0}, "decode_s": 6.0, "peak_gb": 29.0},
    "outside": {
        "bfloat16": {"outside": {"outside_ms": 60.0}},
        "float8": {"outside": {"outside_ms": 30.0}},
    },
}


def test_figures_by_hand():
    assert speed_figures(PARTS, 50) == {
        "fp8_linear_alone_speedup": 2.0,
        "fp8_linear_speedup": 1.5,
        "outside_attention_speedup": 2.0,
        "step_90_480p_speedup_over_cudnn": 3.0,
        "peak_gb": 30.0,
        "peak_steps_gb": 29.5,
        "step_90_speedup_over_cudnn": 4.0,
        "step_default_90": 2.0,
        "step_default_95": 2.5,
        "video_speedup_over_cudnn": 5.0,
        "video_default_90": 4.0,  # ten sparse steps take half a second more each
        "video_published_speedup_over_cudnn": 4.0,
        "look_s": 2.5,
        "image_encode_s": 12.0,
        "image_step_90_s": 0.7,
        "image_decode_s": 7.0,
        "image_peak_gb": 31.0,
        "720p_step_90_s": 0.5,
        "720p_decode_s": 6.0,
        "720p_peak_gb": 29.0,
    }


def test_what_was_not_measured_is_left_out():
    assert speed_figures({}, 50) == {}
    failed = {name: {"error": "no memory"} for name in PARTS}
    assert speed_figures(failed, 50) == {}
    parts = {name: PARTS[name] for name in ("steps", "cudnn")}
    figures = speed_figures(parts | {"video": {"error": "no memory"}}, 50)
    assert figures == {"step_90_speedup_over_cudnn": 2000 / 600}


def test_default_cache_is_that_of_the_published_list():
    options = wan_speed.parse([])
    cache = wan_video.make_cache(options.cache, options.model)
    assert cache == MagCache(ratios=published_ratios("wan2.1-t2v-14b"))
    assert cache.skippable(50).sum() == 25


def test_only_steps_of_one_run_are_compared():
    dense = {"median_ms": 2000.0, "environment": {"date": "today"}}
    earlier = speed_figures(PARTS | {"cudnn": dense}, 50)
    # Parts that have dense steps of their own, or none, say what they did.
    assert not any("video_" in name or "default_" in name for name in earlier)
    assert earlier["step_90_480p_speedup_over_cudnn"] == 3.0
    assert earlier["peak_gb"] == 30.0
    names = ("steps", "video")
    run = {name: PARTS[name] | {"environment": {"date": "today"}} for name in names}
    figures = speed_figures(PARTS | run | {"cudnn": dense}, 50)
    assert figures["video_speedup_over_cudnn"] == 5.0
    assert "video_published_speedup_over_cudnn" not in figures


SHORT = ["look", "image", "720p"]  # parts of a few steps each


@pytest.mark.nightly
def test_short_parts_of_a_tiny_model_are_measured(tmp_path):
    output = tmp_path / "record.json"
    wan_speed.main([*TINY, "--parts", *SHORT, "--output", str(output)])
    parts = json.loads(output.read_text())["parts"]
    assert 0 < parts["look"]["seconds"] < parts["look"]["first_s"]
    for name in SHORT[1:]:
        record = parts[name]
        assert record["work_per_step"] == ["sparse", "sparse", "last"]
        assert record["finite"]
        assert record["decode_s"] > 0 < record["mp4_s"]
    assert parts["image"]["encode_s"] > 0


def test_every_part_of_a_tiny_model_is_measured(tmp_path):
    output = tmp_path / "record.json"
    wanted = [name for name in wan_speed.PARTS if name not in SHORT]
    arguments = ["--cache", "mag:0.9,2", "--parts", *wanted, "--output", str(output)]
    wan_speed.main([*TINY, *arguments])
    document = json.loads(output.read_text())
    parts = document["parts"]
    assert wanted == [name for name in parts if "model" not in name]
    video, published = parts["video"], parts["published"]
    assert video["finite"]
    assert not video["stopped"]
    assert video["work_per_step"][0] == "dense"
    assert set(video["work_per_step"]) == {"dense", "sparse", "skipped", "last"}
    assert video["work_per_step"].count("last") == 1
    assert video["seconds"] == pytest.approx(
        video["steps_s"] + video["decode_s"] + video["other_s"]
    )
    counts = [published[f"{w}_steps"] for w in ("dense", "sparse", "skipped")]
    assert sum(counts) == 10
    median = video["median_ms"]
    # One of three layers is dense in a sparse step of the published rule.
    sparse = (median["dense"] + 2 * median["sparse"]) / 3
    steps_ms = np.dot(counts, [median["dense"], sparse, median["skipped"]])
    steps_ms += median["last"] - median["sparse"]
    expected = steps_ms / 1e3 + video["decode_s"] + video["other_s"]
    assert published["seconds"] == pytest.approx(expected)
    # A CPU has neither a profile nor an account of its memory.
    missing = {"outside_attention_speedup", "peak_gb", "peak_steps_gb"}
    whole = {name: PARTS[name] for name in wanted}
    assert document["summary"].keys() == speed_figures(whole, 50).keys() - missing
    assert parts["steps"]["compile_s"] > 0 == video["compile_s"]  # the same programs


def test_no_part_begins_after_the_limit(tmp_path):
    output = tmp_path / "record.json"
    parts = ["--parts", "linears", "cudnn"]
    wan_speed.main([*TINY, *parts, "--limit", "0", "--output", str(output)])
    document = json.loads(output.read_text())
    assert list(document["parts"]) == ["cudnn", "linears"]
    for record in document["parts"].values():
        assert record["error"] == "not begun: the limit was 0.0 s"
    assert document["summary"] == {}


def test_a_video_that_would_end_too_late_stops():
    options = wan_speed.parse(TINY)
    video = wan_speed.Bench(options).video
    records = []
    times = {"sparse": 1e3, "skipped": 1.0}
    # Some sparse steps are to come, but no second is left for one.
    wan_video.make_video(video, records.append, times, lambda: 0.5)
    assert records[-1]["stopped"]
    assert records[-1]["work_per_step"] == ["dense"]
    assert "seconds" not in records[-1]
