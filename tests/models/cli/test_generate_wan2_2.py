"""`draft-video` on folders of Wan2.2's tiny models: a pair, and text or image."""

import json

import numpy as np
import pytest
from PIL import Image

from models.cli import main
from models.cli.model import read_request
from models.cli.parser import build_parser
from models.umt5.text_encoder import UMT5TextEncoder
from models.wan.checkpoint import WanParts
from tests.wan_folders import save_pair, save_text_or_image_to_video

PROMPT = "a cat"
# Of 8 steps 5 are those of high noise.
SMALL = ("--size", "48x32", "--frames", "5", "--steps", "8", "--sparsity", "0.5")
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.filterwarnings("ignore::models.wan.pair.SchedulerWarning"),
    pytest.mark.filterwarnings("ignore:sparsity=:UserWarning"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan2_2")
    return {
        "pair": save_pair(folder / "pair", "diffusers"),
        "pair from an image": save_pair(folder / "i2v", "diffusers", from_image=True),
        "text or image": save_text_or_image_to_video(folder / "ti2v"),
    }


@pytest.fixture
def image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3))
    file = tmp_path / "image.png"
    Image.fromarray(pixels.astype(np.uint8)).save(file)
    return file


def run(command, checkpoint, output, *arguments):
    given = [command, PROMPT, "--checkpoint", str(checkpoint), *SMALL]
    assert main([*given, "--output", str(output), *map(str, arguments)]) == 0


def read_report(folder):
    return json.loads((folder / "report.json").read_text())


def test_comparison_of_a_pair_with_a_cache_and_rules_for_each(folders, tmp_path):
    """Steps of high noise have layer 0 dense, those of low noise layer 1 instead."""
    cache = ["--cache", "easy:1000,1", "--low-guidance", "1.5"]
    rules = ["--dense-layers", "0", "--low-dense-layers", "1", "--low-sparsity", "0.7"]
    size = ["--size", "256x256"]  # two tiles in a frame
    options = ["--compare", *cache, *rules, *size]
    run("generate", folders["pair"], tmp_path / "out", *options)
    report = read_report(tmp_path / "out")
    assert report["sampling"]["boundary"] == 875.0
    assert report["sampling"]["low_guidance"] == 1.5
    assert report["dense"]["work_per_step"] == ["dense"] * 8
    sparse = report["sparse"]
    start = [t >= 875 for t in sparse["timesteps"]].count(True)
    assert 3 < start < 7
    work = sparse["work_per_step"]
    # The first two of each are computed, for nothing is known before, and the last.
    computed = {0, 1, start, start + 1, 7}
    assert {i for i in range(8) if work[i] != "skipped"} == computed
    kept = np.array(sparse["kept_share_per_step_and_layer"])
    assert kept[start].tolist() == [pytest.approx(kept[start, 0]), 1.0]
    assert kept[start, 0] < 1.0


def test_settings_of_a_pair(folders):
    def request(*options):
        given = ["generate", PROMPT, "--checkpoint", str(folders["pair"]), *options]
        return read_request(build_parser().parse_args(given))

    published = request("--preset", "published").draft[1]
    assert published.dense_above_timestep == 925.0
    assert published.low_noise.dense_layers == (0,)
    assert request("--boundary", "950").sampling.boundary == 950.0
    # 26 and 14 steps: a cache that may skip all but the first and last of each.
    lines = request("--cache", "easy:0.1,1").describe()
    assert "at most 37 of 40 steps" in lines[-1]


