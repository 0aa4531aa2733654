"""Players and explorer of a page in a real browser."""

import base64
import io
import json

import matplotlib.image
import numpy as np
import pytest

from models.report.explorer import explorer_data
from models.report.writing import write_report
from tests.report_pages import (
    FRAMES,
    grey_video,
    level_of,
    open_report,
    record,
    report_of,
    said,
)

pytestmark = [pytest.mark.nightly, pytest.mark.browser]


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
