"""The page in a headless Chromium, on the model that ships."""

import json
import re
import signal
import time
from urllib.parse import urlsplit

import pytest

from tests.app_pages import (
    LONG,
    SECONDS,
    SMALL,
    Server,
    browser,
    button,
    generate,
    report_of,
    wait_for_status,
)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.app,
    pytest.mark.nightly,
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("app"))
    yield server
    server.end()


@pytest.fixture
def page(playwright, server):
    with browser(playwright) as page:
        page.goto(server.url)
        yield page


def test_the_page_is_usable_and_loads_nothing_from_elsewhere(playwright, server):
    with browser(playwright) as page:
        asked, complaints = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(server.url)
        button(page, "Generate").wait_for()
        seconds = time.monotonic() - server.start
        print(f"measured: from start to a usable page {seconds:.1f} s")
        page.locator("#expected", has_text="Two runs of 16 steps").wait_for()
        page.locator("#status:has-text('being loaded')").wait_for(state="detached")
        kinds = {urlsplit(url).scheme for url in asked}
        assert kinds <= {"http", "data", "blob"}
        hosts = {urlsplit(url).netloc for url in asked if url.startswith("http")}
        assert hosts == {server.address}
        assert not complaints
        assert "text-to-video" in page.locator("#no-image").inner_text()


def test_a_comparison_from_the_prompt_to_its_players(page):
    generate(page)
    wait_for_status(page, r"Dense · step \d of 4 · 100 % of token pairs kept")
    assert page.locator("#status img").count() == 1  # the preview
    wait_for_status(page, "^Done")
    report = report_of(page)
    videos = report.locator("video")
    assert videos.count() == 2
    report.locator("#play").click()
    times = None
    end = time.monotonic() + SECONDS
    while not times or min(times) == 0:
        times = [videos.nth(place).evaluate("v => v.currentTime") for place in (0, 1)]
        assert time.monotonic() < end
    report.locator("#play").click()
    times = [videos.nth(place).evaluate("v => v.currentTime") for place in (0, 1)]
    assert abs(times[0] - times[1]) < 1 / 12  # one frame
    # The slider moves the border between the two.
    report.locator("#view-wipe").check()
    clips = []
    for value in ("20", "80"):
        report.locator("#wipe").fill(value)
        clips.append(report.locator(".stage").evaluate("s => s.outerHTML"))
    assert clips[0] != clips[1]
    # A click on a tile tells what it attends to.
    said = report.locator(".said")
    strip = report.get_by_role("application")
    box = strip.bounding_box()
    texts = set()
    for share in (0.1, 0.9):
        place = {"x": share * box["width"], "y": 0.1 * box["height"]}
        strip.click(position=place)
        texts.add(said.inner_text())
    assert len(texts) == 2
    assert all("attends to" in text for text in texts)


def test_earlier_runs_are_listed_and_compared(page, server):
    for seed in (1, 2):
        generate(page, SMALL | {"seed": seed})
        wait_for_status(page, "Dense")
        wait_for_status(page, "^Done")
    page.get_by_role("tab", name="Earlier runs").click()
    page.locator("#runs tbody tr").nth(1).wait_for()
    assert "seed 2" in page.locator("#runs tbody tr").nth(0).inner_text()
    button(page, "Compare the two").click()
    assert "choose a run" in page.locator("#error-runs").inner_text()
    for name, seed in (("first-run", 1), ("second-run", 2)):
        page.locator(f"#{name} input").click()
        page.get_by_role("option", name=re.compile(f"seed {seed},")).first.click()
    button(page, "Compare the two").click()
    report = report_of(page, "#earlier-result")
    report.locator("video").first.wait_for()
    assert page.locator("#error-runs").is_hidden()
    (folder,) = (server.outputs / "comparisons").iterdir()
    assert (folder / "report.html").is_file()
    button(page, "Show the first").click()
    page.locator("#earlier-result a", has_text="report.json").wait_for()


def test_stop_ends_a_run_within_a_step_and_keeps_it(page, server):
    generate(page, LONG)
    text = wait_for_status(page, r"Dense · step \d+ of 400")
    before = int(re.search(r"step (\d+) of", text)[1])
    button(page, "Stop").click()
    text = wait_for_status(page, "^Stopped")
    assert "what was computed is kept" in text
    links = page.locator("#result .dv-links").inner_text()
    assert "video.mp4" in links
    newest = max(server.outputs.glob("*/report.json"), key=lambda f: f.stat().st_mtime)
    report = json.loads(newest.read_text())
    assert report["stopped"]
    assert before <= len(report["time_ms_per_step"]) < 400
    button(page, "Generate").click(trial=True)  # it can be used again


def test_bad_input_is_told_beside_its_field_and_nothing_runs(page, server):
    runs = set(server.outputs.glob("*"))
    generate(page, SMALL | {"frames": 8, "width": 63})
    page.locator("#error-frames", has_text="multiple of 2").wait_for()
    assert "multiple of 8" in page.locator("#error-width").inner_text()
    assert page.locator("#error-height").is_hidden()
    box = page.locator("#frames").bounding_box()
    message = page.locator("#error-frames").bounding_box()
    assert 0 <= message["y"] - (box["y"] + box["height"]) < 40
    page.locator("#steps input").fill("")
    generate(page, {"frames": 9})
    page.locator("#error-steps", has_text="steps is missing").wait_for()
    assert page.locator("#error-frames").is_hidden()
    generate(page, SMALL | {"frames": 301, "steps": 4})
    page.locator("#error-frames", has_text="--max-frames").wait_for()
    assert set(server.outputs.glob("*")) == runs
    assert "Traceback" not in server.errors.read_text()


