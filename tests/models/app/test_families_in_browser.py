"""The page with published families, tiny and random: what they can, and cannot do."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import hunyuan_folders
from tests.app_pages import Server, browser, button, generate, wait_for_status
from tests.wan_folders import (
    TEXT_TO_VIDEO,
    save_image_to_video,
    save_pair,
    save_text_or_image_to_video,
)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.app,
    pytest.mark.nightly,
    pytest.mark.timeout(900),
]

PROMPT = "a cat"
TINY = {"width": 48, "height": 32, "frames": 5, "steps": 1}


@pytest.fixture
def serve(tmp_path, playwright):
    """Opens the page of a model; ends its server afterwards."""
    servers, pages = [], []

    def start(*options):
        servers.append(Server(tmp_path, *options))
        pages.append(browser(playwright))
        page = pages[-1].__enter__()
        page.goto(servers[-1].url)
        button(page, "Generate").wait_for()
        page.locator("#prompt textarea").fill(PROMPT)
        return servers[-1], page

    yield start
    for page in pages:
        page.__exit__(None, None, None)
    for server in servers:
        server.end()


def picture(path, size=(96, 64), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def upload(page, path):
    """Puts a file into the field, which may hold another one."""
    clear = page.locator("#image").get_by_label("Clear")
    if clear.count():
        clear.click()
    page.locator("#image input[type=file]").set_input_files(str(path))


def wait_for_error(page, field, text):
    page.locator(f"#error-{field}", has_text=text).wait_for()


def newest_report(server):
    files = server.outputs.glob("*/report.json")
    newest = max(files, key=lambda file: file.stat().st_mtime)
    return json.loads(newest.read_text())


def test_a_video_starts_from_the_image_that_is_uploaded(serve, tmp_path):
    model = save_image_to_video(tmp_path / "model")
    server, page = serve("--checkpoint", model, "--max-upload", "0.1")
    assert "PNG or JPEG of at most 0.1 MiB" in page.locator("#image").inner_text()
    generate(page, TINY)
    wait_for_error(page, "image", "image is missing")

    # What is too large does not leave the browser; what is sent anyway is refused.
    large = picture(tmp_path / "large.png", (300, 300))
    upload(page, large)
    page.get_by_text("exceed the maximum allowed size").first.wait_for()
    body = large.read_bytes()
    assert server.ask("POST", "/gradio_api/upload", body)[0] == 413

    (tmp_path / "text.png").write_text("no picture")
    upload(page, tmp_path / "text.png")
    generate(page, TINY)
    wait_for_error(page, "image", "cannot be read: give a PNG or JPEG")
    upload(page, picture(tmp_path / "picture.gif"))
    generate(page, TINY)
    wait_for_error(page, "image", "the image is GIF")
    assert not (server.outputs / "uploads").exists()

    right = picture(tmp_path / "right.png")
    upload(page, right)
    page.locator("#image img").wait_for()
    generate(page, TINY)
    wait_for_status(page, "^Done")
    assert page.locator("#error-image").is_hidden()
    (stored,) = (server.outputs / "uploads").iterdir()
    assert stored.read_bytes() == right.read_bytes()
    report = newest_report(server)
    assert report["image"]["file"] == str(stored)
    assert report["image"]["size"] == [64, 96]
    assert f"--image={stored}" in report["command"]
    assert "Traceback" not in server.errors.read_text()


def test_no_image_but_an_upload_is_read(serve, tmp_path):
    """A request that names a file of the machine is refused, and copies nothing."""
    secret = picture(tmp_path / "secret.png")
    model = save_image_to_video(tmp_path / "model")
    server, page = serve("--checkpoint", model)
    upload(page, picture(tmp_path / "right.png", seed=1))
    page.locator("#image img").wait_for()
    answers = []

    def forge(route):
        body = json.loads(route.request.post_data)
        images = [v for v in body["data"] if isinstance(v, dict) and "path" in v]
        for image in images:
            image["path"] = str(secret)
        answer = route.fetch(post_data=json.dumps(body))
        answers.append((len(images), answer.status))
        route.fulfill(response=answer)

    page.route("**/queue/join*", forge)
    with page.expect_response("**/queue/join*"):
        button(page, "Generate").click()
    assert answers == [(1, 403)]
    assert not (server.outputs / "uploads").exists()
    copies = Path(tempfile.gettempdir()).glob("draft-video-*/*/secret.png")
    assert [file for file in copies if file.stat().st_mtime > server.started] == []


def test_wan_from_text(serve, tmp_path):
    server, page = serve("--checkpoint", TEXT_TO_VIDEO)
    assert "text-to-video" in page.locator("#no-image").inner_text()
    page.get_by_role("button", name="Skipped steps and precision").click()
    assert "no ratios are published" in page.locator("#no-mag").inner_text()
    page.get_by_role("button", name="Which blocks are kept, and where").click()
    page.locator("#preset").get_by_text("published:").click()
    page.locator("#blocks-that-are-not-kept").get_by_text("paper:").click()
    page.locator("#selection input[value=percentile]:checked").wait_for()
    generate(page, TINY | {"width": 40})
    wait_for_error(page, "width", "multiple of 16")
    generate(page, TINY | {"width": 64, "height": 64})
    wait_for_status(page, "^Done")
    report = newest_report(server)
    assert report["family"] == "Wan"
    assert report["preset"] == "published"
    assert report["draft"]["compensation"] is None
    assert report["draft"]["sparsity"] == 0.75
    assert "Traceback" not in server.errors.read_text()


def test_wan_with_two_transformers(serve, tmp_path):
    """Its guidance at low noise and its boundary are the model's own."""
    server, page = serve("--checkpoint", save_pair(tmp_path / "pair", "diffusers"))
    assert "text-to-video" in page.locator("#no-image").inner_text()
    page.get_by_role("button", name="Which blocks are kept, and where").click()
    page.locator("#preset").get_by_text("published:").click()
    generate(page, TINY | {"steps": 4, "width": 64, "height": 64})
    wait_for_status(page, "^Done")
    report = newest_report(server)
    sampling = report["sampling"]
    assert (sampling["low_guidance"], sampling["boundary"]) == (3.0, 875.0)
    assert report["schedule"]["low_noise"]["dense_layers"] == [0]
    assert report["sparse"]["timesteps"][0] > 875 > report["sparse"]["timesteps"][-1]
    assert "Traceback" not in server.errors.read_text()


