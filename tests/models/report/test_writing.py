"""What a page holds, and what it leaves out to stay small."""

import base64
import json

import numpy as np
import pytest

from models.media import video as video_io
from models.report.page import read_page
from models.report.writing import read_run, write_comparison, write_report

SHAPE = (4, 32, 48, 3)
SAMPLING = {"frames": 4, "height": 32, "width": 48, "num_steps": 2, "seed": 0}


def report_of(**entries):
    return {"prompt": "a ball", "sampling": SAMPLING, "fps": 12.0} | entries


def make_run(folder, *names, level=0.5, report=None):
    """A folder as `draft-video generate` leaves it, of noise around a grey level."""
    folder.mkdir()
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, SHAPE).astype(np.float32)
    for name in names:
        video_io.write_mp4(folder / name, level + noise, fps=12.0)
    video_io.write_json(folder / "report.json", report or report_of())
    return folder


@pytest.fixture(scope="module")
def two_videos(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "one", "dense.mp4", "sparse.mp4")


def read(path):
    return read_page(path.read_text())


def test_videos_stand_in_the_page_byte_for_byte(two_videos):
    path = two_videos / "report.html"
    report = report_of(psnr_db=20.0, psnr_db_per_frame=[19.0, 20.0, None, 21.0])
    write_report(path, report, videos=["dense.mp4", "sparse.mp4"])
    page = read(path)
    for index, name in enumerate(("dense.mp4", "sparse.mp4")):
        assert base64.b64decode(page[f"video-{index}"]) == (
            (two_videos / name).read_bytes()
        )
    assert [video["shown"] for video in page["report"]["videos"]] == ["whole"] * 2
    assert page["report"]["runs"] == [{"report": report}]
    (pair,) = page["report"]["pairs"]
    assert pair["psnr_db_per_frame"] == [19.0, 20.0, None, 21.0]


def test_a_page_of_settings_alone(tmp_path):
    write_report(tmp_path / "a.html", report_of())
    page = read(tmp_path / "a.html")
    assert page["report"]["videos"] == page["report"]["pairs"] == []


@pytest.mark.parametrize(
    ("room", "shown"), [(6_000, "preview"), (100, "none")], ids=str
)
def test_too_large_videos_become_previews_or_links(tmp_path, room, shown):
    folder = make_run(tmp_path / "run", "video.mp4")
    most_bytes = 300_000 + len(json.dumps(report_of())) + room
    original = (folder / "video.mp4").stat().st_size
    assert original * 4 / 3 > room  # else nothing is left out
    path = folder / "report.html"
    write_report(path, report_of(), videos=["video.mp4"], most_bytes=most_bytes)
    assert path.stat().st_size <= most_bytes
    page = read(path)
    (entry,) = page["report"]["videos"]
    assert (entry["shown"], entry["file"]) == (shown, "video.mp4")
    assert ("video-0" in page) == (shown == "preview")
    if shown == "preview":
        preview = tmp_path / "preview.mp4"
        preview.write_bytes(base64.b64decode(page["video-0"]))
        assert len(preview.read_bytes()) < original
        assert len(video_io.read_mp4(preview)) == 4  # every frame is there


def test_two_runs_side_by_side(two_videos, tmp_path):
    other = make_run(tmp_path / "other", "video.mp4", level=0.6)
    path = tmp_path / "both.html"
    write_comparison(path, two_videos, other)
    page = read(path)["report"]
    assert [(video["run"], video["label"]) for video in page["videos"]] == [
        (0, "Dense"),
        (0, "Sparse"),
        (1, "Video"),
    ]
    across, within = page["pairs"]
    assert (across["left"], across["right"]) == (1, 2)
    assert (within["left"], within["right"]) == (0, 1)
    one, two = (
        video_io.read_mp4(file).astype(float)
        for file in (two_videos / "sparse.mp4", other / "video.mp4")
    )
    want = [
        10 * np.log10(255**2 / ((a - b) ** 2).mean())
        for a, b in zip(one, two, strict=True)
    ]
    np.testing.assert_allclose(across["psnr_db_per_frame"], want, rtol=1e-4)


def test_runs_of_unlike_sizes_have_no_difference(two_videos, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    video_io.write_mp4(other / "video.mp4", np.zeros((4, 16, 16, 3)), fps=12.0)
    sampling = SAMPLING | {"height": 16, "width": 16}
    video_io.write_json(other / "report.json", report_of(sampling=sampling))
    write_comparison(tmp_path / "both.html", two_videos, other)
    across = read(tmp_path / "both.html")["report"]["pairs"][0]
    assert "differ in size or length" in across["note"]
    assert "psnr_db_per_frame" not in across


def test_the_explorer_of_an_earlier_page_is_found(tmp_path):
    folder = make_run(tmp_path / "run")
    explorer = {"grid": {"frames": 1}}
    write_report(folder / "report.html", report_of(), explorer=explorer)
    run = read_run(folder)
    assert run.explorer == explorer
    assert run.report == report_of()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no report.json; expected one that draft-video generate"),
        ("[1]", "holds list; expected an object"),
        ("{}", "is not the report of a run: it has no prompt"),
        ("{", "Expecting property name"),
    ],
    ids=["absent", "list", "empty", "damaged"],
)
def test_folders_that_are_no_runs_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        read_run(tmp_path)
