"""Files that requests name: uploads, and nothing else of the machine."""

import asyncio
import json

import pytest

from models.app.uploads import UploadsOnly, why_foreign


@pytest.fixture
def folder(tmp_path):
    """An upload, a secret beside the folder, and links out of it."""
    uploads = tmp_path / "uploads"
    (uploads / "hash").mkdir(parents=True)
    (uploads / "hash" / "cat.png").write_text("cat")
    (tmp_path / "secret.png").write_text("secret")
    (tmp_path / "uploads-too").mkdir()
    (tmp_path / "uploads-too" / "a.png").write_text("secret")
    (uploads / "out.png").symlink_to(tmp_path / "secret.png")
    return uploads


def body(path, **more):
    image = {"path": path, "meta": {"_type": "gradio.FileData"}, **more}
    return json.dumps({"data": ["a prompt", [image], 4], "fn_index": 0}).encode()


def test_an_upload_is_let_through(folder):
    assert why_foreign(body(str(folder / "hash" / "cat.png")), folder) is None
    assert why_foreign(body(None), folder) is None


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[1, 2]", b"null", b"[" * 9000])
def test_what_names_no_file_is_let_through(folder, text):
    assert why_foreign(text, folder) is None


@pytest.mark.parametrize(
    "path",
    [
        "{0}/secret.png",
        "{0}/uploads/../secret.png",
        "{0}/uploads/hash/../../secret.png",
        "{0}/uploads-too/a.png",  # a name that begins as the folder's
        "{0}/uploads/out.png",
        "{0}/uploads/missing.png",
        "{0}/uploads/hash",
        "{0}/uploads/hash/cat.png\0",
        "hash/cat.png",
        "/etc/hostname",
        "file:///etc/hostname",
        "http://127.0.0.1:1/cat.png",
        "",
        3,
        ["{0}/uploads/hash/cat.png"],
    ],
    ids=str,
)
def test_other_files_are_foreign(folder, path):
    path = path.format(folder.parent) if isinstance(path, str) else path
    assert "no file that was uploaded" in why_foreign(body(path), folder)


def test_escapes_and_depth_hide_nothing(folder):
    hidden = b'{"a": [[{"p\\u0061th": "/etc/hostname"}]]}'
    assert "/etc/hostname" in why_foreign(hidden, folder)
    twice = f'{{"path": "{folder}/hash/cat.png", "path": "/etc/hostname"}}'
    assert "/etc/hostname" in why_foreign(twice.encode(), folder)


def ask(folder, parts, path="queue/join", content_type=b"application/json"):
    """The status of a request whose body comes in parts, and what was read behind."""
    pytest.importorskip("starlette")
    seen, sent = [], []

    async def application(scope, receive, send):
        more = True
        while more:
            message = await receive()
            seen.append(message["body"])
            more = message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})

    left = [
        {"type": "http.request", "body": part, "more_body": index < len(parts) - 1}
        for index, part in enumerate(parts)
    ]

    async def receive():
        return left.pop(0)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": f"/gradio_api/{path}"}
    scope["headers"] = [(b"content-type", content_type)]
    asyncio.run(UploadsOnly(application, folder=folder)(scope, receive, send))
    return sent[0]["status"], b"".join(seen)


def test_a_body_in_parts_is_read_as_one(folder):
    text = body("/etc/hostname")
    assert ask(folder, [text[:40], text[40:]]) == (403, b"")
    # A type that is no JSON hides nothing.
    for kind in (b"text/plain", b"multipart/form-data; boundary=x"):
        assert ask(folder, [text], content_type=kind) == (403, b"")
    text = body(str(folder / "hash" / "cat.png"))
    assert ask(folder, [text[:40], text[40:]]) == (200, text)
    image = b"any bytes " * 300_000  # a part of an upload is not held back
    assert ask(folder, [image], "upload") == (200, image)