def test_wan_from_text_or_an_image(serve, tmp_path):
    folder = save_text_or_image_to_video(tmp_path / "model")
    server, page = serve("--checkpoint", folder)
    size = {"width": 96, "height": 64}
    generate(page, TINY | {"width": 48})
    wait_for_error(page, "width", "multiple of 32")
    upload(page, picture(tmp_path / "right.png"))
    page.locator("#image img").wait_for()
    generate(page, TINY | size)
    wait_for_status(page, "^Done")
    report = newest_report(server)
    assert report["image"]["size"] == [64, 96]
    assert report["fps"] == 24.0
    assert "Traceback" not in server.errors.read_text()


def test_hunyuan_video_with_embeddings(serve, tmp_path):
    folder = hunyuan_folders.write_folders(tmp_path / "models")["diffusers"]
    embeddings = hunyuan_folders.write_embeddings(tmp_path / "e.safetensors", PROMPT)
    server, page = serve("--checkpoint", folder, "--embeddings", embeddings)
    assert "from text alone" in page.locator("#no-image").inner_text()
    page.locator("#prompt textarea").fill("a dog")
    page.locator("#status:has-text('being loaded')").wait_for(state="detached")
    generate(page, TINY)
    wait_for_error(page, "prompt", "no embeddings were given for ['a dog']")
    page.locator("#prompt textarea").fill(PROMPT)
    generate(page, TINY)
    wait_for_status(page, "^Done")
    report = newest_report(server)
    assert report["family"] == "HunyuanVideo"
    assert report["sampling"]["embedded_guidance"] == 6.0
    assert "Traceback" not in server.errors.read_text()
