"""The benchmark of a whole video on a tiny model, and its sums by hand."""

import json

import numpy as np
import pytest

from benchmarks.wan import run as wan_run
from benchmarks.wan import video as wan_video
from benchmarks.wan import weights as wan_weights
from models.diffusion.caches import MagCache, published_ratios


def test_summary_by_hand():
    results = {
        "cudnn": {"median_ms": 2000.0},
        "video": {"seconds": 20.0, "peak_gb": 30.0},
        "published": {"seconds": 25.0},
    }
    assert wan_video.summarise(results, 50) == {
        "video_speedup_over_cudnn": 5.0,
        "video_published_speedup_over_cudnn": 4.0,
        "peak_gb": 30.0,
    }
    assert wan_video.summarise({"cudnn": {"error": "x"}, "video": {}}, 50) == {}


def test_default_cache_is_that_of_the_published_list():
    options = wan_video.parse(["--model", "14b"])
    cache = wan_video.make_cache(options.cache, options.model)
    assert cache == MagCache(ratios=published_ratios("wan2.1-t2v-14b"))
    assert cache.skippable(50).sum() == 25


@pytest.mark.nightly
def test_a_tiny_video_is_measured_and_written(tmp_path, monkeypatch):
    folder, output = tmp_path / "model", tmp_path / "record.json"
    wan_weights.write_folder(wan_run.MODELS["tiny"], folder)
    options = ["--model", "tiny", "--folder", str(folder), "--output", str(output)]
    options += ["--steps", "10", "--sparsity", "0.5", "--cache", "mag:0.9,2"]
    monkeypatch.setattr("sys.argv", ["video", *options])
    wan_video.main()
    record = json.loads(output.read_text())
    video = record["video"]
    assert video["finite"]
    work = video["work_per_step"]
    assert work[0] == "dense"
    assert set(work) == {"dense", "sparse", "skipped"}
    assert video["seconds"] == pytest.approx(
        video["steps_s"] + video["decode_s"] + video["other_s"]
    )
    published = record["published"]
    counts = [published[f"{w}_steps"] for w in ("dense", "sparse", "skipped")]
    assert sum(counts) == 10
    median = video["median_ms"]
    # One of three layers is dense in a sparse step of the published rule.
    sparse = (median["dense"] + 2 * median["sparse"]) / 3
    steps_ms = np.dot(counts, [median["dense"], sparse, median["skipped"]])
    expected = steps_ms / 1e3 + video["decode_s"] + video["other_s"]
    assert published["seconds"] == pytest.approx(expected)
    assert set(record["summary"]) >= {
        "video_speedup_over_cudnn",
        "video_published_speedup_over_cudnn",
    }
