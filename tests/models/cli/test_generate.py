"""`draft-video generate` on a tiny random model, from arguments to files."""

import dataclasses
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest

from models.cli import generate, main, options
from models.cli import model as cli_model
from models.cli.model_options import parse_lora
from models.cli.parser import build_parser
from models.diffusion.pipeline import VideoPipeline
from models.diffusion.schedulers import FlowUniPC
from models.files import whole_file
from models.loading import load_pipeline
from models.media import video as video_io
from models.mini import checkpoint as mini_checkpoint
from models.wan.sampling import wan_sampling
from tests import tiny_model

PROMPT = "a red ball"
SMALL = ("--size", "48x32", "--frames", "3", "--steps", "4")
COMPARISON_FILES = {
    "dense.mp4",
    "sparse.mp4",
    "side_by_side.mp4",
    "kept_share.png",
    "report.json",
    "report.html",
}
RUN_KEYS = {
    "time_ms_per_step",
    "time_ms_median_step",
    "time_ms_all_steps",
    "compile_ms",
    "decode_ms",
    "timesteps",
    "dense_steps",
    "skipped_steps",
    "work_per_step",
    "weight_only_steps",
    "work_share",
    "extra_work_of_a_sparse_layer",
    "stopped",
    "kept_share",
    "kept_share_per_layer",
    "kept_share_per_step_and_layer",
}
DETAIL_KEYS = {
    "cache",
    "speed",
    "mesh",
    "family",
    "method",
    "preset",
    "image",
    "model",
    "commit",
    "loras",
    "prompt",
    "command",
    "date",
    "checkpoint",
    "sampling",
    "draft",
    "schedule",
    "hardware",
    "linears",
    "versions",
    "fps",
}
COMPARISON_KEYS = {
    "psnr_db",
    "psnr_db_per_frame",
    "ssim",
    "sparse_steps",
    "skipped_steps",
    "speed_up_of_sparse_steps",
    "speed_up_of_all_steps",
    "dense",
    "sparse",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(tiny_model.save_checkpoint(tmp_path_factory.mktemp("checkpoint")))


def run(checkpoint, *arguments, prompt=PROMPT):
    return main(["generate", prompt, "--checkpoint", checkpoint, *SMALL, *arguments])


def names_in(folder):
    return {file.name for file in folder.iterdir()}


def read_report(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def comparison(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison") / "new" / "folder"
    assert run(checkpoint, "--compare", "--output", str(folder)) == 0
    return folder


# ---------------------------------------------------------------- what is written


def test_comparison_writes_its_files_and_nothing_else(comparison):
    assert names_in(comparison) == COMPARISON_FILES
    dense, sparse, joined = (
        video_io.read_mp4(comparison / name)
        for name in ("dense.mp4", "sparse.mp4", "side_by_side.mp4")
    )
    assert dense.shape == sparse.shape == (3, 32, 48, 3)
    assert joined.shape == (3, 32, 96, 3)
    # Each was compressed on its own, so they agree only roughly.
    halves = joined[:, :, :48].astype(float), joined[:, :, 48:].astype(float)
    for half, video in zip(halves, (dense, sparse), strict=True):
        assert np.abs(half - video).mean() < 8
    assert (comparison / "kept_share.png").read_bytes().startswith(b"\x89PNG")


def test_comparison_report(comparison):
    report = read_report(comparison)
    assert set(report) == DETAIL_KEYS | COMPARISON_KEYS
    assert set(report["dense"]) == set(report["sparse"]) == RUN_KEYS
    assert report["prompt"] == PROMPT
    assert report["command"].startswith("draft-video generate 'a red ball' --check")
    assert report["sampling"] == {
        "frames": 3,
        "height": 32,
        "width": 48,
        "num_steps": 4,
        "guidance": 4.0,
        "embedded_guidance": None,
        "low_guidance": None,
        "boundary": None,
        "shift": 3.0,
        "solver": "euler",
        "grid": None,
        "seed": 0,
        "negative_prompt": "",
    }
    assert report["draft"]["sparsity"] == 0.9
    assert report["schedule"]["dense_fraction"] == 0.25
    assert 5 < report["psnr_db"] < 80
    errors = 10 ** (-0.1 * np.array(report["psnr_db_per_frame"]))
    assert len(errors) == 3
    assert -10 * np.log10(errors.mean()) == pytest.approx(report["psnr_db"])
    assert report["fps"] == 12.0
    assert 0 < report["ssim"] < 1
    dense, sparse = report["dense"], report["sparse"]
    assert (dense["dense_steps"], sparse["dense_steps"]) == (4, 1)
    assert report["sparse_steps"] == 3
    assert dense["kept_share_per_layer"] == [1.0] * 3
    kept = np.array(sparse["kept_share_per_step_and_layer"])
    assert kept.shape == (4, 3)
    np.testing.assert_array_equal(kept[0], 1.0)
    # 16 of 64 tile pairs; the four big tiles of a frame pair have twice the tokens.
    assert (kept[1:] > 0.1).all()
    assert (kept[1:] < 0.5).all()
    np.testing.assert_allclose(sparse["kept_share_per_layer"], kept.mean(0))
    for one in (dense, sparse):
        assert len(one["time_ms_per_step"]) == len(one["timesteps"]) == 4
        assert one["time_ms_all_steps"] == pytest.approx(
            sum(one["time_ms_per_step"]), rel=1e-3
        )
    assert report["speed_up_of_all_steps"] == pytest.approx(
        dense["time_ms_all_steps"] / sparse["time_ms_all_steps"]
    )


@pytest.mark.nightly
def test_sparsity_zero_equals_dense(checkpoint, tmp_path, capsys):
    options = ("--sparsity", "0", "--dense-fraction", "0", "--selection", "row_topk")
    assert run(checkpoint, "--compare", *options, "--output", str(tmp_path)) == 0
    report = read_report(tmp_path)
    assert report["psnr_db"] is None or report["psnr_db"] > 80
    assert report["ssim"] > 0.99999
    assert report["sparse"]["kept_share"] == 1.0
    assert report["sparse_steps"] == 4
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("dense: ")
    assert printed[1].startswith("sparse: ")
    assert printed[-1] == str(tmp_path / "report.html")


@pytest.mark.nightly
def test_a_seed_gives_the_same_file_and_another_seed_another(
    checkpoint, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    pipeline = load_pipeline(checkpoint)  # compiled only once
    monkeypatch.setattr(cli_model, "load_pipeline", lambda *_, **__: pipeline)
    for folder, seed in (("one", "5"), ("same", "5"), ("other", "6")):
        assert run(checkpoint, "--seed", seed, "--output", folder) == 0
    one, same, other = (
        (tmp_path / folder / "video.mp4").read_bytes()
        for folder in ("one", "same", "other")
    )
    assert one == same
    assert one != other
    assert names_in(tmp_path / "one") == {
        "video.mp4",
        "kept_share.png",
        "report.json",
        "report.html",
    }
    report = read_report(tmp_path / "one")
    assert set(report) == DETAIL_KEYS | RUN_KEYS | {"attention"}
    assert report["attention"] == "draft"
    assert run(checkpoint, "--dense", "--fps", "6", prompt="Blue   SEA!") == 0
    (folder,) = (tmp_path / "outputs").iterdir()  # the default
    assert re.fullmatch("blue-sea-0-[0-9a-f]{8}", folder.name)
    assert names_in(folder) == {"video.mp4", "report.json", "report.html"}
    assert read_report(folder)["attention"] == "dense"
    assert read_report(folder)["kept_share"] == 1.0


# --------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sparsity", "1.0"), "sparsity=1.0 must be a number in [0, 1)"),
        (("--sparsity", "-0.1"), "sparsity=-0.1 must be a number in [0, 1)"),
        (("--sparsity", "much"), "argument --sparsity: invalid float value: 'much'"),
        (("--solver", "heun"), "argument --solver: invalid choice: 'heun'"),
        (("--selection", "random"), "argument --selection: invalid choice: 'random'"),
        (("--selection", "top_p", "--top-p", "0"), "top_p=0.0 must be a number in"),
        (("--size", "50x32"), "width=50 must be a multiple of 8"),
        (("--size", "48x33"), "height=33 must be a multiple of 8"),
        (("--size", "48"), "argument --size: '48' must be WIDTHxHEIGHT"),
        (("--size", "0x32"), "width=0 must be a positive integer"),
        (("--frames", "4"), "frames=4 must be 1 more than a multiple of 2"),
        (("--frames", "-2"), "frames=-2 must be a positive integer"),
        (("--steps", "0"), "num_steps=0 must be a positive integer"),
        (("--seed", "-1"), "seed=-1 must be an integer in [0, 2**32)"),
        (("--fps", "0"), "fps=0.0 must be in [0.01, 1000]"),
        (("--fps", "1e-9"), "fps=1e-09 must be in [0.01, 1000]"),
        (("--compare", "--size", "8208x16"), "16 x 16416 pixels: an H.264 video has"),
        (("a\x1b[2Jball",), r"unrecognized arguments: a\x1b[2Jball (put the prompt"),
        (("--guidance", "inf"), "guidance=inf must be a finite number"),
        (("--mask-refresh", "0"), "mask_refresh=0 must be"),
        (("--dense-layers", "1,9"), "names layers [9]; the model has num_layers=3"),
        (("--dense-layers", "1-2"), "'1-2' must be numbers from 0 with commas"),
        (("--dense-fraction", "1.5"), "dense_fraction=1.5 must be"),
        (("--dense", "--compare"), "not allowed with argument --dense"),
        (("--compare", "--size", "8x8"), "smaller than the 11 x 11 window of SSIM"),
        (("ball",), "unrecognized arguments: ball (put the prompt in quotes)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_options_are_told_in_one_line(
    checkpoint, tmp_path, capsys, arguments, message
):
    folder = tmp_path / "out"
    assert run(checkpoint, *arguments, "--output", str(folder)) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("draft-video")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not folder.exists()


def test_the_solver_is_passed_on():
    arguments = build_parser().parse_args(["generate", PROMPT, "--solver", "unipc"])
    assert options.sampling_from(arguments).make_solver() == FlowUniPC(
        num_steps=16, shift=3.0
    )


@pytest.mark.nightly
def test_guidance_in_two_calls_from_the_command_line(checkpoint, tmp_path, monkeypatch):
    seen = []
    original = VideoPipeline.generate

    def generate_and_note(self, *arguments, **options):
        seen.append(options["guidance_batching"])
        return original(self, *arguments, **options)

    monkeypatch.setattr(VideoPipeline, "generate", generate_and_note)
    chosen = ("--dense", "--guidance-batching", "two_calls", "--steps", "1")
    assert run(checkpoint, *chosen, "--output", str(tmp_path)) == 0
    assert seen == ["two_calls"]


@pytest.mark.parametrize(
    ("prompt", "note"),
    [
        ("", "a prompt is empty: the video is what the model makes without text"),
        (
            "一只狗 runs",
            "the model was not trained on '一只狗', 'runs'; it knows: a ball ",
        ),
    ],
    ids=["empty", "chinese"],
)
def test_prompts_that_say_little_get_a_note(
    checkpoint, capsys, tmp_path, monkeypatch, prompt, note
):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(VideoPipeline, "compile", stop)
    options = ("--sparsity", "0.5", "--output", str(tmp_path / "out"))
    assert run(checkpoint, *options, prompt=prompt) == 130
    notes, last = capsys.readouterr().err.splitlines()
    assert notes.startswith(f"draft-video: note: {note}")
    assert last == "draft-video: interrupted"


def test_missing_checkpoint_is_named(tmp_path, capsys):
    assert run(str(tmp_path / "absent"), "--output", str(tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'absent'} does not exist; expected a folder, or" in error
    assert error.count("\n") == 1


def test_missing_shipped_weights_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mini_checkpoint, "SHIPPED", tmp_path / "weights")
    assert main(["generate", PROMPT, "--output", str(tmp_path / "out")]) == 2
    assert f"checkpoint {tmp_path / 'weights'} is not a" in capsys.readouterr().err


def test_incomplete_checkpoint_is_named(tmp_path, capsys):
    folder = tiny_model.save_checkpoint(tmp_path / "weights")
    (folder / "codec.safetensors").unlink()
    assert run(str(folder), "--output", str(tmp_path / "out")) == 2
    assert "lacks ['codec.safetensors']; expected" in capsys.readouterr().err


def test_output_below_a_file_is_refused_before_any_work(checkpoint, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    for output in (file, file / "below"):
        assert run(checkpoint, "--output", str(output)) == 2
        assert f"{file} is not a folder" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs Linux's /proc")
def test_unwritable_output_is_refused_before_any_work(checkpoint, capsys):
    """/proc cannot be written to even by root."""
    assert run(checkpoint, "--output", "/proc/videos") == 2
    error = capsys.readouterr().err
    assert "--output /proc/videos: /proc cannot be written to (" in error
    assert error.count("\n") == 1


def test_missing_video_extra_names_the_command(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(video_io.importlib.util, "find_spec", lambda name: None)
    assert run(checkpoint) == 2
    expected = "run pip install '.[video]' in a clone of draft_jax"
    assert expected in capsys.readouterr().err


def test_debug_shows_the_traceback(checkpoint, capsys):
    assert run(checkpoint, "--sparsity", "2", "--debug") == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["paint"], "invalid choice: 'paint'"),
        (["generate"], "the following arguments are required: prompt"),
    ],
    ids=["none", "unknown", "no-prompt"],
)
def test_missing_and_unknown_commands(capsys, arguments, message):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["--help"], ["generate", "--help"], ["inspect", "--help"]], ids=str
)
def test_help(capsys, arguments):
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "usage: draft-video" in shown
    words = " ".join(shown.split())
    assert "give a video each (generate only) [0]" in words or len(arguments) == 1
    for nothing in ("None", "False", "()", "[]", ")"):
        assert f"(default: {nothing})" not in shown


# ------------------------------------------------------------------------- Ctrl-C


def test_interrupt_during_sampling_leaves_no_file(
    checkpoint, tmp_path, capsys, monkeypatch
):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(VideoPipeline, "generate", stop)
    assert run(checkpoint, "--output", str(tmp_path / "out")) == 130
    assert capsys.readouterr().err == "draft-video: interrupted\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.nightly
def test_interrupt_during_writing_leaves_whole_files_only(
    checkpoint, comparison, tmp_path, monkeypatch
):
    """Ctrl-C while the picture is drawn: the videos are whole, the rest is absent.

    The old report, which belonged to other videos, is gone too.
    """
    (tmp_path / "report.json").write_text("{}")

    def stop(path, *_, **__):
        with whole_file(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    monkeypatch.setattr(generate.plots, "plot_kept_share", stop)
    assert run(checkpoint, "--compare", "--overwrite", "--output", str(tmp_path)) == 130
    assert names_in(tmp_path) == {"dense.mp4", "sparse.mp4", "side_by_side.mp4"}
    for name in names_in(tmp_path):
        whole = video_io.read_mp4(comparison / name)
        np.testing.assert_array_equal(video_io.read_mp4(tmp_path / name), whole)


# Where the tests run in the background, SIGINT is ignored and children inherit that.
WITH_INTERRUPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from models.cli import run_process
sys.exit(run_process())
"""


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("number", "status", "words"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_real_signal_on_a_terminal(checkpoint, tmp_path, number, status, words):
    """A signal in the middle of a long run whose progress bar is on a terminal."""
    terminal, child_side = pty.openpty()
    termios.tcsetwinsize(terminal, (30, 90))
    command = [sys.executable, "-c", WITH_INTERRUPT, "generate", PROMPT]
    command += ["--checkpoint", checkpoint, *SMALL[:4], "--steps", "100000"]
    command += ["--output", str(tmp_path / "out")]
    child = subprocess.Popen(command, stdout=child_side, stderr=child_side)
    os.close(child_side)
    try:
        shown = read_until(terminal, "% of pairs")
        child.send_signal(number)
        shown += read_until(terminal, words)
        assert child.wait(timeout=60) == status
    finally:
        child.kill()
        os.close(terminal)
    assert re.search(r"/100000 \[\d+:\d+<[\d:]+, ", shown), "steps done, time left"
    assert f"draft-video: {words}" in shown
    assert "Traceback" not in shown
    assert list(tmp_path.iterdir()) == []


def read_until(terminal, text, seconds=120):
    """Returns what is printed up to the text, or until the time is over."""
    shown, deadline = "", time.monotonic() + seconds
    while text not in shown and time.monotonic() < deadline:
        if select.select([terminal], [], [], 1.0)[0]:
            try:
                shown += os.read(terminal, 4096).decode(errors="replace")
            except OSError:  # the program has gone, and the terminal with it
                break
    return shown


# ------------------------------------------------- settings that a checkpoint has


def test_what_is_not_given_is_the_checkpoints():
    parser = build_parser()
    arguments = parser.parse_args(["generate", "a cat", "--size", "64x32"])
    default = wan_sampling("480p", grid="diffusers", seed=3)
    sampling = options.sampling_from(arguments, default)
    assert sampling == dataclasses.replace(default, width=64, height=32)


@pytest.mark.parametrize(
    ("given", "solver", "grid"),
    [
        ("", "unipc", "diffusers"),
        ("--solver unipc", "unipc", "diffusers"),
        ("--grid wan", "unipc", "wan"),
        ("--solver unipc --grid wan", "unipc", "wan"),
        ("--solver euler", "euler", None),
        ("--solver euler --grid diffusers", "euler", "diffusers"),
    ],
)
def test_noise_levels_of_a_checkpoint_are_kept(given, solver, grid):
    arguments = build_parser().parse_args(["generate", "a cat", *given.split()])
    default = wan_sampling("480p", grid="diffusers")
    sampling = options.sampling_from(arguments, default)
    assert (sampling.solver, sampling.grid) == (solver, grid)


def test_noise_levels_of_another_solver_are_refused(checkpoint, capsys):
    assert run(checkpoint, "--grid", "wan") == 2
    expected = "--grid wan is none of the solver euler, which has linear and diffusers"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "file", "strength"),
    [("a.safetensors", "a.safetensors", 1.0), ("b:0.5", "b", 0.5), ("c:d", "c:d", 1.0)],
)
def test_adapters(text, file, strength):
    assert parse_lora(text) == (Path(file), strength)


def test_adapters_need_a_wan_model(checkpoint, capsys):
    assert run(checkpoint, "--lora", "style.safetensors:0.7") == 2
    assert "style.safetensors" in capsys.readouterr().err
