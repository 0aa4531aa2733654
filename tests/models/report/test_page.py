"""The page of a report: data that comes back, and prompts that stay text."""

import base64
import hashlib
import html.parser
import json
import re

import pytest

from models.report.page import read_page, render_page

NASTY = "</script><script>alert(1)</script> <!-- {{data}} & \"'  \udcff 一只狗"


class Elements(html.parser.HTMLParser):
    """The elements of a page as a browser's parser finds them."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.is_open = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.texts.append("")
        self.is_open = True

    def handle_endtag(self, tag):
        self.is_open = False

    def handle_data(self, data):
        if self.is_open:
            self.texts[-1] += data

    def text_of(self, tag: str) -> list[str]:
        pairs = zip(self.found, self.texts, strict=True)
        return [text for (name, _), text in pairs if name == tag]


@pytest.fixture(scope="module")
def page() -> str:
    elements = {"report": {"prompt": NASTY, NASTY: [1.5, None]}, "video-0": "AAA="}
    return render_page(NASTY, elements).decode()


def test_what_is_written_is_read_back(page):
    read = read_page(page)
    assert read == {"report": {"prompt": NASTY, NASTY: [1.5, None]}, "video-0": "AAA="}


def test_no_prompt_becomes_an_element(page):
    parsed = Elements(page)
    tags = [tag for tag, _ in parsed.found]
    assert tags.count("script") == 3  # the report, a video, and the viewer
    assert parsed.found[-1] == ("script", {})
    title = re.search("<title>(.*?)</title>", page)[1]
    assert "<" not in title
    assert html.unescape(title).startswith("</script><script>alert(1)")
    data = parsed.text_of("script")[0]
    assert json.loads(data)["prompt"] == NASTY


def test_only_the_viewer_may_run_and_nothing_is_loaded(page):
    parsed = Elements(page)
    (policy,) = [
        attributes["content"]
        for _, attributes in parsed.found
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    for kind in ("script", "style"):
        text = parsed.text_of(kind)[-1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "http" not in policy
    names = {name for _, attributes in parsed.found for name in attributes}
    assert not names & {"src", "href"}


def test_what_is_no_report_is_refused():
    with pytest.raises(ValueError, match="has no report in it"):
        read_page("<html></html>")


def test_numbers_that_json_cannot_say_are_refused():
    with pytest.raises(ValueError, match="not JSON compliant"):
        render_page("a ball", {"report": {"psnr_db": float("inf")}})
