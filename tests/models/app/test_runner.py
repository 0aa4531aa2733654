"""Jobs of the page on a tiny random model: their files, and how they end early."""

import json
import threading
import warnings

import jax
import numpy as np
import pytest
from PIL import Image

from models.app import fragments
from models.app import runner as runner_module
from models.app.form import FormError, FormValues
from models.app.jobs import Job
from models.app.limits import Limits, run_bytes
from models.app.runner import Runner, hear_warnings
from models.app.runs import list_runs
from models.cli import main
from models.diffusion.pipeline import VideoPipeline
from models.wan.vae.codec import WanVAECodec
from tests import tiny_model

PROMPT = "a red ball"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_model.save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def loaded(checkpoint, tmp_path_factory):
    outputs = tmp_path_factory.mktemp("outputs")
    options = ("--checkpoint", str(checkpoint))
    runner = Runner(model_options=options, outputs=outputs, limits=Limits())
    assert "being loaded" in runner.status
    runner.load()
    assert runner.status == ""
    return runner


@pytest.fixture
def runner(loaded, tmp_path, monkeypatch):
    """The one that is loaded, with a folder of its own."""
    monkeypatch.setattr(loaded, "outputs", tmp_path)
    return loaded


def job_of(runner, **changes):
    base = {"mode": "sparse", "width": 48, "height": 32, "frames": 3, "steps": 4}
    base |= {"guidance": 4.0, "seed": 0}
    values = FormValues(prompt=PROMPT, **(base | changes))
    return Job("page", runner.form.read(values), clock=lambda: 0.0)


def watch(monkeypatch, see):
    """Calls `see` with each progress that a job shows."""
    shown = runner_module._Shown._show

    def show(self, progress):
        shown(self, progress)
        see(self._job, progress)

    monkeypatch.setattr(runner_module._Shown, "_show", show)


@pytest.mark.nightly
def test_a_run_is_saved_as_the_command_line_saves_it(
    runner, checkpoint, tmp_path, monkeypatch
):
    job = job_of(runner)
    assert runner.run(job)
    report = json.loads((job.folder / "report.json").read_text())
    # The command in the report makes the same run in the same folder.
    typed = report["command"].removeprefix("draft-video ")
    assert typed.endswith(f"-- '{PROMPT}'")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert main(job.work.arguments.argv) == 0
    (made,) = (elsewhere / "outputs").iterdir()
    assert made.name == job.folder.name
    assert {file.name for file in made.iterdir()} == {
        file.name for file in job.folder.iterdir()
    }
    assert (made / "video.mp4").read_bytes() == (job.folder / "video.mp4").read_bytes()


@pytest.mark.nightly
def test_progress_of_a_comparison(runner, monkeypatch):
    seen = []
    watch(monkeypatch, lambda job, progress: seen.append(progress))
    job = job_of(runner, mode="compare")
    assert runner.run(job)
    steps = [(p.stage.split(":")[0], p.step) for p in seen if p.step]
    assert steps == [(name, n) for name in ("dense", "sparse") for n in (1, 2, 3, 4)]
    assert [p.kept_share for p in seen if p.step][:5] == [1.0] * 5
    assert seen[-1].kept_share < 1.0
    assert seen[-1].seconds_left == 0
    assert all(p.seconds_left > 0 for p in seen if p.step and p is not seen[-1])
    assert seen[-1].preview.startswith(b"\xff\xd8")  # JPEG
    (run,) = list_runs(runner.outputs)
    assert "psnr_db" in run.report
    # The next one's time is known.
    expected = runner.expect(job.work)
    assert expected.bound == "about"
    assert expected.seconds > 0


def stop_after_first_step(monkeypatch, stage):
    def see(job, progress):
        if progress.stage == stage and progress.step == 1:
            job.stop()

    watch(monkeypatch, see)


@pytest.mark.nightly
def test_a_stopped_run_is_kept_as_far_as_it_is(runner, monkeypatch):
    stop_after_first_step(monkeypatch, "sparse")
    job = job_of(runner)
    assert not runner.run(job)
    report = json.loads((job.folder / "report.json").read_text())
    assert report["stopped"]
    # Stopped in the second step, of which the page was told after the first.
    assert len(report["time_ms_per_step"]) == 2
    assert (job.folder / "video.mp4").stat().st_size > 0


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("stage", "files"),
    [
        ("dense", {"video.mp4", "report.json", "report.html"}),
        ("sparse", {"dense.mp4", "sparse.mp4", "side_by_side.mp4", "kept_share.png"}),
    ],
)
def test_a_stopped_comparison_has_what_was_computed(runner, monkeypatch, stage, files):
    stop_after_first_step(monkeypatch, stage)
    job = job_of(runner, mode="compare")
    assert not runner.run(job)
    found = {file.name for file in job.folder.iterdir()}
    assert found == files | {"report.json", "report.html"}
    report = json.loads((job.folder / "report.json").read_text())
    assert (report if stage == "dense" else report["sparse"])["stopped"]


