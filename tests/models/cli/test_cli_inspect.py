"""`draft-video inspect` on a tiny random model."""

import re

import matplotlib.image
import pytest

from models.cli import main
from models.report.page import read_page
from tests import tiny_model

PROMPT = "a red ball"
SMALL = ("--size", "48x32", "--frames", "3", "--steps", "4")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(tiny_model.save_checkpoint(tmp_path_factory.mktemp("checkpoint")))


def run(checkpoint, *arguments):
    return main(["inspect", PROMPT, "--checkpoint", checkpoint, *SMALL, *arguments])


@pytest.mark.nightly
def test_picture_and_table(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(checkpoint, "--sparsity", "0.5", "--dense-layers", "1") == 0
    *table, path, page = capsys.readouterr().out.splitlines()
    assert re.fullmatch("outputs/a-red-ball-0-[0-9a-f]{8}-step2.png", path)
    assert page == path.removesuffix("png") + "html"
    written = {tmp_path / path, tmp_path / page}
    assert set((tmp_path / "outputs").iterdir()) == written
    data = read_page((tmp_path / page).read_text())
    assert data["report"]["videos"] == []
    assert data["report"]["runs"][0]["report"]["step"] == 2
    explorer = data["explorer-0"]
    assert (explorer["layers"], explorer["heads"]) == ([0, 1, 2], [0, 1])
    assert explorer["dense"] == [[False, True, False]]
    assert len(explorer["frames"]) == 2
    rows = [[float(n) for n in re.findall(r"[\d.]+", line)] for line in table[1:]]
    assert [row[0] for row in rows] == [0, 1, 2]
    for line, (_, kept, mass, top_mass, *_) in zip(table[1:], rows, strict=True):
        # Half of the 64 tile pairs, perhaps one more where a row was empty.
        assert 50.0 <= kept <= 60.0
        assert 40.0 < mass < 100.0
        assert 10.0 < top_mass < mass
        assert ("(dense at this step)" in line) == (line == table[2])


@pytest.mark.nightly
def test_chosen_panels(checkpoint, tmp_path):
    sizes = []
    for layers, heads in (("0,2", "0,1"), ("2", "1")):
        path = tmp_path / f"{heads}.png"
        arguments = ("--layers", layers, "--heads", heads, "--output", str(path))
        assert run(checkpoint, "--step", "0", *arguments) == 0
        picture = matplotlib.image.imread(path)
        sizes.append(picture.shape[:2])
        assert picture[..., :3].std() > 0.1  # something is drawn
    (height, width), (height_of_one, width_of_one) = sizes
    assert height > 1.5 * height_of_one
    assert width > 1.5 * width_of_one


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--step", "4"), "step=4 must be in 0 .. 3"),
        (("--step", "-1"), "step=-1 must be in 0 .. 3"),
        (("--layers", "3"), "layers=(3,) must be at least one of 0 .. 2, as the"),
        (("--heads", "0,2"), "heads=(0, 2) must be at least one of 0 .. 1, as the"),
        (("--heads", ""), "heads=() must be at least one"),
        (("--heads", "all"), "argument --heads: 'all' must be numbers"),
        (("--output", "map.jpg"), "--output map.jpg must end in .png"),
        (("--sparsity", "1"), "sparsity=1.0 must be a number in [0, 1)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_options_are_told_in_one_line(
    checkpoint, tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    assert run(checkpoint, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_output_that_is_a_folder_is_refused(checkpoint, tmp_path, capsys):
    folder = tmp_path / "folder.png"
    folder.mkdir()
    assert run(checkpoint, "--output", str(folder)) == 2
    assert f"--output {folder} is a folder" in capsys.readouterr().err


def test_a_page_of_an_earlier_run_is_kept(checkpoint, tmp_path, capsys):
    page = tmp_path / "map.html"
    page.write_text("mine")
    assert run(checkpoint, "--output", str(tmp_path / "map.png")) == 2
    assert f"{page} exists; --overwrite replaces it" in capsys.readouterr().err
    assert page.read_text() == "mine"