def test_a_second_browser_sees_its_place_and_a_closed_tab_frees_its_job(
    playwright, server
):
    with browser(playwright) as second:
        second.goto(server.url)
        with browser(playwright) as first:
            first.goto(server.url)
            generate(first, LONG)
            wait_for_status(first, r"step \d+ of 400")
            generate(second)
            text = wait_for_status(second, "Place 2 in line")
            assert "1 run is before yours" in text
        # The first browser is gone, and nobody has stopped its run.
        wait_for_status(second, r"(Dense|Sparse) · step \d of 4")
        wait_for_status(second, "^Done")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1600])
def test_the_page_fits_and_can_be_read(playwright, server, scheme, width):
    size = {"width": width, "height": 800}
    with browser(playwright, viewport=size, color_scheme=scheme) as page:
        page.goto(server.url)
        button(page, "Generate").wait_for()
        generate(page, {"frames": 8})
        page.locator("#error-frames", has_text="multiple").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for place in page.locator(
            ".dv-expected, .dv-reason, .dv-error, .dv-status"
        ).all():
            if place.is_visible():
                assert place.evaluate(CONTRAST) >= 4.5, place.inner_text()


# The ratio of WCAG 2 between an element's text and what lies behind it.
CONTRAST = """element => {
  const parts = text => text.match(/[\\d.]+/g).map(Number);
  const light = colour => {
    const [r, g, b] = colour.slice(0, 3).map(value => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let behind = element;
  const colour = () => parts(getComputedStyle(behind).backgroundColor);
  while (behind.parentElement && colour()[3] === 0) behind = behind.parentElement;
  const pair = [parts(getComputedStyle(element).color), colour()].map(light);
  return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
}"""


# -------------------------------------------- requests that no page of ours sends


def test_no_path_leads_out_of_the_outputs_folder(server):
    secret = server.outputs.parent / "secret.json"
    secret.write_text("what nobody may read")
    inside = server.outputs / "run"
    inside.mkdir(parents=True, exist_ok=True)
    (inside / "fine.json").write_text("fine")
    (inside / "link.json").unlink(missing_ok=True)
    (inside / "link.json").symlink_to(secret)
    assert server.ask("GET", "/runs/run/fine.json") == (200, b"fine")
    for path in (
        "/runs/../secret.json",
        "/runs/run/../../secret.json",
        "/runs/%2e%2e/secret.json",
        "/runs/%2e%2e%2fsecret.json",
        "/runs/..%5csecret.json",
        "/runs/%252e%252e/secret.json",
        "/runs//etc/hostname",
        f"/runs/{secret}",
        "/runs/run/link.json",
        f"/gradio_api/file={secret}",
        f"/gradio_api/file={server.outputs}/run/../../secret.json",
        "/gradio_api/file=pyproject.toml",
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=http://127.0.0.1:1/",
        "/file=/etc/passwd",
        "/static/../../../../etc/passwd",
        "/assets/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
    ):
        status, body = server.ask("GET", path)
        assert status in (400, 403, 404, 405), path
        assert b"nobody may read" not in body, path
        assert b"root:" not in body
    assert server.ask("POST", "/runs/run/fine.json", b"x")[0] == 405
    assert server.ask("PUT", "/runs/run/new.json", b"x")[0] == 405


def test_part_of_a_video_can_be_asked_for(server):
    folder = server.outputs / "run"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.mp4").write_bytes(b"0123456789")
    assert server.ask("GET", "/runs/run/a.mp4", Range="bytes=2-4") == (206, b"234")


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Host": "evil.example"},  # DNS rebinding
    ],
    ids=str,
)
def test_a_foreign_page_starts_no_job(server, headers):
    runs = set(server.outputs.glob("*"))
    body = json.dumps({"data": [], "fn_index": 0, "session_hash": "x"}).encode()
    headers = {"Content_Type": "application/json"} | headers
    for path in ("/gradio_api/queue/join", "/gradio_api/run/predict"):
        status, text = server.ask("POST", path, body, **headers)
        assert status == 403
        assert text.startswith(b"Refused")
    assert set(server.outputs.glob("*")) == runs
    plain = {"Content_Type": "text/plain", "Origin": "http://evil.example"}
    assert server.ask("POST", "/gradio_api/queue/join", body, **plain)[0] == 403


def test_nothing_can_be_uploaded_to_a_model_without_images(server):
    status, text = server.ask("POST", "/gradio_api/upload", b"x" * 100)
    assert (status, b"takes no image" in text) == (403, True)


def test_ctrl_c_ends_the_server_without_a_traceback(tmp_path, playwright):
    server = Server(tmp_path)
    with browser(playwright) as page:
        page.goto(server.url)
        generate(page, LONG)
        wait_for_status(page, r"step \d+ of 400")
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(SECONDS) == 130
    errors = server.errors.read_text()
    assert errors.splitlines()[-1] == "draft-video: interrupted"
    assert "Traceback" not in errors
    assert not list(tmp_path.glob("outputs/*/.*"))  # no part of a file
