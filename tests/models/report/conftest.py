"""A page of two videos, and a browser to open it."""

import pytest

from models.media import video as video_io
from models.report.explorer import explorer_data
from models.report.writing import write_report
from tests.browser import open_browser
from tests.report_pages import FPS, compared, grey_video, record


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run #1 of ü")
    for name, inverted in (("dense.mp4", False), ("sparse.mp4", True)):
        video_io.write_mp4(folder / name, grey_video(inverted=inverted), fps=FPS)
    report = compared()
    video_io.write_json(folder / "report.json", report)
    write_report(
        folder / "report.html",
        report,
        videos=["dense.mp4", "sparse.mp4"],
        explorer=explorer_data(record()[1], grey_video()),
    )
    return folder


@pytest.fixture
def browser():
    with open_browser() as page:
        page.resize(1280, 900)
        yield page
        assert page.errors == []
        assert page.addresses <= {"file", "blob", "data", "about"}  # no network
