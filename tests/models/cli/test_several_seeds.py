"""`draft-video generate --seed 3,4`: a video for each seed."""

import json

import pytest

from models.cli import main, options, outputs
from models.cli.messages import EXIT_INCOMPLETE
from models.cli.parser import build_parser
from models.media import plots
from models.media import video as video_io
from tests import tiny_model

PROMPT = "a red ball"
SMALL = ["--size", "48x32", "--frames", "3", "--steps", "1", "--guidance", "1"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(tiny_model.save_checkpoint(tmp_path_factory.mktemp("checkpoint")))


def run(checkpoint, *arguments):
    command = ["generate", PROMPT, "--checkpoint", checkpoint, *SMALL]
    return main([*command, *map(str, arguments)])


@pytest.mark.nightly
def test_each_video_is_the_one_that_its_seed_gives_alone(checkpoint, tmp_path, capsys):
    folder = tmp_path / "several"
    assert run(checkpoint, "--seed", "3,4", "--dense", "--output", folder) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("/")] == [
        str(folder / seed / name)
        for seed in ("3", "4")
        for name in ("video.mp4", "report.json", "report.html")
    ]
    one = tmp_path / "one"
    assert run(checkpoint, "--seed", "4", "--dense", "--output", one) == 0
    videos = [
        (place / "video.mp4").read_bytes()
        for place in (folder / "4", one, folder / "3")
    ]
    assert videos[0] == videos[1] != videos[2]
    for seed in (3, 4):
        report = json.loads((folder / str(seed) / "report.json").read_text())
        assert report["sampling"]["seed"] == seed


def test_a_video_has_the_same_name_with_other_seeds_or_alone():
    def names(text):
        arguments = build_parser().parse_args(["generate", PROMPT, "--seed", text])
        sampling = options.sampling_from(arguments)
        return outputs.run_name(arguments, sampling)

    assert names("4,3") == names("4")
    assert names("3,4") == names("3") != names("4")


@pytest.mark.parametrize(
    ("broken", "missing", "written"),
    [
        ((plots, "plot_kept_share"), ["3/kept_share.png", "4/kept_share.png"], 2),
        ((video_io, "write_mp4"), ["3/video.mp4"], 0),  # as on a full disk
    ],
    ids=["picture", "video"],
)
def test_a_picture_that_fails_does_not_cost_the_other_seeds(
    checkpoint, tmp_path, capsys, monkeypatch, broken, missing, written
):
    def fail(*_, **__):
        raise RuntimeError("no ink")

    monkeypatch.setattr(*broken, fail)
    assert run(checkpoint, "--seed", "3,4", "--output", tmp_path) == EXIT_INCOMPLETE
    error = capsys.readouterr().err
    names = [f"{tmp_path / name} (RuntimeError: no ink)" for name in missing]
    assert " and ".join(names) in error
    assert error.count("no ink") == len(missing)
    assert len(list(tmp_path.glob("*/video.mp4"))) == written


def test_no_seed_is_computed_if_one_has_no_place(checkpoint, tmp_path, capsys):
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / "video.mp4").write_text("of an earlier run")
    assert run(checkpoint, "--seed", "3,4", "--output", tmp_path) == 2
    assert f"{tmp_path / '4'}: an earlier run has left" in capsys.readouterr().err
    assert not (tmp_path / "3").exists()


@pytest.mark.parametrize(
    ("command", "seeds", "message"),
    [
        ("generate", "3,x", "'3,x' must be a seed, or seeds with commas between"),
        ("generate", "3,", "'3,' must be a seed, or seeds with commas between"),
        ("generate", "3,4,3", "'3,4,3' names a seed twice"),
        ("generate", "3,4294967296", "seed=4294967296 must be an integer in [0, 2"),
        ("inspect", "3,4", "--seed 3,4: inspect looks at one run; give one seed"),
    ],
)
def test_wrong_seeds_are_told(capsys, command, seeds, message):
    assert main([command, PROMPT, "--seed", seeds]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
