"""Pages in a real browser: what users click, and what they then see."""

import base64
import io
import json

import matplotlib.image
import numpy as np
import pytest

from draft_jax import VideoGrid
from models.cli import main
from models.diffusion.recording import AttentionRecord, Looks
from models.media import video as video_io
from models.report.explorer import explorer_data
from models.report.writing import write_comparison, write_report
from tests import tiny_model
from tests.browser import open_browser

pytestmark = [pytest.mark.nightly, pytest.mark.browser]

PROMPT = "a ball </script><script>document.title='broken'</script> & <b>more</b>"
FRAMES, HEIGHT, WIDTH, FPS = 24, 64, 96, 12.0
GRID = VideoGrid(3, 8, 16, tile=(4, 8))  # 3 frames of 2 x 2 tiles
LOOKS = Looks(steps=(2, 3), layers=(0, 5), heads=(0, 1))
PSNR = [20.0 + 0.5 * frame for frame in range(FRAMES - 1)] + [None]


def level_of(frame: int) -> int:
    """The grey of a dense frame; that of a sparse one is as far below white."""
    return 30 + 8 * frame


def grey_video(*, inverted=False):
    levels = np.array([level_of(frame) for frame in range(FRAMES)])
    levels = 255 - levels if inverted else levels
    shape = (FRAMES, HEIGHT, WIDTH, 3)
    return np.broadcast_to(levels[:, None, None, None] / 255, shape).astype(np.float32)


def record(*, frames=3):
    rng = np.random.default_rng(0)
    shape = (2, 2, 2, 12, 12)
    masks = rng.random(shape) < 0.3
    masks |= np.eye(12, dtype=bool)
    return masks, AttentionRecord(
        looks=LOOKS,
        levels=rng.integers(1, 256, shape, np.uint8),
        peaks=np.full(shape[:3], 0.25, np.float32),
        masks=np.packbits(masks, axis=-1),
        dense=np.array([[False, True], [False, True]]),
        timesteps=(750.0, 500.0),
        grid=GRID,
        video_frames=frames,
        of_steps=4,
        of_layers=8,
        of_heads=2,
        time_ms=120.0,
    )


def run_of(seed):
    kept = np.full((4, 8), 1.0 if seed == 0 else 0.25)
    return {
        "time_ms_per_step": [100.0, 110.0, 120.0, 130.0],
        "time_ms_median_step": 115.0,
        "time_ms_all_steps": 460.0,
        "compile_ms": 1000.0,
        "decode_ms": 50.0,
        "timesteps": [1000.0, 900.0, 750.0, 500.0],
        "dense_steps": 4,
        "kept_share": float(kept.mean()),
        "kept_share_per_layer": kept.mean(0).tolist(),
        "kept_share_per_step_and_layer": kept.tolist(),
    }


def report_of(**entries):
    sampling = {"frames": FRAMES, "height": HEIGHT, "width": WIDTH, "num_steps": 4}
    return {
        "prompt": PROMPT,
        "command": f"draft-video generate '{PROMPT}'",
        "date": "2026-11-29T12:00:00+00:00",
        "family": "small",
        "model": None,
        "sampling": sampling | {"seed": 0},
        "draft": {"sparsity": 0.75, "selection": "percentile"},
        "schedule": {"dense_fraction": 0.25},
        "hardware": {"processor": "x"},
        "versions": {"jax": "0.12"},
        "fps": FPS,
    } | entries


def compared():
    return report_of(
        psnr_db=25.0,
        psnr_db_per_frame=PSNR,
        ssim=0.9,
        speed_up_of_sparse_steps=1.5,
        speed_up_of_all_steps=1.2,
        dense=run_of(0),
        sparse=run_of(1) | {"work_per_step": ["dense", "sparse", "skipped", "sparse"]},
    )


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


def open_report(browser, path):
    browser.open(path.as_uri())
    browser.wait_for("window.report !== undefined")
    browser.wait_for(
        "!report.players || report.players.shown.every((v) => v.readyState >= 2)"
    )


