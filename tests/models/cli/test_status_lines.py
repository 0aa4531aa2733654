"""Lines on a terminal that say which stage of a run has begun."""

import logging

import pytest
from PIL import Image

from models.cli import main
from models.cli.messages import status_lines
from tests.cases import mostly_nightly
from tests.wan_folders import save_image_to_video

STAGES = [
    "loading the text encoder",
    "encoding the text",
    "loading the image encoder",
    "loading the VAE",
    "loading the transformer",
    "encoding the image",
    "decoding the video",
]


@pytest.mark.nightly
@pytest.mark.parametrize(
    "terminal", mostly_nightly([True, False], [True]), ids=["terminal", "file"]
)
def test_stages_are_told_on_a_terminal_only(tmp_path, capsys, monkeypatch, terminal):
    folder, image = save_image_to_video(tmp_path / "model"), tmp_path / "image.png"
    Image.new("RGB", (48, 32)).save(image)
    command = ["generate", "a cat", "--checkpoint", str(folder), "--image", str(image)]
    command += ["--size", "48x32", "--frames", "5", "--steps", "1", "--guidance", "1"]
    command += ["--sparsity", "0.5"]  # more can't be had of two blocks: a note says so
    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr.isatty", lambda: terminal)
        assert main([*command, "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().err
    if not terminal:
        assert shown == ""
        return
    lines = shown.replace("\r", "\n").splitlines()
    told = [line for line in lines if line.startswith("draft-video: ")]
    assert told == [f"draft-video: {stage}" for stage in STAGES]
    log = logging.getLogger("models")
    assert (log.handlers, log.level) == ([], logging.NOTSET)


def test_names_in_stages_do_not_steer_the_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with status_lines():
        logging.getLogger("models.hub").info("fetching a\x1b[2J\u202eb")
    assert capsys.readouterr().err == "draft-video: fetching a\\x1b[2J\\u202eb\n"
