"""The page of a report: one HTML file with its data, which can be read back.

Data stands in script elements that no browser runs. Every "<" in it is escaped, so that
no prompt ends an element, and a policy in the page forbids all scripts but the viewer's
own and everything from the network.
"""

import base64
import hashlib
import html
import json
import re
from importlib import resources
from typing import Any

_SCRIPTS = ("data.js", "players.js", "charts.js", "explorer.js", "viewer.js")
_ELEMENT = re.compile(
    r'<script type="application/json" id="([\w-]+)">(.*?)</script>', re.DOTALL
)
_PLACE = re.compile(r"\{\{(\w+)\}\}")
# In JSON these stand in strings only, and mean the same.
_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def render_page(title: str, elements: dict[str, Any]) -> bytes:
    """Returns the page.

    Args:
      title: Of the browser's window, as text.
      elements: What the viewer reads, by the name of its element; strict JSON.

    Raises:
      ValueError: A number is infinite or NaN, which JSON cannot say.
    """
    script = "\n".join(map(_viewer_file, _SCRIPTS))
    style = _viewer_file("viewer.css")
    data = "\n".join(
        f'<script type="application/json" id="{name}">{_escaped(value)}</script>'
        for name, value in elements.items()
    )
    policy = (
        "default-src 'none'; img-src data: blob:; media-src blob:; "
        f"style-src '{_digest(style)}'; script-src '{_digest(script)}'"
    )
    parts = {
        "policy": policy,
        "title": html.escape(title),
        "style": style,
        "script": script,
        "data": data,
    }
    template = _viewer_file("page.html")
    page = _PLACE.sub(lambda match: parts[match[1]], template)
    return page.encode(errors="backslashreplace")


def read_page(page: str) -> dict[str, Any]:
    """Returns the elements that `render_page` was given.

    Raises:
      ValueError: The page is no report.
    """
    elements = {name: json.loads(text) for name, text in _ELEMENT.findall(page)}
    if "report" not in elements:
        raise ValueError("the page has no report in it; expected one of draft-video")
    return elements


def _escaped(value: Any) -> str:
    text = json.dumps(value, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    for character, escape in _ESCAPES.items():
        text = text.replace(character, escape)
    return text


def _digest(text: str) -> str:
    """Returns what the policy of a page calls a script or style by."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _viewer_file(name: str) -> str:
    return resources.files("models.report").joinpath("viewer", name).read_text("utf-8")
