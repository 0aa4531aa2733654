"""Trials of the small model's quality, and that a stopped evaluation goes on."""

import dataclasses
import json

import numpy as np
import pytest

from draft_jax import Compensation, DraftConfig, VideoGrid
from models.diffusion.results import GenerationResult
from models.diffusion.sampling import Sampling
from models.mini import evaluate, quality

pytestmark = pytest.mark.usefixtures("without_jaxtyping")  # a pipeline that is none

SHAPE = (2, 4, 16, 16, 3)


@dataclasses.dataclass
class TinyConfig:
    tile: tuple[int, int] = (2, 4)


class GreyPipeline:
    """Stands for a model: dense videos are grey, sparse ones darker by their skips."""

    def __init__(self, fail_at: int | None = None):
        self.calls = []
        self.fail_at = fail_at
        self.model = self
        self.config = TinyConfig()
        self.sampling = Sampling()

    def latent_shape(self, sampling):
        return (2, 4, 8, 4)

    def grid(self, latent_shape):
        return VideoGrid(2, 4, 8, tile=self.config.tile)

    def generate(self, prompts, sampling, *, attention=None):
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append(attention)
        sparsity = 0.0 if attention is None else attention.schedule.sparsity
        kept = np.array([[1.0], [1 - sparsity]])
        return GenerationResult(
            video=np.full(SHAPE, 0.5 - 0.1 * sparsity, np.float32),
            latents=np.zeros((2, 1, 2, 2, 3), np.float32),
            time_ms=np.ones(2),
            compile_ms=0.0,
            decode_ms=0.0,
            kept_density=kept,
            dense=kept == 1.0,
            timesteps=np.array([1000.0, 500.0]),
        )


ARGUMENTS = ["--prompts", "2", "--no-attention", "--methods", "percentile", "spread"]
ARGUMENTS += ["--sparsities", "0.5", "0.8", "--mean-frames", "1", "2"]
ARGUMENTS += ["--sub-tiles", "1x2"]


def run(folder, pipeline, monkeypatch, *more):
    monkeypatch.setattr(evaluate, "load_mini", lambda _: pipeline)
    evaluate.main(["--output", str(folder), *ARGUMENTS, *more])
    return json.loads((folder / "evaluation.json").read_text())


@pytest.fixture(autouse=True)
def no_sheet(monkeypatch):
    monkeypatch.setattr(evaluate, "draw_sheet", lambda *_: None)


def test_rows_say_likeness_and_work(tmp_path, monkeypatch):
    rows = run(tmp_path, GreyPipeline(), monkeypatch)["quality"]
    # Two sparsities of the method without means, and of two sizes of means.
    assert [row["trial"]["method"] for row in rows] == ["percentile"] * 2 + [
        "spread"
    ] * 4
    assert [row["trial"]["mean_frames"] for row in rows[2:]] == [1, 1, 2, 2]
    for row, difference in zip(rows, [0.05, 0.08] * 3, strict=True):
        expected = -20 * np.log10(difference)
        assert row["psnr_db_mean"] == pytest.approx(expected, abs=1e-4)
    assert rows[0]["extra_work"] == 0.0
    assert rows[0]["work_of_sparse_steps"] == pytest.approx(0.5)
    # Means of 1 x 2 tokens over two frames: a quarter of the keys.
    assert rows[4]["work_of_sparse_steps"] == pytest.approx(0.5 + 0.25)


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    """Each result is written at once, and made once; so are the dense videos."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, GreyPipeline(fail_at=3), monkeypatch)
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert len(written["quality"]) == 2
    pipeline = GreyPipeline()
    report = run(tmp_path, pipeline, monkeypatch)
    assert len(pipeline.calls) == 4
    assert report["quality"][:2] == written["quality"]
    further = run(tmp_path, GreyPipeline(), monkeypatch, "--sub-tiles", "1x1")
    assert further["quality"][:6] == report["quality"]
    assert len(further["quality"]) == 6 + 4


@pytest.mark.parametrize(
    ("option", "value", "name"),
    [
        ("--prompts", "1", "prompts"),
        ("--tile", "4x4", "tile"),
        ("--size", "8x8", "size"),
    ],
)
def test_results_of_other_settings_are_not_mixed(
    option, value, name, tmp_path, monkeypatch
):
    run(tmp_path, GreyPipeline(), monkeypatch)
    text = rf"is of {name}=.*another folder as --output"
    with pytest.raises(ValueError, match=text):
        run(tmp_path, GreyPipeline(), monkeypatch, option, value)


def test_trials_are_methods_by_sizes_of_means():
    sizes = {"draft_tile": (2, 4), "sub_tiles": [(1, 2), (2, 2)], "mean_frames": [4]}
    found = quality.trials(["row_topk", "mass"], [0.9, 0.75], **sizes)
    assert [trial.compensation for trial in found] == [
        *(None, None),
        *[Compensation(sub_tile=(1, 2), frames=4)] * 2,
        *[Compensation(sub_tile=(2, 2), frames=4)] * 2,
    ]
    # One capacity: one program for all sparsities of a method.
    assert {trial.config().sparsity for trial in found} == {0.75}
    with pytest.raises(ValueError, match="sparsity=1"):
        quality.trials(["percentile"], [1.5], **sizes)
    with pytest.raises(ValueError, match="frames=0"):
        quality.trials(["spread"], [0.5], **sizes | {"mean_frames": [0]})


def test_the_default_is_that_of_the_library():
    sizes = {"draft_tile": (2, 4), "sub_tiles": [(2, 2)], "mean_frames": [8, 4]}
    shipped, finer = quality.trials(["default"], [0.9], **sizes)
    assert shipped.config() == DraftConfig(sparsity=0.9)
    assert finer.config() == DraftConfig(
        sparsity=0.9, compensation=Compensation(sub_tile=(2, 2), frames=4)
    )
    assert shipped.described() == {
        "method": "default",
        "sparsity": 0.9,
        "draft_tile": "eighths",
        "sub_tile": [2, 2],
        "mean_frames": 8,
    }


def test_methods_are_configs_that_differ():
    means = Compensation()
    configs = set()
    for name in quality.METHODS:
        trial = quality.Trial(
            method=name,
            sparsity=0.5,
            least_sparsity=0.5,
            draft_tile=None if name in quality.WHOLE_TILES else (2, 4),
            compensation=means if name in quality.WITH_MEANS else None,
        )
        configs.add(trial.config())
    assert len(configs) == len(quality.METHODS)