def test_later_runs_of_a_pair_take_the_embeddings(folders, tmp_path, monkeypatch):
    kept = ("--embeddings", tmp_path / "kept", "--dense", "--steps", "2")
    run("generate", folders["pair"], tmp_path / "first", *kept)

    def fail(*_, **__):
        pytest.fail("the text encoder is loaded")

    monkeypatch.setattr(UMT5TextEncoder, "load", fail)
    run("generate", folders["pair"], tmp_path / "second", *kept)
    first, second = (tmp_path / name / "video.mp4" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("step", [1, 6])
def test_a_step_of_each_of_a_pair_is_inspected(folders, tmp_path, capsys, step):
    panels = ["--layers", "0,1", "--heads", "0", "--step", step, "--dense-fraction", 0]
    run("inspect", folders["pair"], tmp_path / "view.png", *panels)
    assert "(dense at this step)" not in capsys.readouterr().out
    assert (tmp_path / "view.html").stat().st_size > 10_000


def test_ratios_of_a_pair_are_measured_and_taken(folders, tmp_path, capsys):
    ratios = tmp_path / "ratios.json"
    run("calibrate", folders["pair"], ratios)
    start = [t >= 875 for t in a_pairs_timesteps(folders)].count(True)
    given = ["--cache", "mag:1000,9,0", "--cache-ratios", ratios]
    run("generate", folders["pair"], tmp_path / "out", *given)
    work = read_report(tmp_path / "out")["work_per_step"]
    computed = [index for index, kind in enumerate(work) if kind != "skipped"]
    assert computed == [0, start]
    assert "skips 6 of 8 steps" in capsys.readouterr().out


def a_pairs_timesteps(folders):
    given = ["generate", PROMPT, "--checkpoint", str(folders["pair"]), *SMALL]
    return (
        read_request(build_parser().parse_args(given)).sampling.make_solver().timesteps
    )


def test_linear_layers_of_both_are_in_float8(folders, tmp_path):
    options = ["--linears", "float8", "--dense", "--steps", "2", "--boundary", "950"]
    run("generate", folders["pair"], tmp_path / "out", *options)
    report = read_report(tmp_path / "out")
    assert report["linears"] == "float8"
    assert report["timesteps"][0] >= 950 > report["timesteps"][1]


@pytest.mark.parametrize("name", ["pair from an image", "text or image"])
def test_videos_of_an_image(folders, image, tmp_path, name):
    options = ["--image", image, "--size", "96x64", "--steps", "2", "--compare"]
    run("generate", folders[name], tmp_path / "out", *options, "--dense-fraction", 0)
    report = read_report(tmp_path / "out")
    assert report["image"]["size"] == [64, 96]
    assert report["sparse"]["work_per_step"] == ["sparse"] * 2
    assert (report["fps"] == 24.0) == (name == "text or image")


def test_the_5b_model_has_caches_float8_embeddings_and_looks(
    folders, image, tmp_path, monkeypatch, capsys
):
    """With a first frame that is held, whose tokens are at another time."""
    options = ["--image", image, "--size", "96x64", "--embeddings", tmp_path / "kept"]
    more = ["--cache", "easy:1000,1", "--linears", "float8", "--dense-fraction", 0]
    run("generate", folders["text or image"], tmp_path / "out", *options, *more)
    report = read_report(tmp_path / "out")
    work = report["work_per_step"]
    assert [i for i in range(8) if work[i] != "skipped"] == [0, 1, 7]
    assert report["linears"] == "float8"
    capsys.readouterr()

    def fail(*_, **__):
        pytest.fail("the text encoder is loaded")

    monkeypatch.setattr(UMT5TextEncoder, "load", fail)
    panels = ["--layers", "0,1", "--heads", "0", "--step", 1, "--dense-fraction", 0]
    view = tmp_path / "view.png"
    run("inspect", folders["text or image"], view, *options, *panels)
    assert "(dense at this step)" not in capsys.readouterr().out
    assert view.with_suffix(".html").stat().st_size > 10_000


def test_what_does_not_fit_is_refused_before_weights_are_loaded(
    folders, image, tmp_path, capsys, monkeypatch
):
    def fail(*_, **__):
        pytest.fail("weights are loaded")

    monkeypatch.setattr(WanParts, "load_transformer", fail)
    monkeypatch.setattr(UMT5TextEncoder, "load", fail)
    for name, options, message in (
        ("pair", ["--boundary", "1000"], "boundary=1000.0 must be a timestep"),
        ("pair", ["--low-sparsity", "1"], "sparsity=1.0 must be a number in [0, 1)"),
        ("pair", ["--low-dense-fraction", "2"], "dense_fraction=2.0 must be"),
        ("pair", ["--image", str(image)], "image is given, but this is a text-to"),
        ("pair from an image", [], "image is missing, but this is an image-to"),
        ("pair", ["--size", "40x32"], "must be a multiple of 16"),
        ("text or image", ["--size", "48x32"], "must be a multiple of 32"),
        ("text or image", ["--low-guidance", "3"], "models with two transformers only"),
        ("pair", ["--frames", "6"], "1 more than a multiple of 4"),
    ):
        given = ["generate", PROMPT, "--checkpoint", str(folders[name]), *SMALL]
        assert main([*given, "--output", str(tmp_path / "out"), *options]) == 2
        error = capsys.readouterr().err
        assert message in error, (name, options, error)
        lines = [line for line in error.splitlines() if "note:" not in line]
        assert len(lines) == 1
