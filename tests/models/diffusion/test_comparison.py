"""Numbers of a comparison, worked out by hand for made-up results."""

import dataclasses
import json
import math

import numpy as np
import pytest

from models.diffusion.comparison import Comparison, run_report
from models.diffusion.results import GenerationResult
from models.files import MissingFilesError
from models.media import plots
from models.media import video as video_io

STEPS, LAYERS = 4, 2


def make_result(video, time_ms, kept_density):
    kept_density = np.array(kept_density, float)
    return GenerationResult(
        video=video,
        latents=np.zeros((1, 1, 2, 2, 3), np.float32),
        time_ms=np.array(time_ms, float),
        compile_ms=1000.0,
        decode_ms=5.0,
        kept_density=kept_density,
        dense=kept_density == 1.0,
        timesteps=np.array([1000.0, 900.0, 750.0, 500.0]),
    )


@pytest.fixture
def comparison():
    """The sparse video differs by 0.1 everywhere: 20 dB."""
    video = np.full((1, 2, 16, 16, 3), 0.5, np.float32)
    dense = make_result(video, [40, 40, 40, 44], np.ones((STEPS, LAYERS)))
    kept = [[1, 1], [1, 0.2], [1, 0.3], [1, 0.4]]
    sparse = make_result(video + np.float32(0.1), [40, 20, 10, 12], kept)
    return Comparison(dense=dense, sparse=sparse)


def test_extra_work_counts_where_layers_are_sparse(comparison):
    """3 of 8 are: they add 3 / 8 of the share that it has of a layer."""
    result = dataclasses.replace(comparison.sparse, extra_work=0.08)
    report = run_report(result)
    assert report["kept_share"] == pytest.approx(0.7375)
    assert report["work_share"] == pytest.approx(0.7375 + 0.03)
    assert report["extra_work_of_a_sparse_layer"] == 0.08


def test_report(comparison):
    report = comparison.report()
    assert report["psnr_db"] == pytest.approx(20.0, abs=1e-5)
    # Both are flat: SSIM is (2 x y + c) / (x^2 + y^2 + c), c = 1e-4.
    assert report["ssim"] == pytest.approx(0.6001 / 0.6101, abs=1e-6)
    assert report["sparse_steps"] == 3  # layer 0 is dense, layer 1 is not
    assert report["speed_up_of_sparse_steps"] == pytest.approx(40 / 12)
    assert report["speed_up_of_all_steps"] == pytest.approx(164 / 82)
    sparse = report["sparse"]
    assert sparse["time_ms_per_step"] == [40, 20, 10, 12]
    assert sparse["time_ms_median_step"] == 16
    assert sparse["time_ms_all_steps"] == 82
    assert sparse["dense_steps"] == 1
    assert sparse["kept_share_per_layer"] == pytest.approx([1, 0.475])
    assert sparse["kept_share"] == pytest.approx(0.7375)
    assert sparse["kept_share_per_step_and_layer"][2] == [1, 0.3]
    assert sparse["timesteps"] == [1000, 900, 750, 500]
    json.dumps(report, allow_nan=False)


def test_report_of_a_sparse_run_that_was_stopped(comparison):
    """Times are compared over the two steps that both have: 80 ms and 60 ms."""
    sparse = comparison.sparse
    fields = ("time_ms", "kept_density", "dense", "timesteps")
    sparse = dataclasses.replace(
        sparse, **{name: getattr(sparse, name)[:2] for name in fields}, stopped=True
    )
    report = Comparison(dense=comparison.dense, sparse=sparse).report()
    assert report["sparse_steps"] == 1
    assert report["speed_up_of_sparse_steps"] == pytest.approx(2)
    assert report["speed_up_of_all_steps"] == pytest.approx(80 / 60)
    assert report["sparse"]["stopped"]
    assert not report["dense"]["stopped"]


def test_report_of_a_run_whose_cache_skipped_steps(comparison):
    """Skipped steps are neither dense nor sparse: one sparse step, 44 ms and 12 ms."""
    kept = np.array([[1, 1], [0, 0], [0, 0], [1, 0.4]])
    sparse = dataclasses.replace(
        comparison.sparse, kept_density=kept, dense=kept == 1.0
    )
    report = Comparison(dense=comparison.dense, sparse=sparse).report()
    assert (report["sparse_steps"], report["skipped_steps"]) == (1, 2)
    assert report["speed_up_of_sparse_steps"] == pytest.approx(44 / 12)
    one = report["sparse"]
    assert one["work_per_step"] == ["dense", "skipped", "skipped", "sparse"]
    assert (one["dense_steps"], one["skipped_steps"]) == (1, 2)
    assert report["dense"]["work_per_step"] == ["dense"] * 4


def test_equal_videos_have_no_finite_psnr(comparison):
    same = Comparison(dense=comparison.dense, sparse=comparison.dense)
    report = same.report()
    assert report["psnr_db"] is None
    assert report["ssim"] == pytest.approx(1.0)
    assert report["sparse_steps"] == 0
    assert report["speed_up_of_sparse_steps"] is None
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize(
    ("broken", "missing"),
    [
        ((video_io, "side_by_side"), "side_by_side.mp4"),
        ((plots, "plot_kept_share"), "kept_share.png"),
        ((Comparison, "report"), "report.json"),
    ],
    ids=["video", "picture", "numbers"],
)
def test_one_file_that_fails_costs_no_other(
    comparison, tmp_path, monkeypatch, broken, missing
):
    def fail(*_, **__):
        raise RuntimeError("no luck")

    monkeypatch.setattr(*broken, fail)
    with pytest.raises(MissingFilesError, match=f"{missing} .*no luck.* is missing"):
        comparison.write(tmp_path, fps=8, details={})
    all_files = {"dense.mp4", "sparse.mp4", "side_by_side.mp4", "kept_share.png"}
    all_files |= {"report.json"}
    assert {file.name for file in tmp_path.iterdir()} == all_files - {missing}


def test_written_files(comparison, tmp_path):
    files = comparison.write(tmp_path / "new", fps=8, details={"prompt": "a ball"})
    assert all(file.stat().st_size > 0 for file in files)
    assert files[-1].name == "report.json"
    assert {file.name for file in files} == {
        file.name for file in (tmp_path / "new").iterdir()
    }
    report = json.loads(files[-1].read_text())
    assert report == {"prompt": "a ball"} | comparison.report()


def test_a_single_run_has_the_same_numbers(comparison):
    assert run_report(comparison.sparse) == comparison.report()["sparse"]
    assert math.isfinite(run_report(comparison.dense)["kept_share"])


def test_unlike_videos_are_refused(comparison):
    short = dataclasses.replace(comparison.dense, video=comparison.dense.video[:, :1])
    with pytest.raises(ValueError, match="must be equal, one video each"):
        Comparison(dense=short, sparse=comparison.sparse)
    two = dataclasses.replace(
        comparison.dense,
        video=np.concatenate([comparison.dense.video] * 2),
        latents=np.concatenate([comparison.dense.latents] * 2),
    )
    with pytest.raises(ValueError, match="must be equal, one video each"):
        Comparison(dense=two, sparse=two)
