"""HTML of the page: what it says, and that texts cannot become code."""

import json
import time

import pytest

from models.app import fragments
from models.app.jobs import Job, JobState, Progress
from models.app.timing import Expected

CODE = '<img src=x onerror="alert(1)">'


def job_in(state, **fields):
    job = Job("page", None, clock=time.monotonic)
    job.state = state
    for name, value in fields.items():
        setattr(job, name, value)
    return job


def test_progress_says_all_of_it():
    progress = Progress(
        stage="sparse",
        step=3,
        num_steps=16,
        kept_share=0.284,
        seconds_left=75.0,
        preview=b"jpeg",
    )
    job = job_in(JobState.RUNNING, progress=progress, notes=["a note"])
    html = fragments.status_of(job, [])
    for text in ("Sparse", "step 3 of 16", "28 % of token pairs", "75 s left"):
        assert text in html
    assert "data:image/jpeg;base64,anBlZw==" in html
    assert "a note" in html
    job.stop()
    assert "stopping after this step" in fragments.status_of(job, [])


def test_a_job_that_waits_says_its_place():
    running = job_in(
        JobState.RUNNING, progress=Progress(stage="dense", seconds_left=40.0)
    )
    waiting = job_in(JobState.WAITING)
    html = fragments.status_of(job_in(JobState.WAITING), [running, waiting])
    assert "Place 3 in line: 2 runs are before yours" in html
    assert "40 s left" in html
    html = fragments.status_of(job_in(JobState.WAITING), [job_in(JobState.RUNNING)])
    assert "Place 2 in line: 1 run is before yours." in html


@pytest.mark.parametrize(
    ("expected", "text"),
    [
        (Expected(seconds=90.0, bound="about"), "about 90 s, without compiling"),
        (Expected(seconds=90.0, bound="at least"), "at least 90 s"),
        (None, "known after the first step"),
    ],
)
def test_the_expected_time_of_two_runs(expected, text):
    html = fragments.expected_time("compare", 16, expected)
    assert "Two runs of 16 steps, dense and then sparse" in html
    assert text in html
    assert "Two runs" not in fragments.expected_time("sparse", 16, expected)


def test_no_text_becomes_code(tmp_path):
    folder = tmp_path / "<b>run"
    folder.mkdir()
    (folder / "report.json").write_text(
        json.dumps({"prompt": CODE, "draft": {"selection": CODE}, "sampling": {}})
    )
    (folder / "report.html").write_text("")
    failed = job_in(JobState.FAILED, message=CODE, notes=[CODE])
    running = job_in(JobState.RUNNING, progress=Progress(stage=CODE))
    for html in (
        fragments.field_error(CODE),
        fragments.message(CODE),
        fragments.status_of(failed, []),
        fragments.status_of(running, []),
        fragments.list_of(tmp_path),
        fragments.result_of(tmp_path, folder),
    ):
        assert CODE not in html
        assert "<b>run" not in html
        assert "<img src=x" not in html


def test_a_run_has_its_report_and_links(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("report.html", "dense.mp4", "report.json", "notes.txt"):
        (folder / name).write_text("")
    html = fragments.result_of(tmp_path, folder)
    assert '<iframe src="/runs/run/report.html"' in html
    assert 'href="/runs/run/dense.mp4"' in html
    assert "notes.txt" not in html
    (folder / "report.html").unlink()  # it could not be written
    assert '<video controls loop muted src="/runs/run/dense.mp4"' in (
        fragments.result_of(tmp_path, folder)
    )