def frames_shown(browser):
    """Which frame each player shows, by the grey of its pixels."""
    greys = browser.evaluate(
        """(async () => {
          const greys = [];
          for (const video of report.players.shown) {
            while (video.seeking) await new Promise((done) => setTimeout(done, 20));
            const canvas = document.createElement("canvas");
            const context = canvas.getContext("2d");
            context.drawImage(video, 0, 0);
            greys.push(context.getImageData(5, 5, 1, 1).data[1]);
          }
          return greys;
        })()"""
    )
    dense, *sparse = greys
    return [round((level - 30) / 8) for level in (dense, *(255 - g for g in sparse))]


def wait_for_frames(browser, frame):
    for _ in range(200):
        if frames_shown(browser) == [frame, frame]:
            return
        browser.evaluate("new Promise((done) => setTimeout(done, 50))")
    assert frames_shown(browser) == [frame, frame]


# ------------------------------------------------------------------------ players


def test_players_play_pause_and_seek_together(folder, browser):
    open_report(browser, folder / "report.html")
    wait_for_frames(browser, 0)
    browser.click("#play")
    assert browser.evaluate("document.querySelector('#play').textContent") == "Pause"
    browser.wait_for("report.players.shown.every((v) => v.currentTime > 0.3)")
    browser.click("#play")
    browser.wait_for("report.players.shown.every((v) => v.paused)")
    frame = browser.evaluate("report.players.frame")
    assert frame > 2
    wait_for_frames(browser, frame)
    browser.click("button[aria-label='Next frame']")
    wait_for_frames(browser, frame + 1)
    browser.evaluate(
        "{ const line = document.querySelector('#timeline'); line.value = 17;"
        "line.dispatchEvent(new Event('input')); }"
    )
    wait_for_frames(browser, 17)
    text = browser.evaluate("document.querySelector('.position').textContent")
    assert text == "frame 18 of 24, PSNR 28.5 dB"


def test_players_start_again_at_the_end(folder, browser):
    open_report(browser, folder / "report.html")
    browser.evaluate("report.players.seek(22)")
    browser.click("#play")
    browser.wait_for("report.players.frame < 10 && report.players.frame > 1")
    assert browser.evaluate("report.players.playing")
    browser.click("#loop")
    browser.evaluate("report.players.pause(); report.players.seek(21)")
    browser.click("#play")
    browser.wait_for("!report.players.playing && report.players.frame === 23")
    wait_for_frames(browser, 23)


def test_a_click_on_the_curve_goes_to_its_frame(folder, browser):
    open_report(browser, folder / "report.html")
    width = browser.evaluate("document.querySelector('#curve').clientWidth")
    inset = 8 / width
    for frame in (0, 12, 23):
        browser.click("#curve", inset + (1 - 2 * inset) * frame / (FRAMES - 1))
        wait_for_frames(browser, frame)
    text = browser.evaluate("document.querySelector('.position').textContent")
    assert text == "frame 24 of 24, PSNR equal"


def test_keys_play_and_go_frame_by_frame(folder, browser):
    open_report(browser, folder / "report.html")
    for _ in range(3):
        browser.press(".")
    browser.press(",")
    wait_for_frames(browser, 2)
    browser.press(" ")
    browser.wait_for("report.players.frame > 4")
    browser.press(" ")
    browser.wait_for("!report.players.playing")
    browser.evaluate("document.querySelector('#timeline').focus()")
    frame = browser.evaluate("report.players.frame")
    browser.press("ArrowLeft")
    wait_for_frames(browser, frame - 1)


def greys_at(browser, selector, *places):
    """What is really painted at shares of an element's width, in its middle."""
    box = browser.evaluate(
        f"(({{x, y, width, height}}) => [x, y, width, height])"
        f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
    )
    shot = browser.send("Page.captureScreenshot")["data"]
    picture = matplotlib.image.imread(io.BytesIO(base64.b64decode(shot)))
    row = int(box[1] + 0.5 * box[3])
    return [255 * picture[row, int(box[0] + x * box[2]), 1] for x in places]


