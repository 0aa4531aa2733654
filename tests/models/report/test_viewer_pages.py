"""Whole pages in a real browser: prompts, sizes, contrast, and what may be missing."""

import pytest

from models.cli import main
from models.media import video as video_io
from models.report.writing import write_comparison, write_report
from tests import tiny_model
from tests.report_pages import (
    FPS,
    PROMPT,
    compared,
    grey_video,
    open_report,
    report_of,
    run_of,
    said,
)

pytestmark = [pytest.mark.nightly, pytest.mark.browser]


def test_a_prompt_is_text_everywhere(folder, browser):
    open_report(browser, folder / "report.html")
    assert browser.evaluate("document.title") == PROMPT
    assert browser.evaluate("document.querySelector('h1').textContent") == PROMPT
    command = browser.evaluate("document.querySelector('pre code').textContent")
    assert command == f"draft-video generate '{PROMPT}'"


CONTRAST = """(() => {
  const channels = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = channels(getComputedStyle(each).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour.slice(0, 3);
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll(
      "h1, h2, p, a, dt, dd, label, .segments span, button, select, figcaption, th, td,"
      + "summary, code, output, li, svg text")) {
    if (!element.textContent.trim() || element.closest("[hidden]")) continue;
    const style = getComputedStyle(element);
    const ink = channels(element.closest("svg") ? style.fill : style.color).slice(0, 3);
    const [high, low] = [light(ink), light(ground(element))].sort((a, b) => b - a);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5) found.push(`${element.outerHTML.slice(0, 80)} ${ratio}`);
  }
  return found;
})()"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1600])
def test_pages_fit_and_are_legible(folder, browser, width, dark):
    browser.resize(width, 900, dark=dark)
    open_report(browser, folder / "report.html")
    for view in ("sides", "wipe", "difference"):
        browser.evaluate(f"report.players.setView('{view}')")
        assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate(CONTRAST) == []
    ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    red = int(ground.removeprefix("rgb(").split(",")[0])
    assert (red < 60) == dark


def test_everything_has_a_name_for_screen_readers(folder, browser):
    open_report(browser, folder / "report.html")
    roles = ("button", "slider", "combobox", "checkbox", "radio", "image", "Video")
    nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
    found = [
        (node["role"]["value"], node.get("name", {}).get("value"))
        for node in nodes
        if node.get("role", {}).get("value") in (*roles, "img", "application")
    ]
    assert {"button", "slider", "combobox"} <= {role for role, _ in found}
    assert [role for role, name in found if not name] == []


def test_a_single_video_without_a_recording(browser, tmp_path):
    video_io.write_mp4(tmp_path / "video.mp4", grey_video(), fps=FPS)
    report = report_of(attention="dense", **run_of(0))
    write_report(tmp_path / "report.html", report, videos=["video.mp4"])
    open_report(browser, tmp_path / "report.html")
    assert browser.evaluate("document.querySelector('.segments').hidden")
    browser.press(".")
    assert browser.evaluate("report.players.frame") == 1
    assert browser.evaluate("report.explorers.length") == 0


def test_a_video_that_does_not_play_is_told(browser, tmp_path):
    (tmp_path / "video.mp4").write_bytes(b"no video")
    write_report(tmp_path / "report.html", report_of(), videos=["video.mp4"])
    browser.open((tmp_path / "report.html").as_uri())
    browser.wait_for("window.report !== undefined")
    browser.wait_for("!document.querySelector('[role=alert]').hidden")
    browser.press(" ")  # stays paused
    browser.wait_for("document.querySelector('#play').textContent === 'Play'")


def test_a_video_that_is_too_large_is_a_link(folder, browser, tmp_path):
    report = compared()
    for name in ("dense.mp4", "sparse.mp4"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    path = tmp_path / "report.html"
    write_report(path, report, videos=["dense.mp4", "sparse.mp4"], most_bytes=300_000)
    open_report(browser, path)
    links = browser.evaluate(
        "[...document.querySelectorAll('.stage a')].map((link) => link.href)"
    )
    assert links == [(tmp_path / n).as_uri() for n in ("dense.mp4", "sparse.mp4")]
    assert browser.evaluate("document.querySelectorAll('.stage video').length") == 0
    browser.press(" ")  # nothing to play, and no error


def test_two_runs_side_by_side(folder, browser, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    video_io.write_mp4(other / "video.mp4", grey_video(inverted=True), fps=FPS)
    report = report_of(attention="draft", **run_of(1))
    report["draft"] = {"sparsity": 0.9, "selection": "percentile"}
    video_io.write_json(other / "report.json", report)
    write_comparison(tmp_path / "both.html", folder, other)
    open_report(browser, tmp_path / "both.html")
    pairs = browser.evaluate(
        "[...document.querySelectorAll('#videos option')].slice(0, 2)"
        ".map((option) => option.textContent)"
    )
    assert pairs == ["A: Sparse | B: Video", "A: Dense | A: Sparse"]
    text = browser.evaluate("document.querySelector('.position').textContent")
    assert text == "frame 1 of 24, PSNR equal"
    differs = browser.evaluate(
        "[...document.querySelectorAll('.differs th')].map((cell) => cell.textContent)"
    )
    assert differs == ["sparsity"]
    assert browser.evaluate("report.explorers.length") == 1


def test_the_page_of_a_real_run(browser, tmp_path):
    checkpoint = tiny_model.save_checkpoint(tmp_path / "checkpoint")
    small = ("--size", "48x32", "--frames", "3", "--steps", "4", "--compare")
    output = str(tmp_path / "run")
    command = ["generate", PROMPT, "--checkpoint", str(checkpoint), *small]
    assert main([*command, "--output", output]) == 0
    open_report(browser, tmp_path / "run" / "report.html")
    assert browser.evaluate("report.players.shown.length") == 2
    before = said(browser)
    browser.click(".map", 0.5, 0.05)
    assert said(browser) != before
    assert browser.evaluate("document.querySelectorAll('#steps rect').length") == 16