@pytest.mark.nightly
def test_a_video_that_is_not_decoded_leaves_its_latents(runner, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    job = job_of(runner, mode="dense")
    with monkeypatch.context() as patch:
        # Not previews, which one latent frame is enough for.
        patch.setattr(runner_module._Shown, "_preview", lambda *_: None)
        patch.setattr(WanVAECodec, "decode_to_host", fail)
        with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED") as caught:
            runner.run(job)
    assert f"`draft-video decode {job.folder}`" in str(caught.value)
    assert [file.name for file in job.folder.iterdir()] == ["latents.safetensors"]
    links = fragments.result_of(runner.outputs, job.folder)
    assert f"/runs/{job.folder.name}/latents.safetensors" in links
    assert main(["decode", str(job.folder)]) == 0
    assert [run.folder for run in list_runs(runner.outputs)] == [job.folder]


@pytest.mark.nightly
def test_a_preview_without_memory_costs_no_run(runner, monkeypatch):
    asked = []

    def fail(*_):
        asked.append(1)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(VideoPipeline, "preview", fail)
    job = job_of(runner)
    assert runner.run(job)
    assert job.notes == ["There is no preview: RESOURCE_EXHAUSTED: out of memory"]
    assert len(asked) == 1
    assert job.progress.preview is None


def test_what_fails_leaves_no_folder_and_says_why(runner, monkeypatch):
    def fail(*arguments, **options):
        raise FloatingPointError("the latent is not finite")

    monkeypatch.setattr(runner_module, "make_run", fail)
    with pytest.raises(RuntimeError, match="the latent is not finite"):
        runner.run(job_of(runner))
    assert list(runner.outputs.iterdir()) == []


def test_a_fault_of_the_program_is_no_message_of_its_own(runner, monkeypatch, capsys):
    def fail(*arguments, **options):
        raise KeyError("inner")

    monkeypatch.setattr(runner_module, "make_run", fail)
    with pytest.raises(RuntimeError, match=r"fault of the program \(KeyError\)"):
        runner.run(job_of(runner))
    assert "Traceback" in capsys.readouterr().err  # for whoever runs the server


def test_runs_of_the_same_settings_have_folders_of_their_own(runner, monkeypatch):
    def write(files, *rest):
        files.write("report.json", lambda path: path.write_text("{}"))

    monkeypatch.setattr(runner_module, "make_run", write)
    jobs = [job_of(runner) for _ in range(3)]
    assert all(map(runner.run, jobs))
    names = [job.folder.name for job in jobs]
    assert names == [names[0], f"{names[0]}-2", f"{names[0]}-3"]


def test_memory_is_limited_by_an_estimate(runner, monkeypatch):
    request = job_of(runner, sparsity=0.75, selection="percentile").work
    needed = run_bytes(request, runner._pipeline)
    # 16 arrays of 2 rows of 48 tokens of 24 channels, and 8 videos, all in float32.
    step, videos = 16 * 2 * 48 * 24 * 4, 8 * 3 * 3 * 32 * 48 * 4
    # Of 3 layers and 2 rows with 2 heads each, of 8 x 8 tiles the fourth part: column,
    # row offsets and what else a mask has, each an int32 or less.
    masks = needed - step - videos
    assert 3 * 2 * 2 * 16 * 4 <= masks <= 3 * 2 * 2 * (2 * 16 + 3 * 9) * 4
    dense = run_bytes(job_of(runner, mode="dense").work, runner._pipeline)
    assert dense == step + videos
    cached = job_of(runner, mode="dense", cache="easy").work
    assert run_bytes(cached, runner._pipeline) == dense + 2 * 48 * 24 * 4
    unguided = job_of(runner, mode="dense", guidance=1.0).work
    assert run_bytes(unguided, runner._pipeline) == step // 2 + videos
    monkeypatch.setattr(runner, "_limits", Limits(memory_bytes=needed))
    job_of(runner, sparsity=0.75, selection="percentile")
    with pytest.raises(FormError) as caught:
        job_of(runner, frames=5)
    assert "--max-memory" in caught.value.messages["frames"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text.png", "cannot be read"),
        ("picture.gif", "the image is GIF"),
        ("large.png", "40000000"),
    ],
)
def test_images_that_are_refused(runner, tmp_path, monkeypatch, name, message):
    path = tmp_path / name
    if name == "text.png":
        path.write_text("no picture")
    elif name == "picture.gif":
        Image.new("RGB", (8, 8)).save(path)
    else:
        Image.new("1", (8000, 5001)).save(path)
    with pytest.raises(FormError) as caught:
        runner.store_image(path)
    assert message in caught.value.messages["image"]


def test_images_are_kept_beside_the_runs(runner, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 3), np.uint8)
    path = tmp_path / "upload.tmp"
    Image.fromarray(pixels).save(path, "PNG")
    stored = runner.store_image(path)
    assert stored.parent == runner.outputs / "uploads"
    assert stored.suffix == ".png"
    np.testing.assert_array_equal(np.asarray(Image.open(stored)), pixels)
    assert runner.store_image(path) == stored


def test_a_warning_is_a_note_of_its_own_threads_job(capsys):
    heard = {"a": [], "b": []}

    def warn(name):
        with runner_module._notes_to(heard[name]):
            warnings.warn(f"of {name}", stacklevel=1)
            warnings.warn(f"of {name}", stacklevel=1)

    with hear_warnings():
        threads = [threading.Thread(target=warn, args=name) for name in heard]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        warnings.warn("of nobody", stacklevel=1)
    assert heard == {"a": ["of a"], "b": ["of b"]}
    assert capsys.readouterr().err == "draft-video: note: of nobody\n"