def test_the_slider_moves_the_border_between_the_two(folder, browser):
    open_report(browser, folder / "report.html")
    wait_for_frames(browser, 0)
    browser.click("label[for=view-wipe]")
    for place in (0.25, 0.75):
        browser.click(".stage", place)
        value = float(browser.evaluate("document.querySelector('#wipe').value"))
        assert value == pytest.approx(100 * place, abs=1)
        left, right = greys_at(browser, ".stage video", place - 0.1, place + 0.1)
        assert left == pytest.approx(level_of(0), abs=6)
        assert right == pytest.approx(255 - level_of(0), abs=6)
    browser.evaluate("document.querySelector('#wipe').focus()")
    browser.press("ArrowLeft")
    moved = float(browser.evaluate("document.querySelector('#wipe').value"))
    assert moved < value


def test_the_difference_is_four_times_as_strong(folder, browser):
    open_report(browser, folder / "report.html")
    browser.evaluate("report.players.seek(11)")
    wait_for_frames(browser, 11)
    browser.click("label[for=view-difference]")
    (grey,) = greys_at(browser, ".stage video", 0.5)
    difference = abs(255 - 2 * level_of(11))
    assert grey == pytest.approx(4 * difference, abs=24)


# ----------------------------------------------------------------------- explorer


def said(browser):
    return browser.evaluate("document.querySelector('.said').textContent")


def choose(browser, label, index):
    browser.evaluate(
        "{ const [label] = [...document.querySelectorAll('.bar label')]"
        f".filter((each) => each.textContent === {json.dumps(label)});"
        "const select = document.getElementById(label.htmlFor);"
        f"select.value = {index}; select.dispatchEvent(new Event('change')); }}"
    )


def test_a_click_on_a_tile_shows_what_it_attends_to(folder, browser):
    masks, recorded = record()
    open_report(browser, folder / "report.html")
    layout = browser.evaluate("report.explorers[0].layout")
    strip = browser.evaluate(
        "(({width, height}) => [width, height])"
        "(document.querySelector('.strip').getBoundingClientRect())"
    )
    step, layer, head = 1, 0, 1
    for label, index in (("Step", step), ("Layer", layer), ("Head", head)):
        choose(browser, label, index)
    for query in (0, 3, 6, 11):
        frame, place = divmod(query, 4)
        x = (frame % layout["across"]) * (layout["width"] + layout["gap"])
        y = (frame // layout["across"]) * (layout["height"] + layout["gap"])
        x += (0.25 + 0.5 * (place % 2)) * layout["width"]
        y += (0.25 + 0.5 * (place // 2)) * layout["height"]
        browser.click(".strip", x / strip[0], y / strip[1])
        kept = masks[step, layer, head, query]
        scores = 10 ** (4 * (recorded.levels[step, layer, head, query] / 255 - 1))
        share = scores[kept].sum() / scores.sum()
        text = said(browser)
        where = f"frame {frame + 1}, row {place // 2 + 1}, column {place % 2 + 1}"
        assert text.startswith(
            f"The tile in {where} attends to {kept.sum()} of 12 tiles "
            f"({100 * kept.mean():.0f} %), which have {100 * share:.0f} % of its draft."
        )
        assert bright_tiles(browser) == {*np.flatnonzero(kept).tolist()}
    assert "ran dense" not in text
    choose(browser, "Layer", 1)
    assert "This layer ran dense at this step: its mask was not used." in said(browser)
    choose(browser, "Step", 0)  # step 2 of the run
    assert "A cache skipped this step: the mask was not used." in said(browser)


def test_times_and_kept_shares_stand_in_a_table(folder, browser):
    open_report(browser, folder / "report.html")
    rows = browser.evaluate(
        "[...document.querySelectorAll('#steps tbody tr')]"
        ".map((row) => [...row.children].map((cell) => cell.textContent))"
    )
    assert rows[2] == [
        *("2", "750", "0.12 s", "100.0 %", "0.12 s", "25.0 %, skipped by a cache"),
    ]
    assert rows[4] == ["All steps", "0.46 s", "100.0 %", "0.46 s", "25.0 %"]
    tallest = browser.evaluate(
        "[...document.querySelectorAll('#steps rect')]"
        ".map((bar) => Number(bar.getAttribute('height')))"
    )
    times = np.tile([100.0, 110.0, 120.0, 130.0], 2)
    np.testing.assert_allclose(np.divide(tallest[:8], tallest[3]), times / 130, 1e-6)
    np.testing.assert_allclose(tallest[12:], 0.25 * tallest[8])


def bright_tiles(browser):
    """Tiles that are not dimmed, by what is drawn in them."""
    reds = browser.evaluate(
        """(() => {
          const { across, width, height, gap } = report.explorers[0].layout;
          const context = report.explorers[0].strip.getContext("2d");
          return Array.from({ length: 12 }, (_, tile) => {
            const frame = Math.floor(tile / 4), place = tile % 4;
            const x = (frame % across) * (width + gap)
              + (0.25 + 0.5 * (place % 2)) * width;
            const y = Math.floor(frame / across) * (height + gap)
              + (0.25 + 0.5 * Math.floor(place / 2)) * height;
            return context.getImageData(x, y, 1, 1).data[0];
          });
        })()"""
    )
    # Of the frames in the middle of each third: dimmed they have 38 % of their grey.
    greys = [level_of(frame) for frame in (4, 12, 20)]
    return {tile for tile, red in enumerate(reds) if red > 0.7 * greys[tile // 4]}


def test_rows_of_maps_and_keys_choose_tiles_too(folder, browser):
    open_report(browser, folder / "report.html")
    browser.click(".map", 0.5, 2.5 / 12)
    assert browser.evaluate("report.explorers[0].query") == 2
    assert "frame 1, row 2, column 1 attends" in said(browser)
    browser.evaluate("document.querySelector('.strip').focus()")
    for key, query in (("ArrowRight", 3), ("PageDown", 7), ("ArrowUp", 5)):
        browser.press(key)
        assert browser.evaluate("report.explorers[0].query") == query


def test_the_maps_are_those_that_were_recorded(folder, browser):
    masks, recorded = record()
    open_report(browser, folder / "report.html")
    choose(browser, "Layer", 1)
    read = browser.evaluate(
        "(() => { const e = report.explorers[0]; return Array.from({length: 144},"
        "(_, i) => [e.level(Math.floor(i / 12), i % 12),"
        "e.isKept(Math.floor(i / 12), i % 12)]); })()"
    )
    levels, kept = zip(*read, strict=True)
    np.testing.assert_array_equal(levels, recorded.levels[0, 1, 0].ravel())
    np.testing.assert_array_equal(kept, masks[0, 1, 0].ravel())
    notes = browser.evaluate("document.querySelector('#explorer-of-0').textContent")
    assert "Recorded were 2 of 4 steps, 2 of 8 layers, chosen before the run." in notes


def test_a_reference_image_has_no_picture_and_a_name(browser, tmp_path):
    _, recorded = record(frames=2)
    explorer = explorer_data(recorded, grey_video())
    write_report(tmp_path / "report.html", report_of(), explorer=explorer)
    open_report(browser, tmp_path / "report.html")
    for key, where in (("PageUp", "the reference frame"), ("PageDown", "frame 1")):
        browser.evaluate("document.querySelector('.strip').focus()")
        browser.press(key)
        assert f"The tile in {where}, row 2, column 2 attends" in said(browser)


# ------------------------------------------------------------------- whole pages


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
    small = ("--size", "48x32", "--frames", "4", "--steps", "4", "--compare")
    output = str(tmp_path / "run")
    command = ["generate", PROMPT, "--checkpoint", str(checkpoint), *small]
    assert main([*command, "--output", output]) == 0
    open_report(browser, tmp_path / "run" / "report.html")
    assert browser.evaluate("report.players.shown.length") == 2
    before = said(browser)
    browser.click(".map", 0.5, 0.05)
    assert said(browser) != before
    assert browser.evaluate("document.querySelectorAll('#steps rect').length") == 16
